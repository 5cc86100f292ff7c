"""``adaptkit report RUN... --out page.html``: what runs scored and cost, on one page that opens anywhere."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["add", "run"]


def add(commands: Any) -> None:
    """Add the command and its arguments."""
    parser = commands.add_parser("report", help="one HTML page about one run or several: curves, classes, pictures")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="--out of a training, or a folder of such folders")
    parser.add_argument("--out", default="report.html", metavar="PAGE", help="(default: %(default)s)")
    parser.add_argument("--title", help="of the page (default: task, data and adapter)")


def run(args: argparse.Namespace) -> None:
    """Read the runs and write the page."""
    from adaptkit.report import Extra, found, grouped, write
    from adaptkit.report.page import needed

    needed()
    runs = found(args.runs)
    path = write(runs, args.out, Extra(title=args.title))
    counts = [f"{n} {what}{'s' * (n != 1)}" for n, what in ((len(runs), "run"), (len(grouped(runs)), "setup"))]
    print(f"{path}: {counts[0]}, {counts[1]}, {path.stat().st_size / 1e6:.1f} MB")
