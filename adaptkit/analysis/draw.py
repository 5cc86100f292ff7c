"""What the pictures share: an image as it was before normalisation, and tiles on a sheet.

Kept patches and moved points are pictures, drawn pixel by pixel with Pillow, which is always there: recipes write them
on machines without matplotlib, which the figures of :mod:`adaptkit.analysis.style` need.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adaptkit.core.view import Source

if TYPE_CHECKING:
    from PIL import Image

GAP, TITLE = 8, 20  #: pixels between tiles, and above each for its title


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


def sheet(tiles: Sequence[tuple[str, Image.Image]], columns: int) -> Image.Image:
    """Lay titled tiles of one size out in rows."""
    from PIL import Image, ImageDraw

    width, height = tiles[0][1].size
    rows = -(-len(tiles) // columns)
    columns = min(columns, len(tiles))
    page = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + TITLE + GAP) + GAP), "white")
    draw = ImageDraw.Draw(page)
    for i, (title, tile) in enumerate(tiles):
        left, top = GAP + i % columns * (width + GAP), GAP + i // columns * (height + TITLE + GAP)
        draw.text((left, top), title, fill="black", font_size=12)
        page.paste(tile, (left, top + TITLE))
    return page
