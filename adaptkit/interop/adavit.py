"""The authors' AdaViT checkpoints: gates on every block's own input, on a DeiT with separate q, k and v."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.core import registry
from adaptkit.core.registry import view
from adaptkit.core.view import Spec
from adaptkit.interop.loading import REMEDY, filled, timm_vit
from adaptkit.interop.vit_adapter import resampled_positions
from adaptkit.losses import KINDS
from adaptkit.model.adapted import AdaptedModel
from adaptkit.model.saved import check_tensors

_GATE = re.compile(r"blocks\.(\d+)\.(?:attn\.token_select|(head|layer)_select)\.mlp_head\.(weight|bias)$")
OFFICIAL = {"patch_threshold": 0.6, "head_threshold": 0.5, "layer_threshold": 0.5, "temperature": 1.0}


def adavit(
    state_dict: dict[str, Tensor], backbone: nn.Module, load_backbone: bool, options: dict[str, Any]
) -> AdaptedModel:
    """Attach the authors' gates; see :func:`adaptkit.interop.from_official`.

    Their FFN may also be masked by heads (``fc1`` columns), which deletes channels of a backbone that was not trained
    for it; that is not done here.
    """
    state_dict = {k.removeprefix("module."): v for k, v in state_dict.items()}
    own, first = _gates(state_dict)
    spec = view(backbone).spec
    _check_fits(own, spec)
    if "head" in first and "head_mode" not in options:
        raise ValueError(
            "head_mode is not in the tensors: pass head_mode='full' (an off head is removed, --ada-head) or 'partial' "
            "(it passes its own values, --ada-head-attn)"
        )
    told: dict[str, Any] = {"gates": tuple(kind for kind in KINDS if kind in first)}
    others = {first[kind] for kind in ("head", "layer") if kind in first}
    if len(others) > 1:
        raise ValueError(f"head and layer gates start at blocks {sorted(others)}; one start for both is known")
    told["first_block"] = others.pop() if others else first["patch"]
    told["first_patch_block"] = first.get("patch")
    given = {k: v for k, v in options.items() if k in told and told[k] != (tuple(v) if k == "gates" else v)}
    if given:
        name, value = next(iter(given.items()))
        raise ValueError(f"{name}={value!r}, but the checkpoint's tensors say {told[name]!r}; leave it out")
    config = registry.adapters()["adavit"].configure({**OFFICIAL, **options, **told})
    load = partial(_load_deit, state_dict, backbone) if load_backbone else None
    return filled(backbone, config, own, only="gates.", load=load)  # a bottleneck is ours alone and starts at zero


def _gates(state_dict: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return the gates by our keys, and the first block of each kind."""
    own: dict[str, Tensor] = {}
    first: dict[str, int] = {}
    for key, tensor in state_dict.items():
        match = _GATE.match(key)
        if match:
            index, kind = int(match[1]), match[2] or "patch"
            own[f"gates.{index}.{kind}.{match[3]}"] = tensor
            first[kind] = min(index, first.get(kind, index))
    if not own:
        raise ValueError(
            "the state dict has no 'blocks.*.attn.token_select', 'head_select' or 'layer_select', so it is no AdaViT "
            "checkpoint"
        )
    return own, first


def _check_fits(own: dict[str, Tensor], spec: Spec) -> None:
    depth = 1 + max(int(k.split(".")[1]) for k in own)
    dim = next(v.shape[1] for k, v in own.items() if k.endswith("weight"))
    heads = next((v.shape[0] for k, v in own.items() if k.endswith("head.weight")), spec.num_heads)
    for name, theirs, here in (
        ("dim", dim, spec.embed_dim),
        ("depth", depth, spec.depth),
        ("heads", heads, spec.num_heads),
    ):
        if theirs != here:
            raise ValueError(
                f"the checkpoint has {name}={theirs}, the backbone {name}={here}; give a ViT with {name}={theirs}"
            )


def _load_deit(state_dict: dict[str, Tensor], backbone: nn.Module) -> None:
    """Load the authors' DeiT (query, key, value apart) into a timm VisionTransformer (fused)."""
    vit = timm_vit(backbone)
    target = vit.state_dict()
    own = {}
    for key in target:
        apart = [key.replace(".qkv.", f".{part}.") for part in ("query", "key", "value")]
        if key in state_dict:
            own[key] = state_dict[key]
        elif all(name in state_dict for name in apart):
            own[key] = torch.cat([state_dict[name] for name in apart])
    if "pos_embed" in own:
        own["pos_embed"] = resampled_positions(own["pos_embed"], vit)
    check_tensors(target, own, "the DeiT part of the official checkpoint", REMEDY)
    vit.load_state_dict(own)
