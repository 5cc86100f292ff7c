"""The embedded segmentation set: scenes drawn by formula, with thin structures, occlusion and textured classes.

A class is a texture or a shape, never a colour: every colour is drawn at random. The first five classes fill regions
that are larger than a 16-pixel token, the last four are one to four pixels thin or a few pixels small, so that a head
on stride-16 tokens sees that they are there and cannot say where. Image i of a split depends on (seed, split, i, size)
and on nothing else: asking for more images leaves the earlier ones as they were.
"""

import io
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import datasets

CLASSES = ("smooth", "grain", "brick", "stripes", "cells", "wire", "lattice", "ring", "pebble")
SMOOTH, GRAIN, BRICK, STRIPES, CELLS, WIRE, LATTICE, RING, PEBBLE = range(len(CLASSES))
THIN = CLASSES[WIRE:]  # thinner or smaller than a token

SPLITS = {"train": 240, "val": 80}  # name -> default number of images
LUMA = np.array([0.299, 0.587, 0.114])
CONTRAST = 0.35  # least difference of luma between a thin structure and what it is drawn on


class SceneCanvas(NamedTuple):
    """What a scene is painted on; the arrays are changed in place."""

    image: np.ndarray  # (H, W, 3) float in [0, 1]
    mask: np.ndarray  # (H, W) uint8 class ids
    y: np.ndarray  # (H, W) pixel rows
    x: np.ndarray  # (H, W) pixel columns


def scenes(split: str = "train", *, size: int = 160, count: int | None = None, seed: int = 0) -> "datasets.Dataset":
    """Draw one split of the segmentation set.

    Args:
        split: "train" or "val"; the two never share an image, whatever the seed.
        size: height and width in pixels, at least 64.
        count: number of images; None for 240 (train) or 80 (val).
        seed: another seed, another set.

    Returns:
        A `datasets.Dataset` with the columns `image` (RGB) and `mask` (one channel, uint8 ids into `CLASSES`; no pixel
        is left unlabelled), both `datasets.Image`.

    Raises:
        ValueError: unknown split, or size below 64.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, the set has {sorted(SPLITS)}; name one of these")
    if size < 64:
        raise ValueError(f"size is {size} pixels, the smallest scene is 64; ask for a larger one")
    import datasets

    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    columns: dict[str, list[dict[str, object]]] = {"image": [], "mask": []}
    for index in range(SPLITS[split] if count is None else count):
        image, mask = scene(split, index, size=size, seed=seed)
        columns["image"].append({"bytes": _png(image), "path": None})
        columns["mask"].append({"bytes": _png(mask), "path": None})
    return datasets.Dataset.from_dict(columns, features=features)


def scene(split: str, index: int, *, size: int = 160, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw one scene: image (size, size, 3) uint8 and mask (size, size) uint8."""
    rng = np.random.default_rng([seed, list(SPLITS).index(split), index])
    y, x = np.mgrid[:size, :size].astype(np.float32)
    canvas = SceneCanvas(np.zeros((size, size, 3), np.float32), np.zeros((size, size), np.uint8), y, x)
    _paint_regions(rng, canvas)
    for paint in _objects(rng):  # painted back to front: a later object hides an earlier one
        paint(rng, canvas)
    return _photograph(rng, canvas), canvas.mask


# What is in a scene


def _paint_regions(rng: np.random.Generator, canvas: SceneCanvas) -> None:
    """Cover the canvas with two or three large regions that meet in wavy lines."""
    families = rng.permutation([SMOOTH, GRAIN, BRICK])
    everywhere = np.ones_like(canvas.x)
    _fill(rng, canvas, families[0], everywhere)
    for family in families[1 : rng.integers(2, 4)]:
        _fill(rng, canvas, family, _coverage(_wavy_half_plane(rng, canvas)))


def _objects(rng: np.random.Generator) -> list[Callable[[np.random.Generator, SceneCanvas], None]]:
    """Choose the painters of one scene in a random order: blobs rather behind, thin things rather before."""
    counts = {_paint_blob: rng.integers(2, 5), _paint_lattice: rng.integers(0, 3), _paint_wire: rng.integers(1, 5)}
    counts |= {_paint_ring: rng.integers(1, 5), _paint_pebbles: rng.integers(1, 3)}
    painters = [painter for painter, number in counts.items() for _ in range(number)]
    depth = [rng.random() + (0.0 if painter is _paint_blob else 0.6) for painter in painters]
    return [painters[i] for i in np.argsort(depth)]


def _paint_blob(rng: np.random.Generator, canvas: SceneCanvas) -> None:
    """A striped or cellular object, a sixth to a third of the canvas wide, with a soft shadow under it."""
    size = len(canvas.x)
    u, v, r, angle = _polar(rng, canvas)
    radius = size * rng.uniform(0.1, 0.22)
    if rng.random() < 0.5:  # a lobed outline, or a rotated box
        lobes = rng.integers(2, 6)
        distance = r - radius * (1 + rng.uniform(0.05, 0.3) * np.cos(lobes * angle + rng.uniform(0, 6.3)))
    else:
        distance = np.maximum(np.abs(u) - radius, np.abs(v) - radius * rng.uniform(0.5, 1.0))
    shadow = 0.45 * np.clip(0.5 - (distance - 2) / 8, 0, 1)
    canvas.image[:] *= (1 - shadow)[..., None]
    _fill(rng, canvas, rng.choice([STRIPES, CELLS]), _coverage(distance))


def _paint_wire(rng: np.random.Generator, canvas: SceneCanvas) -> None:
    """A sagging line from edge to edge, 1.2 to 2.6 pixels wide."""
    along, across = (canvas.x, canvas.y) if rng.random() < 0.6 else (canvas.y, canvas.x)
    t = along / len(along)
    start, end = rng.uniform(0.05, 0.95, 2).tolist()
    sag = rng.normal(0, 0.35)
    line = (start + (end - start) * t + 4 * sag * t * (1 - t)) * len(along)
    slope = (end - start) + 4 * sag * (1 - 2 * t)
    distance = np.abs(across - line) / np.sqrt(1 + slope**2)
    _stroke(rng, canvas, WIRE, _coverage(distance - rng.uniform(0.6, 1.3)))


def _paint_ring(rng: np.random.Generator, canvas: SceneCanvas) -> None:
    """An elliptic ring, 1.6 to 3.2 pixels thick; what is behind it shows through the hole."""
    u, v, _, _ = _polar(rng, canvas)
    radius = len(canvas.x) * rng.uniform(0.04, 0.11)
    r = np.hypot(u, v / rng.uniform(0.6, 1.0))
    _stroke(rng, canvas, RING, _coverage(np.abs(r - radius) - rng.uniform(0.8, 1.6)))


def _paint_lattice(rng: np.random.Generator, canvas: SceneCanvas) -> None:
    """A net of crossing bars, 1.4 to 2.4 pixels wide, inside a rotated frame; only the bars carry the class."""
    u, v, _, _ = _polar(rng, canvas)
    period, width = rng.uniform(8, 14), rng.uniform(0.7, 1.2)
    half_u, half_v = len(canvas.x) * rng.uniform(0.12, 0.28, 2)
    shear = rng.uniform(-0.4, 0.4)
    bars = np.minimum(_to_grid(u + shear * v, period), _to_grid(v, period)) - width
    frame = np.maximum(np.abs(u) - half_u, np.abs(v) - half_v)
    _stroke(rng, canvas, LATTICE, _coverage(np.maximum(bars, frame)))


def _paint_pebbles(rng: np.random.Generator, canvas: SceneCanvas) -> None:
    """A scatter of shaded balls, 4 to 9 pixels across."""
    size = len(canvas.x)
    centre, spread = rng.uniform(0.15, 0.85, 2) * size, size * rng.uniform(0.08, 0.2)
    for _ in range(rng.integers(4, 11)):
        cy, cx = centre + rng.normal(0, spread, 2)
        radius = rng.uniform(2.0, 4.5)
        distance = np.hypot(canvas.y - cy, canvas.x - cx) - radius
        shade = 0.75 + 0.25 * np.clip((cy - canvas.y + cx - canvas.x) / radius, -1, 1)
        _stroke(rng, canvas, PEBBLE, _coverage(distance), shade)


# How a class looks


def _fill(rng: np.random.Generator, canvas: SceneCanvas, family: int, coverage: np.ndarray) -> None:
    """Paint a texture family with two random colours where coverage (H, W) says so."""
    amount = _TEXTURES[family](rng, canvas)[..., None]  # (H, W, 1) in [0, 1]: how much of the second colour
    first, second = _two_colours(rng, 0.1 if family == SMOOTH else 0.25)
    _paint(canvas, family, coverage, first + (second - first) * amount)


def _stroke(
    rng: np.random.Generator, canvas: SceneCanvas, family: int, coverage: np.ndarray, shade: np.ndarray | float = 1.0
) -> None:
    """Paint a thin or small thing in one random colour whose luma differs from what lies under it."""
    under = float(np.mean(canvas.image[np.nonzero(coverage)] @ LUMA)) if coverage.any() else 0.5
    colour = rng.uniform(0.05, 0.95, 3)
    low, high = under - CONTRAST, under + CONTRAST
    go_high = high < 0.95 and (low < 0.05 or rng.random() < 0.5)
    luma = rng.uniform(high, 1.0) if go_high else rng.uniform(0.0, max(low, 0.0))
    colour = np.clip(colour + luma - colour @ LUMA, 0, 1)
    _paint(canvas, family, coverage, colour * np.broadcast_to(shade, coverage.shape)[..., None])


def _paint(canvas: SceneCanvas, family: int, coverage: np.ndarray, colour: np.ndarray) -> None:
    """Blend colour over the image; a pixel takes the class that covers more than half of it."""
    inside = np.nonzero(coverage)  # a thin thing touches few pixels: paint these only
    if len(inside[0]) < coverage.size // 8:
        canvas.image[inside] += coverage[inside][:, None] * (colour[inside] - canvas.image[inside])
    else:
        canvas.image[:] += coverage[..., None] * (colour - canvas.image)
    canvas.mask[coverage > 0.5] = family


def _smooth(rng: np.random.Generator, canvas: SceneCanvas) -> np.ndarray:
    """A straight ramp of colour."""
    ramp = _turned(rng, canvas)[0] / len(canvas.x)
    return np.clip(0.5 + 0.6 * ramp, 0, 1)


def _grain(rng: np.random.Generator, canvas: SceneCanvas) -> np.ndarray:
    """1/f noise, as foliage, gravel and grass have it: white noise whose spectrum is divided by f^beta."""
    size = len(canvas.x)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = np.inf  # no mean
    spectrum = np.fft.rfft2(rng.standard_normal((size, size))) / frequency ** rng.uniform(0.5, 1.0)
    noise = np.fft.irfft2(spectrum, s=(size, size))
    return np.clip(0.5 + 0.3 * noise / noise.std(), 0, 1)


def _brick(rng: np.random.Generator, canvas: SceneCanvas) -> np.ndarray:
    """Rows of bricks with joints, every second row shifted by half a brick."""
    u, v = _turned(rng, canvas, spread=0.3)
    height = rng.uniform(7, 11)
    width = height * rng.uniform(1.4, 2.2)
    row = np.floor(v / height)
    joints = np.minimum(_to_grid(v, height), _to_grid(u + 0.5 * width * (row % 2), width))
    return 0.8 * _coverage(joints - rng.uniform(0.7, 1.2)) + 0.1


def _stripes(rng: np.random.Generator, canvas: SceneCanvas) -> np.ndarray:
    """A grating of any direction, 4.5 to 9 pixels per period, slightly bent."""
    u, v = _turned(rng, canvas)
    phase = u + 2.0 * np.sin(v / rng.uniform(8, 20))
    return 0.5 + 0.5 * np.tanh(3 * np.sin(2 * math.pi * phase / rng.uniform(4.5, 9)))


def _cells(rng: np.random.Generator, canvas: SceneCanvas) -> np.ndarray:
    """Voronoi cells around jittered grid points, each cell in its own mixture of the two colours."""
    pitch = rng.uniform(7, 11)
    n = int(len(canvas.x) / pitch) + 4
    points = (np.mgrid[:n, :n] + rng.uniform(0.05, 0.95, (2, n, n)) - 1).astype(np.float32)  # (2, n, n) as (y, x)
    points *= np.float32(pitch)
    tone = rng.random((n, n), np.float32)
    row, column = (canvas.y / pitch).astype(int) + 1, (canvas.x / pitch).astype(int) + 1
    nearest, amount = np.full_like(canvas.x, np.inf), np.zeros_like(canvas.x)
    for i in (-1, 0, 1):
        for j in (-1, 0, 1):
            py, px = points[:, row + i, column + j]
            distance = (canvas.y - py) ** 2 + (canvas.x - px) ** 2
            amount = np.where(distance < nearest, tone[row + i, column + j], amount)
            nearest = np.minimum(nearest, distance)
    return amount


_TEXTURES = {SMOOTH: _smooth, GRAIN: _grain, BRICK: _brick, STRIPES: _stripes, CELLS: _cells}


# Geometry and colour


def _coverage(distance: np.ndarray) -> np.ndarray:
    """Signed distance to an outline in pixels, negative inside -> covered share of each pixel, in [0, 1]."""
    return np.clip(0.5 - distance, 0, 1)


def _to_grid(u: np.ndarray, period: float) -> np.ndarray:
    """Distance to the nearest multiple of the period."""
    return np.abs(u - period * np.round(u / period))


def _turned(rng: np.random.Generator, canvas: SceneCanvas, spread: float = math.pi) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (u, v) about the canvas' centre, turned by an angle in [-spread, spread] radians."""
    angle, centre = rng.uniform(-spread, spread), len(canvas.x) / 2
    x, y = canvas.x - centre, canvas.y - centre
    return x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)


def _polar(rng: np.random.Generator, canvas: SceneCanvas) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Turned coordinates (u, v) about a random point of the canvas, with their radius and angle."""
    u, v = _turned(rng, canvas)
    du, dv = rng.uniform(-0.4, 0.4, 2) * len(canvas.x)
    u, v = u - du, v - dv
    return u, v, np.hypot(u, v), np.arctan2(v, u)


def _wavy_half_plane(rng: np.random.Generator, canvas: SceneCanvas) -> np.ndarray:
    """Signed distance to a wavy line across the canvas."""
    u, v = _turned(rng, canvas)
    size = len(canvas.x)
    height, length, phase = rng.uniform(0.0, 0.06), rng.uniform(0.3, 1.0), rng.uniform(0, 6.3)
    return v + size * height * np.sin(2 * math.pi * u / (size * length) + phase) - size * rng.uniform(-0.15, 0.25)


def _two_colours(rng: np.random.Generator, contrast: float) -> np.ndarray:
    """Two random colours (2, 3) whose luma differs by at least the contrast."""
    while True:  # a pair is accepted with a probability above one half, so this ends soon
        colours = rng.uniform(0.05, 0.95, (2, 3))
        if abs(colours[0] @ LUMA - colours[1] @ LUMA) >= contrast:
            return colours


def _photograph(rng: np.random.Generator, canvas: SceneCanvas) -> np.ndarray:
    """Light the scene unevenly, add sensor noise, and round to (H, W, 3) uint8."""
    light = 1 + rng.uniform(0.0, 0.35) * _turned(rng, canvas)[0] / len(canvas.x)
    light = light * rng.uniform(0.75, 1.1)
    noise = rng.uniform(0.01, 0.04) * rng.standard_normal(canvas.image.shape, np.float32)
    return np.round(255 * np.clip(canvas.image * light[..., None] + noise, 0, 1)).astype(np.uint8)


def _png(array: np.ndarray) -> bytes:
    """Encode as PNG; a low compression level, for the bytes live in memory only."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="png", compress_level=1)
    return buffer.getvalue()
