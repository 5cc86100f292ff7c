"""AdaViT against what knows nothing of the image, at equal MACs: several budgets, several seeds, one table, one chart.

    adaptkit train adavit --data digits --size 64 --budget 0.4 0.5 0.7 --seeds 0 1 2 --out runs/adavit-baselines

At each budget (``--ways``):

    adaptive         the gates, trained to the budget
    random           random decisions at the rates and MACs of those gates, on the bottlenecks that they trained
    random+          the same training under random decisions at one rate that fits the budget
    static           the same training with the last sub-layers left out of every image
    patches, heads, layers      gates of one kind alone

Table 1 of the paper has Random and Random+; the kinds are its ablation. Dense is the classifier without gates. Heads
alone cannot spend less than the FFNs cost: the table says what each way spends.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from adaptkit.core.arguments import Parser

from .ablate import made
from .ablation import Row, Table
from .adavit_policies import WAYS
from .options import seed_of

__all__ = ["run", "table"]

KINDS = {"patches": "patch", "heads": "head", "layers": "layer"}
#: What is said of each in the table and the legend.
SAID = {"adaptive": "adaptive", "random": "random", "random+": "random+", "static": "static by depth"}
OPTIONS: dict[str, Any] = {"bottleneck": 4}


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return what is asked of the comparison, and the options of the runs."""
    p = Parser(prog="adavit", description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    p.add_argument("--budget", type=float, nargs="+", default=[0.5], metavar="SHARE")
    p.add_argument("--seeds", type=seed_of, nargs="+", default=[0], metavar="N")
    p.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, metavar="WAY")
    p.add_argument("--options", type=json.loads, default=OPTIONS, metavar="JSON")
    p.add_argument("--out", default="runs/adavit")
    args, rest = p.parse_known_args(argv)
    for flag in ("--seed", "--policy", "--overwrite", "--no-overwrite"):
        if any(one == flag or one.startswith(f"{flag}=") for one in rest):
            p.error(f"{flag} is set for each run of a comparison; to begin anew give another --out")
    return args, rest


def table(budgets: list[float], options: dict[str, Any], ways: list[str]) -> Table:
    """Return the comparison as a table of runs: the ways at each budget, and the dense model.

    Raises ``ValueError`` without "adaptive", which the others are compared with.
    """
    if "adaptive" not in ways:
        raise ValueError(f"--ways {' '.join(ways)}: the others are compared with adaptive; add it")
    if len(set(budgets)) < len(budgets):
        raise ValueError(f"--budget names one budget twice: {', '.join(map(str, budgets))}")
    rows = [row for budget in budgets for row in _at(budget, options, ways)]
    dense = Row("dense", runs=rows[0].name, reading="dense")
    return Table(
        "adavit-baselines",
        "AdaViT at equal MACs",
        "Meng et al., CVPR 2022, table 1 and its ablation of the kinds of gates",
        (dense, *rows),
        recipe="adavit",
        chart="macs",
    )


def _at(budget: float, options: dict[str, Any], ways: list[str]) -> list[Row]:
    """Return the rows of one budget."""
    first, found = f"adaptive, {budget:.0%}", []
    for way in (way for way in WAYS if way in ways):
        series = SAID.get(way, f"{way} alone")
        name, base = f"{series}, {budget:.0%}", "" if way == "adaptive" else first
        if way == "random":
            found.append(Row(name, runs=first, reading="random", series=series, base=base))
            continue
        own = {**options, "gates": [KINDS[way]]} if way in KINDS else options
        policy = {"random+": "random", "static": "static"}.get(way, "learned")
        arguments = ("--budget", f"{budget:g}", "--policy", policy)
        found.append(Row(name, options=own, arguments=arguments, series=series, base=base))
    return found


def run(argv: list[str]) -> None:
    """Make the runs and the table."""
    args, rest = parse(argv)
    out = Path(args.out)
    _, failed = made(table(args.budget, args.options, args.ways), "adavit", args.seeds, out, rest)
    if (out / "table.md").is_file():
        print("\n" + (out / "table.md").read_text(encoding="utf-8"))
    if failed:
        raise ValueError(f"these runs failed, see above: {', '.join(failed)}; the same command makes them again")
