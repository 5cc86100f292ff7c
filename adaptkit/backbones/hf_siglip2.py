"""transformers' Siglip2VisionModel (NaFlex), seen at the fixed grid of each image: patch tokens only, none padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adaptkit.backbones._hf import HfClipNames, tower
from adaptkit.core.registry import register_family
from adaptkit.core.view import ViT


@register_family("transformers.models.siglip2.modeling_siglip2.Siglip2VisionModel")
class HfSiglip2(HfClipNames):
    """Blocks ``x + attn(norm(x))``; the backbone takes patches (B, N, p*p*C) and resamples positions to their grid.

    All images of a batch have one size, so every patch is a patch of the image and nothing is masked.
    """

    family = "hf-siglip2"
    positions = "bilinear antialias"

    def __init__(self, backbone: Any) -> None:
        super().__init__(backbone, prefix=0)

    def kernel(self) -> Tensor:
        """The linear layer on patches as a kernel (D, C, p, p)."""
        p = self.body.config.patch_size
        return self.body.embeddings.patch_embedding.weight.unflatten(1, (p, p, -1)).permute(0, 3, 1, 2)

    def embed(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """``backbone.embeddings`` of the patches."""
        return self.body.embeddings(*self._patches(image))

    def sizes(self) -> Sequence[tuple[int, int]]:
        """Its config names a number of patches: of the square, and of another shape."""
        p, side = self.spec.patch_size, round(self.body.config.num_patches**0.5)
        return (side * p, side * p), (3 * p, 5 * p)

    def reference(self, image: Tensor) -> Tensor:
        """``last_hidden_state`` of the patches, none of them masked."""
        patches, shapes = self._patches(image)
        mask = torch.ones(patches.shape[:2], dtype=torch.long, device=image.device)
        return self._forward(patches, pixel_attention_mask=mask, spatial_shapes=shapes)

    def answers(self, tokens: Tensor) -> Sequence[Tensor]:
        """Nothing: the backbone takes patches, not an image."""
        return ()

    def _patches(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, h*p, w*p) -> (B, h*w, p*p*C) as the image processor lays them out, and (h, w) of each (B, 2)."""
        p = self.spec.patch_size
        cells = image.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, h, p, w, p)
        patches = cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        shape = (image.shape[2] // p, image.shape[3] // p)
        return patches, torch.tensor(shape, device=image.device).expand(image.shape[0], 2)


@register_family("transformers.models.siglip2.modeling_siglip2.Siglip2Model")  # type: ignore[type-var]
def siglip2_vision_tower(model: Any) -> ViT:
    """See the vision model inside; the text model stays beside it, unused."""
    return tower(HfSiglip2(model.vision_model), model)
