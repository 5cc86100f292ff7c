"""``adaptkit demo``: three ways to read a frozen backbone, trained side by side on drawn scenes.

The backbone runs once. On its features the linear head, the simple feature pyramid and ViT-Adapter without injectors
see the same batches for the same number of steps; the page says what each costs and what it scores, class by class,
and the picture shows where they differ.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from adaptkit.demo.backbone import demo_backbone
from adaptkit.demo.page import page
from adaptkit.demo.picture import picture
from adaptkit.demo.scenes import CLASSES, THIN
from adaptkit.demo.scoring import Result, Row, ious
from adaptkit.demo.training import BATCH, Examples, examples, fit, kept_bytes, predict, tensors
from adaptkit.hub.write import check_writable, write_atomic
from adaptkit.model.adapted import AdaptedModel, attach

__all__ = ["STEPS", "WAYS", "demo"]

STEPS = 650
SHOWN = 4  #: images in the picture
PYRAMID_HEAD = ("fpn", {"num_classes": len(CLASSES), "channels": 64})


class Way(NamedTuple):
    """What is attached to the backbone."""

    adapters: tuple[Any, ...]
    head: tuple[str, dict[str, Any]]


WAYS = {
    "linear": Way((), ("linear", {"num_classes": len(CLASSES)})),
    "sfp": Way(("sfp",), PYRAMID_HEAD),
    "vit-adapter": Way((("vit-adapter", {"injector": False}),), PYRAMID_HEAD),
}


def demo(
    out: str | Path, steps: int = STEPS, seed: int = 0, advance: Callable[[str, float], None] | None = None
) -> Result:
    """Train and score the three ways, and write what came of them into the folder ``out``.

    There are then a folder for each way with its adapter and head, ``predictions.png``, ``result.json`` and
    ``index.html``, which holds the picture. ``advance(name, loss)`` is called after every step.
    """
    from adaptkit.demo import scenes  # the name of the package, where a test puts smaller ones

    folder = check_writable(out)
    train, val = (tensors(scenes(split, seed=seed)) for split in ("train", "val"))
    started = time.perf_counter()
    reader = attach(demo_backbone(), *WAYS["vit-adapter"].adapters)  # it reads the most: four blocks and the image
    data, unseen = examples(reader, *train, mirrored=True), examples(reader, *val)
    extracted = time.perf_counter() - started
    rows = tuple(_row(name, folder, data, unseen, steps, seed, advance) for name in WAYS)
    size = (int(val[1].shape[-2]), int(val[1].shape[-1]))
    result = Result(CLASSES, THIN, steps, BATCH, seed, len(train[1]), len(val[1]), size, extracted, rows)
    picture(folder / "predictions.png", val[0][:SHOWN], val[1][:SHOWN], result)
    write_atomic(folder / "result.json", result.to_json().encode())
    write_atomic(folder / "index.html", page(folder / "predictions.png", result, Path(out)).encode())
    return result


def _row(
    name: str,
    folder: Path,
    data: Examples,
    unseen: Examples,
    steps: int,
    seed: int,
    advance: Callable[[str, float], None] | None,
) -> Row:
    """Train one way, save it, and score it on what it has not seen."""
    torch.manual_seed(seed)
    model: AdaptedModel = attach(demo_backbone(), *WAYS[name].adapters, head=WAYS[name].head)
    kept = kept_bytes(model, data)
    started = time.perf_counter()
    for value in fit(model, data, steps, seed):
        if advance is not None:
            advance(name, value)
    seconds = time.perf_counter() - started
    predicted = predict(model, unseen)
    saved = model.save(folder / name, task="semantic-segmentation", classes=list(CLASSES))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = (saved / "adapter_model.safetensors").stat().st_size
    scores = ious(predicted, unseen.masks, len(CLASSES))
    return Row(name, trained, size, seconds, kept, scores, predicted[:SHOWN])
