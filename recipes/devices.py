"""One run on all processes that were started, GPUs or not; the loop, and every recipe without it, asks here."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env


def together(kind: type[Accelerator] | type[PartialState], **options: Any) -> Any:
    """Return ``Accelerator(...)``, or before there is one ``PartialState()``, for all processes of this run.

    Without a GPU it must be told to use the CPU, or processes that ``torchrun`` started would not know of each other
    and each would train in the same folder. Raises ``ValueError`` where that happens all the same.
    """
    made, started = kind(cpu=on_cpu(), **options), int(os.environ.get("WORLD_SIZE", 1))
    if started > 1 and made.num_processes < started:
        raise ValueError(
            f"{started} processes were started, and this one knows of {made.num_processes}: they would race for one "
            "folder. Set ACCELERATE_USE_CPU=true to train on the CPU, or start one process"
        )
    return made


def on_cpu() -> bool:
    """Say whether the CPU is to be used. Several processes cannot share a Mac's GPU: there they take the CPU too."""
    if not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"):
        return True
    device = torch.accelerator.current_accelerator()
    return device is not None and device.type == "mps" and int(os.environ.get("WORLD_SIZE", 1)) > 1
