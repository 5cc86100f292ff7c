"""transformers' PoolFormerModel: four stages of maps, pooling in place of attention (Yu et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adaptkit.backbones._hf import headed
from adaptkit.backbones._hf_hierarchical import HfHierarchical
from adaptkit.backbones._maps import as_map, as_tokens, on_nchw
from adaptkit.backbones._timm import block_list, joined, square_side
from adaptkit.core.block import Block, Fn
from adaptkit.core.hierarchical import HierarchicalSpec
from adaptkit.core.registry import register_family
from adaptkit.core.tree import unwrapped
from adaptkit.ops.grid import map_to_tokens

Grid = tuple[int, int]


@register_family("transformers.models.poolformer.modeling_poolformer.PoolFormerModel")
class HfPoolFormer(HfHierarchical):
    """Blocks ``x + scale(pool(norm(x)))`` on maps. Convolutions take the place of positions: any size is native."""

    tupled = True

    def __init__(self, backbone: Any) -> None:
        config: Any = backbone.config
        strides = [square_side(embed.projection.stride) for embed in backbone.encoder.patch_embeddings]
        strides = [math.prod(strides[: i + 1]) for i in range(len(strides))]
        channels = int(backbone.encoder.patch_embeddings[0].projection.weight.shape[1])
        sizes = tuple(config.hidden_sizes), tuple(config.depths), tuple(strides)
        super().__init__(backbone, HierarchicalSpec("hf-poolformer", *sizes, channels))

    def embed(self, image: Tensor) -> tuple[Tensor, Grid]:
        """The first of ``encoder.patch_embeddings``."""
        return as_tokens(self.body.encoder.patch_embeddings[0](image))

    def enter(self, stage: int, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """The stage's patch embedding, a strided convolution; the identity in the first stage."""
        return as_tokens(self.body.encoder.patch_embeddings[stage](as_map(x, grid))) if stage else (x, grid)

    def blocks(self, stage: int, grid: Grid) -> Sequence[Block]:
        """The backbone's layers, given maps of this grid."""
        return [_block(outer, grid) for outer in block_list(self.body.encoder.block[stage])]

    def norm(self, x: Tensor) -> Tensor:
        """The identity: the base model has no last norm, and the classifier's is over the whole map."""
        return x

    def classify(self, x: Tensor, grid: Grid) -> Tensor | None:
        """As the class with a classifier does it; None for a base model."""
        return None if self.head is None else self.head(self.backbone, as_map(x, grid))

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        """Patch kernel, first and last norms."""
        encoder: Any = self.body.encoder
        first, last = unwrapped(encoder.block[0][0]), unwrapped(encoder.block[-1][-1])
        patch = encoder.patch_embeddings[0].projection.weight
        return {"patch": patch, "first": first.before_norm.weight, "last": last.after_norm.weight}

    def sizes(self) -> Sequence[tuple[int, int]]:
        """Any."""
        return [(2 * self.spec.patch_size, 3 * self.spec.patch_size)]

    def reference(self, image: Tensor) -> Tensor:
        """``last_hidden_state``, its map as tokens."""
        return map_to_tokens(self.body(image).last_hidden_state)

    def answers(self, tokens: Tensor) -> Sequence[Tensor]:
        """The logits, where there is a classifier."""
        logits = self.classify(tokens, (2, 3))
        return () if logits is None else (logits,)


def _block(outer: Any, grid: Grid) -> Block:
    """``outer``: the layer as it runs, maybe compiled or wrapped; its parts are those of what is inside."""
    layer: Any = unwrapped(outer)
    scales: tuple[Any, ...] = ()
    if layer.use_layer_scale:
        scales = tuple(partial(torch.mul, gamma[:, None, None]) for gamma in (layer.layer_scale_1, layer.layer_scale_2))
    scale1, scale2 = (joined(*scales[i : i + 1], layer.drop_path) for i in (0, 1))
    parts: dict[str, Fn] = {
        "run": partial(_first, outer), "norm1": layer.before_norm, "attn": layer.pooling, "scale1": scale1,
        "norm2": layer.after_norm, "mlp": layer.output, "scale2": scale2,
    }  # fmt: skip
    given: dict[str, Any] = {name: partial(on_nchw, f, grid) for name, f in parts.items()}
    return Block(**given, qkv=_no_qkv, out=_no_qkv)


def _first(layer: Any, x: Tensor) -> Tensor:
    return layer(x)[0]


def _no_qkv(x: Tensor) -> Any:
    raise TypeError("a PoolFormer pools in place of attention: it has no q, k and v; use an adapter around the block")


@register_family("transformers.models.poolformer.modeling_poolformer.PoolFormerForImageClassification")  # type: ignore[type-var]
def poolformer_classifier(model: Any) -> HfPoolFormer:
    """See the base model inside, and keep the classifier."""
    return headed(HfPoolFormer(model.poolformer), model, "poolformer", _classify)


def _classify(model: Any, x: Tensor) -> Tensor:
    return model.classifier(model.norm(x).mean([-2, -1]))
