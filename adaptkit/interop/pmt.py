"""The authors' plain mask decoders (PMT, arXiv 2603.25398)."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from adaptkit.core import registry
from adaptkit.core.layers import indices
from adaptkit.core.registry import view
from adaptkit.core.view import Spec, ViT
from adaptkit.heads.plain_mask import PlainMaskHeadConfig, even_layers
from adaptkit.heads.plain_mask.config import LEVELS
from adaptkit.interop.loading import REMEDY, Checkpoint, filled
from adaptkit.model.adapted import AdaptedModel

# What their files hold beside the decoder and the norms of its levels, and what older ones had.
_ASIDE = re.compile(
    r"(encoder|criterion|metrics?)\.|_attn_mask_probs_fallback$|decoder\.(attn_mask_probs$|pe\.)|bn_(prefix|patch)\."
)
#: What the backbone says, by the names of the authors' constructors and of their configs.
_OF_BACKBONE = {
    "dim": "embed_dim", "embed_dim": "embed_dim", "patch": "patch_size", "patch_size": "patch_size",
    "num_prefix_tokens": "num_prefix_tokens", "depth": "depth",
}  # fmt: skip


def pmt(
    state_dict: dict[str, Tensor], backbone: nn.Module, load_backbone: bool, options: dict[str, Any]
) -> AdaptedModel:
    """Attach the authors' plain mask decoder; see :func:`adaptkit.interop.from_official`."""
    if load_backbone:
        raise ValueError(
            "load_backbone=True: the authors' decoders are published without their encoder, a DINOv3 or DINOv2 as it "
            "was released; load its weights into the backbone yourself"
        )
    own = Checkpoint(_unfused(_decoder(state_dict)))
    if "q.weight" not in own or "class_head.weight" not in own:
        raise ValueError("the state dict has no 'decoder.q.weight' and 'decoder.class_head.weight', so it is no PMT")
    vit = view(backbone)
    if not isinstance(vit, ViT):
        raise TypeError(f"a plain mask decoder reads a plain ViT, and {type(backbone).__name__} has stages")
    dim = own.shape("q.weight", 2)[1]
    if dim != vit.spec.embed_dim:
        raise ValueError(
            f"the checkpoint has dim={dim}, the backbone dim={vit.spec.embed_dim}; give a ViT of that width"
        )
    config = _config(own, vit.spec, dict(options))
    for key, probabilities in state_dict.items():
        if key.endswith("attn_mask_probs") and tuple(probabilities.shape) != (config.num_blocks,):
            raise ValueError(
                f"{key} has shape {tuple(probabilities.shape)}, and there are tensors of {config.num_blocks}: {REMEDY}"
            )
    return filled(backbone, None, {}, config, own)


def _decoder(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys of the decoder and of the norms of its levels, as our head has them."""
    own = {}
    for key, tensor in state_dict.items():
        key = key.replace("._orig_mod", "").removeprefix("_orig_mod.").removeprefix("network.")
        if not _ASIDE.match(key):
            own[key.removeprefix("decoder.")] = tensor
    linear = re.compile(r"(lateral_projections\.\d+)\.0\.(weight|bias)$")  # alone in a sequence
    mlp = any(re.match(r"lateral_projections\.\d+\.2\.", key) for key in own)
    return own if mlp else {linear.sub(r"\1.\2", key): tensor for key, tensor in own.items()}


def _unfused(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Attention whose three layers were made one, apart again; ``ValueError`` where its keys have a bias."""
    apart = {}
    for key, tensor in own.items():
        name, fused, kind = key.partition(".qkv_proj.")
        if not fused:
            apart[key] = tensor
            continue
        for letter, part in zip("qkv", tensor.chunk(3)):
            if (letter, kind) != ("k", "bias"):
                apart[f"{name}.{letter}_proj.{kind}"] = part
            elif part.any():
                raise ValueError(f"{key}: the keys have a bias, and those of PMT have none; give an unfused checkpoint")
    return apart


def _config(own: Checkpoint, spec: Spec, options: dict[str, Any]) -> PlainMaskHeadConfig:
    """Read the config off the tensors' shapes; ``options`` adds the rest and must not contradict them."""
    for name in [name for name in options if name in _OF_BACKBONE]:
        given, there = options.pop(name), getattr(spec, _OF_BACKBONE[name])
        if given != there:
            raise ValueError(f"{name}={given!r}, and the backbone has {there}; give the ViT of the checkpoint")
    options.pop("grid", None)  # comes with each image
    if "heads" in options:
        options.setdefault("num_heads", options.pop("heads"))
    told = _told(own)
    levels = told.pop("levels")
    if options.get("interaction_indices") is None:
        if levels != LEVELS or spec.depth % LEVELS:
            raise ValueError(
                f"the checkpoint reads {levels} layers of the {spec.depth} of this backbone, and which ones is not in "
                "its tensors: pass interaction_indices=[...], from 0 on"
            )
        options["interaction_indices"] = even_layers(spec.depth)
    options["interaction_indices"] = indices("interaction_indices", options["interaction_indices"])
    if len(options["interaction_indices"]) != levels:
        raise ValueError(
            f"interaction_indices={list(options['interaction_indices'])}, but the checkpoint's tensors say {levels} "
            "layers"
        )
    for name, value in told.items():
        if options.get(name) is not None and options[name] != value:
            raise ValueError(f"{name}={options[name]!r}, but the checkpoint's tensors say {value!r}; leave it out")
    return registry.heads()["plain-mask"].configure({**options, **told})


def _told(own: Checkpoint) -> dict[str, Any]:
    """What the shapes say."""
    if not own.count("upscale"):
        raise ValueError(f"the official checkpoint has no 'upscale.*', and masks are doubled once or more: {REMEDY}")
    kinds = {key.partition(".")[2].partition(".")[2] for key in own if key.startswith("lateral_projections.")}
    return {
        "levels": own.count("scalers"),
        "num_classes": own.shape("class_head.weight", 2)[0] - 1,
        "num_q": own.shape("q.weight", 2)[0],
        "num_blocks": own.count("blocks"),
        "hidden_dim": own.shape("blocks.0.mlp.up_proj.weight", 2)[0] if own.count("blocks") else None,
        "lateral_projection": "mlp" if "2.weight" in kinds else "linear" if "weight" in kinds else "identity",
        "lateral_bn": own.count("bn") > 0,
        "upscale": own.count("upscale"),
    }
