"""transformers' Data2VecVisionModel: BEiT's blocks, with a relative position bias per layer or one for all."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from adaptkit.backbones._hf import HfViT, attend
from adaptkit.backbones._hf_bert import attention_parts, ffn
from adaptkit.backbones._timm import block_list, joined, layer_scale
from adaptkit.core.block import Block
from adaptkit.core.registry import register_family
from adaptkit.core.tree import unwrapped


@register_family("transformers.models.data2vec.modeling_data2vec_vision.Data2VecVisionModel")
class HfData2VecVision(HfViT):
    """Blocks ``x + lambda * attn(norm(x))`` with a bias on the logits by where two patches lie to each other."""

    family = "hf-data2vec"
    positions = "relative bias, bilinear; absolute ones bicubic"
    tupled = True
    prefix_optional = False  # the bias has a row for the class token

    def embed(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """``backbone.embeddings``, which takes any size."""
        return self.body.embeddings(image)[0]

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
        """The backbone's layers, given the shared bias and the size of the image."""
        encoder: Any = self.body.encoder
        shared = encoder.relative_position_bias(grid) if encoder.has_relative_position_bias else None
        return [_block(layer, shared, grid, tuple(image.shape[-2:])) for layer in block_list(self.layers())]


def _block(outer: Any, shared: Tensor | None, grid: tuple[int, int], resolution: tuple[int, ...]) -> Block:
    """``outer``: the layer as it runs, maybe compiled or wrapped; its parts are those of what is inside."""
    layer: Any = unwrapped(outer)
    inner: Any = unwrapped(layer.attention.attention)
    bias = shared
    if inner.has_relative_position_bias:
        bias = inner.relative_position_bias(grid)
        bias = bias if shared is None else bias + shared
    given = {"relative_position_bias": shared, "resolution": resolution}
    mlp, mlp_layers = ffn(layer)
    return Block(
        run=partial(attend, outer, given),
        norm1=layer.layernorm_before,
        attn=partial(attend, layer.attention, given),
        scale1=joined(layer_scale(layer.lambda_1), layer.drop_path),
        norm2=layer.layernorm_after,
        mlp=mlp,
        mlp_layers=mlp_layers,
        scale2=joined(layer_scale(layer.lambda_2), layer.drop_path),
        bias=bias,
        **attention_parts(layer.attention),
    )
