"""What the benchmarks share: turns, medians, memory, and a line on the machine."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


def seconds(run: Callable[[], object], device: str = "cpu") -> float:
    """Wall time of a call."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def in_turns(runs: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu") -> dict[str, float]:
    """Median seconds of each run: they take turns, so that a busy machine is busy for all of them."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            spent = seconds(run, device)
            if turn:  # the first one warms up
                taken[name].append(spent)
    return {name: statistics.median(found) for name, found in taken.items()}


def status(field: str) -> int:
    """KiB of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def machine(threads: int, device: str = "cpu") -> str:
    """One line on what the figures were taken on."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = models[0].split(":")[1].strip() if models else processor
    if device.startswith("cuda"):
        processor = torch.cuda.get_device_name(device)
    return f"{processor}, {threads} threads, torch {torch.__version__}, Python {platform.python_version()}"
