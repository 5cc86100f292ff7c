"""Runs that are the same but for their seed, together; of each number the mean and the spread over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from adaptkit.report.run import Run
from adaptkit.report.words import SPACE, metric, number

__all__ = ["Group", "Spread", "best", "grouped", "spread"]

#: Options that say where and how, not what: they make no other training.
PLACE = (
    "seed",
    "out",
    "workers",
    "save_every",
    "eval_every",
    "tracker",
    "details",
    "cache_features",
    "offload",
    "shard",
)


class Spread(NamedTuple):
    """The mean over seeds, and the standard deviation with n - 1, None for a single one."""

    mean: float
    deviation: float | None
    seeds: int

    def said(self, name: str, unit: bool = True) -> str:
        """Write it as the metric ``name`` is written."""
        if self.deviation is None:
            return number(name, self.mean, unit)
        apart = number(name, self.deviation, unit=False)
        percent = f"{SPACE}%" if unit and metric(name).percent else ""
        return f"{number(name, self.mean, unit=False)}{SPACE}±{SPACE}{apart}{percent}"


def spread(values: Sequence[float | None]) -> Spread | None:
    """Return mean and spread of the values that are there; None where none is."""
    known = [v for v in values if v is not None and v == v]
    if not known:
        return None
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


@dataclass
class Group:
    """Runs of one setup."""

    label: str
    runs: list[Run]
    place: int = 0  #: among the groups, which is its colour

    @property
    def metric(self) -> str | None:
        """Which number is the score."""
        return next((run.metric for run in self.runs if run.metric), None)

    @property
    def counted(self) -> list[Run]:
        """The runs that have ended: the score of half a training is no draw of the same number. Without any, all."""
        return [run for run in self.runs if run.is_finished] or self.runs

    def of(self, value: Callable[[Run], float | None]) -> Spread | None:
        """Return mean and spread of what ``value`` says of each run that counts."""
        return spread([value(run) for run in self.counted])

    @property
    def score(self) -> Spread | None:
        """Mean and spread of the score."""
        return self.of(lambda run: run.score)

    @property
    def lead(self) -> Run:
        """The run that pictures and files are of: the best one."""
        return max(self.counted, key=lambda run: -1.0 if run.score is None else run.score)

    def per_class(self, key: str) -> list[Spread | None]:
        """Return mean and spread of each class of a list that the evaluations hold; [] where none does."""
        rows = [run.evaluation[key] for run in self.counted if run.evaluation.get(key)]
        return [spread(list(values)) for values in zip(*rows)] if rows else []


def best(groups: Sequence[Group]) -> Group | None:
    """Return the group with the highest score (of a score more is better); None where none has one.

    Groups none of whose runs has ended are passed over, unless all are such.
    """
    scored = [group for group in groups if group.score is not None]
    scored = [group for group in scored if group.lead.is_finished] or scored
    return max(scored, key=lambda group: group.score.mean if group.score else 0.0, default=None)


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Put runs together whose configuration is equal but for the seed, in the order in which they are given.

    A run without a configuration stands alone.
    """
    together: dict[str, list[Run]] = {}
    for i, run in enumerate(runs):
        together.setdefault(_key(run) or f"alone {i}", []).append(run)
    members = list(together.values())
    return [Group(label, group, i) for i, (label, group) in enumerate(zip(_labels(members), members))]


def _setup(run: Run) -> dict[str, Any]:
    return {k: v for k, v in run.options.items() if k not in PLACE}


def _key(run: Run) -> str | None:
    if not run.config:
        return None
    recipe = (run.config.get("run") or {}).get("recipe")
    rest = {k: run.config.get(k) for k in ("data", "backbone")}
    return json.dumps([recipe, _setup(run), rest], sort_keys=True, default=str)


def _labels(members: list[list[Run]]) -> list[str]:
    """Name each group by as few of the options that differ as tell all apart, the adapter first."""
    setups = [_setup(group[0]) for group in members]
    keys = list(dict.fromkeys(k for setup in setups for k in setup))
    differ = [k for k in keys if len({json.dumps(setup.get(k), default=str) for setup in setups}) > 1]
    order: list[str] = [k for k in ("adapter", "head", "adapter_options") if k in differ]
    order += [k for k in differ if k not in order]
    labels = [_adapter(setup, group[0]) for setup, group in zip(setups, members)]
    for key in order:
        if len(set(labels)) == len(labels):
            return labels
        if key != "adapter":
            labels = [f"{label}, {_said(key, setup.get(key))}" for label, setup in zip(labels, setups)]
    if len(set(labels)) < len(labels):  # of the same options: other data, another backbone, or no configuration
        labels = [group[0].name for group in members]
    taken: dict[str, int] = {}
    for i, label in enumerate(labels):
        taken[label] = taken.get(label, 0) + 1
        labels[i] = label if taken[label] == 1 else f"{label} ({taken[label]})"
    return labels


def _adapter(setup: dict[str, Any], run: Run) -> str:
    named = setup.get("adapter") or run.result.get("adapter") or run.name
    said = " + ".join(map(str, named)) if isinstance(named, list) else str(named)
    return "no adapter" if said == "none" else said


def _said(key: str, value: Any) -> str:
    said = json.dumps(value) if isinstance(value, dict) else value
    return f"{key.replace('_', '-')} {' '.join(map(str, said)) if isinstance(said, list) else said}"
