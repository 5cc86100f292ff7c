"""torchvision's VisionTransformer: ``vit_b_16`` and its siblings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.backbones._mha import mha_parts
from adaptkit.backbones._timm import block_list, is_bare, output_of, reading_layer, resampled, two_layers
from adaptkit.core.block import Block, MLPLayers, identity
from adaptkit.core.registry import register_family
from adaptkit.core.tree import unwrapped
from adaptkit.core.view import Source, Spec, ViT
from adaptkit.ops.grid import map_to_tokens


@register_family("torchvision.models.vision_transformer.VisionTransformer")
class TorchvisionViT(ViT):
    """Blocks ``dropout(attn(norm(x))) + x`` on a class token and patches.

    The backbone takes images of its own size alone; at another one the view resamples the positions as torchvision's
    ``interpolate_embeddings`` does, bicubic with the corners aligned.
    """

    positions = "bicubic, corners aligned"

    def __init__(self, backbone: Any) -> None:
        layers = backbone.encoder.layers
        heads = unwrapped(layers[0]).num_heads
        sizes = (backbone.hidden_dim, len(layers), heads, backbone.patch_size, 1)
        super().__init__(backbone, Spec("torchvision-vit", *sizes, _stem(backbone).in_channels))

    def embed(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """``backbone.conv_proj``, class token, positions, dropout."""
        backbone: Any = self.backbone
        x = map_to_tokens(backbone.conv_proj(image))
        x = torch.cat([backbone.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        return backbone.encoder.dropout(x + _positions(backbone, grid))

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
        """torchvision's own blocks."""
        return [_block(layer) for layer in block_list(self.backbone.encoder.layers)]

    def norm(self, x: Tensor) -> Tensor:
        """``backbone.encoder.ln``."""
        return self.backbone.encoder.ln(x)

    def classify(self, x: Tensor) -> Tensor | None:
        """``backbone.heads`` of the class token; None where they were taken off."""
        return self.backbone.heads(x[:, 0]) if _classes(self.backbone) else None

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        """Kernel that reads the image, first and last norms."""
        layers: Any = self.backbone.encoder.layers
        first, last = unwrapped(layers[0]), unwrapped(layers[-1])
        return {"patch": _stem(self.backbone).weight, "first": first.ln_1.weight, "last": last.ln_2.weight}

    def source(self) -> Source:
        """torchvision keeps nothing of where weights come from."""
        return (self.origin or Source())._replace(classes=_classes(self.backbone))

    def sizes(self) -> Sequence[tuple[int, int]]:
        """The backbone's own: it takes no other."""
        return [(self.backbone.image_size, self.backbone.image_size)]

    def reference(self, image: Tensor) -> Tensor:
        """What a copy's ``heads`` are given, with the encoder that says all its tokens: its last norm's output."""
        return output_of(self.backbone.encoder, self.backbone, image)

    def answers(self, tokens: Tensor) -> Sequence[Tensor]:
        """``backbone.heads`` of the class token."""
        return (self.backbone.heads(tokens[:, 0]),)


def _stem(backbone: Any) -> Any:
    """Return the convolution that reads the image."""
    return reading_layer(backbone.conv_proj)


def _classes(backbone: Any) -> int:
    layers = [m for m in backbone.heads.modules() if isinstance(m, nn.Linear)]
    return layers[-1].out_features if layers else 0


def _positions(backbone: Any, grid: tuple[int, int]) -> Tensor:
    """Return (1, 1+h*w, D); the table itself on its own grid."""
    table, side = backbone.encoder.pos_embedding, backbone.image_size // backbone.patch_size
    if grid == (side, side):
        return table
    return torch.cat([table[:, :1], resampled(table[:, 1:], grid, corners=True)], dim=1)


def _block(outer: Any) -> Block:
    """``outer``: the block as it runs, maybe compiled or wrapped; its parts are those of what is inside."""
    blk: Any = unwrapped(outer)
    return Block(
        run=outer,
        norm1=blk.ln_1,
        scale1=blk.dropout,
        norm2=blk.ln_2,
        mlp=blk.mlp,
        scale2=identity,
        mlp_layers=partial(_mlp_layers, blk.mlp),
        **mha_parts(blk.self_attention),
    )


def _mlp_layers(mlp: Any) -> MLPLayers | None:
    """See the FFN layer by layer; None where layers are replaced (LoRA)."""
    linear = [m for m in mlp if isinstance(m, nn.Linear)]
    return two_layers(linear[0], mlp[1], linear[1]) if is_bare(mlp, type(unwrapped(mlp))) and len(linear) == 2 else None
