"""An image as it was before normalisation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adaptkit.core.view import Source

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["to_picture"]


def to_picture(image: Tensor, source: Source) -> Image.Image:
    """Normalised image (C, H, W) -> RGB picture: the first three channels, or grey where there are fewer.

    Where the backbone does not say how it normalises, the values are stretched to fill the range.
    """
    from PIL import Image

    image = image.detach().float().cpu()
    if source.mean:
        image = image * torch.tensor(source.std)[:, None, None] + torch.tensor(source.mean)[:, None, None]
    else:
        image = (image - image.amin()) / (image.amax() - image.amin()).clamp_min(1e-12)
    image = image[:3] if len(image) >= 3 else image.mean(0).expand(3, -1, -1)
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
