"""What AdaViT keeps: the patches of each block on the image, and usage against depth (paper, figures 3 to 5)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.adapters.adavit import AdaViT
from adaptkit.analysis.draw import sheet, to_picture
from adaptkit.analysis.watch import single
from adaptkit.core.tree import evaluating
from adaptkit.losses import KINDS
from adaptkit.model.adapted import AdaptedModel

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["kept_patches", "usage_by_depth"]

COLUMNS = 6
SIDE = 192  #: least width of a tile in pixels
FADED = 0.8  #: how far an off patch goes towards white
COLOURS = {"patch": "#1b6ca8", "head": "#d1495b", "layer": "#2e933c"}


@torch.no_grad()
def kept_patches(model: AdaptedModel, image: Tensor, path: str | os.PathLike[str] | None = None) -> Image.Image:
    """Draw one image, once for each gated block, with the patches that the block left out faded.

    Args:
        model: with AdaViT gates; decided as in evaluation.
        image: (C, H, W) or (1, C, H, W), normalised as the backbone wants it.
        path: where to write the picture as well.

    Returns the picture; each tile says which share of the patches and heads and which sub-layers were kept, and
    usage against depth is drawn below. Raises ``TypeError`` for a model without gates, ``ValueError`` for a batch.
    """
    from PIL import Image

    gates = AdaViT.of(model)
    image = single(image)
    with evaluating(model):
        features = model(image)
    height, width = features.size
    zoom = max(1, -(-SIDE // width))
    shown = to_picture(image[0], model.vit.source()).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
    tiles = [("image", shown)]
    for index in sorted(int(name) for name in gates.gates):
        kept = {k: features.aux[f"{k}_keep"][0, index - gates.first[k]] for k in KINDS if gates.gated(k, index)}
        tiles.append(
            (_title(index, kept), _faded(shown, kept.get("patch"), features.grid, model.spec.patch_size * zoom))
        )
    tall = sheet(tiles, COLUMNS)
    chart = usage_by_depth({k: v for k, v in features.aux.items() if k.endswith("_keep")}, gates.first, tall.width)
    page = Image.new("RGB", (tall.width, tall.height + chart.height), "white")
    page.paste(tall, (0, 0))
    page.paste(chart, (0, tall.height))
    if path is not None:
        page.save(path)
    return page


def _title(index: int, kept: Mapping[str, Tensor]) -> str:
    words = [f"{index}:"]
    if "patch" in kept:
        words.append(f"{float(kept['patch'].mean()):.0%}")
    if "head" in kept:
        words.append(f"{int(kept['head'].sum())}/{len(kept['head'])} heads")
    if "layer" in kept:
        words.append("+".join(n for n, on in zip(("MSA", "FFN"), kept["layer"].tolist()) if on) or "skipped")
    return "  ".join(words)


def _faded(shown: Image.Image, keep: Tensor | None, grid: tuple[int, int], patch: int) -> Image.Image:
    """Fade the patches (N,) that are off; the last row and column may reach over the picture's edge."""
    from PIL import Image

    if keep is None:
        return shown
    off = 1.0 - keep.float().cpu().view(1, 1, *grid)
    mask = F.interpolate(off, scale_factor=float(patch), mode="nearest")[0, 0, : shown.height, : shown.width]
    white = Image.new("RGB", shown.size, "white")
    return Image.composite(white, shown, Image.fromarray((mask * FADED * 255).byte().numpy(), "L"))


def usage_by_depth(
    aux: Mapping[str, Tensor], first: Mapping[str, int] | None = None, width: int = 640, height: int = 220
) -> Image.Image:
    """Draw the share that is kept in each block, a line for each kind.

    Args:
        aux: ``Features.aux``, or the ``<kind>_keep`` of many images put together: (B, gated blocks, ...).
        first: the first gated block of each kind, ``AdaViT.first``; without it all start at 0.
        width, height: of the picture, in pixels.
    """
    from PIL import Image, ImageDraw

    curves = {k: aux[f"{k}_keep"].float().flatten(2).mean((0, 2)).tolist() for k in KINDS if f"{k}_keep" in aux}
    starts = {k: 0 if first is None else first[k] for k in curves}
    last = max(starts[k] + len(c) for k, c in curves.items()) - 1
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    left, right, top, bottom = 52, width - 90, 14, height - 34

    def at(block: int, share: float) -> tuple[float, float]:
        return left + (right - left) * block / max(1, last), bottom - (bottom - top) * share

    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        draw.line(
            [at(0, share), at(last, share)] if last else [(left, at(0, share)[1]), (right, at(0, share)[1])], "#dddddd"
        )
        draw.text((8, at(0, share)[1] - 7), f"{share:.0%}", fill="black", font_size=12)
    for block in range(last + 1):
        draw.text((at(block, 0)[0] - 4, bottom + 6), str(block), fill="black", font_size=12)
    draw.text((left, bottom + 19), "block", fill="black", font_size=12)
    for row, (kind, curve) in enumerate(curves.items()):
        points = [at(starts[kind] + i, share) for i, share in enumerate(curve)]
        if len(points) > 1:
            draw.line(points, fill=COLOURS[kind], width=7 - 2 * row)  # those below stay visible
        for x, y in points:
            size = 5 - row
            draw.ellipse((x - size, y - size, x + size, y + size), fill=COLOURS[kind])
        draw.text((right + 12, top + 18 * row), kind, fill=COLOURS[kind], font_size=13)
    return page
