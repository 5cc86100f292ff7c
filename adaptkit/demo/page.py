"""The page at the end of the demo: the report of its ways, with the picture and how to go on."""

from __future__ import annotations

from pathlib import Path

from adaptkit.demo.picture import COLOURS, rgb
from adaptkit.demo.scoring import Result, Row, percent
from adaptkit.report import Extra, Run
from adaptkit.report import page as report

__all__ = ["page"]

WAYS = {
    "linear": "one linear layer on each token",
    "sfp": "four maps from the last tokens (ViTDet)",
    "vit-adapter": "the image itself, read beside the tokens (ViT-Adapter without injectors)",
}
EVERY = 10  #: steps between two points of a curve, each the mean of the losses between


def page(picture: Path, result: Result, folder: Path) -> str:
    """Return the page: the picture, what each way costs, its IoU class by class, and how to go on from ``folder``."""
    best = max(result.rows, key=lambda row: row.miou)
    height, width = result.size
    lead = (
        f"A ViT-Tiny/16 saw {result.train} drawn scenes of {height} × {width} pixels and their mirror images once "
        f"({result.seconds:.0f} seconds) and stayed frozen. On what it saw, each way was then trained for "
        f"{result.steps} steps of {result.batch} images: the same batches, loss, and learning rates. The scores are of "
        f"{result.val} other scenes. The best here is {best.name} with {percent(best.miou)} % mIoU."
    )
    caption = (
        f"The first validation scenes, not chosen. A token is 16 pixels wide; {', '.join(result.thin)} are at most a "
        "few pixels, and the image turns grey under the colours."
    )
    alt = "Scenes, their truth and the predictions of each way"
    notes = (
        "Each way: " + "; ".join(f"{name}, {what}" for name, what in WAYS.items()) + ".",
        "Kept by a step: memory of a training step for its backward pass, beside weights and batch.",
        f"Seed {result.seed}. The numbers of this page are in result.json beside it.",
    )
    extra = Extra("Three ways to read one frozen backbone", lead, (picture.read_bytes(), alt, caption),
                  _commands(folder, best.name), notes, frozenset(result.thin))  # fmt: skip
    return report([_run(row, result) for row in result.rows], extra)


def _run(row: Row, result: Result) -> Run:
    """One way as a run that the report reads."""
    means = [row.losses[i : i + EVERY] for i in range(0, len(row.losses), EVERY)]
    rows = [{"step": min((i + 1) * EVERY, result.steps), "loss": sum(m) / len(m)} for i, m in enumerate(means)]
    evaluation = {
        "task": "segmentation",
        "miou": row.miou,
        "per_class": [None if value != value else value for value in row.iou],
        "confusion": [list(counts) for counts in row.confusion],
        "pixels": [sum(counts) for counts in row.confusion],
        "classes": list(result.classes),
        "palette": [list(rgb(COLOURS[name])) for name in result.classes],
    }
    costs = {
        "adapter": row.name,
        "steps": result.steps,
        "seconds": row.seconds,
        "trained_parameters": row.trained,
        "file_bytes": row.file_bytes,
        "kept_bytes": row.kept_bytes,
    }
    return Run(row.name, rows=rows, result=costs, evaluation=evaluation)


def _commands(folder: Path, name: str) -> str:
    saved = folder / name
    return f"""adaptkit inspect {saved}
adaptkit predict {saved} IMAGES... --out predictions
adaptkit export {saved} --out model.onnx --size 160 160
adaptkit train segment --help      # your own images and masks

# in Python
import adaptkit
model = adaptkit.attach(adaptkit.demo_backbone(), "{saved}")"""
