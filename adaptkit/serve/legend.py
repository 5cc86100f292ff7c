"""What an answer says, in HTML: a colour, a name, a bar and a number for each thing found."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from adaptkit.predict.answers import Answer, Classification, Depth, Detection, Panoptic, Segmentation
from adaptkit.predict.draw import drawn_between
from adaptkit.predict.palette import VIRIDIS, Colour

__all__ = ["legend"]

MOST = 24  #: rows
Row = tuple[Sequence[int], str, float, str]  #: colour, name, length of the bar in 0..1, number


def legend(answer: Answer) -> str:
    """Return it; names are a file's, and are escaped."""
    if isinstance(answer, Depth):
        return _ramp(answer)
    rows = _rows(answer)
    if not rows:
        return '<p class="foot">nothing was found</p>'
    more = f'<p class="foot">and {len(rows) - MOST} more, in the JSON</p>' if len(rows) > MOST else ""
    return f'<div class="legend">{"".join(map(_row, rows[:MOST]))}</div>{more}'


def _rows(answer: Answer) -> list[Row]:
    said = answer.json()
    if isinstance(answer, Segmentation):
        return [(answer.palette[c["id"]], c["name"], c["share"], percent(c["share"])) for c in said["classes"]]
    if isinstance(answer, Panoptic):
        return _kinds(answer)
    if isinstance(answer, Detection):
        found = zip(answer.labels.tolist(), said["objects"])
        return [(answer.palette[label], one["name"], one["score"], f"{one['score']:.2f}") for label, one in found]
    if isinstance(answer, Classification):
        accent: Colour = (0, 114, 178)  # one picture, one answer: colours would say nothing
        return [(accent, top["name"], top["score"], percent(top["score"])) for top in said["top"]]
    return []


def _kinds(answer: Panoptic) -> list[Row]:
    """Segments of one class in one row, the largest area first."""
    areas: dict[int, list[int]] = {}
    for one in answer.found:
        areas.setdefault(one["label"], []).append(one["area"])
    names = {one["label"]: (one["name"], one["isthing"]) for one in answer.found}
    pixels = max(1, answer.segments.size)
    rows: list[Row] = []
    for label, found in sorted(areas.items(), key=lambda item: -sum(item[1])):
        name, isthing = names[label]
        share = sum(found) / pixels
        rows.append((answer.palette[label], f"{name} × {len(found)}" if isthing else name, share, percent(share)))
    return rows


def percent(share: float) -> str:
    """``0.0004`` -> ``<0.1%``: what is there is not nought."""
    return "<0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def _row(row: Row) -> str:
    (red, green, blue), name, length, number = row
    colour = f"background:rgb({red}, {green}, {blue})"
    return (
        f'<i style="{colour}"></i><span>{escape(name)}</span>'
        f'<s style="{colour};width:{100 * length:.1f}%"></s><b>{escape(number)}</b>'
    )


def _ramp(answer: Depth) -> str:
    low, high = drawn_between(answer)
    steps = ", ".join(f"rgb{colour}" for colour in VIRIDIS)
    said = answer.json()
    return (
        f'<div class="ramp" style="background:linear-gradient(90deg, {steps})"></div>'
        f'<div class="ends"><span>near: {low:.2f} m</span><span>far: {high:.2f} m</span></div>'
        f'<p class="foot">least {said["min"]:.2f} m, median {said["median"]:.2f} m, greatest {said["max"]:.2f} m</p>'
    )
