"""Images with one class each: Parquet files, a Hub data set, a folder of class folders, a list of images,
scikit-learn's digits, or crops of a segmentation set, by themselves or each at a place in an empty image."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from adaptkit.core.near import beside, hint
from adaptkit.core.view import Source
from adaptkit.pictures import class_ids, colours, pair, read_row
from adaptkit.version import DISTRIBUTION

from .augment import NAMES, of_images
from .data import filled, image_column, open_dataset, open_rows, renamed
from .devices import sent
from .layouts import class_folders
from .normalisation import normalise
from .order import Rows, undecoded

LABEL_NAMES = ("label", "labels", "fine_label", "class", "target")
KNOWN = "a folder with one folder per class, or a .txt list of images"
PURE = 0.6  # least share of a crop that its class must cover
SIDES = 0.25, 0.67  # least and largest side of what is placed in an empty image, as shares of the image's
EMPTY = 128  # gray


class Labelled(NamedTuple):
    """A whole set in memory, as suits the small sets that a frozen backbone is adapted to."""

    images: Tensor  # (K, 3, H, W) uint8, or float32 in 0..1 where an image has more than eight bits
    labels: Tensor  # (K,) int64
    classes: list[str]

    def batches(self, order: Tensor, size: int, source: Source, device: torch.device) -> Any:
        """Yield (images (B, 3, H, W) normalised as the backbone wants them, labels (B,))."""
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (source.mean, source.std))
        white = 255 if self.images.dtype == torch.uint8 else 1
        for chosen in order.split(size):
            yield (sent(self.images[chosen], device) / white - mean) / std, sent(self.labels[chosen], device)


def in_memory(images: list[Tensor]) -> Tensor:
    """Images (3, H, W) of one size -> (K, 3, H, W): uint8, or float32 in 0..1 where one of them is."""
    if any(image.dtype != torch.uint8 for image in images):
        images = [v2.functional.to_dtype(image, torch.float32, scale=True) for image in images]
    return torch.stack(images).as_subclass(Tensor)


def open_labelled(name: str, split: str, size: int) -> Labelled:
    """Read a set at ``size`` x ``size`` pixels.

    Args:
        name: ``digits`` (scikit-learn's, every fourth image for validation), ``crops:FILE`` (crops of a segmentation
            set, labelled by the class that covers most), ``placed:FILE`` (each of these crops smaller, and somewhere in
            an empty image: images of which more or less matters), a Parquet file, a folder of class folders, or a Hub
            id.
        split: ``train`` or ``validation``; of a file or folder everything is read.
        size: side in pixels.

    Raises ``ValueError`` where nothing is found, or images and labels are not.
    """
    if name == "digits":
        return _digits(split, size)
    if name.startswith("crops:"):
        return _crops(name.removeprefix("crops:"), size)
    if name.startswith("placed:"):
        return _placed(_crops(name.removeprefix("placed:"), round(SIDES[1] * size)), size)
    data, classes = open_images(name, split)
    resize = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])
    rows = (read_row(row, f"{name}: row {i}") for i, row in enumerate(undecoded(data)))
    images = in_memory([resize(colours(row["image"])) for row in rows])
    return Labelled(images, torch.tensor(data["label"][:]), classes)


def open_images(
    name: str, split: str, columns: tuple[str | None, str | None] = (None, None), streaming: bool = False
) -> tuple[Any, list[str]]:
    """Return rows with the columns ``image`` (PIL) and ``label`` (int), and the names of the classes.

    Args:
        name: ``digits``, a Parquet file or a pattern, a folder with one folder per class, a ``.txt`` list whose lines
            are ``path label`` with paths beside it, or a Hub id.
        split: what is read of the digits (``train`` or ``validation``), of a Hub id, and of a folder with several.
        columns: of images and of labels, where they are not found by themselves.
        streaming: return an ``IterableDataset``, read as it goes.

    The names are numbers where the set has none; a stream without names gives []. Raises ``ValueError`` where nothing
    is found, or images and labels are not.
    """
    import datasets

    path = Path(name)
    if name == "digits":
        pixels, labels = _digits_of(split)
        pictures = [Image.fromarray((p.reshape(8, 8) / 16 * 255).astype(np.uint8)) for p in pixels]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(10)})
        data = datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)
    elif path.is_dir():
        data = _foldered(path, split, streaming)
    elif path.suffix == ".txt":
        data = _listed(path)
    else:
        data = open_rows(name, split, KNOWN, streaming)
    data = filled(data, f"{name} ({split})", streaming)
    image, label = _columns(data, columns, name)
    data = renamed(data, {image: "image", label: "label"})
    names = getattr(data.features["label"], "names", None) or []
    if not streaming:
        check_classes(data["label"][:], f"{name} ({split})")
    if not names and not streaming:
        names = [str(i) for i in range(max(data["label"]) + 1)]
    return data, list(names)


def _foldered(path: Path, split: str, streaming: bool) -> Any:
    """Read a folder of class folders; one with ``metadata.csv`` or ``.jsonl`` as ``datasets`` does.

    ``datasets`` itself takes the last folder for the class, and leaves out files with "test" or "val" in their names.
    """
    import datasets

    if any((path / f"metadata.{end}").is_file() for end in ("csv", "jsonl", "parquet")):
        return datasets.load_dataset("imagefolder", data_dir=str(path), split="train", streaming=streaming)
    files, labels, names = class_folders(path, split)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"image": list(map(str, files)), "label": labels}, features=features)


def check_classes(labels: list[Any], name: str) -> None:
    """``ValueError`` where a label is no class number from 0 on, naming the first."""
    for row, label in enumerate(labels):
        if not isinstance(label, int) or label < 0:
            unlabelled = ": so sets mark rows whose class is kept secret; choose another split" if label == -1 else ""
            raise ValueError(f"{name}: row {row} has the label {label!r}, and classes are numbered from 0{unlabelled}")


def check_same_classes(names: list[str], val_names: list[str], flag: str = "--train") -> None:
    """Raise ``ValueError`` where a number means one class in training and another in validation."""
    if any(a != b for a, b in zip(names, val_names)):
        raise ValueError(
            f"the classes of {flag} are {', '.join(names[:5])}, ... and of --val {', '.join(val_names[:5])}, ...: a "
            "label would mean another class. Give both the same classes"
        )


def _listed(path: Path) -> Any:
    """Read a list of images, one ``path label`` a line, as VTAB-1k has it."""
    import datasets

    if not path.is_file():
        raise ValueError(f"there is no file {path}{beside(path)}")
    rows: dict[str, list[Any]] = {"image": [], "label": []}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        file, _, label = line.strip().rpartition(" ")
        if not file or not label.isdigit():
            raise ValueError(f"{path}, line {number}: {line!r} is no 'path label', e.g. 'images/000.jpg 3'")
        rows["image"].append(str(path.parent / file))
        rows["label"].append(int(label))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict(rows, features=features)


class LabelledData(Rows):
    """Pairs (image (C, size, size) normalised as the backbone wants it, label).

    Args:
        data: rows with ``image`` and ``label``.
        size: side in pixels.
        source: of the backbone, for the normalisation, and with it the number of channels.
        seed: of the augmentation.
        augment: ``"crop"`` (a random part of at least ``least`` of the image), ``"flip"`` (mirrored at random too),
            ``"none"``, the whole image squeezed to a square, or one of ``augment.NAMES``.
        train: whether to augment; else the centre of the image, 7/8 of it, or the whole with ``augment="none"``.
        least: share of the image in a crop.
        classes: labels are in 0..classes - 1; None: any.
        name: of the set, for errors.
    """

    def __init__(
        self,
        data: Any,
        size: int,
        source: Source,
        seed: int,
        augment: str,
        train: bool,
        least: float = 0.08,
        classes: int | None = None,
        name: str = "",
    ) -> None:
        super().__init__(data, seed, name)
        self.classes, self.channels = classes, len(source.mean)
        if augment == "none":
            steps = [v2.Resize((size, size), antialias=True)]
        elif train and augment in NAMES:
            steps = of_images(augment, size, least, self.channels)
        elif train:
            steps = [v2.RandomResizedCrop(size, scale=(least, 1.0), antialias=True)]
            steps += [v2.RandomHorizontalFlip()] if augment == "flip" else []
        else:
            steps = [v2.Resize(round(size * 8 / 7), antialias=True), v2.CenterCrop(size)]
        self.transform = v2.Compose([v2.ToDtype(torch.float32, scale=True), *steps, normalise(source)])

    def make(self, row: dict[str, Any]) -> tuple[Tensor, int]:
        """Row with image and label -> (image (C, H, W) float, label)."""
        label = int(row["label"])
        if self.classes is not None and not 0 <= label < self.classes:
            raise ValueError(
                f"{row['image'].name} has the label {label}, outside 0..{self.classes - 1}; check --num-classes and "
                "the labels"
            )
        return self.transform(colours(row["image"])).as_subclass(Tensor), label


def _digits_of(split: str) -> tuple[np.ndarray, np.ndarray]:
    """1797 handwritten digits of 8 x 8 pixels in 0..16, (K, 64), and their labels; every fourth is for validation."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(f"the digits are in scikit-learn: pip install '{DISTRIBUTION}[recipes]'") from error
    pixels, labels = load_digits(return_X_y=True)
    held = np.arange(len(labels)) % 4 == 3
    chosen = held if split == "validation" else ~held
    return pixels[chosen], labels[chosen]


def _digits(split: str, size: int) -> Labelled:
    """Bring the digits to size bilinearly."""
    pixels, labels = _digits_of(split)
    small = torch.from_numpy(pixels.reshape(-1, 1, 8, 8) / 16 * 255).float()
    images = torch.nn.functional.interpolate(small, (size, size), mode="bilinear").round().byte()
    return Labelled(images.expand(-1, 3, -1, -1), torch.from_numpy(labels), [str(i) for i in range(10)])


def _crops(name: str, size: int) -> Labelled:
    """Square crops side by side, of which one class covers most."""
    data = open_dataset(name, "train")
    images, labels = [], []
    for number, row in enumerate(undecoded(data)):
        pictures = read_row(row, f"{name}: row {number}")
        image, ids = pair(pictures["image"], pictures["mask"], class_ids(pictures["mask"]), "a mask")
        mask = ids.numpy()
        for top in range(0, mask.shape[0] - size + 1, size):
            for left in range(0, mask.shape[1] - size + 1, size):
                counts = np.bincount(mask[top : top + size, left : left + size].ravel(), minlength=256)[:255]
                if counts.max() >= PURE * size * size:
                    images.append(image[:, top : top + size, left : left + size])
                    labels.append(int(counts.argmax()))
    if not images:
        raise ValueError(
            f"{name} has no crop of {size} pixels that one class covers by {PURE:.0%}; try a smaller --size"
        )
    return Labelled(in_memory(images), torch.tensor(labels), [str(i) for i in range(max(labels) + 1)])


def _placed(crops: Labelled, size: int) -> Labelled:
    """Each crop at a side and a place of its own, both drawn from one seed, in an empty image."""
    generator, least, images = torch.Generator().manual_seed(0), max(1, round(SIDES[0] * size)), []
    for crop in crops.images:
        side = int(torch.randint(least, crop.shape[-1] + 1, (), generator=generator))
        top, left = torch.randint(size - side + 1, (2,), generator=generator).tolist()
        image = torch.full((3, size, size), EMPTY if crop.dtype == torch.uint8 else EMPTY / 255, dtype=crop.dtype)
        image[:, top : top + side, left : left + side] = v2.functional.resize(crop, [side, side], antialias=True)
        images.append(image)
    return Labelled(torch.stack(images), crops.labels, crops.classes)


def _columns(data: Any, columns: tuple[str | None, str | None], name: str) -> tuple[str, str]:
    import datasets

    for column in columns:
        if column is not None and column not in data.features:
            near = hint(column, data.features)
            raise ValueError(f"{name} has no column {column!r}{near}; its columns are {', '.join(data.features)}")
    image = columns[0] or image_column([k for k, f in data.features.items() if isinstance(f, datasets.Image)], name)
    label = columns[1] or next((k for k in LABEL_NAMES if k in data.features and k != image), None)
    if image is None or label is None:
        size = f"{len(data)} rows" if hasattr(data, "__len__") else "rows"
        if image is not None and Path(name).is_dir():
            raise ValueError(
                f"{name} has {size} of images and not two folders of them: a folder holds one folder per class, at "
                f"least two, e.g. {name}/cat and {name}/dog"
            )
        raise ValueError(
            f"{name} has {size} with the columns {', '.join(data.features)}; it needs images and a label column "
            f"({', '.join(LABEL_NAMES)}), or name them with --image-column and --label-column"
        )
    return image, label
