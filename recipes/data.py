"""Images with a map of the same size, of classes or of depths: from a Parquet file, a Hub data set or a folder."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from adaptkit.core.near import beside, hint, looks_like_path
from adaptkit.core.view import Source
from adaptkit.pictures import Picture, check_pair, class_ids, pair

from .augment import of_pixels
from .normalisation import normalise
from .order import Rows, undecoded

LABELS = 65536  # that a mask can hold, in 16 bits
BLACK_AND_WHITE = '{"0": 0, "255": 1}'
MASK_NAMES = ("label", "mask", "annotation", "semantic_segmentation", "segmentation", "labels", "segmentation_mask")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


def open_dataset(
    name: str,
    split: str,
    columns: tuple[str | None, str | None] = (None, None),
    streaming: bool = False,
    names: tuple[str, ...] = MASK_NAMES,
) -> Any:
    """Return a ``datasets.Dataset`` with the columns ``image`` and ``mask``, both decoded to PIL images.

    Args:
        name: a Parquet file or a pattern (``"train-*.parquet"``), a folder with ``images/`` and ``masks/`` (or
            another of ``names``; same file stems), a Cityscapes folder (``leftImg8bit/`` and ``gtFine/``), or a Hub id.
        split: what is read of a Hub id and of Cityscapes.
        columns: of images and of masks, where they are not found by themselves.
        streaming: return an ``IterableDataset``, read as it goes.
        names: of the second column, and of its folder, in the order of preference.

    Raises ``ValueError`` where images or masks are not found or nothing is in it.
    """
    path = Path(name)
    if (path / "leftImg8bit").is_dir():
        data = _cityscapes(path, {"validation": "val"}.get(split, split))
    elif path.is_dir():
        data = _folder(path, next((n for n in names if (path / n).is_dir()), "masks"))
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
        data = data.to_iterable_dataset(num_shards=max(1, min(64, len(data))))
    if next(iter(data.take(1)), None) is None:
        raise ValueError(f"{name} holds no rows")
    return undecoded(data if data.features is not None else data._resolve_features())  # read from the first rows


def renamed(data: Any, names: dict[str, str]) -> Any:
    """Return these columns alone, under these names."""
    other = {old: new for old, new in names.items() if old != new}
    data = data.select_columns(list(names))
    return data.rename_columns(other) if other else data


def _folder(path: Path, second: str) -> Any:
    images, masks = _by_stem(path / "images"), _by_stem(path / second)
    if not images:
        raise ValueError(f"{path}/images holds no images ({', '.join(sorted(SUFFIXES))})")
    return _paired(path, images, masks)


def _by_stem(folder: Path) -> dict[str, Path]:
    """The pictures of a folder; what begins with a dot is not meant (macOS puts ``._name`` beside each file)."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("[!.]*")):
        if path.suffix.lower() not in SUFFIXES or path.is_dir():
            continue
        if path.stem in found:
            raise ValueError(
                f"{found[path.stem]} and {path.name} have the same stem, which pairs images and masks; take one out"
            )
        found[path.stem] = path
    return found


def _cityscapes(path: Path, split: str) -> Any:
    """``leftImg8bit/<split>/<city>/<name>_leftImg8bit.png`` with ``gtFine/.../<name>_gtFine_labelIds.png``."""
    found = {}
    for folder, end in (("leftImg8bit", "_leftImg8bit.png"), ("gtFine", "_gtFine_labelIds.png")):
        found[folder] = {p.name.removesuffix(end): p for p in sorted((path / folder / split).glob(f"*/*{end}"))}
    if not found["leftImg8bit"]:
        raise ValueError(f"{path}/leftImg8bit/{split} holds no <city>/*_leftImg8bit.png")
    return _paired(path, found["leftImg8bit"], found["gtFine"])


def _paired(path: Path, images: dict[str, Path], masks: dict[str, Path]) -> Any:
    import datasets

    lonely = sorted(images.keys() ^ masks.keys())
    if lonely:
        there = images.get(lonely[0], masks.get(lonely[0]))
        raise ValueError(
            f"{path}: {len(lonely)} files have no partner ({len(images)} images, {len(masks)} masks), e.g. {there}: an "
            f"image and its mask have the same name, and one of the suffixes {', '.join(sorted(SUFFIXES))}"
        )
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
    mask = columns[1] or next((m for m in (*names, "mask") if m in pictures), None)
    image = columns[0] or next((k for k in pictures if k != mask), None)
    mask = mask or next((k for k in pictures if k != image), None)
    if image is None or mask is None:
        raise ValueError(
            f"{name} has no pair of image columns; its columns are {dict(data.features)}. Name them with "
            f"--image-column and --{'mask' if names is MASK_NAMES else names[0]}-column"
        )
    return image, mask


class SegmentationData(Rows):
    """Pairs (image (3, H, W) normalised as the backbone wants it, mask (H, W) int64).

    Training samples are asked for as ``(epoch, index)`` and cropped, flipped and coloured by a random state of their
    own, so that they do not depend on workers, ranks or a resumed run. Others are resized only.

    Args:
        data: rows with ``image`` and ``mask``.
        size: (H, W) of the samples.
        source: of the backbone, for the normalisation.
        seed: of the augmentation.
        train: whether to augment.
        labels: what each label of a file becomes (:func:`label_table`).
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
        labels: Tensor | None = None,
        classes: int | None = None,
        ignore: int = 255,
        name: str = "",
        augment: str = "medium",
    ) -> None:
        super().__init__(data, seed, name)
        self.labels, self.classes, self.ignore = labels, classes, ignore
        steps: list[Any] = [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)]
        steps += of_pixels(augment if train else "none", size, ignore)
        self.transform = v2.Compose([*steps, normalise(source)])

    def make(self, row: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Row with image and mask -> (image (3, H, W) float, mask (H, W) int64)."""
        ids = self.ids(row["mask"])
        if self.classes is not None:
            check_range(ids, self.classes, self.ignore, row["mask"].name)
        image, mask = pair(row["image"], row["mask"], ids, "a mask")
        image, mask = self.transform(image, tv_tensors.Mask(mask))
        return image.as_subclass(Tensor), mask.as_subclass(Tensor)

    def ids(self, mask: Picture) -> np.ndarray:
        """Mask -> class ids (H, W), by the table of labels if there is one."""
        ids = class_ids(mask)
        if self.labels is None:
            return ids
        if ids.min() < 0 or ids.max() >= len(self.labels):
            raise ValueError(f"{mask.name}: the mask holds labels {ids.min()}..{ids.max()}; give 0..{LABELS - 1}")
        return self.labels.numpy()[ids]


# ---------------------------------------------------------------------------------------------------------- labels


def label_table(mapping: dict[str, int], reduce_zero: bool, ignore_index: int) -> Tensor | None:
    """Return what each label of a file becomes, (65536,), or None where it stays.

    Args:
        mapping: ``{"7": 0, "8": 1}``; labels that are not in it are ignored.
        reduce_zero: label 0 is ignored and the others come down by one, as ADE20K's 150 classes are meant.
        ignore_index: what an ignored label becomes.

    Raises ``ValueError`` for a label that no mask can hold.
    """
    if not mapping and not reduce_zero:
        return None
    table = torch.full((LABELS,), ignore_index) if mapping else torch.arange(LABELS)
    for label, target in mapping.items():
        if not str(label).isdigit() or int(label) >= LABELS:
            raise ValueError(f"--label-map: {label!r} is no label of a mask; give 0..{LABELS - 1}")
        table[int(label)] = target
    if reduce_zero:
        moved = torch.where((table == 0) | (table == ignore_index), ignore_index, table - 1)
        table = moved
    return table


def check_range(ids: np.ndarray, num_classes: int, ignore_index: int, name: str, file: str = "") -> None:
    """``ValueError`` where a mask holds labels that are neither classes nor ignored."""
    outside = np.unique(ids[((ids < 0) | (ids >= num_classes)) & (ids != ignore_index)])
    if len(outside) == 0:
        return
    wrong = outside.tolist()
    black_and_white = f", or --label-map '{BLACK_AND_WHITE}' if white is a class" if wrong == [255] else ""
    more = f"--num-classes {max(wrong) + 1} or " if max(wrong) >= num_classes else ""
    raise ValueError(
        f"{name}: the mask holds labels {wrong[:5]}, outside 0..{num_classes - 1} and not the ignore index "
        f"{ignore_index}{f', in {file}' if file else ''}; pass {more}--ignore-index {wrong[-1]}{black_and_white}"
    )


def check_labels(
    data: SegmentationData, num_classes: int, ignore_index: int, name: str, most: int = 2000, train: bool = False
) -> np.ndarray:
    """Look at ``most`` masks, evenly chosen (of a stream at the first tenth of it); return the pixels of each class.

    Raises ``ValueError`` for labels out of range and masks of another size than their image. What will teach nothing is
    a warning: masks that are ignored as a whole, white that is ignored, and, of training data, classes without a pixel.
    """
    looked, ignored, pixels, stored = 0, 0, np.zeros(num_classes, np.int64), set()
    for index, row in some(data.data, most):
        mask = data.read({"mask": row["mask"]}, index)["mask"]
        check_pair(data.read({"image": row["image"]}, index, pixels=False)["image"], mask, "a mask")
        ids = data.ids(mask)
        check_range(ids, num_classes, ignore_index, f"{name}, row {index}", mask.name)
        counts = np.bincount(ids[ids != ignore_index], minlength=num_classes)
        looked, ignored, pixels = looked + 1, ignored + (not counts.any()), pixels + counts
        if len(stored) < 3:
            stored |= set(np.unique(class_ids(mask)).tolist())
    if stored <= {0, 255} and 255 in stored and data.labels is None and ignore_index == 255:
        warnings.warn(
            f"{name}: the {looked} masks that were looked at hold 0 and 255 alone, and 255 is ignored: if they are "
            f"black and white, and white is a class, pass --label-map '{BLACK_AND_WHITE}'",
            stacklevel=2,
        )
    elif ignored:
        warnings.warn(
            f"{name}: {ignored} of {looked} masks that were looked at are ignored as a whole (label {ignore_index}) "
            "and teach nothing; check --ignore-index, --label-map and --reduce-zero-label",
            stacklevel=2,
        )
    if train:
        advice = "check --num-classes, --label-map and --reduce-zero-label"
        unseen = [str(k) for k in np.flatnonzero(pixels == 0) if k != ignore_index]
        warn_unseen(unseen, num_classes, name, f"{looked} masks", advice)
    return pixels


def warn_unseen(unseen: list[str], classes: int, name: str, where: str, advice: str) -> None:
    """Warn of classes that never occur in what is trained on: nothing teaches them."""
    if unseen:
        shown = ", ".join(unseen[:10]) + (", ..." if len(unseen) > 10 else "")
        warnings.warn(
            f"{name}: {len(unseen)} of {classes} classes occur in none of the {where} that were looked at ({shown}), "
            f"and nothing teaches them; {advice}",
            stacklevel=3,
        )


def some(data: Any, most: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number, row) of ``most`` rows, evenly chosen; of a stream of the first, a tenth as many."""
    if hasattr(data, "__len__"):
        for index in np.linspace(0, len(data) - 1, min(len(data), most)).round().astype(int).tolist():
            yield index, data[index]
    else:
        yield from enumerate(data.take(most // 10))
