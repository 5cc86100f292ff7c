"""transformers' SamVisionEncoder: the image encoder of Segment Anything, windowed and global attention on a map."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from adaptkit.backbones._hf import HfViT, attend, tower
from adaptkit.backbones._maps import no_qkv, on_map, windowed
from adaptkit.backbones._timm import block_list, resampled
from adaptkit.core.block import Block, identity
from adaptkit.core.registry import register_family
from adaptkit.core.tree import unwrapped
from adaptkit.core.view import ViT


@register_family("transformers.models.sam.modeling_sam.SamVisionEncoder")
class HfSam(HfViT):
    """Blocks on a map (B, h, w, D), given and taken as tokens. No class token and no final norm.

    The neck, a small convolutional head to 256 channels, is left to the backbone: tokens are what the last block gives.
    The model takes images of its own size alone; at another one the view resamples the positions as transformers does
    elsewhere. Attention does not come apart: its windows are padded and its positions depend on the query.
    """

    family = "hf-sam"
    layers_at = "layers"
    kernel_at = "patch_embed.projection.weight"
    layer_norms = ("layer_norm1", "layer_norm2")
    positions = "bicubic, relative ones linear"
    splits = False

    def __init__(self, backbone: Any) -> None:
        super().__init__(backbone, prefix=0)

    def embed(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patches and positions."""
        backbone: Any = self.body
        x = backbone.patch_embed.projection(image).permute(0, 2, 3, 1)
        table = backbone.pos_embed
        if table is not None:
            x = x + (
                table if tuple(table.shape[1:3]) == grid else resampled(table.flatten(1, 2), grid).unflatten(1, grid)
            )
        return x.flatten(1, 2)

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
        """The backbone's layers, tokens unfolded to this grid."""
        return [_block(layer, grid) for layer in block_list(self.layers())]

    def norm(self, x: Tensor) -> Tensor:
        """The identity: SAM has a neck where others have a norm."""
        return x

    def sizes(self) -> Sequence[tuple[int, int]]:
        """The backbone's own: it takes no other."""
        side = self.body.config.image_size
        return [(side, side)]

    def reference(self, image: Tensor) -> Tensor:
        """``last_hidden_state`` of a copy, its neck taken off."""
        backbone: Any = self.body
        backbone.neck = nn.Identity()
        return self._forward(image).flatten(1, 2)


def _block(outer: Any, grid: tuple[int, int]) -> Block:
    """``outer``: the layer as it runs, maybe compiled or wrapped; its parts are those of what is inside."""
    layer: Any = unwrapped(outer)
    attn = partial(windowed, partial(attend, layer.attn, {}), layer.window_size)
    return Block(
        run=partial(on_map, outer, grid),
        norm1=layer.layer_norm1,
        attn=partial(on_map, attn, grid),
        scale1=identity,
        norm2=layer.layer_norm2,
        mlp=layer.mlp,
        scale2=identity,
        qkv=no_qkv,
        out=no_qkv,
    )


@register_family(  # type: ignore[type-var]
    "transformers.models.sam.modeling_sam.SamVisionModel",
    "transformers.models.sam.modeling_sam.SamModel",
)
def sam_vision_encoder(model: Any) -> ViT:
    """See the encoder inside; prompts and masks stay beside it, unused."""
    return tower(HfSam(model.vision_encoder), model)
