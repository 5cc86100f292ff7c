"""An ablation table of a paper on a frozen backbone: every row with every seed, in runs of a recipe.

    adaptkit train ablate --table vit-adapter-modules --seeds 0 1 2 --out runs/modules
        --train train.parquet --val val.parquet --num-classes 11 --steps 400

Every other option is the recipe's own: `adaptkit train segment --help`. Each run is a process of its own, with a folder
of its own in --out. Runs that have ended are not made again, and runs that were stopped go on: give the same command.
After each run table.md, chart.svg and results.json in --out say what is known. A score is the mean over the seeds, its
spread their standard deviation; so is the distance from the row that the others are compared with, seed by seed.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from adaptkit.core.arguments import Parser
from adaptkit.hub.write import check_writable, write_atomic
from adaptkit.report import Run, read
from adaptkit.report.page import needed

from .ablation import Table, known, planned, table
from .ablation_page import Line, lines, markdown, picture
from .compare import TASKS, Asked, make, state
from .options import command, seed_of

RECIPES = (*TASKS, "adavit")


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Return what is asked of the table, and the options of the recipe."""
    listed = "\n".join(f"  {t.name:26}{t.title}: {t.source}" for t in map(table, known()))
    p = Parser(prog="ablate", description=f"{__doc__}\ntables:\n{listed}\n", allow_abbrev=False,
               formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    p.add_argument("--table", required=True, metavar="TABLE", help="one of the tables below, or a YAML file like them")
    p.add_argument("--recipe", choices=RECIPES, help="that trains the rows; default: the table's own, mostly segment")
    p.add_argument("--rows", nargs="+", metavar="NAME", help="these alone, names or patterns ('pool*')")
    p.add_argument("--seeds", nargs="+", type=seed_of, default=[0], metavar="N", help="a run for each (default: 0)")
    p.add_argument("--out", required=True, metavar="DIR", help="a folder for each run, and the table")
    args, rest = p.parse_known_args(argv)
    for flag in ("--seed", "--resume", "--overwrite", "--change", "--adapter", "--adapter-options"):
        if any(one == flag or one.startswith(f"{flag}=") for one in rest):
            p.error(f"{flag} is set for each run; to begin anew give another --out")
    return args, rest


def chosen(whole: Table, patterns: list[str] | None) -> Table:
    """Return the table with the rows that are asked for. ``ValueError`` for a name that no row has."""
    if not patterns:
        return whole
    names = [row.name for row in whole.rows]
    for pattern in patterns:
        if pattern not in names and not fnmatch.filter(names, pattern):
            raise ValueError(f"--rows {pattern}: table {whole.name} has no such row, but {', '.join(names)}")
    keep = {name for name in names if any(name == p or fnmatch.fnmatch(name, p) for p in patterns)}
    keep |= {row.runs for row in whole.rows if row.name in keep and row.runs}
    rows = tuple(row for row in whole.rows if row.name in keep)
    return replace(whole, rows=rows, base=whole.base if whole.base in keep else "")


def made(whole: Table, recipe: str, seeds: list[int], out: Path, rest: list[str]) -> tuple[list[Line], list[str]]:
    """Make the runs that are not there and write the table; returns its lines, and the names of runs that failed."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a table is made by one process, which starts the runs one after another: leave out torchrun")
    needed()  # before hours of work
    check_writable(out)
    module: Any = importlib.import_module(f"{__package__}.{recipe}")
    asked = planned(whole, recipe, seeds, out, rest)
    runs = [(one, state(one, module)) for one in asked.values()]
    failed = make(recipe, runs, lambda: write(whole, asked, out))
    return write(whole, asked, out), failed


def write(whole: Table, asked: dict[tuple[str, int], Asked], out: Path) -> list[Line]:
    """Write what is known so far; returns the lines of the table."""
    ended: dict[tuple[str, int], Run] = {
        key: read(one.out) for key, one in asked.items() if (one.out / "result.json").is_file()
    }
    found = lines(whole, ended)
    if found:
        write_atomic(out / "table.md", markdown(whole, found, len({seed for _, seed in asked})).encode())
        write_atomic(out / "results.json", (json.dumps([line.record() for line in found], indent=2) + "\n").encode())
        picture(whole, found).save(out / "chart.svg")
    return found


def main(argv: list[str] | None = None) -> list[Line]:
    args, rest = parse(argv)
    whole, out = chosen(table(args.table), args.rows), Path(args.out)
    recipe = args.recipe or whole.recipe
    if recipe != whole.recipe and "adavit" in (recipe, whole.recipe):
        raise ValueError(f"--recipe {recipe}: the rows of table {whole.name} are for {whole.recipe}")
    found, failed = made(whole, recipe, args.seeds, out, rest)
    if found:
        print("\n" + (out / "table.md").read_text(encoding="utf-8"))
    if failed:
        raise ValueError(f"these runs failed, see above: {', '.join(failed)}; the same command makes them again")
    return found


if __name__ == "__main__":
    command("ablate", main)
