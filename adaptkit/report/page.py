"""The page: facts and charts in a template."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from adaptkit.hub.write import check_writable, write_atomic
from adaptkit.report import by_class, charts, facts, figures
from adaptkit.report.groups import Group, best, grouped
from adaptkit.report.run import Run
from adaptkit.report.words import metric, number
from adaptkit.version import DISTRIBUTION, __version__

__all__ = ["Extra", "needed", "page", "write"]


@dataclass(frozen=True)
class Extra:
    """What whoever made the runs adds to the page."""

    title: str | None = None
    lead: str | None = None  #: in place of the sentence of the result
    picture: tuple[bytes, str, str] | None = None  #: a PNG, what it shows, and what to say under it
    commands: str | None = None  #: how to go on
    notes: tuple[str, ...] = ()
    marked: frozenset[str] = field(default_factory=frozenset)  #: classes to look at


def needed() -> None:
    """Raise ``ImportError`` with the pip line where what makes the page is not installed."""
    try:
        import jinja2  # noqa: F401
        import matplotlib as _  # noqa: F401
    except ImportError as error:
        raise ImportError(f"the report needs {error.name}: pip install '{DISTRIBUTION}[report]'") from error


def write(runs: Sequence[Run], out: str | Path, extra: Extra = Extra()) -> Path:
    """Write the page about these runs; returns its path."""
    target = Path(out).expanduser()
    check_writable(target.parent)
    write_atomic(target, page(runs, extra).encode())
    return target


def page(runs: Sequence[Run], extra: Extra = Extra()) -> str:
    """Return the page. ``ValueError`` without runs, and for runs of several tasks, whose scores are not the same."""
    from jinja2 import Environment

    groups = grouped(runs)
    if not groups:
        raise ValueError("there is no run to report on")
    tasks = sorted({str(run.task) for run in runs if run.task})
    if len(tasks) > 1:
        raise ValueError(f"these runs are of several tasks, {', '.join(tasks)}: make a report of each")
    folder, top = files("adaptkit.report"), best(groups)
    scores = by_class.classes(groups)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((folder / "page.html").read_text(encoding="utf-8"))
    return template.render(
        title=extra.title or _title(groups, runs), lead=extra.lead or facts.sentence(groups), extra=extra,
        style=(folder / "style.css").read_text(encoding="utf-8"), version=__version__, tiles=_tiles(top or groups[0]),
        picture=extra.picture and base64.b64encode(extra.picture[0]).decode(), groups=groups,
        top=top and top.label, several=len(runs) > len(groups),
        about_pictures=figures.ABOUT.get(str(runs[0].task)), legend=figures.has_legend(runs[0].task, scores),
        score=metric(top.metric).label if top and top.metric else "score",
        percent=bool(top and top.metric and metric(top.metric).percent), comparison=facts.comparison(groups),
        metrics=facts.metrics(groups), runs=facts.runs(groups), charts=_charts(groups), classes=scores,
        confusion=by_class.confusion(top or groups[0]), figures=figures.figures(groups, top),
        calibration=_calibration(groups), config=facts.configuration(groups),
        missing=[*facts.missing(groups), *_undrawn()],
        commands=extra.commands or _commands((top or groups[0]).lead),
    )  # fmt: skip


def _title(groups: Sequence[Group], runs: Sequence[Run]) -> str:
    task = (runs[0].task or "training").capitalize()
    data = next((((run.config.get("data") or {}).get("val") or {}).get("name") for run in runs if run.config), None)
    what = groups[0].label if len(groups) == 1 else f"{len(groups)} setups compared"
    return f"{task}{f' on {Path(str(data)).stem}' if data else ''}: {what}"


def _tiles(group: Group) -> list[tuple[str, str]]:
    """The numbers that are read first."""
    row, name, score = facts.comparison([group])[0], group.metric, group.score
    found = [(metric(name).label, score.said(name))] if name and score else []
    return found + [(label, value) for label, value in row["costs"].items() if value != "–" and label != "of the model"]


def _undrawn() -> list[str]:
    return (
        [] if charts.available() else [f"For the curves: pip install '{DISTRIBUTION}[report]', and make the page again"]
    )


def _charts(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Titles and drawings of score, loss and learning rate over the steps, and of all runs' scores."""
    if not charts.available():
        return []
    name, drawn = next((g.metric for g in groups if g.metric), None), []
    scored = [charts.Row(f"{g.label}, seed {run.seed}" if run.seed is not None else g.label, g.place,
                         _shown(name, run.score), _both(name, run.interval))
              for g in groups for run in g.counted if name and run.score is not None]  # fmt: skip
    if name and len(scored) > 1 and (any(row.between for row in scored) or len(scored) > len(groups)):
        unit = " in %" if metric(name).percent else ""
        title = f"{metric(name).label} of each run{unit}"
        title += ", with its 95 % interval over images" if any(r.between for r in scored) else ""
        drawn.append((title, charts.forest(f"{title}: {_told(scored)}", scored)))
    for key in ("loss", name, "lr"):
        rows = _lines(groups, key) if key else []
        if key and any(len(row.x) > 1 for row in rows):
            title = _curve(key)
            ends = ", ".join(f"{row.label} {row.y[-1]:.3g}" for row in rows if row.label)
            drawn.append((title, charts.lines(f"{title} over the steps; at the end {ends}", rows, marks=key == name)))
    return drawn


def _curve(key: str) -> str:
    known = {"loss": "Loss in training", "lr": "Learning rate"}
    return known.get(key) or f"{metric(key).label} in validation{' in %' if metric(key).percent else ''}"


def _shown(name: str | None, value: float | None) -> float:
    return (value or 0.0) * (100 if name and metric(name).percent else 1)


def _both(name: str | None, between: tuple[float, float] | None) -> tuple[float, float] | None:
    return None if between is None else (_shown(name, between[0]), _shown(name, between[1]))


def _told(rows: Sequence[charts.Row]) -> str:
    return ", ".join(f"{row.label} {row.value:.1f}" for row in rows)


def _lines(groups: Sequence[Group], key: str) -> list[charts.Line]:
    """A line for each run; the first of a group has its name."""
    found = []
    for group in groups:
        for n, run in enumerate(group.runs):
            rows = [row for row in run.rows if isinstance(row.get(key), int | float)]
            y = [_shown(key, row[key]) for row in rows]
            found.append(charts.Line(group.label if n == 0 else None, group.place, [row["step"] for row in rows], y))
    return [line for line in found if line.x]


def _calibration(groups: Sequence[Group]) -> dict[str, Any] | None:
    """How sure the predictions are and how often they are right."""
    rows, said = [], []
    for group in groups:
        run = group.lead
        bins = run.evaluation.get("calibration")
        if not bins:
            continue
        pairs = [(x, y) for x, y in zip(bins["confidence"], bins["accuracy"]) if x is not None and y is not None]
        rows.append(charts.Line(group.label, group.place, [x for x, _ in pairs], [y for _, y in pairs]))
        said.append((group.label, number("ece", run.evaluation.get("ece"))))
    if not rows or not charts.available():
        return None
    title = f"Share that is right over confidence; ECE {', '.join(f'{label} {value}' for label, value in said)}"
    return {"svg": charts.reliability(title, rows), "said": said}


def _commands(run: Run) -> str | None:
    if run.path is None:
        return None
    file, data = run.path / "adapter", ((run.config.get("data") or {}).get("val") or {}).get("name") or "DATA"
    return (
        f"adaptkit predict {file} IMAGES... --out predictions\n"
        f"adaptkit eval {file} --data {data}\n"
        f"adaptkit export {file} --out model.onnx\n"
        f"adaptkit serve model={file}"
    )
