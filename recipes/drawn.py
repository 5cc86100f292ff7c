"""Rooms drawn by formula with their exact depth: a floor, a wall and boxes, seen by a pinhole camera."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image


def rooms(count: int, seed: int, scale: float, size: tuple[int, int] = (96, 128)) -> Any:
    """Return a ``datasets.Dataset`` with the columns ``image`` and ``mask``, a 16-bit map of metres times ``scale``."""
    import datasets

    if count < 1:
        raise ValueError(f"drawn:{count}: draw at least one room")
    rng = np.random.default_rng(seed)
    pairs = [room(rng, size) for _ in range(count)]
    images = [Image.fromarray(image) for image, _ in pairs]
    depths = [Image.fromarray((depth * scale).round().clip(0, 65535).astype(np.uint16)) for _, depth in pairs]
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    return datasets.Dataset.from_dict({"image": images, "mask": depths}, features=features)


def room(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return (image (H, W, 3) uint8, depth (H, W) in metres along the view).

    The camera stands ``eye`` metres above the floor and looks level. A pixel ``y`` below the horizon sees the floor at
    ``eye * focal / y`` metres, unless the wall or a box stands nearer. All surfaces are darker the farther they are
    and carry a pattern whose grain shrinks with depth, as in a photograph.
    """
    height, width = size
    focal, eye, far = 0.8 * width, rng.uniform(1.0, 1.8), rng.uniform(4.0, 9.0)
    y, x = np.mgrid[0:height, 0:width] + 0.5
    y, x = y - height * rng.uniform(0.35, 0.5), x - width / 2
    floor = np.where(y > 0, eye * focal / np.maximum(y, 1e-6), np.inf)
    depth = np.minimum(floor, far)
    colour = np.where((floor < far)[..., None], rng.uniform(90, 220, 3), rng.uniform(90, 220, 3))
    for _ in range(rng.integers(2, 6)):
        away, across = rng.uniform(1.5, far), rng.uniform(-0.5, 0.5) * width
        wide, tall = rng.uniform(0.3, 1.2), rng.uniform(0.3, 1.6)
        inside = (np.abs(x - across) < wide / 2 * focal / away) & (y < eye * focal / away)
        inside &= (y > (eye - tall) * focal / away) & (away < depth)
        depth = np.where(inside, away, depth)
        colour = np.where(inside[..., None], rng.uniform(40, 255, 3), colour)
    right, down = x * depth / focal, y * depth / focal  # metres
    pattern = np.sin(12 * right + rng.uniform(0, 6)) * np.sin(12 * (down + depth) + rng.uniform(0, 6))
    light = (1 + 0.15 * pattern) * np.exp(-0.08 * depth)
    image = colour * light[..., None] + rng.normal(0, 4, (height, width, 3))
    return image.clip(0, 255).astype(np.uint8), depth
