"""The authors' ViT-Adapter checkpoints."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.adapters.vit_adapter import ViTAdapterConfig, even_groups
from adaptkit.core import registry
from adaptkit.core.registry import view
from adaptkit.core.view import Spec
from adaptkit.interop.loading import REMEDY, Checkpoint, filled, timm_vit
from adaptkit.model.adapted import AdaptedModel
from adaptkit.model.saved import check_tensors

# The adapter's keys, anchored: `norm1.` at the top is the pyramid's, `blocks.0.norm1.` is the ViT's.
_ADAPTER_KEY = re.compile(r"(level_embed$|spm\.|interactions\.\d+\.|up\.|norm[1-4]\.)")


def vit_adapter(
    state_dict: dict[str, Tensor], backbone: nn.Module, load_backbone: bool, options: dict[str, Any]
) -> AdaptedModel:
    """Attach the authors' ViT-Adapter; see :func:`adaptkit.interop.from_official`."""
    if any(k.startswith("backbone.") for k in state_dict):
        state_dict = {k[len("backbone.") :]: v for k, v in state_dict.items() if k.startswith("backbone.")}
    own = Checkpoint({_our_key(k): v for k, v in state_dict.items() if _ADAPTER_KEY.match(k)})
    if "level_embed" not in own:
        raise ValueError("the state dict has no 'level_embed', so it is no ViT-Adapter checkpoint")
    vit = view(backbone)
    dim = own["level_embed"].shape[1]
    if dim != vit.spec.embed_dim:
        raise ValueError(
            f"the checkpoint has dim={dim}, the backbone dim={vit.spec.embed_dim}; give a ViT of that width"
        )
    if "add_vit_feature" not in options:
        raise ValueError(
            "add_vit_feature is not in the tensors: pass add_vit_feature='last' (the authors' detection models), "
            "'per-stage' (their segmentation models) or None"
        )
    load = partial(_load_vit, state_dict, backbone) if load_backbone else None
    return filled(backbone, _vit_adapter_config(own, vit.spec, options), own, load=load)


def _our_key(key: str) -> str:
    return key.replace(".ffn.dwconv.dwconv.", ".ffn.dwconv.")


def _vit_adapter_config(own: dict[str, Tensor], spec: Spec, options: dict[str, Any]) -> ViTAdapterConfig:
    """Read the config off the tensors' shapes; ``options`` adds the rest and must not contradict them."""
    groups = 1 + max((int(k.split(".")[1]) for k in own if k.startswith("interactions.")), default=-1)
    if not groups:
        raise ValueError(f"the official checkpoint has no 'interactions.*': {REMEDY}")
    last = f"interactions.{groups - 1}."
    width = own[last + "extractor.attn.value_proj.weight"].shape[0]
    samples = own[last + "extractor.attn.attention_weights.weight"].shape[0]  # heads * points
    hidden = own.get(last + "extractor.ffn.fc1.weight")
    points = options.get("n_points") or (samples // options["deform_num_heads"] if "deform_num_heads" in options else 4)
    if samples % points:
        raise ValueError(
            f"the checkpoint has {samples} sampling points over all heads, which {points} per head do not divide: "
            "pass deform_num_heads= or n_points="
        )
    told = {
        "injector": any(".injector." in key for key in own),
        "conv_inplane": own["spm.stem.0.weight"].shape[0],
        "n_points": points,
        "deform_num_heads": samples // points,
        "deform_ratio": width / spec.embed_dim,
        "with_cffn": hidden is not None,
        "extra_extractors": len({k.split(".")[3] for k in own if k.startswith(last + "extra_extractors.")}),
    }
    if hidden is not None:
        told["cffn_ratio"] = hidden.shape[0] / spec.embed_dim
    if "interaction_indexes" not in options:
        if spec.depth % groups:
            raise ValueError(
                f"the checkpoint has {groups} interactions for {spec.depth} blocks, and where they sit is not in its "
                "tensors: pass interaction_indexes=[(first, last), ...], inclusive"
            )
        told["interaction_indexes"] = even_groups(spec.depth, groups)
    asked = registry.adapters()["vit-adapter"].configure({"prefix": "drop", **options})
    for name, value in told.items():
        given = getattr(asked, name)
        same = (
            int(given * spec.embed_dim) == int(value * spec.embed_dim)
            if name.endswith("_ratio") and given
            else given == value
        )
        if name in options and not same:
            raise ValueError(f"{name}={options[name]!r}, but the checkpoint's tensors say {value!r}; leave it out")
    return replace(asked, **told)


def _load_vit(state_dict: dict[str, Tensor], backbone: nn.Module) -> None:
    """Load the authors' plain ViT (fused qkv, gamma1/gamma2) into a timm VisionTransformer."""
    vit = timm_vit(backbone)
    own = {
        re.sub(r"\.gamma([12])$", r".ls\1.gamma", k): v
        for k, v in state_dict.items()
        if k.startswith(("patch_embed.", "blocks."))
    }
    target = vit.state_dict()
    for key in [k for k in own if k.endswith("gamma") and k not in target]:
        if not torch.equal(own[key], torch.ones_like(own[key])):
            raise ValueError(
                f"the checkpoint has a layer scale ({key}), the backbone has none: build it with init_values=1.0"
            )
        del own[key]
    if "pos_embed" in state_dict:
        own["pos_embed"] = resampled_positions(state_dict["pos_embed"], vit)
    needed = {k: v for k, v in target.items() if k.startswith(("patch_embed.", "blocks.", "pos_embed"))}
    check_tensors(needed, own, "the ViT part of the official checkpoint", REMEDY)
    vit.load_state_dict(own, strict=False)


def resampled_positions(pos_embed: Tensor, vit: Any) -> Tensor:
    """(1, 1 + n*n, D) -> the vit's own table, resampled as the authors do: bicubic, without antialias."""
    side = math.isqrt(pos_embed.shape[1] - 1)
    if side * side != pos_embed.shape[1] - 1:
        raise ValueError(f"pos_embed has {pos_embed.shape[1]} entries, which is no class position and a square grid")
    table = pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = tuple(vit.patch_embed.grid_size)
    if grid != (side, side):
        table = F.interpolate(table, size=grid, mode="bicubic", align_corners=False)
    prefix = pos_embed[:, :1] if vit.pos_embed.shape[1] == grid[0] * grid[1] + 1 else pos_embed[:, :0]
    return torch.cat([prefix, table.flatten(2).transpose(1, 2)], dim=1)
