"""Boxes and polygons in YOLO's format: a text file beside each image, ``data.yaml`` for the classes and the splits.

    data.yaml               path, train, val, test: folders of images, or lists of them in a .txt; names of the classes
    images/**/a.jpg         the pictures
    labels/**/a.txt         a line for each object: CLASS X Y WIDTH HEIGHT, or CLASS X1 Y1 X2 Y2 X3 Y3 ...; in 0..1

``--train`` is ``data.yaml``, the folder that holds it, or a folder of a split (``train/images``, ``train/labels``) with
``data.yaml`` in it or above. An image without a text file, or with an empty one, has no object. What is read is made
into COCO's format, and checked and scored as that is.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

from adaptkit.pictures import CHANNELS, read

from .coco import Instances, instances_of
from .layouts import SUFFIXES, pictures, split_of

YAML = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
KEYS = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}
SLACK = 0.01  # by which a corner may lie outside of the image; more is no rounding


def is_yolo(name: str) -> bool:
    """Whether a name means a set in YOLO's format; a folder with ``annotations.json`` is one of COCO's."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return True
    return path.is_dir() and not (path / "annotations.json").is_file() and _yaml_of(path) is not None


def has_splits(name: str) -> bool:
    """Whether one name means training and validation."""
    path = Path(name)
    found = path if path.is_file() else _yaml_of(path, above=False)
    return is_yolo(name) and found is not None and any(_read(found).get(k) for k in KEYS["validation"])


def _yaml_of(folder: Path, above: bool = True) -> Path | None:
    places = (folder, folder.parent) if above and split_of(folder.name) else (folder,)
    return next((place / name for place in places for name in YAML if (place / name).is_file()), None)


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        said = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(said, dict):
        raise ValueError(f"{path} holds no 'key: value' lines")
    return said


def _names(path: Path, said: dict[str, Any]) -> list[str]:
    names = said.get("names")
    if isinstance(names, dict):
        if sorted(names) != list(range(len(names))):
            raise ValueError(f"{path}: the numbers of names are {sorted(names)}; give 0..{len(names) - 1}")
        names = [names[k] for k in range(len(names))]
    if not isinstance(names, list) or not names:
        raise ValueError(f"{path} has no names of classes; give names: [car, ...]")
    if said.get("nc") not in (None, len(names)):
        raise ValueError(f"{path}: nc is {said['nc']}, and there are {len(names)} names")
    if said.get("kpt_shape"):
        raise ValueError(f"{path} is of keypoints (kpt_shape), whose lines are neither boxes nor polygons")
    return [str(name) for name in names]


# -------------------------------------------------------------------------------------------------------- images


def _images(places: list[Path], split: str, yaml: Path, flag: str) -> list[Path]:
    """The pictures in folders, or in lists of them."""
    found: list[Path] = []
    for place in places:
        if place.suffix == ".txt" and place.is_file():
            lines = [line.strip() for line in place.read_text().splitlines() if line.strip()]
            found += [Path(line) if Path(line).is_absolute() else place.parent / line for line in lines]
        elif place.is_dir():
            found += pictures(place, SUFFIXES - {".npy"})  # which its trainers keep beside the images, as a cache
        else:
            raise ValueError(f"{flag}: {yaml} names {place} for the split {split!r}, and there is no such folder")
    if not found:
        raise ValueError(f"{flag}: {', '.join(map(str, places))} holds no images")
    return list(dict.fromkeys(found))


def _places(name: str, split: str, yaml: Path, said: dict[str, Any], flag: str) -> list[Path]:
    """Where the pictures of a split are: what data.yaml says, or the folder that is named below it."""
    folder = Path(name)
    if folder.is_dir() and folder != yaml.parent:
        return [folder / "images" if (folder / "images").is_dir() else folder]
    key = next((k for k in KEYS[split] if said.get(k)), None)
    if key is None:
        raise ValueError(f"{flag}: {yaml} names no images for the split {split!r}; it has {', '.join(map(str, said))}")
    given = said[key] if isinstance(said[key], list) else [said[key]]
    root = yaml.parent / str(said.get("path") or "")
    root = root if root.is_dir() else yaml.parent  # written on another machine
    # Roboflow writes ../train/images and means train/images beside data.yaml.
    return [next((p for p in (root / one, yaml.parent / one.removeprefix("../")) if p.exists()), root / one) for one in
            map(str, given)]  # fmt: skip


def labels_of(image: Path) -> Path:
    """``images/a.jpg`` -> ``labels/a.txt``, by the last folder of that name; else the text lies beside the picture."""
    parts = list(image.parts)
    if "images" in parts[:-1]:
        parts[len(parts) - 2 - parts[-2::-1].index("images")] = "labels"
    return Path(*parts).with_suffix(".txt")


# ------------------------------------------------------------------------------------------------------- objects


def objects_of(file: Path, size: tuple[int, int], classes: int) -> list[tuple[dict[str, Any], str]]:
    """Read the objects of one image of ``size`` (H, W): entries of COCO's format, and where each stands.

    Raises ``ValueError`` for a line that is neither a box nor a polygon, an unknown class, and values outside 0..1.
    """
    found = []
    try:
        lines = file.read_text().splitlines() if file.is_file() else []
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            label, *values = map(float, line.split())
        except ValueError:
            raise ValueError(f"{where}: {line.strip()[:60]!r} is not numbers") from None
        if len(values) != 4 and (len(values) < 6 or len(values) % 2):
            raise ValueError(
                f"{where} has {len(values)} numbers after the class: a box has 4 (x, y, width, height), a polygon 6 or "
                "more, two of each corner"
            )
        if not label.is_integer() or not 0 <= label < classes:
            raise ValueError(f"{where}: class {label:g} is outside 0..{classes - 1}, the names in data.yaml")
        found.append((_object(int(label), values, size, where), where))
    return found


def _object(label: int, values: list[float], size: tuple[int, int], where: str) -> dict[str, Any]:
    height, width = size
    corners = values
    if len(values) == 4:
        x, y, w, h = values
        corners = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
    if not all(math.isfinite(v) for v in values):
        raise ValueError(f"{where}: the numbers are not finite")
    if min(corners) < -SLACK or max(corners) > 1 + SLACK:
        pixels = "; divide pixels by the width and the height of the image" if max(corners) > 2 else ""
        raise ValueError(f"{where}: {min(corners):g}..{max(corners):g} is outside of the image, 0..1{pixels}")
    xs, ys = ([min(1.0, max(0.0, v)) * side for v in corners[k::2]] for k, side in ((0, width), (1, height)))
    entry: dict[str, Any] = {"category_id": label, "iscrowd": 0}
    if len(values) > 4:
        entry["segmentation"] = [[v for point in zip(xs, ys) for v in point]]
    return {**entry, "bbox": [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]}


@functools.lru_cache(maxsize=4)  # a run asks for each split several times
def read_yolo(name: str, split: str, masks: bool, flag: str, skip: bool = False, channels: int = CHANNELS) -> Instances:
    """Read a split of a set in YOLO's format.

    Args:
        name: ``data.yaml``, its folder, or the folder of a split.
        split: ``train``, ``validation`` or ``test``.
        masks: every object must be a polygon.
        flag: how the user named this split, for the errors.
        skip: leave out boxes and polygons without area instead of refusing them.
        channels: of an image, TIFF where they are not three: its trainers keep caches in ``.npy``.

    Raises ``ValueError`` for what is missing or wrong, naming the file and the line.
    """
    yaml = Path(name) if Path(name).is_file() else _yaml_of(Path(name))
    if yaml is None:
        raise ValueError(f"{flag}: there is no file {Path(name) if Path(name).suffix else Path(name) / YAML[0]}")
    said = _read(yaml)
    names, places = _names(yaml, said), _places(name, split, yaml, said, flag)
    images = _images(places, split, yaml, flag)
    texts = {image: labels_of(image) for image in images}
    if not any(text.is_file() for text in texts.values()):
        raise ValueError(f"{flag}: none of {len(images)} images has a text file, e.g. {texts[images[0]]}")
    if not any(place.suffix == ".txt" for place in places):  # a list names some images of a folder
        _check_lonely(texts, flag)
    entries, annotations, wheres = [], [], []
    for number, image in enumerate(images, 1):
        height, width = read(image, pixels=False, channels=channels).upright
        entries.append({"id": number, "file_name": str(image.absolute()), "height": height, "width": width})
        for found, where in objects_of(texts[image], (height, width), len(names)):
            annotations.append({"id": len(annotations) + 1, "image_id": number, **found})
            wheres.append(f"{flag}: {where}")
    categories = [{"id": k, "name": name} for k, name in enumerate(names)]
    data = {"images": entries, "annotations": annotations, "categories": categories}
    return instances_of(data, Path("/"), yaml, masks, flag, skip, wheres, channels)


def _check_lonely(texts: dict[Path, Path], flag: str) -> None:
    """``ValueError`` for a text file in a folder of labels without its image: its objects would be lost."""
    known, beside = set(texts.values()), {image.parent for image in texts}
    for folder in sorted({text.parent for text in known} - beside):
        lonely = [one for one in sorted(folder.glob("[!.]*.txt")) if one not in known and one.name != "classes.txt"]
        if lonely:
            raise ValueError(f"{flag}: {len(lonely)} text files have no image, e.g. {lonely[0]}; take them out")
