"""``adaptkit eval FILE --data D``: what a saved adapter scores, by the published protocols."""

from __future__ import annotations

import argparse
import importlib
import json
from typing import Any

from adaptkit.cli._backbone import add_backbone
from adaptkit.cli.predict import add_ways

__all__ = ["CORRUPTIONS", "add", "add_options", "run"]

#: Those of ``recipes/corruptions.py``, which imports what computes.
CORRUPTIONS = ("gaussian_noise", "gaussian_blur", "jpeg", "brightness", "contrast", "pixelate")


def add(commands: Any) -> None:
    """Add the command and its arguments."""
    add_options(commands.add_parser("eval", help="score an adapter file at the images' own size, class by class"))


def add_options(p: Any) -> None:
    """Add what is asked of an evaluation."""
    p.add_argument("file", help="a saved folder, or org/name on the Hub")
    p.add_argument("--data", required=True, help="as --val of the task's recipe")
    p.add_argument("--split", default="validation", help="of a Hub id, of Cityscapes, of the digits")
    add_backbone(p)
    p.add_argument("--json", action="store_true", help="print one JSON object with all that was found")
    add_ways(p)
    p.add_argument("--image-column", help="default: the only one, or the one named image")
    p.add_argument("--target-column", "--mask-column", "--depth-column", "--label-column", metavar="COLUMN",
                   help="of masks, depths or labels; default: found by its name")  # fmt: skip
    p.add_argument(
        "--images",
        "--data-images",
        metavar="DIR",
        help="folder of the images of a COCO file; default: images/ beside it",
    )
    p.add_argument(
        "--maps",
        "--data-maps",
        metavar="DIR",
        help="folder of the panoptic PNG files; default: beside the JSON file, with its name",
    )
    p.add_argument("--ignore-index", type=int, help="label that counts nowhere; default: as trained, 255")
    p.add_argument("--label-map", type=json.loads, metavar="JSON", help="of labels in files, or of colours, to classes")
    p.add_argument("--palette", nargs="+", default=[], metavar="COLOUR", help="of each class, in masks of colours")
    p.add_argument("--mask-suffix", metavar="_END", help="how the name of a mask ends that lies beside its image")
    p.add_argument("--reduce-zero-label", action="store_true", help="label 0 is ignored, the others come down by one")
    p.add_argument("--depth-scale", type=float, default=1000.0, help="values per metre (default: %(default)s)")
    p.add_argument("--skip-degenerate", action="store_true", help="leave out boxes and masks without area")
    p.add_argument("--crop", choices=["eigen", "garg"], help="of depth: the part that published numbers look at")
    p.add_argument("--corruptions", nargs="*", metavar="NAME", choices=CORRUPTIONS,
                   help=f"score worse pictures too, in five strengths; alone: {', '.join(CORRUPTIONS)}")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Evaluate by the recipes, and print."""
    from adaptkit.cli.train import recipes

    package, _ = recipes()
    importlib.import_module(f"{package}.evaluate").run(args)
