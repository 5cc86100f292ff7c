"""An ablation as data: a YAML file with a row for each setup, read into the runs that make it.

    title, source:  what is taken apart, and the paper's table
    recipe:         that trains it where nobody asks for another
    arguments:      of the runs, by recipe, before those of the command line
    adapter:        of the rows that name none; A+B is both in one
    base:           name of the row that the others are compared with
    missing:        rows of the paper that are not there, and why
    chart:          bars (default), or macs: the score against MACs, a line through the rows of one series
    rows:           name; adapter; options (of a single adapter, or by adapter); arguments; series; base; and
                    runs, reading: the name of a row whose runs this one reads again, and which of their scores

The files are in ``recipes/ablations``.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from adaptkit.core.near import hint

from .compare import Asked, own_cache

__all__ = ["FOLDER", "Row", "Table", "known", "planned", "table"]

FOLDER = Path(__file__).parent / "ablations"
CHARTS = ("bars", "macs")
#: How a recipe names adapters and options. AdaViT's has one adapter.
OF_RECIPE = {"adavit": "--options"}


@dataclass(frozen=True)
class Row:
    """One setup."""

    name: str
    adapter: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    runs: str = ""  #: the row whose runs it reads; "": its own
    reading: str = ""  #: which score of a run; "": that of what it trained
    series: str = ""  #: rows of one series are joined by a line
    base: str = ""  #: the row that it is compared with; "": the table's


@dataclass(frozen=True)
class Table:
    """A table of setups."""

    name: str
    title: str
    source: str
    rows: tuple[Row, ...]
    recipe: str = "segment"
    arguments: dict[str, list[str]] = field(default_factory=dict)
    adapter: str = ""
    base: str = ""
    missing: str = ""
    chart: str = "bars"

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        if not names:
            raise ValueError(f"table {self.name} has no rows")
        nameless = next((name for name in names if not slug(name)), None)
        if nameless is not None:
            raise ValueError(
                f"table {self.name}: row {nameless!r} needs a letter or a digit in its name, for its folder"
            )
        if len({slug(name) for name in names}) < len(names):
            raise ValueError(f"table {self.name}: two rows have one name, or one folder: {', '.join(names)}")
        own = [row.name for row in self.rows if not row.runs]
        bases = [("base", name, names) for name in (self.base, *(row.base for row in self.rows))]
        for what, name, among in [*bases, *(("runs", row.runs, own) for row in self.rows)]:
            if name and name not in among:
                raise ValueError(f"table {self.name}: {what} is {name!r}, which is no row of it{hint(name, among)}")
        if self.chart not in CHARTS:
            raise ValueError(f"table {self.name}: chart is {self.chart!r}; the charts are {', '.join(CHARTS)}")

    def base_of(self, row: Row) -> str:
        """Return the name of the row that this one is compared with; "" for none, and for a base itself."""
        base = row.base or self.base
        return "" if base == row.name else base


def known() -> list[str]:
    """Return the names of the tables that come with the recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def table(name: str) -> Table:
    """Read a table of :func:`known`, or a file of one's own. ``ValueError`` where there is none, or it is not sound."""
    path = next((p for p in (FOLDER / f"{name}.yaml", Path(name)) if p.is_file()), None)
    if path is None:
        raise ValueError(f"no table is named {name!r}{hint(name, known())}; the tables are {', '.join(known())}")
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
        rows = tuple(_row(row, said.get("adapter", "")) for row in said.pop("rows"))
        return Table(name=path.stem, rows=rows, **said)
    except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no table: {error}; see those in {FOLDER.name}") from error


def _row(said: dict[str, Any], adapter: str) -> Row:
    """Raise ``TypeError`` for a field of another kind: YAML makes numbers of names, and characters of a lone string."""
    if "name" not in said:
        raise TypeError(f"a row has no name: {said}")
    texts = {key: str(said[key]) for key in ("name", "runs", "reading", "series", "base") if key in said}
    row = Row(**{"adapter": adapter, **said, **texts})
    if not isinstance(row.arguments, list | tuple):
        raise TypeError(f"row {row.name!r} has arguments: {row.arguments!r}; give a list, [--lr, 1e-3]")
    if not isinstance(row.options, dict):
        raise TypeError(f"row {row.name!r} has options: {row.options!r}; give names and values, {{injector: false}}")
    return replace(row, arguments=tuple(map(str, row.arguments)))


def slug(name: str) -> str:
    """Return a name that a folder can have."""
    return re.sub(r"[^\w.=-]+", "-", name.replace("+", "with")).strip("-").lower()


def planned(table: Table, recipe: str, seeds: list[int], out: Path, rest: list[str]) -> dict[tuple[str, int], Asked]:
    """Return the runs of a table by row and seed, seed by seed: what is there after half of the time is a table.

    ``rest`` are arguments of the recipe. Raises ``ValueError`` where they set what a row sets.
    """
    runs: dict[tuple[str, int], Asked] = {}
    for seed in seeds:
        for row in (row for row in table.rows if not row.runs):
            folder = out / f"{slug(row.name)}-seed{seed}"
            given = [*_adapters(row, recipe), *row.arguments]
            twice = sorted({a for a in given if a.startswith("--")} & {a.partition("=")[0] for a in rest})
            if twice:
                raise ValueError(
                    f"row {row.name!r} sets {', '.join(twice)}; leave that out, or make a table of your own"
                )
            arguments = [*table.arguments.get(recipe, ()), *own_cache(rest, folder.name), *given]
            where = ["--seed", str(seed), "--out", str(folder)]
            runs[row.name, seed] = Asked(row.adapter, seed, folder, [*arguments, *where])
    if len(runs) < len(seeds) * sum(not row.runs for row in table.rows):
        raise ValueError("--seeds names one seed twice")
    return runs


def _adapters(row: Row, recipe: str) -> list[str]:
    if recipe in OF_RECIPE:
        return [OF_RECIPE[recipe], json.dumps(row.options)] if row.options else []
    names = row.adapter.split("+")
    options = row.options if len(names) > 1 or not row.options else {names[0]: row.options}
    return ["--adapter", *names, *(["--adapter-options", json.dumps(options)] if options else [])]
