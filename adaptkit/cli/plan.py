"""``adaptkit plan TASK ...``: what a run with these options would take, measured in three steps, nothing written."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

__all__ = ["add", "run"]


def add(commands: Any) -> None:
    """Add the command and its arguments."""
    parser = commands.add_parser("plan", help="parameters, memory, time and data of a training, before it is started")
    parser.add_argument("task", help="segment, classify, depth, detect or panoptic")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, help="as of `adaptkit train TASK`; --json: one JSON object"
    )


def run(args: argparse.Namespace) -> None:
    """Hand the arguments to the recipe, and measure instead of training."""
    from adaptkit.cli.train import recipes

    package, _ = recipes()
    left = [one for one in args.arguments if one != "--json"]
    importlib.import_module(f"{package}.plan").run(args.task, left, len(left) < len(args.arguments))
