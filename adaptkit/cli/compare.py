"""``adaptkit compare TASK --adapter A B ... --seeds 0 1 ... --out DIR``: makes the runs, a table and a page."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

__all__ = ["add", "run"]

HELP = """adaptkit compare TASK --adapter NAME ... --seeds N ... --out DIR [options of the recipe]

TASK is segment, classify, depth, detect or panoptic. Each adapter is trained with each seed, one run after the other,
in DIR/NAME-seedN; runs that have ended are not made again, runs that were stopped go on. Then a table is printed, and
DIR/report.html is written. `adaptkit compare TASK --help` says more."""


def add(commands: Any) -> None:
    """Add the command; its arguments are the recipe's own."""
    parser = commands.add_parser(
        "compare",
        help="train several adapters with several seeds; a table and a page",
        usage="adaptkit compare TASK --adapter NAME ... --seeds N ... --out DIR [options]",
        description=HELP,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("task", help="segment, classify, depth, detect or panoptic")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the comparison and of the recipe")


def run(args: argparse.Namespace) -> None:
    """Hand the arguments to the recipe."""
    from adaptkit.cli.train import recipes

    package, _ = recipes()
    importlib.import_module(f"{package}.compare").main(argv=[args.task, *args.arguments])
