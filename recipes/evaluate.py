"""Score a saved adapter as papers do: at the images' own size, class by class, with an interval for the score.

    python -m recipes.evaluate runs/seg/adapter --data val.parquet --json
    python -m recipes.evaluate runs/seg/adapter --data ade20k/val --resize 512 --slide 512 512 --stride 341 341
    python -m recipes.evaluate runs/depth/adapter --data nyu/test --crop eigen

`adaptkit eval` is the same. The task is the file's, and `--data` is what the recipe of that task reads: a Parquet file,
a folder, a Hub id; COCO's JSON, or a folder with it, for detectors. The file records how labels are to be read, and how
its run looked at images in validation (--slide, --resize, ...): this is done again where nothing else is asked for.
Numbers are in 0..1; depths in metres. The interval is the 95 % bootstrap over images: of two runs on the same images,
those whose intervals are apart differ by more than the choice of images.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from adaptkit.cli.eval import add_options
from adaptkit.cli.predict import ways_of
from adaptkit.create import best_device
from adaptkit.pictures import CHANNELS
from adaptkit.predict.tasks import Asked
from adaptkit.predict.ways import Ways
from adaptkit.pretrained import from_pretrained

from .corruptions import CORRUPTIONS, SEVERITIES, corrupted
from .options import command
from .scores import recorded
from .scores.protocols import EVALUATIONS, SCORE

#: Of what is found, not shown in the terminal: it is in --json.
LONG = ("per_class", "per_class_accuracy", "per_class_boundary_iou", "pixels", "confusion", "per_image", "interval",
        "classes", "corruptions", "ways", "palette", "calibration", "count",
        "per_image_confidence")  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="evaluate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_options(p)
    return p.parse_args(argv)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Open the file, and return what it scores. Raises what reading a file or data raises."""
    model = from_pretrained(args.file, backbone=args.backbone, positions=args.positions)
    model = model.to(best_device(args.device))
    described, channels = model.described(), model.vit.spec.channels
    if args.corruptions is not None and channels != CHANNELS:
        raise ValueError(f"--corruptions are of pictures in colours, and {args.file} takes {channels} channels")
    kind, ways = described.answers, recorded.ways_of(described.said, Ways(**ways_of(args)))
    asked = Asked(ways, confidence=True, threshold=0.0)

    def score(alter: Callable[[Tensor, int], Tensor]) -> dict[str, Any]:
        return EVALUATIONS[kind](model, asked, args, alter)

    found = {"task": kind, "file": str(args.file), "data": args.data, "size": "native",
             "ways": recorded.written(ways), **score(lambda image, i: image)}  # fmt: skip
    if args.corruptions is not None:
        worse = {
            name: [score(corrupted(name, s))[SCORE[kind]] for s in range(1, SEVERITIES + 1)]
            for name in args.corruptions or CORRUPTIONS
        }
        found["corruptions"] = {SCORE[kind]: worse, "mean": sum(map(sum, worse.values())) / SEVERITIES / len(worse)}
    return found


def show(found: dict[str, Any]) -> None:
    """Print the scores, and a table of the classes."""
    from rich.console import Console
    from rich.table import Table

    console, between = Console(), found.get("interval", {})
    for name, value in found.items():
        if name not in LONG:
            low, high = between.get(name, (None, None))
            said = f"{value:.4f}" if isinstance(value, float) else str(value)
            between_them = "" if low is None else f"  (95 %: {low:.4f} to {high:.4f})"
            console.print(f"{name:18} {said}{between_them}", soft_wrap=True)
    if found.get("per_class"):
        columns = [k for k in ("per_class", "per_class_accuracy", "per_class_boundary_iou") if k in found]
        table = Table("class", *columns)
        names = found.get("classes") or [str(i) for i in range(len(found["per_class"]))]
        for i, name in enumerate(names):
            cells = (found[k][i] for k in columns)
            table.add_row(name, *("-" if v is None else f"{v:.4f}" for v in cells))
        console.print(table)
    for name, values in found.get("corruptions", {}).get(SCORE[found["task"]], {}).items():
        console.print(f"{name:18} {'  '.join(f'{v:.4f}' for v in values)}")


def main(*, argv: list[str] | None = None) -> dict[str, Any]:
    return run(parse(argv))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate and print."""
    found = evaluate(args)
    if args.json:
        print(json.dumps(found))
        sys.stdout.flush()
    else:
        show(found)
    return found


if __name__ == "__main__":
    command("evaluate", main)
