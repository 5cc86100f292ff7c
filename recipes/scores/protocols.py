"""What each task is scored by: data as its recipe reads them, predictions of ``adaptkit.predict`` at their size."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptkit.core.view import Source
from adaptkit.pictures import colours, pair, read_row
from adaptkit.predict.tasks import TASKS, Asked

from ..coco import called, picture_of
from ..data import SegmentationData, open_dataset
from ..depth import DEPTH_NAMES, metres_of
from ..detection_data import open_instances
from ..labelled import open_images
from ..labels import palette_of, reading
from ..look import check_labels
from ..names import are_numbers
from ..native import NativeSegmentation, masks
from ..normalisation import floats
from ..order import undecoded
from ..panoptic_data import PanopticData, read_segments
from ..panoptic_data import locate as locate_segments
from .average_precision import average_precisions
from .classification import ClassificationScores
from .depth import DepthScores, cropped
from .panoptic import PanopticQuality
from .recorded import labels_of
from .segmentation import SemanticScores, extras, packed

Alter = Callable[[Tensor, int], Tensor]  #: image (C, H, W) in 0..1 and its number -> what is looked at
SCORE = {"segmentation": "miou", "classification": "top1", "depth": "delta1", "detection": "box_ap", "panoptic": "pq"}


def segmentation(model: Any, asked: Asked, args: argparse.Namespace, alter: Alter) -> dict[str, Any]:
    """IoU, accuracy and boundary IoU by class, confusion matrix, calibration of all pixels."""
    described, transform = model.described(), model.transform
    labels = labels_of(described.said)
    ignore = labels["ignore_index"] if args.ignore_index is None else args.ignore_index
    classes, mapping = classes_of(model), args.label_map or labels["label_map"]
    palette = palette_of(args.palette) or ([] if args.label_map else labels["palette"])
    reduce = args.reduce_zero_label or labels["reduce_zero_label"]
    how = reading({} if args.palette else mapping, reduce, ignore, classes, palette, described.said.get("palette"))
    columns = args.image_column, args.target_column
    opened = open_dataset(args.data, args.split, columns, suffix=args.mask_suffix)
    source = Source(mean=transform.mean, std=transform.std)
    rows = SegmentationData(opened, (32, 32), source, labels=how, classes=classes, ignore=ignore, name="--data")
    check_labels(rows, classes, ignore, "--data", of_model=True)
    native = NativeSegmentation(rows)
    task, scores = TASKS["segmentation"](model, described, transform, asked), SemanticScores()
    with torch.no_grad():
        for first in range(0, len(native), asked.ways.batch_size):
            numbers = range(first, min(first + asked.ways.batch_size, len(native)))
            images, truth = native.collate([native[i] for i in numbers])
            images = [alter(image, i) for image, i in zip(images, numbers)]
            for (mask, confidence), true in zip(masks(task, images), truth):  # type: ignore[arg-type]
                matrix, rims, bins = extras(mask, true.to(mask.device), confidence, classes, ignore)
                scores.update(matrix[None], packed(rims, bins)[None])
    said = task.palette(classes)
    return {**scores.details(), "classes": said["names"], "palette": said["palette"]}


def classes_of(model: Any) -> int:
    """Return how many classes a model tells apart. Raises ``TypeError`` where its head does not say."""
    recipe = getattr(model, "recipe", None)
    if recipe is not None:
        return len(recipe["categories"])
    config = getattr(model.head, "config", None)
    count = getattr(config, "num_classes", None) or len(model.metadata.get("classes") or ())
    if not count:
        raise TypeError(f"the head {type(model.head).__name__} does not say its number of classes: save with classes=")
    return int(count)


def classification(model: Any, asked: Asked, args: argparse.Namespace, alter: Alter) -> dict[str, Any]:
    """Top-1, top-5, accuracy by class, confusion matrix, calibration."""
    data, names = open_images(args.data, args.split, (args.image_column, args.target_column))
    labels = same_classes(data["label"][:], names, model.described().said.get("classes"), args.data)
    answers = model.predict_each(_pictures(data, args.data, alter, model.vit.spec.channels), asked)
    scores: ClassificationScores | None = None
    for label, answer in zip(labels, answers):
        shares = torch.from_numpy(answer.probabilities)
        scores = scores or ClassificationScores(len(shares))
        if label >= len(shares):
            raise ValueError(f"--data {args.data} has the label {label}, and the file knows {len(shares)} classes")
        scores.update(shares[None], torch.tensor([int(label)]), shares[None])
        known = answer.names
    assert scores is not None  # the data are not empty
    return {**scores.details(), "classes": known}


def same_classes(labels: list[int], names: list[str], known: Any, where: str) -> list[int]:
    """Labels of a set -> those of the file, by the names of the classes where both have some; a set may lack classes.

    The classes of a file without names are numbers, and so are folders that are called by numbers.

    Raises ``ValueError`` for a class that the file does not know.
    """
    if not isinstance(known, list | tuple):
        return [int(names[k]) for k in labels] if all(n.isdecimal() for n in names) else labels
    if list(known[: len(names)]) == names or (are_numbers(names) and not any(str(n).isdecimal() for n in known)):
        return labels
    used = sorted(set(labels))
    strange = [names[k] for k in used if names[k] not in known]
    if strange:
        raise ValueError(
            f"--data {where} has the class {strange[0]!r}, and the file knows {', '.join(map(str, known[:5]))}, ...: a "
            "label would mean another class. Give the folders the names of the classes that it was trained on"
        )
    return [list(known).index(names[k]) for k in labels]


def depth(model: Any, asked: Asked, args: argparse.Namespace, alter: Alter) -> dict[str, Any]:
    """The usual scores, at the size of the depth map, within the range of the head."""
    columns = args.image_column, args.target_column
    data = undecoded(open_dataset(args.data, args.split, columns, names=DEPTH_NAMES, suffix=args.mask_suffix))
    config: Any = model.head.config
    scores, truth = DepthScores(), []

    def images() -> Iterator[Tensor]:
        for i in range(len(data)):
            row = read_row(data[i], f"--data: row {i}", channels=model.vit.spec.channels)
            metres = metres_of(row["mask"], args.depth_scale, config.min_depth, config.max_depth)
            image, target = pair(row["image"], row["mask"], metres, "a depth map")
            truth.append(cropped(target, args.crop))
            yield alter(floats(image), i)

    for i, answer in enumerate(model.predict_each(images(), asked)):
        scores.update(torch.from_numpy(answer.depth)[None], truth[i][None])
        truth[i] = torch.empty(0)  # has been used
    return {**scores.details(), **({"crop": args.crop} if args.crop else {})}


def detection(model: Any, asked: Asked, args: argparse.Namespace, alter: Alter) -> dict[str, Any]:
    """COCO's AP of boxes, and of masks where the detector makes them; by class."""
    recipe = getattr(model, "recipe", None)  # a head that makes objects has none, and makes masks
    with_masks = recipe is None or recipe["network"] == "mask-rcnn"
    channels = model.vit.spec.channels
    skip = args.skip_degenerate
    data = open_instances(args.data, args.images, args.split, with_masks, "--data", skip, channels=channels)
    _check_categories(model, data.categories)

    results = []
    for row, answer in zip(data.rows, model.predict_each(_framed(data.rows, alter), asked)):
        for entry, label in zip(answer.coco(row["id"]), answer.labels.tolist()):
            results.append({**entry, "label": label + 1})
    means, by_class = average_precisions(data, results, with_masks)
    return {**means, "per_class": by_class["mask" if with_masks else "box"], "classes": called(data.categories),
            "images": len(data.rows)}  # fmt: skip


def panoptic(model: Any, asked: Asked, args: argparse.Namespace, alter: Alter) -> dict[str, Any]:
    """Panoptic quality, its parts, and by class."""
    places = locate_segments(args.data, args.images, args.maps, "--data")
    data = read_segments(*places, "--data", model.vit.spec.channels)
    _check_categories(model, data.categories)
    transform = model.transform
    rows = PanopticData(data, (32, 32), Source(mean=transform.mean, std=transform.std))
    quality = PanopticQuality(data.categories)

    for i, answer in enumerate(model.predict_each(_framed(data.rows, alter), asked)):
        label = np.full(len(answer.found) + 1, -1)
        for segment in answer.found:
            label[segment["id"]] = segment["label"]
        ids = torch.from_numpy(answer.segments.astype(np.int64))
        found = torch.stack([torch.from_numpy(label)[ids], ids], -1)
        quality.update([found], [rows.truth(data.rows[i])])
    return {**quality.details(), "classes": called(data.categories)}


def _check_categories(model: Any, categories: list[dict[str, Any]]) -> None:
    known = model.described().said["categories"]
    theirs, mine = ([(c["id"], name) for c, name in zip(found, called(found))] for found in (categories, known))
    if theirs != mine:
        other = next((pair for pair in zip(theirs, mine) if pair[0] != pair[1]), (theirs[-1], mine[-1]))
        raise ValueError(
            f"--data has {len(theirs)} categories and the file was trained on {len(mine)}; the first that differs has "
            f"id and name {other[0]} in --data, {other[1]} in the file: they must be the same"
        )


def _framed(rows: list[dict[str, Any]], alter: Alter) -> Iterator[Tensor]:
    """Yield the images of rows of COCO's formats, (C, H, W) in 0..1."""
    for i, row in enumerate(rows):
        yield alter(floats(picture_of(row)), i)


def _pictures(data: Any, name: str, alter: Alter, channels: int) -> Iterator[Tensor]:
    """Yield the pictures of rows, (C, H, W) in 0..1."""
    for i, row in enumerate(undecoded(data)):
        image = colours(read_row(row, f"{name}: row {i}", channels=channels)["image"])
        yield alter(floats(image), i)


EVALUATIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "segmentation": segmentation,
    "classification": classification,
    "depth": depth,
    "detection": detection,
    "panoptic": panoptic,
}
