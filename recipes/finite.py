"""Whether the loss stays finite, looked up without waiting for the device."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

NEVER = torch.iinfo(torch.int64).max


class Finite:
    """Remembers on the device the first step whose loss was not finite.

    A question to a GPU waits until all is computed that was asked of it before, so the loop puts it only now and then,
    and before it saves or scores: what was trained after a loss that is not finite is in no checkpoint.
    """

    def __init__(self, accelerator: Accelerator, out: Path | None = None) -> None:
        """``out``: the folder of a run that writes checkpoints."""
        self.accelerator, self.out = accelerator, out
        self.first = torch.full((1,), NEVER, device=accelerator.device)

    def see(self, step: int, loss: Tensor) -> None:
        """Look at the loss of a step."""
        self.first = torch.where(loss.detach().isfinite(), self.first, self.first.clamp(max=step))

    def check(self, done: int) -> None:
        """Wait for the device; end the run where the loss of a step before ``done`` was not finite on some rank."""
        first = int(self.accelerator.gather(self.first).min())
        if first == NEVER:
            return
        kept = checkpoints(self.out) if self.out else []
        where = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was written yet"
        raise SystemExit(
            f"the loss is not finite at step {first}: stopped after step {done - 1}, and nothing of steps "
            f"{first}..{done - 1} was saved; {where}. Try a smaller --lr"
        )


def checkpoints(out: Path) -> list[Path]:
    """Return the finished ones of a run, oldest first."""
    return sorted(p for p in (out / "checkpoints").glob("step-*") if p.is_dir() and p.suffix == "")
