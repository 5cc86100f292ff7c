"""open_clip's own VisionTransformer, the ``visual`` of its CLIP, and TimmModel, which holds a timm trunk."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.backbones._mha import mha_parts
from adaptkit.backbones._timm import REMEDY, block_list, class_name, is_bare, joined, output_of, square_side, two_layers
from adaptkit.core.block import Block, MLPLayers
from adaptkit.core.registry import register_family, view
from adaptkit.core.tree import unwrapped
from adaptkit.core.view import Source, Spec, ViT
from adaptkit.ops.grid import map_to_tokens


@register_family("open_clip.transformer.VisionTransformer")
class OpenCLIPViT(ViT):
    """Blocks ``x + ls(attn(norm(x)))`` after a first norm; the projection to the text's space is left to the backbone.

    The backbone takes images of its own size alone; at another one the view resamples the positions as open_clip does
    when it loads them, bicubic with antialias. Where the last norm comes after pooling, tokens are not normed.
    """

    positions = "bicubic antialias"

    def __init__(self, backbone: Any) -> None:
        layers, kernel = block_list(backbone.transformer.resblocks), backbone.conv1.weight
        parts = mha_parts(_plain(layers[0]).attn)  # refuses the batch second
        heads = unwrapped(parts["attn"].args[0]).num_heads
        sizes = (kernel.shape[0], len(layers), heads, square_side(backbone.patch_size), 1)
        super().__init__(backbone, Spec("open-clip-vit", *sizes, kernel.shape[1]))

    def embed(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patches, class token, positions, ``ln_pre``."""
        backbone: Any = self.backbone
        x = map_to_tokens(backbone.conv1(image))
        x = torch.cat([backbone.class_embedding.view(1, 1, -1).expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        return backbone.ln_pre(backbone.patch_dropout(x + _positions(backbone, grid).to(x.dtype)))

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
        """open_clip's own blocks."""
        return [_block(layer) for layer in block_list(self.backbone.transformer.resblocks)]

    def norm(self, x: Tensor) -> Tensor:
        """``backbone.ln_post``; the identity where the backbone norms after pooling."""
        backbone: Any = self.backbone
        return x if backbone.attn_pool is not None or backbone.final_ln_after_pool else backbone.ln_post(x)

    def classify(self, x: Tensor) -> Tensor | None:
        """None: a projection is no classifier."""
        return None

    def is_checkpointing(self) -> bool:
        """As ``set_grad_checkpointing`` left it."""
        return bool(self.backbone.transformer.grad_checkpointing)

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        """Patch kernel, first and last norms."""
        backbone: Any = self.backbone
        first, last = (unwrapped(backbone.transformer.resblocks[i]) for i in (0, -1))
        return {"patch": backbone.conv1.weight, "first": first.ln_1.weight, "last": last.ln_2.weight}

    def source(self) -> Source:
        """open_clip keeps the normalisation beside its towers."""
        backbone: Any = self.backbone
        mean, std = getattr(backbone, "image_mean", None), getattr(backbone, "image_std", None)
        return self.origin or Source(mean=tuple(mean or ()), std=tuple(std or ()))

    def sizes(self) -> Sequence[tuple[int, int]]:
        """The backbone's own: it takes no other."""
        return [tuple(self.backbone.image_size)]

    def reference(self, image: Tensor) -> Tensor:
        """The tokens that a copy returns beside the pooled one, or those that its attention pools."""
        backbone: Any = self.backbone
        if backbone.attn_pool is None:
            backbone.output_tokens = True
            return backbone(image)[1]
        return output_of(backbone.transformer, backbone, image)


def _positions(backbone: Any, grid: tuple[int, int]) -> Tensor:
    """Return (1+h*w, D); the table itself on its own grid."""
    table, native = backbone.positional_embedding, tuple(backbone.grid_size)
    if grid == native:
        return table
    square = table[1:].unflatten(0, native).permute(2, 0, 1)[None]
    square = F.interpolate(square, size=grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([table[:1], square[0].flatten(1).T])


def _plain(outer: Any) -> Any:
    blk: Any = unwrapped(outer)
    if not isinstance(unwrapped(getattr(blk, "attn", nn.Identity())), nn.MultiheadAttention):
        raise TypeError(
            f"open_clip's {class_name(blk)} attends by another rule than softmax(q k^T) v (scaled cosine, a scale for "
            f"each head); {REMEDY}"
        )
    return blk


def _block(outer: Any) -> Block:
    """``outer``: the block as it runs, maybe compiled or wrapped; its parts are those of what is inside."""
    blk = _plain(outer)
    return Block(
        run=outer,
        norm1=blk.ln_1,
        scale1=joined(blk.ls_1),
        norm2=blk.ln_2,
        mlp=blk.mlp,
        scale2=joined(blk.ls_2),
        mlp_layers=partial(_mlp_layers, blk.mlp),
        **mha_parts(blk.attn),
    )


def _mlp_layers(mlp: Any) -> MLPLayers | None:
    """See the FFN layer by layer; None where layers are replaced (LoRA)."""
    return two_layers(mlp.c_fc, mlp.gelu, mlp.c_proj) if is_bare(mlp, nn.Sequential) and len(mlp) == 3 else None


@register_family("open_clip.timm_model.TimmModel")  # type: ignore[type-var]
def open_clip_trunk(model: Any) -> ViT:
    """See the timm trunk inside; the head stays beside it, unused."""
    return view(model.trunk)
