"""What a recipe plugs into the shared loop: its model, data, loss and metric, and how its files are written."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import adaptkit
from adaptkit.hub.fits import normalised_by_file

from .channels import backbone_of
from .order import Rows


def save_adapted(model: Any, folder: Path, **metadata: Any) -> Path:
    """Write adapters and head."""
    return model.save(folder, **metadata)


def restore_adapted(model: Any, folder: Path) -> None:
    """Read back what ``save_adapted`` wrote."""
    model.load_adapter_state_dict(adaptkit.load(folder).tensors)


def attach_again(args: argparse.Namespace, folder: Path) -> nn.Module:
    """Attach what was saved to a fresh backbone."""
    with normalised_by_file():  # so are the images of the run
        return adaptkit.attach(backbone_of(args), folder)


@dataclass(frozen=True)
class Task:
    """What one recipe adds to the loop.

    A batch is what the ``DataLoader`` makes of samples, images first: its length is the number of images.
    """

    name: str  #: of the recipe
    kind: str  #: the Hub's name of the task, for the card
    score: str  #: which of the metrics is the result
    percent: tuple[str, ...]  #: metrics in 0..1 that people read as per cent
    build: Callable[[argparse.Namespace], Any]  #: -> the model to train
    data: Callable[[argparse.Namespace, Any, bool], Rows]  #: (args, model, train) -> samples
    loss: Callable[[nn.Module, Any, argparse.Namespace], Tensor]  #: (model, batch, args) -> scalar
    #: (model, batch, args) -> (prediction, target), an entry per image
    predict: Callable[[nn.Module, Any, argparse.Namespace], tuple[Any, Any]]
    metric: Callable[[argparse.Namespace], Any]  #: -> update(prediction, target), and compute() -> {name: number}
    ragged: bool = False  #: predictions and targets are lists, e.g. of boxes, an entry per image
    collate: Callable[[list[Any]], Any] | None = None
    save: Callable[..., Path] = save_adapted  #: (model, folder, **metadata)
    restore: Callable[[Any, Path], None] = restore_adapted
    again: Callable[[argparse.Namespace, Path], nn.Module] = attach_again
    lower: tuple[str, ...] = ()  #: metrics of which less is better
    #: ``predict`` with what the record at the end of a run has beside the score; None: the same
    predict_fully: Callable[[nn.Module, Any, argparse.Namespace], tuple[Any, Any]] | None = None
    native: bool = True  #: whether the score is of the images' own size
