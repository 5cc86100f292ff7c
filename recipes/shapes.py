"""A small data set in COCO's formats, drawn by formula: for a first run, and for tests.

    python -m recipes.shapes --out shapes --train 240 --val 60

Each split is a folder with `images/`, `annotations.json` (boxes and polygons), `panoptic.json` and its folder
`panoptic/` of coloured PNG files. Things are discs, squares and triangles, in any colour and partly hidden; stuff is
what they lie on, a smooth or a striped ground. A class is a shape or a texture, never a colour.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from adaptkit.hub.write import check_writable, write_atomic

from .options import seed_of

CATEGORIES = [
    {"id": 1, "name": "disc", "isthing": 1},
    {"id": 2, "name": "square", "isthing": 1},
    {"id": 3, "name": "triangle", "isthing": 1},
    {"id": 7, "name": "smooth ground", "isthing": 0},
    {"id": 8, "name": "striped ground", "isthing": 0},
]
CORNERS = {1: 40, 2: 4, 3: 3}  # a disc is a polygon of many corners


def draw(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """Return image (H, W, 3) uint8, segment ids (H, W) int32, and of each segment its id, category and polygon."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    image = np.broadcast_to(rng.uniform(40, 215, 3), (height, width, 3)).copy()
    stripes = rng.random() < 0.5
    if stripes:
        angle, period = rng.uniform(0, math.pi), rng.uniform(4, 8)
        wave = np.sin((x * math.cos(angle) + y * math.sin(angle)) * 2 * math.pi / period)
        image += 40 * np.sign(wave)[..., None]
    ids = np.ones((height, width), np.int32)
    segments: list[dict[str, Any]] = [{"id": 1, "category_id": 8 if stripes else 7, "polygon": [], "hidden": True}]
    for number in range(2, 2 + rng.integers(1, 5)):
        category = int(rng.choice(list(CORNERS)))
        radius = rng.uniform(0.10, 0.24) * min(height, width)
        centre = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
        turn, n = rng.uniform(0, 2 * math.pi), CORNERS[category]
        angles = [turn + 2 * math.pi * i / n for i in range(n)]
        polygon = [(centre[0] + radius * math.cos(a), centre[1] + radius * math.sin(a)) for a in angles]
        inside = Image.new("1", (width, height))
        ImageDraw.Draw(inside).polygon(polygon, fill=1)
        hit = np.asarray(inside)
        colour = rng.uniform(0, 255, 3)
        while np.abs(colour - image[hit].mean(0)).sum() < 120:
            colour = rng.uniform(0, 255, 3)
        image[hit] = colour + 12 * np.sin(x / 5)[hit][:, None]
        for segment in segments:
            segment["hidden"] |= bool((hit & (ids == segment["id"])).any())
        ids[hit] = number
        flat = [round(v, 2) for p in polygon for v in p]
        segments.append({"id": number, "category_id": category, "polygon": flat, "hidden": False})
    image += rng.normal(0, 6, image.shape)
    return image.clip(0, 255).astype(np.uint8), ids, segments


def runs(mask: np.ndarray) -> dict[str, Any]:
    """COCO's run lengths of a mask (H, W): column by column, the first run is of zeros."""
    flat = np.concatenate([[0], mask.T.reshape(-1).astype(np.int8), [2]])
    ends = np.flatnonzero(np.diff(flat))
    return {"size": list(mask.shape), "counts": np.diff(ends, prepend=0).tolist()}


def write(folder: str | Path, count: int, height: int = 96, width: int = 128, seed: int = 0) -> Path:
    """Draw one split of ``count`` images; returns its folder."""
    path = check_writable(folder)
    for name in ("images", "panoptic"):
        (path / name).mkdir(exist_ok=True)
    images, instances, panoptic = [], [], []
    for i in range(count):
        image, ids, segments = draw(np.random.default_rng([seed, i]), height, width)
        Image.fromarray(image).save(path / "images" / f"{i:05d}.png")
        coded = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
        Image.fromarray(coded).save(path / "panoptic" / f"{i:05d}.png")
        images.append({"id": i + 1, "file_name": f"{i:05d}.png", "height": height, "width": width})
        seen = []
        for segment in segments:
            rows, columns = np.nonzero(ids == segment["id"])
            if len(rows) == 0:
                continue  # wholly hidden
            left, top = int(columns.min()), int(rows.min())
            box = [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top]
            entry = {"category_id": segment["category_id"], "bbox": box, "area": len(rows), "iscrowd": 0}
            seen.append({"id": segment["id"], **entry})
            if segment["polygon"]:
                shape = runs(ids == segment["id"]) if segment["hidden"] else [segment["polygon"]]
                instances.append({**entry, "id": len(instances) + 1, "image_id": i + 1, "segmentation": shape})
        panoptic.append({"image_id": i + 1, "file_name": f"{i:05d}.png", "segments_info": seen})
    things = [c for c in CATEGORIES if c["isthing"]]
    for name, entries, categories in (("annotations", instances, things), ("panoptic", panoptic, CATEGORIES)):
        content = {"images": images, "annotations": entries, "categories": categories}
        write_atomic(path / f"{name}.json", json.dumps(content).encode())
    return path


def main() -> None:
    p = argparse.ArgumentParser(prog="shapes", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--out", default="shapes")
    p.add_argument("--train", type=int, default=240, help="images")
    p.add_argument("--val", type=int, default=60, help="images")
    p.add_argument("--size", type=int, nargs=2, default=(96, 128), metavar=("H", "W"))
    p.add_argument("--seed", type=seed_of, default=0)
    args = p.parse_args()
    for split, seed in (("train", 2 * args.seed), ("val", 2 * args.seed + 1)):
        print(write(Path(args.out) / split, getattr(args, split), *args.size, seed))


if __name__ == "__main__":
    main()
