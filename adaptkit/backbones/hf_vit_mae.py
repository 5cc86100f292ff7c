"""transformers' ViTMAEModel, seen without its masking: all patches, row by row."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adaptkit.backbones._hf import HfViT, is_native, vit_block
from adaptkit.backbones._timm import block_list
from adaptkit.core.block import Block
from adaptkit.core.registry import register_family


@register_family("transformers.models.vit_mae.modeling_vit_mae.ViTMAEModel")
class HfViTMAE(HfViT):
    """Blocks ``x + attn(norm(x))``; the backbone drops 75 % of the patches and shuffles the rest, the view none."""

    family = "hf-vit-mae"
    layers_at = "layers"
    interpolates_when_told = True
    positions = "bicubic"

    def embed(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """The sum that ``backbone.embeddings`` forms before it masks."""
        embeddings: Any = self.body.embeddings
        x = embeddings.patch_embeddings(image)
        positions = embeddings.position_embeddings
        if not is_native(image, embeddings.image_size):
            positions = embeddings.interpolate_pos_encoding(x, *image.shape[-2:])
        cls = embeddings.cls_token + positions[:, :1]
        return torch.cat([cls.expand(x.shape[0], -1, -1), x + positions[:, 1:]], dim=1)

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
        """The backbone's layers."""
        return [vit_block(layer) for layer in block_list(self.layers())]

    def reference(self, image: Tensor) -> Tensor:
        """``last_hidden_state`` of a copy that masks nothing and shuffles nothing."""
        embeddings: Any = self.body.embeddings
        embeddings.config = copy.copy(embeddings.config)
        embeddings.config.mask_ratio = 0.0
        cells = (image.shape[-2] // self.spec.patch_size) * (image.shape[-1] // self.spec.patch_size)
        noise = torch.arange(cells, device=image.device)[None]
        return self._forward(image, noise=noise, **self.interpolating(image))
