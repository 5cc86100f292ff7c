"""How a recipe uses the devices of this machine; the loop, and every recipe without it, asks here."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration, parse_flag_from_env
from torch import Tensor

from adaptkit import AdaptedModel
from adaptkit.model.offloading import offload

from .stopping import ends, patient

BACKEND = "inductor"  # of torch.compile


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


def loading(device: torch.device, workers: int) -> dict[str, Any]:
    """Options of a ``DataLoader``: batches for a GPU lie in pinned memory, from which copies need not wait.

    Workers end with their pass over the data. Those that persist outlive the run until the loader, which lies in a
    cycle, is collected; their queue is closed by then, and torch waits five seconds for each.
    """
    more = {"worker_init_fn": patient} if workers else {}
    if workers:
        ends()
    return {"num_workers": workers, "pin_memory": device.type == "cuda", **more}


def copying() -> DataLoaderConfiguration:
    """What an Accelerator is told: copies to a GPU do not wait for it."""
    return DataLoaderConfiguration(non_blocking=torch.cuda.is_available())


def sent(x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU on the device, a GPU at its leisure."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def on_device(model: Any, accelerator: Accelerator, args: Any) -> Any:
    """Put a model on the device of this process; with ``--offload`` but for the blocks of its backbone."""
    if getattr(args, "offload", False):
        offload(model, accelerator.device)
        return model
    return model.to(accelerator.device)


def compile_adapted(model: Any, mode: str) -> Any:
    """Compile the adapted model (backbone, adapters, and a head of adaptkit's), in place; returns the whole.

    Names stay as they are, so files and checkpoints do not show it. What other libraries put around a pyramid, such as
    a detector, runs as it is: shapes that change from image to image would be compiled again and again.
    """
    for part in model.modules():
        if isinstance(part, AdaptedModel):
            part.compile(backend=BACKEND, mode=mode)
    return model
