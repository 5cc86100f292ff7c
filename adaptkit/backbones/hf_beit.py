"""transformers' BeitModel, with a relative position bias per layer or one for all."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from adaptkit.backbones._hf import HfViT, attention_parts, mlp_layers
from adaptkit.backbones._timm import block_list, joined, layer_scale
from adaptkit.core.block import Block
from adaptkit.core.registry import register_family
from adaptkit.core.tree import unwrapped


@register_family("transformers.models.beit.modeling_beit.BeitModel")
class HfBeit(HfViT):
    """Blocks ``x + lambda * attn(norm(x))`` with a bias on the logits by where two patches lie to each other."""

    family = "hf-beit"
    layers_at = "layers"
    positions = "relative bias, bilinear; absolute ones bicubic"
    prefix_optional = False  # the bias has a row for the class token

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
        """The backbone's layers, given the shared bias and the size of the image."""
        backbone: Any = self.body
        shared = None if backbone.shared_position_bias is None else backbone.shared_position_bias(grid)
        return [_block(layer, shared, grid, tuple(image.shape[-2:])) for layer in block_list(self.layers())]


def _block(outer: Any, shared: Tensor | None, grid: tuple[int, int], resolution: tuple[int, ...]) -> Block:
    """``outer``: the layer as it runs, maybe compiled or wrapped; its parts are those of what is inside."""
    layer: Any = unwrapped(outer)
    bias = shared
    if layer.relative_position_bias is not None:
        bias = layer.relative_position_bias(grid)
        bias = bias if shared is None else bias + shared
    return Block(
        run=partial(outer, attention_mask=shared, resolution=resolution),
        norm1=layer.layernorm_before,
        scale1=joined(layer.dropout, _scale(layer.lambda_1), layer.drop_path),
        norm2=layer.layernorm_after,
        mlp=layer.mlp,
        mlp_layers=partial(mlp_layers, layer.mlp),
        scale2=joined(layer.dropout, _scale(layer.lambda_2), layer.drop_path),
        bias=bias,
        **attention_parts(layer.attention, "o_proj", "scaling", attention_mask=bias),
    )


def _scale(value: Tensor | float) -> Any:
    """LayerScale; transformers keeps the number 1 where there is none."""
    return layer_scale(value if isinstance(value, Tensor) else None)
