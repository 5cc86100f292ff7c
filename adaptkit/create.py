"""Build a backbone from its name: timm, transformers, a Hub id, a local folder, or the demo backbone."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaptkit.backbones._hf import HUB_CACHE
from adaptkit.backbones._processor import FILES
from adaptkit.core.near import beside, hint, looks_like_path

__all__ = ["best_device", "create_backbone"]


def create_backbone(
    name: str,
    pretrained: bool = True,
    *,
    classifier: bool = False,
    cls: Any = None,
    in_chans: int = 3,
    **download: Any,
) -> nn.Module:
    """Return a ViT, ready to be given to ``attach``.

    Args:
        name: ``"demo"`` (the small backbone in this package), a timm name (``"vit_small_patch14_dinov2.lvd142m"``;
            ``"dat_tiny"`` and the others of :mod:`adaptkit.models` too, whose weights are in a folder of yours),
            ``"hf-hub:<org>/<repo>"`` (timm weights on the Hub), ``"<org>/<repo>"`` (timm's repositories through timm,
            others through transformers), or a local folder that either library saved.
        pretrained: load the weights; ``False`` builds the architecture with random ones.
        classifier: keep the classifier that comes with timm's weights.
        cls: the transformers class to build, in place of what ``AutoModel`` chooses.
        in_chans: of timm's models; those of pretrained weights are repeated or summed as timm does it. For a frozen
            answer that stays what it was see :func:`adaptkit.expand_channels`.
        download: ``revision``, ``token``, ``cache_dir`` and ``local_files_only`` as transformers takes them. timm knows
            the first, as ``@revision`` behind the name, and ``cache_dir``.

    No code of a repository is run, whatever its config says, and of a pickle only the tensors are read
    (``weights_only=True``, in timm since 1.0.26).

    Raises ``ValueError`` for a name that nothing knows, and for ``in_chans`` of what timm does not build.
    """
    by_timm = partial(_timm, pretrained=pretrained, classifier=classifier, in_chans=in_chans)
    if name == "demo":
        _check_three(name, in_chans)
        from adaptkit.demo import demo_backbone

        return demo_backbone(pretrained)
    is_path = looks_like_path(name)
    if is_path:
        name = str(Path(name).expanduser())
    folder = Path(name)
    if folder.is_dir():
        config = folder / "config.json"
        if not config.is_file():
            raise ValueError(f"{folder} holds no config.json: expected a folder saved by timm or transformers")
        if "architecture" in json.loads(config.read_text()):
            return by_timm(f"local-dir:{folder}", {})
        _check_three(name, in_chans)
        return _transformers(name, pretrained, cls, download)
    if name.startswith(("hf-hub:", "local-dir:")):
        return by_timm(name, download)
    if is_path:
        raise ValueError(f"there is no folder {name}{beside(name)}: the Hub is not asked for what looks like a path")
    if name.startswith("timm/"):
        return by_timm(f"hf-hub:{name}", download)
    if "/" in name:
        _check_three(name, in_chans)
        return _transformers(name, pretrained, cls, download)
    return by_timm(name, download)


def best_device(name: str | None = None) -> torch.device:
    """Return the device of this name; without one the accelerator where there is one, else the CPU.

    Raises ``ValueError`` for a device that this machine does not have.
    """
    if name is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        name = "cpu" if found is None else found.type
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"the device {name!r} is not to be had here: {str(error).splitlines()[0]}") from error
    return device


def _check_three(name: str, in_chans: int) -> None:
    if in_chans != 3:
        raise ValueError(
            f"{name} is not built by timm, which makes kernels for other channels: build it with 3 and give it to "
            f"adaptkit.expand_channels(backbone, {in_chans})"
        )


def _timm(name: str, download: dict[str, Any], pretrained: bool, classifier: bool, in_chans: int) -> nn.Module:
    import timm

    import adaptkit.models  # noqa: F401  registers DAT with timm

    if ":" not in name and not timm.is_model(name.split(".")[0]):
        raise ValueError(
            f"no backbone is named {name!r}{hint(name, ['demo', *timm.list_models()])}: it is no timm model, no local "
            "folder and no Hub id of the form org/repo"
        )
    if pretrained and ":" not in name and name.partition(".")[2] in ("", "untrained"):
        _check_there_are_weights(name)
    # Positions are resampled by the view; DINOv2's 518-pixel default would only make a larger table.
    if download.get("revision") and name.startswith("hf-hub:"):
        name = f"{name}@{download['revision']}"
    options: dict[str, Any] = {} if classifier else {"num_classes": 0}
    if in_chans != 3:
        options["in_chans"] = in_chans
    if download.get("cache_dir"):
        options["cache_dir"] = download["cache_dir"]
    return timm.create_model(name, pretrained=pretrained, **options)


def _check_there_are_weights(name: str) -> None:
    """Raise ``ValueError`` for an architecture without weights that can be had by its name."""
    import timm

    model = name.partition(".")[0]
    if not timm.is_model_pretrained(model):
        raise ValueError(
            f"{name!r} names no weights. pretrained=False (--random-backbone) builds it with random ones; those of a "
            "file go into a folder once, which is then the name: timm.models.save_for_hf(timm.create_model("
            f"{model!r}, pretrained=True, pretrained_cfg_overlay={{'file': 'weights.pth'}}), './{model}')"
        )


def _transformers(name: str, pretrained: bool, cls: Any, download: dict[str, Any]) -> nn.Module:
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError as error:
        raise ImportError(f"{name} is a transformers model: pip install transformers") from error
    if pretrained:
        commit = _commit(name, download)
        options = {**download, "revision": commit, "trust_remote_code": False}
        model: Any = (cls or AutoModel).from_pretrained(name, **options)
    else:
        commit = None
        config = (cls.config_class if cls else AutoConfig).from_pretrained(name, trust_remote_code=False, **download)
        model = cls(config) if cls else AutoModel.from_config(config, trust_remote_code=False)
    model = getattr(model, "vision_model", model)  # the image half of CLIP and SigLIP
    if commit:  # transformers 4 keeps it there, 5 does not keep it
        model.config._commit_hash = commit
    model.config._name_or_path = model.config._name_or_path or name
    if pretrained and not Path(name).is_dir():
        _fetch_processor(name, {**download, "revision": commit})
        if download.get("cache_dir"):
            setattr(model, HUB_CACHE, str(download["cache_dir"]))
    return model


def _fetch_processor(name: str, download: dict[str, Any]) -> None:
    """Bring what the image processor says into the cache, where the view of the model reads it; not all have one."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for file in FILES:
        try:
            hf_hub_download(name, file, **download)
        except (EntryNotFoundError, LocalEntryNotFoundError):  # the repository has none; the cache has none
            continue


def _commit(name: str, download: dict[str, Any]) -> str | None:
    """Return the commit that a revision of a Hub repository is now, so that a file can record it; None for a folder."""
    from huggingface_hub import hf_hub_download

    if Path(name).is_dir():
        return None
    return Path(hf_hub_download(name, "config.json", **download)).parent.name
