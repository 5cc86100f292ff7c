"""Class by class: scores side by side, and what is taken for what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adaptkit.predict.palette import checked_palette
from adaptkit.report.groups import Group, Spread

__all__ = ["classes", "confusion"]

LARGEST = 30  #: classes of a confusion matrix that is shown cell by cell
#: Of each task, the lists by class that are shown, and what they are called.
BY_CLASS = {
    "segmentation": (
        ("per_class", "IoU"), ("per_class_accuracy", "accuracy"), ("per_class_boundary_iou", "boundary IoU"),
    ),
    "classification": (("per_class", "accuracy"),),
    "detection": (("per_class", "AP"),),
    "panoptic": (("per_class", "PQ"),),
}  # fmt: skip


def _names(group: Group, count: int) -> tuple[list[str], list[str]]:
    """Names and colours (#rrggbb) of so many classes, as the evaluation says them."""
    said = next((run.evaluation for run in group.runs if run.evaluation.get("classes")), {})
    known = [str(n) for n in said.get("classes") or ()][:count]
    colours = checked_palette(said.get("palette"), count)
    return [*known, *map(str, range(len(known), count))], [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in colours]


def classes(groups: Sequence[Group]) -> dict[str, Any] | None:
    """Scores by class: of one setup all kinds of score, of several the first kind side by side; None without any."""
    scored = [g for g in groups if g.per_class("per_class")]
    if not scored:
        return None
    kinds = BY_CLASS.get(str(scored[0].lead.task), BY_CLASS["detection"])
    if len(scored) == 1:
        columns = [(label, scored[0], scored[0].per_class(key)) for key, label in kinds if scored[0].per_class(key)]
    else:
        columns = [(g.label, g, g.per_class("per_class")) for g in scored]
    count = len(columns[0][2])
    if any(len(values) != count for _, _, values in columns):
        return None  # of other classes: they cannot stand side by side
    called, colours = _names(scored[0], count)
    evaluation = scored[0].lead.evaluation
    counted = evaluation.get("pixels") or evaluation.get("count")
    whole = sum(counted) if counted else 0
    rows = []
    for k in range(count):
        values = [column[2][k] for column in columns]
        cells = [
            {"said": "–" if v is None else v.said("miou", unit=False), "share": 0 if v is None else 100 * v.mean,
             "best": len(scored) > 1 and _leads(v, values)}
            for v in values
        ]  # fmt: skip
        share = f"{100 * counted[k] / whole:.1f} %" if counted and whole else ""
        rows.append({"name": called[k], "colour": colours[k], "share": share, "cells": cells})
    heads = [{"label": label, "place": group.place} for label, group, _ in columns]
    kind = kinds[0][1]
    return {
        "title": f"{kind[0].upper()}{kind[1:]} by class",
        "heads": heads,
        "rows": rows,
        "shares": bool(counted and whole),
        "several": len(scored) > 1,
        "counted": "pixels" if evaluation.get("pixels") else "images",
    }


def _leads(value: Spread | None, values: Sequence[Spread | None]) -> bool:
    """Whether it is the highest of several that are not all the same."""
    means = {v.mean for v in values if v is not None}
    return len(means) > 1 and value is not None and value.mean == max(means)


def confusion(group: Group | None) -> dict[str, Any] | None:
    """What is taken for what, over all seeds of a setup; None where it is not recorded."""
    matrices = [r.evaluation["confusion"] for r in group.counted if r.evaluation.get("confusion")] if group else []
    if group is None or not matrices:
        return None
    count = len(matrices[0])
    total = [[sum(m[i][j] for m in matrices) for j in range(count)] for i in range(count)]
    shares = [[v / sum(row) if sum(row) else None for v in row] for row in total]
    called, colours = _names(group, count)
    mistakes = sorted(
        ((share, i, j) for i, row in enumerate(shares) for j, share in enumerate(row) if i != j and share), reverse=True
    )
    unit = "pixels" if group.lead.evaluation.get("pixels") else "images"
    said = [f"{100 * s:.0f} % of the {unit} of {called[i]} are taken for {called[j]}" for s, i, j in mistakes[:5]]
    return {"names": called, "colours": colours, "rows": shares if count <= LARGEST else None, "mistakes": said,
            "label": group.label, "unit": unit}  # fmt: skip
