"""transformers' SwinModel: four stages of shifted windows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adaptkit.backbones._hf import headed, hf_source, is_native
from adaptkit.backbones._hf_hierarchical import HfHierarchical
from adaptkit.backbones._maps import no_qkv, on_map
from adaptkit.backbones._timm import block_list, joined, square_side
from adaptkit.backbones._windows import by_cell, padded, partitioned, shift_mask, shifted_windows
from adaptkit.core.block import Block
from adaptkit.core.hierarchical import HierarchicalSpec
from adaptkit.core.registry import register_family
from adaptkit.core.tree import unwrapped
from adaptkit.ops.grid import map_to_tokens

Grid = tuple[int, int]


class HfSwinLike(HfHierarchical):
    """What the two versions of Swin share: embedding, merging of patches between stages, a last norm."""

    positions = "relative in windows, kept as they are; bicubic where there is a table"
    tupled = True

    def __init__(self, backbone: Any, family: str) -> None:
        config: Any = backbone.config
        patch, count = square_side(config.patch_size), len(config.depths)
        dims = tuple(int(config.embed_dim * 2**i) for i in range(count))
        strides = tuple(patch * 2**i for i in range(count))
        channels = int(backbone.embeddings.patch_embeddings.projection.weight.shape[1])
        super().__init__(backbone, HierarchicalSpec(family, dims, tuple(config.depths), strides, channels))

    def embed(self, image: Tensor) -> tuple[Tensor, Grid]:
        """``backbone.embeddings``, with its own interpolation at another size."""
        native = is_native(image, self.body.config.image_size)
        return self.body.embeddings(image, interpolate_pos_encoding=not native)

    def enter(self, stage: int, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """Patch merging; the identity in the first stage."""
        if stage == 0:
            return x, grid
        merged = self.body.encoder.layers[stage - 1].downsample(x, grid)
        return merged, ((grid[0] + 1) // 2, (grid[1] + 1) // 2)

    def norm(self, x: Tensor) -> Tensor:
        """``backbone.layernorm``."""
        return self.body.layernorm(x)

    def is_checkpointing(self) -> bool:
        """As ``gradient_checkpointing_enable`` left it, stage by stage."""
        return any(getattr(stage, "gradient_checkpointing", False) for stage in self.body.encoder.layers)

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        """Patch kernel, first and last norms."""
        stages, patch = self.body.encoder.layers, self.body.embeddings.patch_embeddings.projection.weight
        first, last = unwrapped(stages[0].blocks[0]), unwrapped(stages[-1].blocks[-1])
        return {"patch": patch, "first": first.layernorm_before.weight, "last": last.layernorm_after.weight}

    def reference(self, image: Tensor) -> Tensor:
        """``last_hidden_state``."""
        self._forget_hooks()
        return self.body(image).last_hidden_state


@register_family("transformers.models.swin.modeling_swin.SwinModel")
class HfSwin(HfSwinLike):
    """Blocks ``x + attn(norm(x))`` in windows, every second one shifted.

    On a map of one window a SwinModel does not shift, and it *keeps* that for all images that come later. The view
    shifts as a model does that has run no image before, and changes nothing in it. So a block whose own forward would
    do otherwise runs from its parts.
    """

    always: bool = False  #: whether a map of one window is shifted, too, as SwinBackbone does

    def __init__(self, backbone: Any) -> None:
        super().__init__(backbone, "hf-swin")

    def blocks(self, stage: int, grid: Grid) -> Sequence[Block]:
        """The backbone's layers, given the grid."""
        layers, side = block_list(self.body.encoder.layers[stage].blocks), int(self.body.config.window_size)
        whole = min(grid) <= side and not self.always
        keep = self.always or min(grid) < side  # else the layer would change its window
        shifts = [0 if whole or i % 2 == 0 else side // 2 for i in range(len(layers))]
        return [_block(outer, grid, side, shift, keep) for outer, shift in zip(layers, shifts)]

    def accept(self, grid: Grid) -> None:
        """Let the layers of a copy shift as a model does that has run no image before, on any map."""
        self.always, side = True, int(self.body.config.window_size)
        for stage in self.body.encoder.layers:
            for i, layer in enumerate(stage.blocks):
                inner: Any = unwrapped(layer)
                inner.window_size, inner.shift_size = side, side // 2 if i % 2 else 0


def _block(outer: Any, grid: Grid, side: int, shift: int, keep: bool) -> Block:
    """``outer``: the layer as it runs, maybe compiled or wrapped; its parts are those of what is inside.

    ``keep``: tell it to keep window and shift as they are.
    """
    layer: Any = unwrapped(outer)
    attn = partial(shifted_windows, partial(_attend, layer.attention), side, shift)
    block = Block(
        run=partial(_run, outer, grid, keep),
        norm1=layer.layernorm_before,
        attn=partial(on_map, attn, grid),
        scale1=joined(layer.dropout, layer.drop_path),
        norm2=layer.layernorm_after,
        mlp=layer.mlp,
        scale2=layer.dropout,
        qkv=no_qkv,
        out=no_qkv,
        attended=partial(_attended, layer.attention, grid, side, shift),
    )
    own = (layer.window_size, layer.shift_size) == (side, shift)
    return block if own else Block(**{**vars(block), "run": block.equation})


def _run(layer: Any, grid: Grid, keep: bool, x: Tensor) -> Tensor:
    return layer(x, grid, always_partition=keep)[0]


def _attend(attn: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    return attn(x, mask)[0]


def _attended(outer: Any, grid: Grid, side: int, shift: int, h: Tensor) -> tuple[Tensor, Tensor]:
    """Normed tokens (B, N, D) -> attention (B, heads, N, K) in the window of each cell, and its K cells (N, K).

    Padding is a key in Swin: what it gets is left out.
    """
    attn: Any = unwrapped(outer)
    x = padded(h.unflatten(1, grid), side, shift)
    cells = torch.arange(grid[0] * grid[1], device=h.device).view(1, *grid, 1)
    cells = partitioned(padded(cells, side, shift, -1), side).squeeze(-1)  # (windows, K)
    windows = partitioned(x, side)
    q, k = (p(windows).unflatten(2, (-1, attn.head_dim)).transpose(1, 2) for p in (attn.q_proj, attn.k_proj))
    logits = (q @ k.mT * attn.scaling + attn.relative_position_bias()).unflatten(0, (-1, len(cells)))
    if shift:
        logits = logits + shift_mask((x.shape[1], x.shape[2]), side, shift, logits)[:, None]
    return by_cell(logits.softmax(-1), cells)


class HfSwinBackbone(HfSwin):
    """The Backbone class: every map is shifted, and the last norm is that of the last map which it returns."""

    always = True

    def norm(self, x: Tensor) -> Tensor:
        """``hidden_states_norms`` of the last stage."""
        return self.backbone.hidden_states_norms[self.backbone.stage_names[-1]](x)

    def reference(self, image: Tensor) -> Tensor:
        """The last of ``feature_maps``, as tokens."""
        self._forget_hooks()
        return map_to_tokens(self.backbone(image).feature_maps[-1])


@register_family("transformers.models.swin.modeling_swin.SwinForImageClassification")  # type: ignore[type-var]
def swin_classifier(model: Any) -> HfSwin:
    """See the base model inside, and keep the classifier."""
    return headed(HfSwin(model.swin), model, "swin", partial(pooled, "swin"))


@register_family("transformers.models.swin.modeling_swin.SwinBackbone")  # type: ignore[type-var]
def swin_backbone(model: Any) -> HfSwinBackbone:
    """See the base model inside. ``TypeError`` where the last stage is none of ``out_features``: it has no norm."""
    check_last_stage(model)
    seen = HfSwinBackbone(model.swin)
    seen.backbone, seen.inside = model, "swin"
    seen.origin = hf_source(model, seen.spec.channels)
    return seen


def pooled(inside: str, model: Any, x: Tensor) -> Tensor:
    """Tokens (B, N, D) -> logits, as the classes with a classifier make them."""
    return model.classifier(getattr(model, inside).pooler(x.transpose(1, 2)).flatten(1))


def check_last_stage(model: Any) -> None:
    """Raise ``TypeError`` for a Backbone class that does not return its last stage."""
    if model.stage_names[-1] not in model.out_features:
        raise TypeError(
            f"this {type(model).__name__} returns {', '.join(model.out_features)} and not its last stage "
            f"{model.stage_names[-1]}; name it in out_features=; the adapters' maps come from all stages"
        )
