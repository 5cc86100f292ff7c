"""transformers' HieraModel: four stages, attention inside mask units, queries pooled between stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adaptkit.backbones._hf import headed
from adaptkit.backbones._hf_hierarchical import HfHierarchical, depths_but_entries
from adaptkit.backbones._maps import no_qkv
from adaptkit.core.block import Block
from adaptkit.core.hierarchical import HierarchicalSpec
from adaptkit.core.registry import register_family
from adaptkit.core.tree import unwrapped
from adaptkit.ops.grid import pad_to_multiple


@register_family("transformers.models.hiera.modeling_hiera.HieraModel")
class HfHiera(HfHierarchical):
    """Blocks ``x + attn(norm(x))``; the first layer of a later stage pools its queries: it is how the stage is entered.

    The model keeps tokens in such an order that those pooled together lie in one place; the view has them row by row,
    and each layer runs in the backbone's order. It takes images whose sides are multiples of the last stride; the
    view pads others with zeros.
    """

    positions = "bicubic"
    tupled = True
    flat: bool = False  #: of a copy that is proven on a grid that cannot be pooled: its order is row by row

    def __init__(self, backbone: Any) -> None:
        config: Any = backbone.config
        counts, stride = tuple(config.depths), tuple(config.query_stride)
        pooled = tuple(0 < stage <= config.num_query_pool for stage in range(len(counts)))
        if len({*stride}) != 1 or len({*config.patch_stride}) != 1 or config.num_query_pool != len(counts) - 1:
            raise TypeError(
                f"a Hiera with query_stride {list(stride)}, patch_stride {list(config.patch_stride)} and "
                f"{config.num_query_pool} poolings for {len(counts)} stages has no one stride per stage; use one that "
                "halves the map on entering each later stage, by the same factor in height and width"
            )
        depths = depths_but_entries(counts, pooled, type(backbone).__name__)
        widths = tuple(int(config.embed_dim * config.embed_dim_multiplier**i) for i in range(len(counts)))
        strides = tuple(config.patch_stride[0] * stride[0] ** i for i in range(len(counts)))
        kernel = backbone.embeddings.patch_embeddings.projection.weight
        super().__init__(backbone, HierarchicalSpec("hf-hiera", widths, depths, strides, kernel.shape[1]))

    def embed(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """``backbone.embeddings``, with its own interpolation at another size."""
        image = pad_to_multiple(image, self.spec.strides[-1])
        native = tuple(image.shape[-2:]) == tuple(self.body.config.image_size)
        x = self.body.embeddings(image, interpolate_pos_encoding=not native)[0]
        return x, (image.shape[-2] // self.spec.strides[0], image.shape[-1] // self.spec.strides[0])

    def enter(self, stage: int, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """The layer that pools; the identity in the first stage."""
        if stage == 0:
            return x, grid
        side = self.body.config.query_stride[0]
        order, inner = self._order(stage - 1, grid), (grid[0] // side, grid[1] // side)
        x = self.body.encoder.stages[stage].layers[0](x.index_select(1, order))[0]
        return x.index_select(1, self._order(stage, inner).argsort()), inner

    def blocks(self, stage: int, grid: tuple[int, int]) -> Sequence[Block]:
        """The other layers of the stage, each in the backbone's order of these tokens."""
        order = self._order(stage, grid)
        layers = self.body.encoder.stages[stage].layers
        return [_block(layer, order, order.argsort()) for layer in layers[1 if stage else 0 :]]

    def norm(self, x: Tensor) -> Tensor:
        """The identity: the backbone norms after pooling."""
        return x

    def reference(self, image: Tensor) -> Tensor:
        """``last_hidden_state``; in the last stage its order is row by row."""
        return self.body(image).last_hidden_state

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        """Patch kernel, first and last norms."""
        stages, patch = self.body.encoder.stages, self.body.embeddings.patch_embeddings.projection.weight
        first, last = unwrapped(stages[0].layers[0]), unwrapped(stages[-1].layers[-1])
        return {"patch": patch, "first": first.layernorm_before.weight, "last": last.layernorm_after.weight}

    def accept(self, grid: tuple[int, int]) -> None:
        """Let the layers of a copy attend to all tokens: a grid of this size has no whole mask units."""
        self.flat = True
        for stage in self.body.encoder.stages:
            for layer in stage.layers:
                unwrapped(layer).attn.use_mask_unit_attn = False

    def _order(self, stage: int, grid: tuple[int, int]) -> Tensor:
        """Return which token, row by row, stands at each place (h*w,) of the backbone's order in a stage.

        Before each pooling that is still to come, the cells of one pooling window come apart as the slowest index, so
        that the backbone pools by a maximum over it.
        """
        side = self.body.config.query_stride[0]
        device = self.body.embeddings.position_embeddings.device
        places = torch.arange(math.prod(grid), device=device).view(1, *grid)
        for _ in range(0 if self.flat else len(self.spec.depths) - 1 - stage):
            cells = places.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # (K, h, side, w, side)
            places = cells.permute(0, 2, 4, 1, 3).flatten(0, 2)
        return places.flatten()


def _block(outer: Any, order: Tensor, back: Tensor) -> Block:
    """``outer``: the layer as it runs, maybe compiled or wrapped; its parts are those of what is inside."""
    layer: Any = unwrapped(outer)
    return Block(
        run=partial(_ordered, outer, order, back),
        norm1=layer.layernorm_before,
        attn=partial(_ordered, layer.attn, order, back),
        scale1=layer.drop_path,
        norm2=layer.layernorm_after,
        mlp=layer.mlp,
        scale2=layer.drop_path,
        qkv=no_qkv,
        out=no_qkv,
    )


def _ordered(module: Any, order: Tensor, back: Tensor, x: Tensor) -> Tensor:
    return module(x.index_select(1, order))[0].index_select(1, back)


@register_family("transformers.models.hiera.modeling_hiera.HieraForImageClassification")  # type: ignore[type-var]
def hiera_classifier(model: Any) -> HfHiera:
    """See the base model inside, and keep the classifier."""
    return headed(HfHiera(model.hiera), model, "hiera", _classify)


def _classify(model: Any, x: Tensor) -> Tensor:
    return model.classifier(model.hiera.pooler(x))
