"""What the page says of the groups: sentence, tables, configuration, and what is missing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptkit.report.groups import PLACE, Group, Spread, best
from adaptkit.report.run import Run
from adaptkit.report.words import METRICS, SPACE, amount, duration, metric, number, size

__all__ = ["comparison", "configuration", "metrics", "missing", "runs", "sentence"]


def sentence(groups: Sequence[Group]) -> str:
    """The result in one sentence or two."""
    top = best(groups)
    if top is None or top.score is None or top.metric is None:
        steps = max((run.rows[-1]["step"] for g in groups for run in g.runs if run.rows), default=0)
        return f"Trained for {steps} steps so far; there is no score yet."
    name = metric(top.metric).label
    reached = f"{top.label} reaches {top.score.said(top.metric)} {name}{_seeds(top.score)}"
    rest = [g for g in groups if g is not top and g.score is not None]
    if not rest:
        return f"{reached}{_interval(top)}{_cost(top)}."
    second = best(rest)
    if second is None or second.score is None:
        return f"{reached}."
    apart = top.score.mean - second.score.mean
    points = f"{100 * apart:.1f} points" if metric(top.metric).percent else f"{apart:.3f}"
    said = f"Of {len(groups)} setups, {reached}, {points} more than {second.label} ({second.score.said(top.metric)})."
    return f"{said} {_verdict(top, second)}"


def _seeds(score: Spread) -> str:
    return f" (mean and standard deviation of {score.seeds} seeds)" if score.seeds > 1 else ""


def _interval(group: Group) -> str:
    between = group.lead.interval if len(group.runs) == 1 else None
    if between is None or group.metric is None:
        return ""
    low, high = (number(group.metric, v, unit=False) for v in between)
    return f" (95 % interval over images: {low} to {high})"


def _cost(group: Group) -> str:
    trained, whole = (group.lead.result.get(k) for k in ("trained_parameters", "parameters"))
    if not trained:
        return ""
    return f", with {trained:,} trained parameters" + (f", {trained / whole:.1%} of the model" if whole else "")


def _verdict(one: Group, other: Group) -> str:
    """Whether the seeds of two groups tell them apart, and the intervals over images."""
    scores = [[run.score for run in g.counted if run.score is not None] for g in (one, other)]
    if min(map(len, scores)) > 1:
        clear = min(scores[0]) > max(scores[1])
        seeds = f"{'Every' if clear else 'Not every'} seed of {one.label} scores above every seed of {other.label}"
    else:
        seeds = "With one seed each, how much of this is luck of the seed is not known"
    between = [run.interval for g in (one, other) for run in (g.lead,)]
    if between[0] is None or between[1] is None:
        return f"{seeds}."
    overlap = between[0][0] <= between[1][1]
    return f"{seeds}; the 95 % intervals over images {'overlap' if overlap else 'do not overlap'}."


def comparison(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """What each setup scores and costs; the best score is marked."""
    top, rows = best(groups), list[dict[str, Any]]()
    for group in groups:
        lead, score = group.lead.result, group.score
        costs = {
            "trained parameters": _count(lead.get("trained_parameters")),
            "of the model": _share(lead.get("trained_parameters"), lead.get("parameters")),
            "file": size(lead.get("file_bytes")),
            "MACs per image": amount(lead.get("macs")),
            "training": _costs(group, Run.seconds, duration),
            "peak memory": _costs(group, Run.memory, _mebibytes),
            "kept by a step": size(lead.get("kept_bytes")),
        }
        rows.append({
            "label": group.label, "place": group.place, "best": group is top and len(groups) > 1, "costs": costs,
            "seeds": _of(len(group.counted), len(group.runs)),
            "score": score.said(group.metric, unit=False) if score and group.metric else "–",
        })  # fmt: skip
    return _known(rows, "costs")


def _of(part: int, whole: int) -> str:
    return str(part) if part == whole else f"{part} of {whole}"


def _share(part: int | None, whole: int | None) -> str:
    return f"{part / whole:.1%}".replace("%", f"{SPACE}%") if part and whole else "–"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _mebibytes(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f} MiB"


def _costs(group: Group, value: Any, said: Any) -> str:
    found = group.of(value)
    return said(None if found is None else found.mean)


def metrics(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Every number of the evaluations, a row for each."""
    rows = []
    for name in METRICS:
        found = [group.of(lambda run, name=name: _value(run, name)) for group in groups]  # type: ignore[misc]
        if any(found):
            known = metric(name)
            cells = ["–" if one is None else one.said(name, unit=False) for one in found]
            unit = "%" if known.percent else known.unit.strip()
            rows.append({"label": known.label, "unit": unit, "lower": known.lower, "cells": cells})
    return rows


def _value(run: Run, name: str) -> float | None:
    rows = [row for row in run.rows if name in row]
    found = run.evaluation.get(name, rows[-1][name] if rows else None)
    return found if isinstance(found, int | float) else None


def runs(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Every run: seed, score, interval, steps, time; of these what is known of any."""
    rows = []
    for group in groups:
        for run in group.runs:
            name, between = run.metric, run.interval
            cells = {
                "seed": "–" if run.seed is None else str(run.seed),
                "score": number(name, run.score, unit=False) if name else "–",
                "95 % interval over images": " to ".join(number(str(name), v, unit=False) for v in between or ())
                or "–",
                "steps": str(run.result.get("steps") or (run.rows[-1]["step"] if run.rows else "–")),
                "training": duration(run.seconds()),
                "peak memory": _mebibytes(run.memory()),
                "SHA-256 of the file": str(run.result.get("file_sha256") or "–")[:12],
            }
            state = "" if run.is_finished else "not ended"
            rows.append({"name": run.name, "label": group.label, "place": group.place, "state": state, "cells": cells})
    return _known(rows, "cells")


def _known(rows: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Leave out the columns that nobody fills."""
    for name in [name for name in rows[0][key] if all(row[key][name] == "–" for row in rows)]:
        for row in rows:
            del row[key][name]
    return rows


def configuration(groups: Sequence[Group]) -> dict[str, Any]:
    """What differs between the setups, all options of the best, data, backbone and versions."""
    lead = (best(groups) or groups[0]).lead
    keys = list(dict.fromkeys(k for g in groups for k in g.runs[0].options if k not in PLACE))
    values = {k: [_plain(g.runs[0].options.get(k)) for g in groups] for k in keys}
    differ = [(k.replace("_", "-"), v) for k, v in values.items() if len(set(v)) > 1]
    about = {
        "Options": {k.replace("_", "-"): _plain(v) for k, v in lead.options.items() if v not in (None, [], {})},
        "Run": lead.config.get("run"), "Data for training": (lead.config.get("data") or {}).get("train"),
        "Data for validation": (lead.config.get("data") or {}).get("val"), "Backbone": lead.config.get("backbone"),
        "Versions": lead.config.get("versions"),
    }  # fmt: skip
    tables = [(title, [(k, _plain(v)) for k, v in said.items()]) for title, said in about.items() if said]
    return {"differ": differ if len(groups) > 1 else [], "tables": tables, "name": lead.name}


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_plain, value))
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def missing(groups: Sequence[Group]) -> list[str]:
    """What runs did not record, and the command that makes it."""
    said = []
    for run in (run for group in groups for run in group.runs):
        where = run.path or Path(run.name)
        if run.config and not run.is_finished:
            recipe = (run.config.get("run") or {}).get("recipe")
            how = "--resume" if any(where.glob("checkpoints/*")) else "--overwrite"
            said.append(f"{run.name} has not ended: adaptkit train {recipe} --config {where}/config.yaml "
                        f"--out {where} {how}")  # fmt: skip
        elif not run.evaluation:
            data = ((run.config.get("data") or {}).get("val") or {}).get("name") or "DATA"
            said.append(f"{run.name} has no evaluation, so no classes, confusions or pictures: adaptkit eval "
                        f"{where}/adapter --data {data} --json > {where}/evaluation.json")  # fmt: skip
        elif not run.evaluation.get("pictures") and run.config:
            said.append(f"{run.name} has no pictures, as runs on streamed data, and evaluations made afterwards: "
                        f"adaptkit predict {where}/adapter IMAGES... --out DIR")  # fmt: skip
    return said
