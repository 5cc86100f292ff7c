"""Curves as SVG inside the page: matplotlib draws, the page's style sheet gives colours and letters.

What is drawn in the placeholders ``INK``, ``FAINT`` and ``SERIES`` becomes a CSS variable, so that one drawing serves
light, dark and print. Series differ in dashes and marks too, not in colour alone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any, NamedTuple

__all__ = ["SERIES", "Line", "Row", "available", "forest", "lines", "reliability"]

INK, FAINT, GRID = "#010203", "#040506", "#070809"
SERIES = tuple(f"#0a0b{i:02x}" for i in range(8))  #: as many as the style sheet has
DASHES = ("solid", (0, (6, 2)), (0, (2, 1.4)), (0, (7, 2, 1.5, 2)), (0, (1, 1)))
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
WIDTH, HEIGHT = 4.7, 2.7  #: inches of 72 units
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "adaptkit", "text.parse_math": False, "font.size": 9,
    "text.color": INK, "axes.labelcolor": FAINT, "axes.edgecolor": GRID, "xtick.color": FAINT, "ytick.color": FAINT,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.6,
    "axes.axisbelow": True, "xtick.major.size": 0, "ytick.major.size": 0, "axes.formatter.useoffset": False,
    "legend.frameon": False, "legend.fontsize": 8.5, "lines.linewidth": 1.6, "lines.markersize": 3.6,
}  # fmt: skip


class Line(NamedTuple):
    """One run in a chart."""

    label: str | None  #: None for a further run of a group
    place: int  #: of its group
    x: Sequence[float]
    y: Sequence[float]


class Row(NamedTuple):
    """One run in a forest plot."""

    label: str
    place: int
    value: float
    between: tuple[float, float] | None


def available() -> bool:
    """Whether charts can be drawn here."""
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def lines(title: str, rows: Sequence[Line], x: str = "step", marks: bool = False) -> str:
    """Curves over steps."""
    with _axes() as (figure, axes):
        for row in rows:
            axes.plot(row.x, row.y, label=row.label, **_look(row.place, marks))
        axes.set_xlabel(x, fontsize=8.5)
        axes.margins(x=0.02)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len({row.place for row in rows}) > 1:
            axes.legend(loc="best", ncols=2, handlelength=2.6)
        return _svg(figure, title)


def forest(title: str, rows: Sequence[Row]) -> str:
    """A row for each run: its score as a mark, its interval as a line."""
    with _axes(0.75 + 0.26 * len(rows)) as (figure, axes):
        for i, row in enumerate(rows):
            look = _look(row.place, True)
            if row.between is not None:
                axes.plot(row.between, (i, i), color=look["color"], linewidth=2.2, solid_capstyle="round", alpha=0.55)
            axes.plot([row.value], [i], color=look["color"], marker=look["marker"], markersize=6, linestyle="none")
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        return _svg(figure, title)


def reliability(title: str, rows: Sequence[Line]) -> str:
    """Accuracy over confidence; on the diagonal a model is as often right as it is sure."""
    with _axes(3.4, 3.7) as (figure, axes):
        axes.plot((0, 1), (0, 1), color=FAINT, linewidth=1, linestyle=DASHES[2], label="as sure as right")
        for row in rows:
            axes.plot(row.x, row.y, label=row.label, **_look(row.place, True))
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.set_xlabel("confidence", fontsize=8.5)
        axes.set_ylabel("share that is right", fontsize=8.5)
        axes.legend(loc="upper left", handlelength=2.6)
        return _svg(figure, title)


def _look(place: int, marks: bool) -> dict[str, Any]:
    look = {"color": SERIES[place % len(SERIES)], "linestyle": DASHES[place % len(DASHES)]}
    return {**look, "marker": MARKS[place % len(MARKS)]} if marks else look


@contextmanager
def _axes(height: float = HEIGHT, width: float = WIDTH) -> Iterator[tuple[Any, Any]]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot: no state, no window

    with rc_context(STYLE):
        figure = Figure((width, height), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        yield figure, axes


def _svg(figure: Any, title: str) -> str:
    """The figure as an element of a page: sized and coloured by the style sheet, with a name for who cannot see it."""
    held = io.StringIO()
    figure.savefig(held, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = held.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]+)"', text)
    inside = text[text.index(">") + 1 :]
    used = set(re.findall(r"(?:url\(#|href=\"#)([^\")]+)", inside))
    inside = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", inside)  # ids of a page are unique
    names = {INK: "ink", FAINT: "faint", GRID: "line", **{colour: f"s{i}" for i, colour in enumerate(SERIES)}}
    for placeholder, name in names.items():
        inside = inside.replace(placeholder, f"var(--{name})")
    inside = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", inside)  # the page's own letters
    view = box[1] if box else "0 0 100 100"
    return f'<svg role="img" aria-label="{escape(title)}" viewBox="{view}">{inside}'.replace("xlink:href", "href")
