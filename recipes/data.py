"""Images with a map of the same size, of classes or of depths: from a Parquet file, a Hub data set or a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from adaptkit.core.near import beside, hint, looks_like_path
from adaptkit.core.view import Source
from adaptkit.pictures import pair

from .augment import of_pixels
from .labels import Reading, check_range
from .layouts import Files, pairs
from .normalisation import normalise
from .order import Rows, undecoded

MASK_NAMES = ("label", "mask", "annotation", "semantic_segmentation", "segmentation", "labels", "segmentation_mask")
IMAGE_NAMES = ("image", "images", "img", "picture", "photo", "rgb", "pixel_values")
GENERIC = ("label", "labels", "mask")  #: what a depth map may be called, where nothing is called depth


def open_dataset(
    name: str,
    split: str,
    columns: tuple[str | None, str | None] = (None, None),
    streaming: bool = False,
    names: tuple[str, ...] = MASK_NAMES,
    suffix: str | None = None,
) -> Any:
    """Return a ``datasets.Dataset`` with the columns ``image`` and ``mask``, both decoded to PIL images.

    Args:
        name: a Parquet file or a pattern (``"train-*.parquet"``), a folder in one of the layouts of ``layouts.py``, or
            a Hub id.
        split: what is read of a Hub id, and of a folder with several.
        columns: of images and of masks, where they are not found by themselves; of a folder, its folders.
        streaming: return an ``IterableDataset``, read as it goes.
        names: of the second column, and of its folder.
        suffix: how the name of a mask ends in a folder, ``"_mask"``; None: as the layouts say.

    Raises ``ValueError`` where images or masks are not found or nothing is in it, and where it is not clear which of
    several columns or folders is meant.
    """
    path = Path(name)
    if path.is_dir():
        data, columns = _dataset(*pairs(path, split, columns, names, suffix)), ("image", "mask")
    else:
        data = open_rows(name, split, "a folder with images/ and masks/", streaming)
    data = filled(data, f"{name} ({split})", streaming)
    image, mask = _columns(data, columns, name, names)
    return renamed(data, {image: "image", mask: "mask"})


def open_rows(name: str, split: str, folder: str, streaming: bool = False) -> Any:
    """Open a Parquet file or pattern (all of it), or a Hub id: its ``split``, or the one named in ``org/set@split``.

    ``folder`` says what else it might be.
    """
    import datasets

    path = Path(name)
    if path.suffix == ".parquet" or "*" in name:
        if "*" not in name and not path.is_file():
            raise ValueError(f"there is no file {name}{beside(name)}")
        try:
            data = datasets.load_dataset("parquet", data_files=name, split="train", streaming=streaming)
        except ValueError as error:  # how datasets says that a file has no rows
            raise ValueError(f"{name} holds no rows ({error})") from error
    elif path.exists():
        raise ValueError(f"{name} is neither a Parquet file nor {folder}")
    elif looks_like_path(name):
        raise ValueError(f"there is no file or folder {name}{beside(name)}: the Hub is not asked for a path")
    else:
        repository, _, own = name.partition("@")
        data = datasets.load_dataset(repository, split=own or split, streaming=streaming)
    return data


def filled(data: Any, name: str, streaming: bool) -> Any:
    """Return the data, as a stream if asked for; ``ValueError`` where it has no rows."""
    if not streaming:
        if len(data) == 0:
            raise ValueError(f"{name} holds no rows")
        return data
    if hasattr(data, "to_iterable_dataset"):  # a folder: its list of files is small, and is shared by the readers
        data = undecoded(data).to_iterable_dataset(num_shards=max(1, min(64, len(data))))
    if next(iter(data.take(1)), None) is None:
        raise ValueError(f"{name} holds no rows")
    return undecoded(data if data.features is not None else data._resolve_features())  # read from the first rows


def renamed(data: Any, names: dict[str, str]) -> Any:
    """Return these columns alone, under these names."""
    other = {old: new for old, new in names.items() if old != new}
    data = data.select_columns(list(names))
    return data.rename_columns(other) if other else data


def _dataset(images: Files, masks: Files) -> Any:
    import datasets

    rows = {"image": [str(images[k]) for k in images], "mask": [str(masks[k]) for k in images]}
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    return datasets.Dataset.from_dict(rows, features=features)


def _columns(data: Any, columns: tuple[str | None, str | None], name: str, names: tuple[str, ...]) -> tuple[str, str]:
    import datasets

    pictures = [k for k, f in data.features.items() if isinstance(f, datasets.Image)]
    for column in columns:
        if column is not None and column not in pictures:
            near = hint(column, pictures)
            raise ValueError(f"{name} has no column of images {column!r}{near}; its columns are {dict(data.features)}")
    second = "mask" if names is MASK_NAMES else names[0]
    called = [m for m in dict.fromkeys((*names, "mask")) if m in pictures and m != columns[0]]
    sure = called if names is MASK_NAMES else ([m for m in called if m not in GENERIC] or called)
    mask = columns[1] or only(sure, name, f"--{second}-column")
    image = columns[0] or image_column([k for k in pictures if k != mask], name)
    mask = mask or only([k for k in pictures if k != image], name, f"--{second}-column")
    if image is None or mask is None:
        raise ValueError(
            f"{name} has no pair of image columns; its columns are {dict(data.features)}. Name them with "
            f"--image-column and --{second}-column"
        )
    return image, mask


def image_column(columns: list[str], name: str) -> str | None:
    """Return the one that holds the images: the only one, or the one that is called so; None of none."""
    called = [k for k in columns if k.lower() in IMAGE_NAMES]
    return only(called if called else columns, name, "--image-column")


def only(columns: list[str], name: str, option: str) -> str | None:
    """Return the only one, None of none; ``ValueError`` for several, any of which may be meant."""
    if len(columns) > 1:
        raise ValueError(
            f"{name} has several columns of images, {', '.join(columns)}, and any of them may be meant: choose "
            f"one with {option} {columns[0]}"
        )
    return columns[0] if columns else None


class SegmentationData(Rows):
    """Pairs (image (C, H, W) normalised as the backbone wants it, mask (H, W) int64).

    Training samples are asked for as ``(epoch, index)`` and cropped, flipped and coloured by a random state of their
    own, so that they do not depend on workers, ranks or a resumed run. Others are resized only.

    Args:
        data: rows with ``image`` and ``mask``.
        size: (H, W) of the samples.
        source: of the backbone, for the normalisation, and with it the number of channels.
        seed: of the augmentation.
        train: whether to augment.
        labels: what the values of a mask mean (``labels.py``).
        classes: labels of 0..classes - 1 and ``ignore`` are all there may be; None: any.
        ignore: the label that counts nowhere.
        name: of the set, for errors.
        augment: one of ``augment.NAMES``, of training samples.
    """

    def __init__(
        self,
        data: Any,
        size: tuple[int, int],
        source: Source,
        seed: int = 0,
        train: bool = False,
        labels: Reading | None = None,
        classes: int | None = None,
        ignore: int = 255,
        name: str = "",
        augment: str = "medium",
    ) -> None:
        super().__init__(data, seed, name)
        self.channels = len(source.mean)
        self.labels, self.classes, self.ignore = labels or Reading(), classes, ignore
        steps: list[Any] = [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)]
        steps += of_pixels(augment if train else "none", size, ignore, self.channels)
        self.transform = v2.Compose([*steps, normalise(source)])

    def reading(self) -> dict[str, Any]:
        return {"labels": self.labels.digest(), "ignore": self.ignore}

    def make(self, row: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Row with image and mask -> (image (C, H, W) float, mask (H, W) int64)."""
        ids = self.labels.ids(row["mask"])
        if self.classes is not None:
            check_range(ids, self.classes, self.ignore, row["mask"].name)
        image, mask = pair(row["image"], row["mask"], ids, "a mask")
        image, mask = self.transform(image, tv_tensors.Mask(mask))
        return image.as_subclass(Tensor), mask.as_subclass(Tensor)
