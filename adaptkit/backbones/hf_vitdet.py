"""transformers' VitDetModel and VitDetBackbone: windowed and global attention on a map, relative positions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from adaptkit.backbones._hf import HfViT, attend
from adaptkit.backbones._maps import no_qkv, on_map, windowed
from adaptkit.backbones._timm import block_list
from adaptkit.core.block import Block
from adaptkit.core.registry import register_family
from adaptkit.core.tree import unwrapped
from adaptkit.ops.grid import map_to_tokens, tokens_to_map


@register_family(
    "transformers.models.vitdet.modeling_vitdet.VitDetModel",
    "transformers.models.vitdet.modeling_vitdet.VitDetBackbone",
)
class HfVitDet(HfViT):
    """Blocks ``x + drop(attn(norm(x)))`` on maps (B, D, h, w), given and taken as tokens; no class token, no last norm.

    Raises ``TypeError`` for one with convolutions after its blocks (``residual_block_indices``): they are no part of
    the equation. Attention does not come apart: its windows are padded and its positions depend on the query.
    """

    family = "hf-vitdet"
    kernel_at = "embeddings.projection.weight"
    layer_norms = ("norm1", "norm2")
    positions = "bicubic, relative ones linear"
    splits = False
    tupled = True

    def __init__(self, backbone: Any) -> None:
        if any(unwrapped(layer).use_residual_block for layer in backbone.encoder.layer):
            raise TypeError(
                f"this {type(backbone).__name__} has convolutions after blocks "
                f"{list(backbone.config.residual_block_indices)}, so that they are not of the form x + attn(norm(x)), "
                "x + mlp(norm(x)); use one with residual_block_indices=[]"
            )
        super().__init__(backbone, prefix=0)

    def embed(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """``backbone.embeddings``, which takes any size."""
        return map_to_tokens(self.body.embeddings(image))

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
        """The backbone's layers, tokens unfolded to this grid."""
        return [_block(layer, grid) for layer in block_list(self.layers())]

    def norm(self, x: Tensor) -> Tensor:
        """The identity."""
        return x

    def reference(self, image: Tensor) -> Tensor:
        """``last_hidden_state``, its map as tokens."""
        said = self._forward(image)
        return map_to_tokens(said) if said.ndim == 4 else said


def _block(outer: Any, grid: tuple[int, int]) -> Block:
    """``outer``: the layer as it runs, maybe compiled or wrapped; its parts are those of what is inside."""
    layer: Any = unwrapped(outer)
    attn = partial(windowed, partial(attend, layer.attention, {}), layer.window_size)
    return Block(
        run=partial(_run, outer, grid),
        norm1=layer.norm1,
        attn=partial(on_map, attn, grid),
        scale1=layer.drop_path,
        norm2=layer.norm2,
        mlp=layer.mlp,
        scale2=layer.drop_path,
        qkv=no_qkv,
        out=no_qkv,
    )


def _run(layer: Any, grid: tuple[int, int], x: Tensor) -> Tensor:
    return map_to_tokens(layer(tokens_to_map(x, grid))[0])
