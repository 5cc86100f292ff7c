"""Build a backbone from its name: timm, transformers, a Hub id, a local folder, or the demo backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

__all__ = ["create_backbone"]


def create_backbone(name: str, pretrained: bool = True) -> nn.Module:
    """Return a ViT, ready to be given to ``attach``.

    Args:
        name: ``"demo"`` (the small backbone in this package), a timm name (``"vit_small_patch14_dinov2.lvd142m"``;
            ``"dat_tiny"`` and the others of :mod:`adaptkit.models` too),
            ``"hf-hub:<org>/<repo>"`` (timm weights on the Hub), ``"<org>/<repo>"`` (timm's repositories through timm,
            others through transformers), or a local folder that either library saved.
        pretrained: load the weights; ``False`` builds the architecture with random ones.

    Raises ``ValueError`` for a name that nothing knows.
    """
    if name == "demo":
        from adaptkit.demo import demo_backbone

        return demo_backbone(pretrained)
    folder = Path(name)
    if folder.is_dir():
        config = folder / "config.json"
        if not config.is_file():
            raise ValueError(f"{folder} holds no config.json: expected a folder saved by timm or transformers")
        if "architecture" in json.loads(config.read_text()):
            return _timm(f"local-dir:{folder}", pretrained)
        return _transformers(name, pretrained)
    if name.startswith(("hf-hub:", "local-dir:")):
        return _timm(name, pretrained)
    if name.startswith("timm/"):
        return _timm(f"hf-hub:{name}", pretrained)
    if "/" in name:
        return _transformers(name, pretrained)
    return _timm(name, pretrained)


def _timm(name: str, pretrained: bool) -> nn.Module:
    import timm

    import adaptkit.models  # noqa: F401  registers DAT with timm

    if ":" not in name and not timm.is_model(name.split(".")[0]):
        close = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise ValueError(
            f"no backbone is named {name!r}: it is no timm model (near: {', '.join(close) or 'none'}), no local "
            "folder and no Hub id of the form org/repo"
        )
    # Positions are resampled by the view; DINOv2's 518-pixel default would only make a larger table.
    return timm.create_model(name, pretrained=pretrained, num_classes=0)


def _transformers(name: str, pretrained: bool) -> nn.Module:
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError as error:
        raise ImportError(f"{name} is a transformers model: pip install transformers") from error
    if pretrained:
        model: Any = AutoModel.from_pretrained(name)
    else:
        model = AutoModel.from_config(AutoConfig.from_pretrained(name))
    return getattr(model, "vision_model", model)  # the image half of CLIP and SigLIP
