"""Panoptic segments in COCO's format: read, checked before anything is trained, made into samples."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from adaptkit.core.view import Source
from adaptkit.pictures import CHANNELS, read, turned

from .augment import colours
from .coco import MOST, check_images, image_row, picture_of, read_json, size_of
from .normalisation import normalise
from .order import Rows
from .scores.panoptic import CROWD, NOTHING


class Segments(NamedTuple):
    """One split: an entry of ``rows`` per image, and the categories, of which number i has label i."""

    rows: list[dict[str, Any]]
    categories: list[dict[str, Any]]

    def labels(self) -> list[list[int]]:
        """Of each image, the number of the category of each segment, crowds left out."""
        return [[label for label, crowd in row["segments"].values() if not crowd] for row in self.rows]


def locate(name: str, images: str | None, maps: str | None, flag: str) -> tuple[Path, Path, Path]:
    """Return the JSON file, the folder of images and that of the PNG files; a folder alone may hold all three."""
    path = Path(name) / "panoptic.json" if Path(name).is_dir() else Path(name)
    folder = Path(images) if images else path.parent / "images"
    coded = Path(maps) if maps else path.with_suffix("")  # as COCO has it: panoptic_val2017.json, panoptic_val2017/
    for place, option in ((folder, f"{flag}-images"), (coded, f"{flag}-maps")):
        if not place.is_dir():
            raise ValueError(f"{flag}: there is no folder {place}; name it with {option}")
    return path, folder, coded


@functools.lru_cache(maxsize=4)  # a run asks for each split several times
def read_segments(path: Path, images: Path, maps: Path, flag: str, channels: int = CHANNELS) -> Segments:
    """Read the JSON file ``path``, whose images of so many channels lie in ``images``, and whose PNG files in ``maps``.

    Raises ``ValueError`` for files that are missing or of another size, for unknown images and categories, and for
    segments that the JSON and the PNG file do not share.
    """
    data = read_json(path, ("images", "annotations", "categories"), flag)
    categories = sorted(data["categories"], key=lambda c: c["id"])
    lacking = [c["id"] for c in categories if "isthing" not in c]
    if lacking:
        raise ValueError(
            f"{flag}: {path}: category {lacking[0]} does not say isthing 0 or 1; is this a detection file?"
        )
    label = {c["id"]: i for i, c in enumerate(categories)}
    entries = {e["id"]: image_row(e, images, path, flag, channels) for e in data["images"]}
    rows = []
    for n, annotation in enumerate(data["annotations"]):
        where = f"{flag}: {path}, annotation number {n}"
        if annotation.get("image_id") not in entries:
            raise ValueError(f"{where}: image_id {annotation.get('image_id')!r} is not among the images")
        if "file_name" not in annotation or not isinstance(annotation.get("segments_info"), list):
            raise ValueError(f"{where} has no file_name or no segments_info; is this a detection file?")
        for segment in annotation["segments_info"]:
            if segment.get("category_id") not in label:
                raise ValueError(f"{where}: category_id {segment.get('category_id')!r} is not among the categories")
        segments = {s["id"]: (label[s["category_id"]], bool(s.get("iscrowd"))) for s in annotation["segments_info"]}
        rows.append({**entries[annotation["image_id"]], "map": maps / annotation["file_name"], "segments": segments})
    if not rows:
        raise ValueError(f"{flag}: {path} holds no annotations")
    check_images(rows, flag)
    check_maps(rows, flag)
    return Segments(rows, categories)


def check_maps(rows: list[dict[str, Any]], flag: str) -> None:
    """Every PNG file must be there, and the first ``MOST`` must show the segments that the JSON lists."""
    lost = [row["map"] for row in rows if not row["map"].is_file()]
    if lost:
        raise ValueError(f"{flag}: {len(lost)} of {len(rows)} panoptic PNG files are missing, e.g. {lost[0]}")
    for row in rows[:MOST]:
        ids = segment_ids(row["map"], size_of(row))
        shown, listed = {int(v) for v in np.unique(ids)} - {0}, set(row["segments"])
        if shown != listed:
            more = f"shows {sorted(shown - listed)[:3]} that the JSON does not list" if shown - listed else ""
            less = f"does not show {sorted(listed - shown)[:3]} that the JSON lists" if listed - shown else ""
            raise ValueError(f"{flag}: {row['map']} {' and '.join(s for s in (more, less) if s)}")


def segment_ids(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """Read a panoptic PNG file: (H, W) int64 ids, red + 256 green + 65536 blue; 0 is unlabelled.

    Raises ``ValueError`` where it is no picture of eight bits a colour, or of another ``size`` (H, W) than its image.
    """
    picture = read(path)
    if picture.wide is not None or picture.image.mode not in ("RGB", "RGBA", "P"):
        raise ValueError(
            f"{picture.name} has the mode {picture.image.mode}{' in 16 bits' if picture.wide else ''}: a panoptic map "
            "has colours of 8 bits (red + 256 green + 65536 blue is the id of a segment); is it a mask of classes?"
        )
    coded = turned(np.asarray(picture.image.convert("RGB")), picture.turn).astype(np.int64)
    if size is not None and coded.shape[:2] != size:
        raise ValueError(
            f"{picture.name} is {coded.shape[0]} x {coded.shape[1]} pixels, its image {size[0]} x {size[1]}; "
            "pair it with its own image"
        )
    return coded @ np.array([1, 256, 65536])


def sized(size: tuple[int, int], train: bool, channels: int) -> list[Any]:
    """Steps from an image and its masks to one size; in training a random window of it, mirrored and coloured.

    Of other than three channels the values stay as they are.
    """
    steps: list[Any] = [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)]
    if not train:
        return [*steps, v2.Resize(size, antialias=True)]
    aspect = size[1] / size[0]
    return [
        *steps,
        v2.RandomResizedCrop(size, scale=(0.4, 1.0), ratio=(0.8 * aspect, 1.25 * aspect), antialias=True),
        v2.RandomHorizontalFlip(),
        *colours("medium", channels),
    ]


class Resized(Rows):
    """Rows of annotated images, all made into one size (:func:`sized`) and normalised."""

    def __init__(self, data: Any, size: tuple[int, int], source: Source, seed: int = 0, train: bool = False) -> None:
        """``data``: :class:`Segments`, or ``coco.Instances``."""
        super().__init__(data.rows, seed)
        self.train, self.channels = train, len(source.mean)
        self.transform = v2.Compose([*sized(size, train, self.channels), normalise(source)])


class PanopticData(Resized):
    """Samples (image (C, h, w) normalised, target), all resized to one size; ``target`` is a dict.

    Training: ``masks`` (n, h, w) in 0..1 and ``labels`` (n,) of the segments that are left after crop and flip, crowds
    left out. Otherwise ``truth`` (H, W, 2), label and segment id of each pixel at the image's own size, as
    :func:`recipes.scores.panoptic.counted` takes it.
    """

    def truth(self, row: dict[str, Any]) -> Tensor:
        """Row -> (H, W, 2) int64, label and segment id of each pixel."""
        ids = torch.from_numpy(segment_ids(row["map"], size_of(row)))
        labels = torch.full_like(ids, NOTHING)
        for number, (label, crowd) in row["segments"].items():
            labels[ids == number] = CROWD - label if crowd else label
        return torch.stack([labels, ids], -1)

    def make(self, row: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Row -> sample."""
        image = picture_of(row)
        if not self.train:
            return self.transform(image).as_subclass(Tensor), {"truth": self.truth(row)}
        ids = torch.from_numpy(segment_ids(row["map"], size_of(row)))
        counted = {k: label for k, (label, crowd) in row["segments"].items() if not crowd}
        image, mask = self.transform(image, tv_tensors.Mask(ids))
        left = [k for k in counted if bool((mask == k).any())]
        masks = torch.stack([mask == k for k in left]) if left else torch.zeros(0, *mask.shape[-2:])
        target = {"masks": masks.as_subclass(Tensor).float(), "labels": torch.tensor([counted[k] for k in left]).long()}
        return image.as_subclass(Tensor), target


def stacked(batch: list[tuple[Tensor, Any]]) -> tuple[Tensor, list[Any]]:
    """Samples -> (images (B, C, h, w), list of targets)."""
    images, targets = zip(*batch)
    return torch.stack(images), list(targets)
