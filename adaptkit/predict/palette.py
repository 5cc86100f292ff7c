"""Colours for classes that people with any colour vision can tell apart."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np

__all__ = ["Colour", "checked_palette", "palette", "ramp"]

Colour = tuple[int, int, int]  #: red, green, blue, 0..255

#: Okabe and Ito (2008), Color Universal Design, without black; then Tol's muted scheme (2021).
SAFE: tuple[Colour, ...] = (
    (0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0), (240, 228, 66),
    (136, 34, 85), (153, 153, 51), (51, 34, 136), (170, 68, 153), (17, 119, 51), (221, 204, 119), (136, 204, 238),
)  # fmt: skip
#: Steps of viridis (van der Walt and Smith 2015): even in lightness, so that near and far read in grey as well.
VIRIDIS = ((68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141), (39, 173, 129), (92, 200, 99),
           (170, 220, 50), (253, 231, 37))  # fmt: skip


def palette(classes: int) -> list[Colour]:
    """Return a colour for each class: the safe ones first, then hues a golden angle apart in three lightnesses."""
    more = []
    for i in range(max(0, classes - len(SAFE))):
        hue, light = (i * 0.61803398875) % 1, (0.42, 0.58, 0.72)[i % 3]
        red, green, blue = colorsys.hls_to_rgb(hue, light, 0.55)
        more.append((round(255 * red), round(255 * green), round(255 * blue)))
    return [*SAFE[:classes], *more]


def checked_palette(colours: Sequence[Sequence[int]] | None, classes: int) -> list[Colour]:
    """Return the palette that a file holds, or the usual one where it holds none that fits."""
    fits = isinstance(colours, list | tuple) and len(colours) >= classes
    if not fits or not all(
        isinstance(c, list | tuple) and len(c) == 3 and all(isinstance(v, int) and 0 <= v <= 255 for v in c)
        for c in colours or ()
    ):
        return palette(classes)
    return [(c[0], c[1], c[2]) for c in colours or ()]


def ramp(values: np.ndarray) -> np.ndarray:
    """(H, W) in 0..1 -> (H, W, 3) uint8 along viridis."""
    steps = np.linspace(0, 1, len(VIRIDIS))
    channels = [np.interp(values, steps, [c[k] for c in VIRIDIS]) for k in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)
