"""transformers' Aimv2VisionModel: RMS norms, a gated FFN, patch tokens only; alone or inside Aimv2Model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from adaptkit.backbones._hf import HfViT, attention_parts, is_native, tower
from adaptkit.backbones._timm import block_list, resampled
from adaptkit.core.block import Block, identity
from adaptkit.core.registry import register_family
from adaptkit.core.tree import unwrapped
from adaptkit.core.view import ViT
from adaptkit.ops.grid import map_to_tokens


@register_family("transformers.models.aimv2.modeling_aimv2.Aimv2VisionModel")
class HfAimv2(HfViT):
    """Blocks ``x + attn(norm(x))``; positions are waves computed for the grid at hand, or a table of one grid.

    With a table the backbone takes no other size; the view then resamples it as transformers does for CLIP.
    """

    family = "hf-aimv2"
    layers_at = "encoder.layers"
    kernel_at = "embeddings.patch_embed.weight"
    layer_norms = ("rms_norm1", "rms_norm2")
    last_norm = "rms_norm"
    positions = "bicubic"

    def __init__(self, backbone: Any) -> None:
        super().__init__(backbone, prefix=0)
        if backbone.config.is_native:
            self.positions = "waves"

    def embed(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """``backbone.embeddings``; at another size its parts, with the resampled table."""
        embeddings: Any = self.body.embeddings
        if self.positions == "waves" or is_native(image, self.body.config.image_size):
            return embeddings(image)
        x = embeddings.rms_norm(map_to_tokens(embeddings.patch_embed(image)))
        return x + resampled(embeddings.position_embedding.weight[None], grid)

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
        """The backbone's layers."""
        return [_block(layer) for layer in block_list(self.layers())]

    def sizes(self) -> Sequence[tuple[int, int]]:
        """The backbone's own, and another where it takes any."""
        side = self.body.config.image_size // self.spec.patch_size * self.spec.patch_size
        other = [(3 * self.spec.patch_size, 5 * self.spec.patch_size)]
        return [(side, side), *(other if self.positions == "waves" else [])]


def _block(outer: Any) -> Block:
    """``outer``: the layer as it runs, maybe compiled or wrapped; its parts are those of what is inside."""
    layer: Any = unwrapped(outer)
    return Block(
        run=partial(outer, attention_mask=None),
        norm1=layer.rms_norm1,
        scale1=identity,
        norm2=layer.rms_norm2,
        mlp=layer.ffn,
        scale2=identity,
        **attention_parts(layer.attention, "out_proj", "scale"),
    )


@register_family("transformers.models.aimv2.modeling_aimv2.Aimv2Model")  # type: ignore[type-var]
def aimv2_vision_tower(model: Any) -> ViT:
    """See the vision model inside; the text model stays beside it, unused."""
    return tower(HfAimv2(model.vision_model), model)
