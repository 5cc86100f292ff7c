"""The best score so far: its adapter is kept in ``best/``, and a run ends that finds no better one for long."""

from __future__ import annotations

import argparse
from typing import Any

from .task import Task


class Best:
    """The best value of one metric over the evaluations. What decides is in a checkpoint (:meth:`state`)."""

    def __init__(self, metric: str | None, lower: bool = False, patience: int = 0) -> None:
        """``metric``: None keeps nothing. ``patience``: evaluations without a better one that end the run; 0: none."""
        self.metric, self.lower, self.patience = metric, lower, patience
        self.step: int | None = None
        self.value: float | None = None
        self.scored = -1  #: the step of the last evaluation
        self.since = 0  #: evaluations after the best

    def see(self, step: int, metrics: dict[str, float]) -> bool:
        """Look at an evaluation; True where it is the best. Of two equal ones the first is; NaN never is."""
        self.scored = step
        if self.metric is None:
            return False
        if self.metric not in metrics:
            raise ValueError(f"--keep-best {self.metric}: this evaluation has {', '.join(metrics)}; name one of these")
        value = metrics[self.metric]
        better = self.value is None or (value < self.value if self.lower else value > self.value)
        if value != value or not better:
            self.since += 1
            return False
        self.step, self.value, self.since = step, value, 0
        return True

    @property
    def exhausted(self) -> bool:
        """Whether the run is to end."""
        return bool(self.patience) and self.since >= self.patience

    def state(self) -> dict[str, Any]:
        """What a checkpoint says, and result.json."""
        return {k: getattr(self, k) for k in ("metric", "step", "value", "scored", "since")}

    def go_on(self, state: dict[str, Any]) -> None:
        """Put back what a checkpoint says. The best of another metric is no best of this one."""
        self.scored = state.get("scored", -1)
        if state.get("metric") == self.metric:
            self.step, self.value, self.since = state["step"], state["value"], state["since"]


def best_of(task: Task, args: argparse.Namespace) -> Best:
    """Read ``--keep-best`` and ``--patience``; ``ValueError`` where the task has no such metric.

    Without ``--keep-best``, the task's score decides where ``--eval-every`` asks for it more than once.
    """
    known = dict.fromkeys((task.score, *task.percent, *task.lower))
    name = args.keep_best or (task.score if args.eval_every else None)
    if name is not None and name != "none" and name not in known:
        raise ValueError(f"--keep-best {name}: {task.name} has no such metric; it has {', '.join(known)}, or give none")
    if args.patience and (not args.eval_every or name == "none"):
        raise ValueError(
            f"--patience {args.patience} counts evaluations without a better one: give --eval-every N, and a metric "
            "for --keep-best"
        )
    return Best(None if name == "none" else name, name in task.lower, args.patience)
