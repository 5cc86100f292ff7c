"""The average of the weights over the steps, which often scores better than the last of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Average:
    """Exponential moving average of the trained parameters: ``average += (1 - decay) (parameter - average)``.

    The decay rises with the step t as (1 + t) / (10 + t), so that short runs do not average their random start.
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.average = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the parameters, after the optimiser's step ``step`` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for average, parameter in zip(self.average, self.parameters):
            average.lerp_(parameter, 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the model has the average weights."""
        with torch.no_grad():
            raw = [p.detach().clone() for p in self.parameters]
            self._write(self.average)
        try:
            yield
        finally:
            self._write(raw)

    def settle(self) -> None:
        """Give the model the average weights for good."""
        self._write(self.average)

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put it back."""
        for average, saved in zip(self.average, state["average"], strict=True):
            average.copy_(saved)
