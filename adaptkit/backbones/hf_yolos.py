"""transformers' YolosModel: a ViT with detection tokens, which the view counts among the prefix tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adaptkit.backbones._hf import HfViT
from adaptkit.backbones._hf_bert import attention_parts, ffn
from adaptkit.backbones._timm import block_list
from adaptkit.core.block import Block, identity
from adaptkit.core.registry import register_family
from adaptkit.core.tree import unwrapped


@register_family("transformers.models.yolos.modeling_yolos.YolosModel")
class HfYolos(HfViT):
    """Blocks ``attn(norm(x)) + x``, positions anew after each but the last; all resampled bicubic without antialias.

    The model keeps class token, patches, detection tokens; the view class token, detection tokens, patches. Each block
    runs in the backbone's order, so that sums are taken as there.
    """

    family = "hf-yolos"
    positions = "bicubic"
    prefix_optional = False  # there are positions for the detection tokens too

    def __init__(self, backbone: Any) -> None:
        super().__init__(backbone, 1 + backbone.config.num_detection_tokens)

    def embed(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """``backbone.embeddings``, which takes any size."""
        return _seen(self.body.embeddings(image), self.spec.num_prefix_tokens)

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
        """The backbone's layers, each with the positions that are added after it."""
        encoder: Any = self.body.encoder
        layers = block_list(self.layers())
        after = [None] * len(layers)
        if encoder.interpolation is not None:
            after = [*encoder.interpolation(tuple(image.shape[-2:])), None]
        return [_block(layer, self.spec.num_prefix_tokens, added) for layer, added in zip(layers, after)]

    def reference(self, image: Tensor) -> Tensor:
        """``last_hidden_state``, in the view's order."""
        return _seen(self._forward(image), self.spec.num_prefix_tokens)


def _seen(x: Tensor, prefix: int) -> Tensor:
    """Class token, patches, detection tokens -> class token, detection tokens, patches."""
    return torch.cat([x[:, :1], x[:, x.shape[1] - prefix + 1 :], x[:, 1 : x.shape[1] - prefix + 1]], dim=1)


def _kept(x: Tensor, prefix: int) -> Tensor:
    """The other way round."""
    return torch.cat([x[:, :1], x[:, prefix:], x[:, 1:prefix]], dim=1)


def _block(outer: Any, prefix: int, added: Tensor | None) -> Block:
    """``outer``: the layer as it runs, maybe compiled or wrapped; its parts are those of what is inside."""
    layer: Any = unwrapped(outer)
    mlp, mlp_layers = ffn(layer)
    return Block(
        run=partial(_run, outer, prefix, added),
        norm1=layer.layernorm_before,
        attn=layer.attention,
        scale1=identity,
        norm2=layer.layernorm_after,
        mlp=mlp,
        mlp_layers=mlp_layers,
        scale2=identity if added is None else partial(torch.add, _seen(added, prefix)),
        scale=layer.attention.attention.scaling,
        **attention_parts(layer.attention),
    )


def _run(layer: Any, prefix: int, added: Tensor | None, x: Tensor) -> Tensor:
    x = layer(_kept(x, prefix))
    return _seen(x if added is None else x + added, prefix)
