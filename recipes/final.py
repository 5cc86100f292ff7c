"""What a run leaves for `adaptkit report` when it ends: evaluation.json and pictures.

The numbers are those of the validation that looks at the saved file anyway, in the words of `adaptkit eval --json`; no
image is looked at twice for them. Up to nine images are, to be drawn: the worst, the best, and some that every run on
these data draws, so that runs can be compared.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch

import adaptkit
from adaptkit.adapters.adavit import AdaViT
from adaptkit.analysis.accounting import counted
from adaptkit.core.packed import numel
from adaptkit.hub.write import write_atomic
from adaptkit.predict.draw import laid, sized
from adaptkit.predict.pixels import shown as visible
from adaptkit.predict.tasks import TASKS, Asked

from .examples import EXAMPLES
from .native import ways
from .scores.recorded import written
from .task import Task

EVALUATION, PICTURES = "evaluation.json", "pictures"
EACH = 3  #: pictures of the worst, of the best, and of those that are not chosen
SIDE = 480  #: longer side of a picture, in pixels
MOST = 256  #: classes of a confusion matrix that is kept


def write(task: Task, out: Path, model: Any, metric: Any, rows: Any, args: argparse.Namespace) -> None:
    """Write them; ``metric`` has seen the validation ``rows`` through ``model``, the file attached again."""
    described = model.described()
    found = metric.details() if hasattr(metric, "details") else metric.compute()
    if len(found.get("confusion", ())) > MOST:
        del found["confusion"]
    asked = Asked(ways(args)) if hasattr(args, "slide") else Asked()
    said = TASKS[described.answers](model, described, model.transform, Asked()).palette(len(found.get("per_class", ())))
    drawn = [] if args.streaming or args.shard else draw(out / PICTURES, model, found, rows, asked)
    record = {
        "task": described.answers,
        "file": "adapter",
        "data": args.val or args.train,
        "size": "native" if task.native else args.size,
        "ways": written(asked.ways),
        **found,
        "classes": said["names"],
        "palette": said["palette"],
        "pictures": drawn,
    }
    write_atomic(out / EVALUATION, (json.dumps(record) + "\n").encode())


def chosen(scores: list[float | None], each: int = EACH) -> list[tuple[str, int]]:
    """Scores of images -> which to draw: some at even distances, then the worst, then the best, each image once."""
    count = len(scores)
    even = dict.fromkeys((2 * k + 1) * count // (2 * each) for k in range(each))
    known = sorted((i for i, score in enumerate(scores) if score is not None), key=lambda i: scores[i] or 0.0)
    picked: list[tuple[str, int]] = [("even", i) for i in even if i < count]
    worst = known[: min(each, len(known) // 2)]
    best = [i for i in reversed(known) if i not in worst][:each]
    return picked + [("worst", i) for i in worst] + [("best", i) for i in best]


def draw(folder: Path, model: Any, found: dict[str, Any], rows: Any, asked: Asked) -> list[dict[str, Any]]:
    """Draw image, truth and prediction of the chosen images into a folder; returns what is said of each."""
    ranking = found.get("per_image_confidence") or found.get("per_image") or [None] * len(rows)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    made, drawn = {}, []
    for why, i in chosen(ranking):
        if i not in made:
            image, truth_of = EXAMPLES[model.described().answers](rows, i)
            answer = next(iter(model.predict_each([image], asked)))
            made[i] = _panels(folder, f"{i:06d}", image, answer, truth_of(answer))
        scores = found.get("per_image") or ranking
        drawn.append({"why": why, "index": i, "score": scores[i], **made[i]})
    return drawn


def _panels(folder: Path, name: str, image: torch.Tensor, answer: Any, truth: Any) -> dict[str, Any]:
    """Write the panels of one image; returns their names, and what is said in words beside them."""
    pixels = visible(image)
    panels = {"image": sized(pixels, SIDE)}
    if truth.drawn is not None:
        shown = truth.answer if truth.answer is not None else answer
        panels |= {"truth": laid(pixels, truth.drawn, SIDE), "prediction": laid(pixels, shown, SIDE)}
    for panel, picture in panels.items():
        picture.save(folder / f"{name}_{panel}.webp", quality=82, method=4)
    return {**{panel: f"{PICTURES}/{name}_{panel}.webp" for panel in panels}, **truth.words}


def costs(model: Any, args: argparse.Namespace) -> dict[str, int]:
    """Return all parameters, and the MACs of one image at ``--size``, where they do not depend on the image."""
    said = {"parameters": sum(numel(p) for p in model.parameters())}
    if not args.details or args.shard or any(isinstance(m, AdaViT) for m in model.modules()):
        return said
    height, width = (args.size, args.size) if isinstance(args.size, int) else args.size
    parameter = next(model.parameters())
    image = torch.zeros(1, model.vit.spec.channels, height, width, device=parameter.device, dtype=parameter.dtype)
    # torchvision's detectors, which have a recipe, take a list of images
    detects = model.described().answers == "detection" and hasattr(model, "recipe")
    # The plain text: what fast paths and compiled code do is the same, and not seen by the counter.
    with torch.no_grad(), adaptkit.reference(), torch.compiler.set_stance("force_eager"):
        return {**said, "macs": round(counted(lambda: model(list(image) if detects else image)))}
