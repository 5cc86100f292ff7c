"""transformers' Swinv2Model: four stages of shifted windows, cosine attention, norms after (Liu et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from adaptkit.backbones._hf import headed, hf_source
from adaptkit.backbones._maps import no_qkv, on_map
from adaptkit.backbones._timm import block_list, joined
from adaptkit.backbones._windows import shifted_windows
from adaptkit.backbones.hf_swin import HfSwinLike, check_last_stage, pooled
from adaptkit.core.block import Block, identity
from adaptkit.core.registry import register_family
from adaptkit.core.tree import unwrapped
from adaptkit.ops.grid import map_to_tokens

Grid = tuple[int, int]


@register_family("transformers.models.swinv2.modeling_swinv2.Swinv2Model")
class HfSwinv2(HfSwinLike):
    """Blocks ``x + norm(attn(x))``; windows and shifts stay those of the size that it was built for."""

    def __init__(self, backbone: Any) -> None:
        super().__init__(backbone, "hf-swinv2")

    def blocks(self, stage: int, grid: Grid) -> Sequence[Block]:
        """The backbone's layers, given the grid."""
        return [_block(outer, grid) for outer in block_list(self.body.encoder.layers[stage].blocks)]


def _block(outer: Any, grid: Grid) -> Block:
    """``outer``: the layer as it runs, maybe compiled or wrapped; its parts are those of what is inside."""
    layer: Any = unwrapped(outer)
    attn = partial(shifted_windows, partial(_attend, layer.attention), layer.window_size, layer.shift_size)
    return Block(
        run=partial(_run, outer, grid),
        norm1=identity,
        attn=partial(on_map, attn, grid),
        scale1=joined(layer.layernorm_before, layer.drop_path),
        norm2=identity,
        mlp=joined(layer.intermediate, layer.output),
        scale2=joined(layer.layernorm_after, layer.drop_path),
        qkv=no_qkv,
        out=no_qkv,
    )


def _run(layer: Any, grid: Grid, x: Tensor) -> Tensor:
    return layer(x, grid)[0]


def _attend(attn: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    return attn(x, mask)[0]


class HfSwinv2Backbone(HfSwinv2):
    """The Backbone class, which has no last norm."""

    def norm(self, x: Tensor) -> Tensor:
        """The identity."""
        return x

    def reference(self, image: Tensor) -> Tensor:
        """The last of ``feature_maps``, as tokens."""
        self._forget_hooks()
        return map_to_tokens(self.backbone(image).feature_maps[-1])


@register_family("transformers.models.swinv2.modeling_swinv2.Swinv2ForImageClassification")  # type: ignore[type-var]
def swinv2_classifier(model: Any) -> HfSwinv2:
    """See the base model inside, and keep the classifier."""
    return headed(HfSwinv2(model.swinv2), model, "swinv2", partial(pooled, "swinv2"))


@register_family("transformers.models.swinv2.modeling_swinv2.Swinv2Backbone")  # type: ignore[type-var]
def swinv2_backbone(model: Any) -> HfSwinv2Backbone:
    """See it as a base model without a last norm. ``TypeError`` where the last stage is not returned."""
    check_last_stage(model)
    seen = HfSwinv2Backbone(model)
    seen.origin = hf_source(model, seen.spec.channels)
    return seen
