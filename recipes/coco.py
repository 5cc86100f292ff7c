"""Boxes and masks in COCO's format: read, and checked before anything is trained."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from torchvision import tv_tensors

from adaptkit.core.near import beside
from adaptkit.pictures import CHANNELS, check_frame, framed, read

from .labels import warn_unseen
from .summary import Summary, of_counts

MOST = 2000  # files that are opened and masks that are drawn before training; the rest is checked by its JSON alone


class Instances(NamedTuple):
    """One split: an entry of ``rows`` per image, and the categories, of which number i has label i + 1."""

    rows: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    truth: dict[str, Any]  # the JSON, for scoring: of its annotations those that were not left out

    def labels(self) -> list[list[int]]:
        """Of each image, the number of the category of each object."""
        return [[one["label"] - 1 for one in row["instances"]] for row in self.rows]


# --------------------------------------------------------------------------------------------------------- read


def locate(name: str, images: str | None, flag: str) -> tuple[Path, Path]:
    """Return the annotations and the folder of images that the user means by a JSON file, or by a folder of both."""
    path = Path(name) / "annotations.json" if Path(name).is_dir() else Path(name)
    folder = Path(images) if images else path.parent / "images"
    if not folder.is_dir():
        raise ValueError(f"{flag}: there is no folder {folder}; name the folder of the images with {flag}-images")
    return path, folder


def read_json(path: Path, keys: tuple[str, ...], flag: str) -> dict[str, Any]:
    """Read a file of COCO's format; a ``ValueError`` where it is none."""
    if not path.is_file():
        raise ValueError(f"{flag}: there is no file {path}{beside(path)}")
    try:
        data = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag}: {path} is not JSON ({error})") from error
    missing = [k for k in keys if not isinstance(data, dict) or not isinstance(data.get(k), list)]
    if missing:
        raise ValueError(f"{flag}: {path} has no list {', '.join(missing)}; COCO's format has {', '.join(keys)}")
    for key in ("images", "categories"):
        ids = [entry.get("id") for entry in data[key]]
        strange = next((i for i in ids if i is not None and type(i) is not int), None)
        if strange is not None:
            raise ValueError(
                f"{flag}: {path}: {key} have the id {strange!r}, and COCO's are whole numbers: number them, in the "
                "annotations too"
            )
        if None in ids or len(set(ids)) != len(ids):
            raise ValueError(f"{flag}: {path}: {key} without an id, or with one that is given twice")
        if not ids:
            raise ValueError(f"{flag}: {path} holds no {key}")
    return data


def check_images(rows: list[dict[str, Any]], flag: str) -> None:
    """Every file must be there, and the first ``MOST`` must open at the size that the JSON says."""
    lost = [row["path"] for row in rows if not row["path"].is_file()]
    if lost:
        raise ValueError(f"{flag}: {len(lost)} of {len(rows)} images are missing, e.g. {lost[0]}")
    for row in rows[:MOST]:
        check_frame(read(row["path"], pixels=False, channels=channels_of(row)), size_of(row))


@functools.lru_cache(maxsize=4)  # a run asks for each split several times
def read_instances(
    images: Path, annotations: Path, masks: bool, flag: str, skip: bool = False, channels: int = CHANNELS
) -> Instances:
    """Read ``annotations``, whose ``file_name``s lie in the folder ``images``.

    Args:
        images, annotations: a folder and a JSON file in COCO's detection format.
        masks: every instance must have a segmentation.
        flag: how the user named this split, for the errors.
        skip: leave out boxes and masks without area instead of refusing them.
        channels: of an image.

    Raises ``ValueError`` for files that are missing or no images, for unknown images and categories, for numbers that
    are no box, masks of another size, and instances without area, naming the first.
    """
    data = read_json(annotations, ("images", "annotations", "categories"), flag)
    return instances_of(data, images, annotations, masks, flag, skip, channels=channels)


def instances_of(
    data: dict[str, Any],
    images: Path,
    path: Path,
    masks: bool,
    flag: str,
    skip: bool,
    wheres: list[str] | None = None,
    channels: int = CHANNELS,
) -> Instances:
    """Check what a file of COCO's format says, and make rows of it; ``wheres`` names its annotations for errors."""
    categories = sorted(data["categories"], key=lambda c: c["id"])
    label = {c["id"]: i + 1 for i, c in enumerate(categories)}
    rows = {e["id"]: {**image_row(e, images, path, flag, channels), "instances": []} for e in data["images"]}
    check_images(list(rows.values()), flag)
    if not data["annotations"]:
        raise ValueError(f"{flag}: {path} holds no annotations")
    flat, left = [], []
    for n, entry in enumerate(data["annotations"]):
        where = wheres[n] if wheres else f"{flag}: {path}, annotation {entry.get('id', f'number {n}')}"
        row = rows.get(entry.get("image_id"))
        if row is None:
            raise ValueError(f"{where}: image_id {entry.get('image_id')!r} is not among the images")
        if entry.get("category_id") not in label:
            raise ValueError(f"{where}: category_id {entry.get('category_id')!r} is not among the categories")
        shape, crowd, boxed = entry.get("segmentation"), entry.get("iscrowd"), entry.get("bbox") is not None
        if masks or (crowd and shape and not boxed):
            check_segmentation(shape, row, where)
        if crowd and shape and not boxed:
            entry = {**entry, "bbox": rle_box(shape, row)}
        box = clipped(entry.get("bbox"), row, where)
        if crowd:  # a region of many; scoring ignores what is found there
            left.append(entry)
            continue
        drawn = masks and n < MOST  # drawing the masks of all of COCO takes minutes
        if min(box[2] - box[0], box[3] - box[1]) <= 0 or (drawn and not rle_area(shape, row)):
            flat.append(where)
            continue
        left.append(entry)
        shape = shape if masks else None
        row["instances"].append({"box": box, "label": label[entry["category_id"]], "shape": shape})
    if flat and not skip:
        raise ValueError(
            f"{flat[0]} has no area inside its image ({len(flat)} such annotations); mend the file, or leave them out "
            "with --skip-degenerate"
        )
    if not any(row["instances"] for row in rows.values()):
        raise ValueError(f"{flag}: {path} holds no instance that can be trained on")
    return Instances(list(rows.values()), categories, {**data, "annotations": left})


def image_row(entry: dict[str, Any], folder: Path, path: Path, flag: str, channels: int) -> dict[str, Any]:
    """An entry of ``images`` -> path, channels, id, height, width."""
    if not all(entry.get(k) for k in ("file_name", "height", "width")):
        raise ValueError(f"{flag}: {path}, image {entry['id']} needs a file_name, a height and a width: {entry}")
    for side in ("height", "width"):
        if not isinstance(entry[side], int | float) or entry[side] != int(entry[side]):
            raise ValueError(
                f"{flag}: {path}, image {entry['id']}: {side} {entry[side]!r} is no whole number of pixels"
            )
    sizes = {"height": int(entry["height"]), "width": int(entry["width"])}
    return {"path": folder / entry["file_name"], "channels": channels, "id": entry["id"], **sizes}


def clipped(bbox: Any, row: dict[str, Any], where: str) -> list[float]:
    """COCO's (x, y, width, height) -> (x1, y1, x2, y2) inside the image."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(isinstance(v, int | float) for v in bbox):
        raise ValueError(f"{where}: bbox {bbox!r} is not four numbers (x, y, width, height)")
    if not all(math.isfinite(v) for v in bbox):
        raise ValueError(f"{where}: bbox {bbox!r} is not finite")
    x, y, w, h = bbox
    return [max(0.0, x), max(0.0, y), min(float(row["width"]), x + w), min(float(row["height"]), y + h)]


def check_segmentation(shape: Any, row: dict[str, Any], where: str) -> None:
    """Polygons of three points and more, or a run-length code of the image's size."""
    if not shape:
        raise ValueError(f"{where} has no segmentation: use a model of boxes alone (--model faster-rcnn)")
    if isinstance(shape, dict):
        if list(shape.get("size", [])) != [row["height"], row["width"]] or "counts" not in shape:
            raise ValueError(
                f"{where}: the segmentation is coded for size {shape.get('size')}, its image is "
                f"{row['height']} x {row['width']}"
            )
    elif not all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in shape):
        raise ValueError(f"{where}: a polygon needs three points or more, x and y of each")


def rle(shape: Any, row: dict[str, Any]) -> dict[str, Any]:
    """Polygons or a run-length code -> a compressed run-length code."""
    from faster_coco_eval import mask

    size = row["height"], row["width"]
    if isinstance(shape, list):
        return mask.merge(mask.frPyObjects(shape, *size))
    return mask.frPyObjects(shape, *size) if isinstance(shape["counts"], list) else shape


def rle_area(shape: Any, row: dict[str, Any]) -> int:
    """Pixels of a segmentation."""
    from faster_coco_eval import mask

    return int(mask.area(rle(shape, row)))


def rle_box(shape: Any, row: dict[str, Any]) -> list[float]:
    """The box of a segmentation, (x, y, width, height)."""
    from faster_coco_eval import mask

    return [float(v) for v in mask.toBbox(rle(shape, row))]


def called(categories: list[dict[str, Any]]) -> list[str]:
    """Return the names of categories, the id of one that has none."""
    return [str(c.get("name", c["id"])) for c in categories]


def size_of(row: dict[str, Any]) -> tuple[int, int]:
    """Return height and width of the image, as the annotations have it."""
    return row["height"], row["width"]


def channels_of(row: dict[str, Any]) -> int:
    """Return the channels of the image; a row that does not say has three."""
    return int(row.get("channels", CHANNELS))


def picture_of(row: dict[str, Any]) -> tv_tensors.Image:
    """Read the image of a row, (C, H, W)."""
    return framed(read(row["path"], channels=channels_of(row)), size_of(row))


# ------------------------------------------------------------------------------------------ a look before training


def warn_unseen_categories(data: Any) -> None:
    """Warn of categories of ``--train`` without an object; ``data``: :class:`Instances`, or panoptic ``Segments``."""
    seen = {label for labels in data.labels() for label in labels}
    unseen = [name for i, name in enumerate(called(data.categories)) if i not in seen]
    where = f"{len(data.rows)} images"
    warn_unseen(unseen, len(data.categories), "--train", where, "check the categories of the JSON file")


def summary_of(data: Any, unit: str, train: bool) -> Summary:
    """Return what the same holds, of this unit."""
    sizes = [size_of(row) for row in data.rows]
    return of_counts("--train" if train else "--val", unit, data.labels(), sizes, called(data.categories))
