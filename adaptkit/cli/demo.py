"""``adaptkit demo``: three ways to read a frozen backbone, trained offline in minutes."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["add", "run"]


def add(commands: Any) -> None:
    """Add the command and its arguments."""
    parser = commands.add_parser("demo", help="train three ways to read a frozen backbone, offline, in minutes")
    parser.add_argument(
        "--out", default="adaptkit-demo", help="folder for report, picture, adapters (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=650, help="per way (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> None:
    """Train the three, save them, draw what they say."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from adaptkit.demo.run import WAYS, demo
    from adaptkit.demo.scoring import tables

    if args.steps < 1:
        raise ValueError(f"--steps {args.steps}: give at least 1")
    console = Console()
    columns = (
        TextColumn("{task.description:12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        tasks = {name: progress.add_task(name, total=args.steps, loss="") for name in WAYS}

        def advance(name: str, loss: float) -> None:
            progress.update(tasks[name], advance=1, loss=f"loss {loss:.3f}")

        result = demo(args.out, args.steps, args.seed, advance)
    console.print(*tables(result), sep="\n")
    console.print(f"report:      {args.out}/index.html, with {args.out}/predictions.png", soft_wrap=True)
    console.print(
        f"adapters:    {args.out}/{{{','.join(WAYS)}}}, see `adaptkit inspect {args.out}/vit-adapter`", soft_wrap=True
    )
