"""The picture of the demo: what every way sees in the same images, drawn over them.

The colours are Paul Tol's "muted" scheme and its grey (Tol 2021, Colour schemes, figure 4), which colour-blind people
tell apart. Regions have the light ones and let the image through; thin things have the dark ones and cover it, in the
truth and in every prediction alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from adaptkit.demo.scenes import CLASSES, THIN
from adaptkit.demo.scoring import Result, percent

if TYPE_CHECKING:
    from PIL import ImageDraw

__all__ = ["COLOURS", "overlay", "picture", "rgb"]

COLOURS = {
    "smooth": "#88CCEE",
    "grain": "#DDCC77",
    "brick": "#DDDDDD",
    "stripes": "#44AA99",
    "cells": "#CC6677",
    "wire": "#332288",
    "lattice": "#882255",
    "ring": "#AA4499",
    "pebble": "#117733",
}
COVER, COVER_THIN = 0.72, 0.95  #: how much of the image a region hides, and a thin thing
EDGE = 0.6  #: brightness of the line between two regions
INK, FAINT, PAPER = "#222222", "#666666", "#FFFFFF"
GAP, MARGIN, TITLE, LEGEND = 10, 20, 52, 44  #: pixels: between tiles, around, above the columns, below the rows
HEADING, SMALL = 20, 16  #: height of the letters


def picture(path: Path, images: Tensor, masks: Tensor, result: Result, zoom: int = 2) -> None:
    """Write one row for each image (n, 3, H, W) in -1..1: the image, its truth (n, H, W), and what each way says."""
    from PIL import Image, ImageDraw

    shown = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    columns = [("image", "drawn by formula", shown), ("truth", "", _overlays(shown, masks, zoom))]
    columns += [(row.name, f"mIoU {percent(row.miou)}", _overlays(shown, row.prediction, zoom)) for row in result.rows]
    height, width = (side * zoom for side in images.shape[-2:])
    size = (2 * MARGIN + len(columns) * (width + GAP) - GAP, 2 * MARGIN + TITLE + len(images) * (height + GAP) + LEGEND)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (name, note, tiles) in enumerate(columns):
        left = MARGIN + i * (width + GAP)
        draw.text((left, MARGIN - 6), name, fill=INK, font_size=HEADING)
        draw.text((left, MARGIN + 20), note, fill=FAINT, font_size=SMALL)
        for j, tile in enumerate(tiles):
            enlarged = Image.fromarray(tile).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left, MARGIN + TITLE + j * (height + GAP)))
    _legend(draw, MARGIN, size[1] - MARGIN - SMALL - 6, size[0] - 2 * MARGIN)
    sheet.save(path, optimize=True)


def overlay(image: np.ndarray, ids: np.ndarray, zoom: int = 1) -> np.ndarray:
    """Draw class ids (H, W) over an image (H, W, 3) uint8 -> (H zoom, W zoom, 3) uint8.

    The image turns grey, so that every colour is that of a class; a dark line runs between two regions.
    """
    ids, image = (a.repeat(zoom, 0).repeat(zoom, 1) for a in (ids, image))
    palette = np.array([rgb(COLOURS[name]) for name in CLASSES], np.float32)
    cover = np.array([COVER_THIN if name in THIN else COVER for name in CLASSES], np.float32)
    grey = image.astype(np.float32).mean(-1, keepdims=True)
    blended = grey + cover[ids][..., None] * (palette[ids] - grey)
    blended[_edges(ids)] *= EDGE
    return blended.round().astype(np.uint8)


def _overlays(images: np.ndarray, ids: Tensor, zoom: int) -> list[np.ndarray]:
    return [overlay(image, classes, zoom) for image, classes in zip(images, ids.numpy())]


def _edges(ids: np.ndarray) -> np.ndarray:
    """Pixels (H, W) of a region whose right or lower neighbour is of another region; thin things need no line."""
    thin = np.array([name in THIN for name in CLASSES])[ids]
    edges = np.zeros(ids.shape, bool)
    edges[:, :-1] |= (ids[:, :-1] != ids[:, 1:]) & ~thin[:, :-1] & ~thin[:, 1:]
    edges[:-1] |= (ids[:-1] != ids[1:]) & ~thin[:-1] & ~thin[1:]
    return edges


def _legend(draw: ImageDraw.ImageDraw, left: int, top: int, width: int) -> None:
    """One line: a patch of colour and the name of each class."""
    step = width / len(CLASSES)
    for i, name in enumerate(CLASSES):
        x = left + i * step
        draw.rectangle((x, top, x + 22, top + 18), fill=COLOURS[name], outline="#AAAAAA")
        draw.text((x + 30, top), name, fill=INK, font_size=SMALL)


def rgb(colour: str) -> tuple[int, int, int]:
    """``"#88CCEE"`` -> red, green and blue in 0..255."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
