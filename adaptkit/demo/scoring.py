"""What the demo says of each way: its score class by class, and what it costs."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Result", "Row", "confusion", "ious", "tables"]


class Row(NamedTuple):
    """One way to read the backbone."""

    name: str  #: also that of its folder, with the saved adapter
    trained: int  #: trainable parameters
    file_bytes: int
    seconds: float  #: of training
    kept_bytes: int  #: what a training step keeps for the backward pass
    iou: tuple[float, ...]  #: of each class over the whole validation set, 0..1; NaN for one that occurs nowhere
    prediction: Tensor  #: (n, H, W) for the first validation images
    confusion: tuple[tuple[int, ...], ...] = ()  #: pixels of each true class (rows) by predicted class
    losses: tuple[float, ...] = ()  #: of every step

    @property
    def miou(self) -> float:
        """The mean over the classes that occur, 0..1."""
        return float(torch.tensor(self.iou).nanmean())


class Result(NamedTuple):
    """All of it."""

    classes: tuple[str, ...]
    thin: tuple[str, ...]  #: those of the classes that are a few pixels thin or small
    steps: int
    batch: int  #: images in a step
    seed: int
    train: int  #: images
    val: int
    size: tuple[int, int]  #: (H, W) of them, in pixels
    seconds: float  #: of the backbone, which ran once for all ways
    rows: tuple[Row, ...]

    def to_json(self) -> str:
        """Return it as JSON; an IoU that is not defined is null."""
        said: dict[str, Any] = self._asdict()
        del said["rows"], said["seconds"]
        said["backbone_seconds"] = round(self.seconds, 2)
        said["ways"] = [
            {
                "name": row.name,
                "miou": row.miou,
                "iou": {name: None if value != value else value for name, value in zip(self.classes, row.iou)},
                "seconds": round(row.seconds, 2),
                "trained_parameters": row.trained,
                "file_bytes": row.file_bytes,
                "memory_bytes": row.kept_bytes,
            }
            for row in self.rows
        ]
        return json.dumps(said, indent=2) + "\n"


def confusion(predicted: Tensor, masks: Tensor, classes: int) -> Tensor:
    """Class ids (n, H, W) -> pixels of each true class (rows) by predicted class, (classes, classes)."""
    counts = torch.bincount(masks.flatten() * classes + predicted.flatten(), minlength=classes**2)
    return counts.view(classes, classes)


def ious(matrix: Tensor) -> tuple[float, ...]:
    """Confusion matrix -> intersection over union of each class; NaN where nobody says it."""
    hit = matrix.double().diagonal()
    return tuple((hit / (matrix.sum(0) + matrix.sum(1) - hit)).tolist())


def tables(result: Result) -> list[Any]:
    """Return the result as two rich tables: what each way costs, and its IoU class by class."""
    from rich.table import Table

    title = f"Frozen demo backbone, {result.steps} steps of {result.batch} images each"
    costs = Table(title=title, title_justify="left")
    for column in ("", "trainable", "file", "step keeps", "seconds", "mIoU"):
        costs.add_column(column, justify="left" if not column else "right")
    for row in result.rows:
        sizes = (f"{row.file_bytes / 1e6:.2f} MB", f"{row.kept_bytes / 1e6:.0f} MB")
        costs.add_row(row.name, f"{row.trained:,}", *sizes, f"{row.seconds:.0f}", f"{100 * row.miou:.1f}")
    scores = Table(title="IoU by class (bold: thin or small)", title_justify="left")
    for column in ("", *(row.name for row in result.rows)):
        scores.add_column(column, justify="left" if not column else "right")
    for name, values in zip(result.classes, zip(*(row.iou for row in result.rows))):
        scores.add_row(name, *map(percent, values), style="bold" if name in result.thin else None)
    return [costs, scores]


def percent(value: float) -> str:
    """A share as 12.3; a dash for NaN."""
    return "–" if value != value else f"{100 * value:.1f}"
