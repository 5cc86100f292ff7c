"""transformers' ViTMAEModel, seen without its masking: all patches, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adaptkit.backbones._hf import HfViT, hf_spec, is_native, vit_block
from adaptkit.registry import register_family
from adaptkit.vit import Block


@register_family("transformers.models.vit_mae.modeling_vit_mae.ViTMAEModel")
class HfViTMAE(HfViT):
    """Blocks ``x + attn(norm(x))``; the host alone drops 75 % of the patches and shuffles the rest, the view none."""

    positions = "bicubic"

    def __init__(self, host: Any) -> None:
        kernel = host.embeddings.patch_embeddings.projection.weight
        super().__init__(host, hf_spec("hf-vit-mae", host.config, host.layers, 1, kernel))

    def embed(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """The sum that ``host.embeddings`` forms before it masks."""
        embeddings: Any = self.host.embeddings
        x = embeddings.patch_embeddings(image)
        positions = embeddings.position_embeddings
        if not is_native(image, embeddings.image_size):
            positions = embeddings.interpolate_pos_encoding(x, *image.shape[-2:])
        cls = embeddings.cls_token + positions[:, :1]
        return torch.cat([cls.expand(x.shape[0], -1, -1), x + positions[:, 1:]], dim=1)

    def layers(self) -> Any:
        """``host.layers``."""
        return self.host.layers

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
        """The host's layers."""
        return [vit_block(layer) for layer in self.layers()]

    def norm(self, x: Tensor) -> Tensor:
        """``host.layernorm``."""
        return self.host.layernorm(x)

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        """Patch kernel, first and last norms."""
        host: Any = self.host
        patch = host.embeddings.patch_embeddings.projection.weight
        return {
            "patch": patch,
            "first": host.layers[0].layernorm_before.weight,
            "last": host.layers[-1].layernorm_after.weight,
        }
