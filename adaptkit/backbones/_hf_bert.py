"""Layers of transformers written as in BERT: ``attention.attention`` and ``attention.output``, ``intermediate`` and
``output``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from adaptkit.backbones._hf import three_by_head
from adaptkit.backbones._timm import is_bare, joined, merge_heads, two_layers
from adaptkit.core.block import MLPLayers, Projections
from adaptkit.core.tree import unwrapped

__all__ = ["attention_parts", "ffn"]


def attention_parts(attention: Any) -> dict[str, Any]:
    """``qkv``, ``out`` and ``projections`` of a Block; ``attention`` holds the attention itself and its ``output``."""
    inner, output = unwrapped(attention.attention), attention.output
    return {
        "qkv": partial(_qkv, inner),
        "out": joined(partial(merge_heads, output.dense), output.dropout),
        "projections": partial(_projections, attention.attention, output.dense),
    }


def ffn(layer: Any) -> tuple[Callable[[Tensor], Tensor], Callable[[], MLPLayers | None]]:
    """``mlp`` and ``mlp_layers`` of a Block."""
    return joined(layer.intermediate, layer.output.dense, layer.output.dropout), partial(_mlp_layers, layer)


def _qkv(attn: Any, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, P+N, D) -> three of (B, heads, P+N, E)."""
    parts = (attn.query, attn.key, attn.value)
    q, k, v = (part(h).unflatten(2, (attn.num_attention_heads, -1)).transpose(1, 2) for part in parts)
    return q, k, v


def _projections(outer: Any, proj: Any) -> Projections | None:
    """Return the weights by head; None where a layer is no plain linear one, LoRA for instance."""
    attn: Any = unwrapped(outer)
    if not is_bare(outer, type(attn)):
        return None
    return three_by_head((attn.query, attn.key, attn.value), proj, attn.attention_head_size)


def _mlp_layers(layer: Any) -> MLPLayers | None:
    inner, output = layer.intermediate, layer.output
    whole = is_bare(inner, type(unwrapped(inner))) and is_bare(output, type(unwrapped(output)))
    return two_layers(inner.dense, inner.intermediate_act_fn, output.dense) if whole else None
