"""How long something takes on the device at hand."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["seconds"]

ROUNDS = 5


def seconds(run: Callable[[], Tensor]) -> float:
    """Return the median time of a run, after one that is not counted; waits for the device."""
    taken = []
    device = run().device
    for _ in range(ROUNDS):
        _wait(device)
        started = time.perf_counter()
        run()
        _wait(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
