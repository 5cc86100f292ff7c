"""Train several adapters with several seeds, one run after the other, and put them side by side on one page.

    adaptkit compare segment --adapter none lora sfp vit-adapter --seeds 0 1 2 --out runs/compare
        --train train.parquet --val val.parquet --num-classes 11 --steps 400

Every other option is the recipe's own: `adaptkit train segment --help`. An adapter may be several, `lora+vit-adapter`;
`--adapter-options '{"lora": {"r": 8}}'` reach the adapters that they name. Each run is a process of its own, so that
its peak memory is its own. Runs that have ended are not made again, and runs that were stopped go on: give the same
command.
"""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from adaptkit.core.arguments import Parser
from adaptkit.hub.write import check_writable
from adaptkit.report import Group, Run, grouped, read, write
from adaptkit.report.facts import comparison, sentence
from adaptkit.report.page import needed

from . import checkpoints, record
from .options import command, seed_of

TASKS = ("classify", "depth", "detect", "panoptic", "segment")
PAGE = "report.html"
#: Options that may differ between a run that is there and the one that is asked for.
FREE = ("out", "workers", "tracker", "details", "seed", "save_every")
#: What is left to a run, which records what it found: the number of classes, their weights.
FOUND: tuple[Any, ...] = (None, ["balanced"], "auto")


@dataclass(frozen=True)
class Asked:
    """One run that is to be there."""

    adapter: str
    seed: int
    out: Path
    arguments: list[str]  #: of the recipe


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Return what is asked of the comparison, and the options of the recipe."""
    p = Parser(prog="compare", description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    p.add_argument("task", choices=TASKS)
    p.add_argument("--adapter", nargs="+", required=True, metavar="NAME", help="each is a setup; A+B: both in one")
    p.add_argument("--adapter-options", type=json.loads, default={}, metavar="JSON", help='{"NAME": {...}, ...}')
    p.add_argument("--seeds", nargs="+", type=seed_of, default=[0], metavar="N", help="a run for each (default: 0)")
    p.add_argument("--out", required=True, metavar="DIR", help=f"a folder for each run, and {PAGE}")
    args, rest = p.parse_known_args(argv)
    for flag in ("--seed", "--resume", "--overwrite", "--change"):
        if any(one == flag or one.startswith(f"{flag}=") for one in rest):
            p.error(f"{flag} is set for each run; give --seeds, and to begin anew another --out")
    names = {name for adapter in args.adapter for name in adapter.split("+")}
    unknown = sorted(set(args.adapter_options) - names) if isinstance(args.adapter_options, dict) else ["no object"]
    if unknown:
        p.error(f"--adapter-options has {', '.join(unknown)}: name the adapters, {', '.join(sorted(names))}")
    return args, rest


def planned(args: argparse.Namespace, rest: list[str]) -> list[Asked]:
    """Return the runs, seed by seed, so that what is there after half of the time can be compared."""
    runs = []
    for seed in args.seeds:
        for adapter in args.adapter:
            names, out = adapter.split("+"), Path(args.out) / f"{adapter}-seed{seed}"
            options = {name: args.adapter_options[name] for name in names if name in args.adapter_options}
            given = ["--adapter-options", json.dumps(options)] if options else []
            arguments = [*own_cache(rest, out.name), "--adapter", *names, *given]
            runs.append(Asked(adapter, seed, out, [*arguments, "--seed", str(seed), "--out", str(out)]))
    if len({run.out for run in runs}) < len(runs):
        raise ValueError("--adapter or --seeds names one run twice")
    return runs


def own_cache(rest: list[str], name: str) -> list[str]:
    """Give each run a folder of its own for features: what is read and which views differ."""
    found = list(rest)
    for i, one in enumerate(found):
        if one == "--cache-features" and i + 1 < len(found):
            found[i + 1] = str(Path(found[i + 1]) / name)
        elif one.startswith("--cache-features="):
            found[i] = f"{one}/{name}"
    return found


def state(asked: Asked, recipe: Any) -> list[str] | None:
    """Return the arguments that make a run what it is to be: to begin it, to go on with it, or None where it has ended.

    Raises ``ValueError`` where the folder holds a run of other options.
    """
    wanted = json.loads(json.dumps(record.options(recipe.parse(asked.arguments)), default=str))
    config = asked.out / record.CONFIG
    if not config.is_file():
        return [*asked.arguments, "--overwrite"]  # or nothing is there
    there = (yaml.safe_load(config.read_text()) or {}).get("options") or {}
    told = [k for k, value in wanted.items() if k in there and k not in FREE and value not in FOUND]
    differ = [k for k in told if there[k] != wanted[k]]
    if differ:
        said = ", ".join(f"{k} {there[k]!r}, now {wanted[k]!r}" for k in differ)
        raise ValueError(f"{asked.out} holds a run with other options: {said}. Give those, or choose another --out")
    if (asked.out / "result.json").is_file():
        return None
    return [*asked.arguments, "--resume" if checkpoints.checkpoints(asked.out) else "--overwrite"]


def ended(command: list[str]) -> int:
    """Run a process to its end and return its status. When this process is asked to stop it is that one which stops.

    SIGTERM is passed on, Ctrl-C reaches both from the terminal: either way a run has the time to keep a checkpoint.
    """
    if threading.current_thread() is not threading.main_thread():  # others are told of no signal
        return subprocess.call(command)
    asked, children = [], []

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for child in children if number == signal.SIGTERM else ():
            child.send_signal(number)

    former = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        children.append(child := subprocess.Popen(command))
        if signal.SIGTERM in asked:  # before there was a child
            child.send_signal(signal.SIGTERM)
        return child.wait()
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def make(task: str, runs: list[tuple[Asked, list[str] | None]], after: Callable[[], Any] = lambda: None) -> list[str]:
    """Make the runs that are to be made, and call ``after`` when each has ended; returns the names that failed."""
    package, failed = __package__, []
    for n, (asked, arguments) in enumerate(runs, 1):
        if all((asked.out / name).is_file() for name in (record.CONFIG, "result.json")):
            arguments = None  # another process may have made it since the runs were looked at
        verb = "is there" if arguments is None else "goes on" if "--resume" in arguments else "begins"
        print(f"[{n}/{len(runs)}] {asked.out.name} {verb}", flush=True)
        if arguments is None:
            continue
        status = ended([sys.executable, "-m", f"{package}.{task}", *arguments])
        if status in (130, 143, -2, -15):
            raise KeyboardInterrupt(f"stopped in {asked.out.name}; the same command goes on")
        failed += [asked.out.name] if status else []
        after()
    return failed


def show(groups: list[Group]) -> None:
    """Print the setups side by side."""
    from rich.console import Console
    from rich.table import Table

    from adaptkit.report.words import metric

    rows, name = comparison(groups), next((g.metric for g in groups if g.metric), "score")
    columns = [c for c in ("trained parameters", "training", "peak memory") if c in rows[0]["costs"]]
    table = Table(title=sentence(groups), title_justify="left")
    for column in ("", metric(name).label, "seeds", *columns):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        cells = row["label"], row["score"], str(row["seeds"]), *(row["costs"][c] for c in columns)
        table.add_row(*cells, style="bold" if row["best"] else None)
    Console().print(table)


def main(*, argv: list[str] | None = None) -> list[Run]:
    args, rest = parse(argv)
    needed()  # before hours of work
    check_writable(args.out)
    recipe = importlib.import_module(f"{__package__}.{args.task}")
    runs = [(asked, state(asked, recipe)) for asked in planned(args, rest)]
    failed = make(args.task, runs)
    there = [read(asked.out) for asked, _ in runs if (asked.out / "result.json").is_file()]
    if there:
        show(grouped(there))
        print(f"report: {write(there, Path(args.out) / PAGE)}")
    if failed:
        raise ValueError(f"these runs failed, see above: {', '.join(failed)}; the same command makes them again")
    return there


if __name__ == "__main__":
    command("compare", main)
