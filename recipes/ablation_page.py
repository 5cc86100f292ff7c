"""What an ablation found: the lines of its table, in Markdown, and as a chart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from adaptkit.analysis.style import COLOURS, WIDTH, Drawn
from adaptkit.report import Run
from adaptkit.report.groups import Spread, spread
from adaptkit.report.words import amount, duration, metric

from .ablation import Row, Table

__all__ = ["Bars", "Curves", "Line", "lines", "markdown", "picture", "reading"]


@dataclass(frozen=True)
class Line:
    """What one row scores and costs; means over the seeds that have ended."""

    name: str
    series: str
    base: str  #: the line that it is compared with
    metric: str  #: name of the score, as ``adaptkit.report`` knows it
    score: Spread
    apart: Spread | None  #: from the base, seed by seed
    macs: float | None  #: of one image
    share: float | None  #: of the MACs of the dense model, where a run tells it
    parameters: float | None  #: that are trained
    seconds: float | None  #: of training
    memory: float | None  #: MiB, at most

    def record(self) -> dict[str, Any]:
        """The line for a JSON file."""
        return {k: v for k, v in asdict(self).items() if v is not None} | {
            key: value._asdict() for key in ("score", "apart") if (value := getattr(self, key)) is not None
        }


def reading(run: Run, which: str) -> Run | None:
    """Return a run as its score ``which`` has it; "" is that of what it trained. None where it has no such score.

    A run of AdaViT's recipe tells several, in ``readings`` of its result.json: trained, dense, and so on.
    """
    told = run.result.get("readings")
    if told is None:
        return None if which else run
    said = told.get(which or run.result["trained"])
    if said is None:
        return None
    costs = {"macs": said["macs"] * run.result["gmacs"] * 1e9, "share": said["macs"]}
    spent = ("seconds", "peak_memory_mib", "trained_parameters") if which not in ("", run.result["trained"]) else ()
    kept = {k: v for k, v in run.result.items() if k not in spent}
    evaluation = {"task": "classification", "top1": said["accuracy"]}
    return replace(run, result={**kept, **costs}, evaluation=evaluation, rows=[] if spent else run.rows)


def lines(table: Table, ended: Mapping[tuple[str, int], Run]) -> list[Line]:
    """Return the lines of the rows that have a run, by row and seed in ``ended``."""
    found = {row.name: _runs(row, ended) for row in table.rows}
    made = (_line(row, found[row.name], table.base_of(row), found) for row in table.rows)
    return [line for line in made if line is not None]


def _runs(row: Row, ended: Mapping[tuple[str, int], Run]) -> dict[int, Run]:
    """The runs of a row by seed."""
    own = {seed: reading(run, row.reading) for (name, seed), run in ended.items() if name == (row.runs or row.name)}
    return {seed: run for seed, run in own.items() if run is not None}


def _line(row: Row, runs: Mapping[int, Run], base: str, found: Mapping[str, Mapping[int, Run]]) -> Line | None:
    name = next((run.metric for run in runs.values() if run.metric), None)
    score = spread([run.score for run in runs.values()])
    if name is None or score is None:
        return None
    pairs = [(run.score, found[base][seed].score) for seed, run in runs.items() if base and seed in found[base]]
    apart = spread([one - other for one, other in pairs if one is not None and other is not None])

    def mean(value: Callable[[Run], Any]) -> float | None:
        found = spread([value(run) for run in runs.values()])
        return None if found is None else found.mean

    return Line(
        row.name, row.series, base, name, score, apart,
        mean(lambda run: run.result.get("macs")), mean(lambda run: run.result.get("share")),
        mean(lambda run: run.result.get("trained_parameters")), mean(Run.seconds), mean(Run.memory),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ table


def markdown(table: Table, found: list[Line], seeds: int) -> str:
    """Write the page: title and source, the table, what it says, and what is missing."""
    name = found[0].metric
    known = metric(name)
    columns: dict[str, Callable[[Line], str]] = {
        f"{known.label}{', %' if known.percent else ''}": lambda line: line.score.said(name, unit=False),
        f"to {_base(table, found)}": lambda line: _signed(line.apart, name),
        "seeds": lambda line: str(line.score.seeds) if line.score.seeds == seeds else f"{line.score.seeds} of {seeds}",
        "MACs": lambda line: amount(line.macs) + (f" ({line.share:.0%})" if line.share is not None else ""),
        "trained parameters": lambda line: "–" if line.parameters is None else f"{round(line.parameters):,}",
        "training": lambda line: duration(line.seconds),
        "peak memory": lambda line: "–" if line.memory is None else f"{line.memory:,.0f} MiB",
    }
    cells = {title: [say(line) for line in found] for title, say in columns.items()}
    cells = {title: column for title, column in cells.items() if set(column) != {"–"}}
    text = [f"**{table.title}** ({table.source})", "", f"| | {' | '.join(cells)} |", "|---" * (len(cells) + 1) + "|"]
    text += [f"| {line.name} | {' | '.join(column[i] for column in cells.values())} |" for i, line in enumerate(found)]
    said = [one for one in (verdict(found), table.missing) if one]
    return "\n".join([*text, *(line for one in said for line in ("", one))]) + "\n"


def _signed(apart: Spread | None, name: str) -> str:
    if apart is None:
        return "–"
    said = apart.said(name, unit=False)
    return said if apart.mean < 0 else f"+{said}"


def _base(table: Table, found: list[Line]) -> str:
    """What the others are compared with, in the title of the column: the base, of several the series."""
    names = {line.base for line in found if line.base}
    series = {line.series for line in found if line.name in names and line.series}
    return next(iter(series)) if len(names) > 1 and len(series) == 1 else table.base or " or ".join(sorted(names))


def verdict(found: list[Line]) -> str:
    """Say which rows differ significantly from their base, and which do not.

    A row does where the 95 % interval of its mean distance, seed by seed (Student's t), leaves out 0.
    """
    bases = list(dict.fromkeys(line.base for line in found if line.apart is not None))
    if not bases:
        return ""
    seeds = min(line.score.seeds for line in found)
    if seeds < 2:
        return "One seed does not tell what of it is chance: give --seeds two or more."
    said = "; ".join(f"{base}: {_against([line for line in found if line.base == base])}" for base in bases)
    return f"By 95 % intervals over {seeds} seeds (Student's t), against {said}."


def _against(found: list[Line]) -> str:
    known = [
        (line.name, line.apart.mean, student(line.apart.seeds) * line.apart.deviation / line.apart.seeds**0.5)
        for line in found
        if line.apart is not None and line.apart.deviation is not None
    ]
    above = [name for name, apart, reach in known if apart > reach]
    below = [name for name, apart, reach in known if apart < -reach]
    rest = [name for name, *_ in known if name not in above and name not in below]
    parts = (("significantly above", above), ("significantly below", below), ("not significant", rest))
    return ", ".join(f"{what} {' / '.join(names)}" for what, names in parts if names)


def student(seeds: int) -> float:
    """Return the 97.5 % quantile of Student's t with ``seeds`` - 1 degrees of freedom."""
    quantiles = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
    return quantiles[min(seeds - 2, len(quantiles) - 1)]


# ------------------------------------------------------------------------------------------------------------ chart


def picture(table: Table, found: list[Line]) -> Drawn:
    """Return the chart that the table asks for."""
    return Curves(found) if table.chart == "macs" else Bars(found, table.base)


@dataclass
class Bars(Drawn):
    """The score of each row with its spread over seeds, and beside it what an image costs."""

    lines: list[Line]
    base: str = ""

    def draw(self, figure: Any) -> None:
        """Points on a common scale, which need not start at 0 as bars would, and bars of MACs."""
        costs = any(line.macs for line in self.lines)
        figure.set_size_inches(WIDTH, 0.7 + 0.2 * len(self.lines))
        panels = figure.subplots(1, 2 if costs else 1, sharey=True, squeeze=False, width_ratios=[2, 1][: 1 + costs])[0]
        known, places = metric(self.lines[0].metric), range(len(self.lines))
        scale = 100 if known.percent else 1
        for place, line in zip(places, self.lines):
            error = None if line.score.deviation is None else scale * line.score.deviation
            marked = COLOURS[1] if line.name == self.base else COLOURS[0]
            panels[0].errorbar(scale * line.score.mean, place, xerr=error, fmt="o", color=marked, capsize=2)
            if line.name == self.base:
                panels[0].axvline(scale * line.score.mean, color=marked, linewidth=0.6, linestyle=":")
        panels[0].set_yticks(list(places), [line.name for line in self.lines])
        panels[0].set_ylim(len(self.lines) - 0.5, -0.5)
        panels[0].set_xlabel(f"{known.label}{', %' if known.percent else ''}")
        if costs:
            panels[1].barh(
                list(places), [(line.macs or 0.0) / 1e9 for line in self.lines], color=COLOURS[0], height=0.6
            )
            panels[1].set_xlabel("GMACs per image")


@dataclass
class Curves(Drawn):
    """The score against MACs, a line through the rows of a series; a row without a series is a level."""

    lines: list[Line]

    def draw(self, figure: Any) -> None:
        """One panel."""
        figure.set_size_inches(WIDTH * 0.75, 3.0)
        axes, known = figure.subplots(), metric(self.lines[0].metric)
        scale, shares = (100 if known.percent else 1), all(line.share is not None for line in self.lines)
        named = list(dict.fromkeys(line.series for line in self.lines if line.series))
        for colour, series in zip(COLOURS, named):
            some = [line for line in self.lines if line.series == series]
            some.sort(key=lambda line: line.macs or 0.0)
            x = [100 * (line.share or 0.0) if shares else (line.macs or 0.0) / 1e9 for line in some]
            y = [scale * line.score.mean for line in some]
            error = [scale * (line.score.deviation or 0.0) for line in some]
            axes.errorbar(x, y, yerr=error, marker="o", color=colour, capsize=2, label=series)
        for line in (line for line in self.lines if not line.series):
            axes.axhline(scale * line.score.mean, color="0.4", linestyle="--", linewidth=1.0, label=line.name)
        axes.set_xlabel("MACs, % of the dense model" if shares else "GMACs per image")
        axes.set_ylabel(f"{known.label}{', %' if known.percent else ''}")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
