"""A look at the masks before training: what would fail later is an error now, what would teach nothing is said."""

from __future__ import annotations

import warnings

import numpy as np

from adaptkit.pictures import check_pair

from .data import SegmentationData
from .labels import BLACK_AND_WHITE, check_range, some, warn_unseen
from .summary import Summary

MOST = 2000  # masks that are looked at, evenly chosen
ADVICE = "check --ignore-index, --label-map and --reduce-zero-label"


def check_labels(
    data: SegmentationData,
    num_classes: int,
    ignore_index: int,
    name: str,
    most: int = MOST,
    train: bool = False,
    of_model: bool = False,
) -> Summary:
    """Look at ``most`` masks, evenly chosen (of a stream at the first tenth of it); return what they hold.

    ``of_model``: the classes are those of a trained model.

    Raises ``ValueError`` for labels out of range, masks of another size than their image, black and white masks whose
    white would be ignored, and training masks of which nothing counts. What will teach nothing is a warning: masks that
    are ignored as a whole, and, of training data, classes without a pixel.
    """
    seen, ignored, stored = Summary(name, "pixels", len(data.data) if hasattr(data.data, "__len__") else None), 0, set()
    seen.counts, seen.images_of = np.zeros(num_classes, np.int64), np.zeros(num_classes, np.int64)
    for index, row in some(data.data, most):
        mask = data.read({"mask": row["mask"]}, index)["mask"]
        image = data.read({"image": row["image"]}, index, pixels=False)["image"]
        check_pair(image, mask, "a mask")
        ids = data.labels.ids(mask)
        check_range(ids, num_classes, ignore_index, f"{name}, row {index}", mask.name, of_model)
        counts = np.bincount(ids[ids != ignore_index], minlength=num_classes)
        ignored += not counts.any()
        seen.see(counts, ids.size - int(counts.sum()), image.upright)
        if len(stored) < 3:
            stored |= set(np.unique(data.labels.stored(mask)).tolist())
    plain = data.labels.table is None and data.labels.colours is None
    if plain and 255 in stored and stored <= {0, 255} and ignore_index == 255:
        _black_and_white(name, seen.looked, num_classes, train)
    elif ignored:
        _ignored(name, ignored, seen.looked, ignore_index, train)
    if train:
        advice = "check --num-classes, --label-map and --reduce-zero-label"
        unseen = [str(k) for k in np.flatnonzero(seen.counts == 0) if k != ignore_index]
        warn_unseen(unseen, num_classes, name, f"{seen.looked} masks", advice)
    seen.uncounted = (ignore_index,)
    data.summary = seen
    return seen


def _black_and_white(name: str, looked: int, num_classes: int, train: bool) -> None:
    """255 is ignored, so that everything that counts would be background."""
    two = "" if num_classes > 1 else " --num-classes 2"
    said = (
        f"{name}: the {looked} masks that were looked at hold 0 and 255 alone, and 255 is ignored: all that counts is "
        f"background. If white is a class, pass --label-map '{BLACK_AND_WHITE}'{two}; if it is not, say so, "
        '--label-map \'{"0": 0, "255": 255}\''
    )
    if train or num_classes <= 2:
        raise ValueError(said)
    warnings.warn(said, stacklevel=3)


def _ignored(name: str, ignored: int, looked: int, ignore_index: int, train: bool) -> None:
    said = (
        f"{name}: {ignored} of {looked} masks that were looked at are ignored as a whole (label {ignore_index}) and "
        f"teach nothing; {ADVICE}"
    )
    if train and ignored == looked:
        raise ValueError(said)
    warnings.warn(said, stacklevel=3)
