"""``adaptkit train TASK ...``: hands its arguments to a recipe."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
from pathlib import Path
from typing import Any

from adaptkit.cli._show import table
from adaptkit.core.near import hint
from adaptkit.version import DISTRIBUTION

__all__ = ["add", "recipes", "run"]


def add(commands: Any) -> None:
    """Add the command and its arguments."""
    parser = commands.add_parser("train", help="train an adapter for a task; alone: the tasks")
    parser.add_argument("task", nargs="?", help="segment, classify, ...")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the task: `adaptkit train segment --help`")


def run(args: argparse.Namespace) -> None:
    """Hand the arguments to the recipe's own ``main``: also under ``torchrun -m adaptkit train ...``."""
    package, folder = recipes()
    tasks = {}
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))  # none is imported to be listed
        mains = [f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name == "main" and f.args.args]
        if mains:
            tasks[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    if args.task is None:
        table("adaptkit train TASK ...", list(tasks.items()))
        return
    if args.task not in tasks:
        raise ValueError(f"no task is named {args.task!r}{hint(args.task, tasks)}; the tasks are {', '.join(tasks)}")
    importlib.import_module(f"{package}.{args.task}").main(args.arguments)


def recipes() -> tuple[str, Path]:
    """Return the package of recipes and its folder: installed in adaptkit, or beside it in a clone."""
    here = Path(__file__).parents[1]
    for name in ("adaptkit.recipes", "recipes"):
        spec = importlib.util.find_spec(name)
        folder = Path(spec.origin).parent if spec is not None and spec.origin else None
        if folder is not None and (name == "adaptkit.recipes" or folder.parent == here.parent):
            return name, folder
    raise ImportError(
        f"the recipes are neither in adaptkit.recipes nor beside {here}; install {DISTRIBUTION} with pip, or run in a "
        "clone"
    )
