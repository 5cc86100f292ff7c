"""From the words of the command line to a service."""

from __future__ import annotations

import argparse
import math

import torch
from torch import nn

from adaptkit.create import best_device, create_backbone
from adaptkit.hub.file import AdapterFile
from adaptkit.pretrained import expanded_as, recorded
from adaptkit.serve.allow import Allowed
from adaptkit.serve.limits import Limits
from adaptkit.serve.mounts import Mounts, checked_task
from adaptkit.serve.service import Service
from adaptkit.serve.worker import Worker

__all__ = ["files_of", "service_of"]


def files_of(words: list[str]) -> dict[str, str]:
    """``["seg=runs/seg", ...]`` -> file by name; ``ValueError`` for another form, and for a name given twice."""
    files: dict[str, str] = {}
    for word in words:
        name, given, file = word.partition("=")
        if not given or not file:
            raise ValueError(f"{word!r}: give the task a name, e.g. seg={word or 'FILE'}")
        if checked_task(name) in files:
            raise ValueError(f"two files are named {name!r}: {files[name]} and {file}")
        files[name] = file
    return files


def service_of(args: argparse.Namespace) -> Service:
    """Build the backbone, mount the files and start the thread that owns them; errors as of ``from_pretrained``."""
    files, allowed = files_of(args.adapters), Allowed(args.allow_mount)
    if not files and not allowed.places:
        raise ValueError("nothing to serve: give name=FILE, or --allow-mount to mount while it runs")
    pixels = _whole("--max-megapixels", args.max_megapixels * 1e6)
    limits = Limits(_whole("--max-mb", args.max_mb * 2**20), pixels, args.max_images, args.max_requests, 2 * pixels)
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads {args.threads}: give at least 1")
        torch.set_num_threads(args.threads)
    read = {name: Mounts.read(file) for name, file in files.items()}
    backbone = _backbone(args.backbone, files, read).to(best_device(args.device))
    mounts = Mounts(backbone, args.batching, args.max_batch, strict=args.strict, positions=args.positions)
    for name, file in files.items():
        try:
            mounts.mount(name, file, read[name])
        except (ValueError, TypeError) as error:
            said = str(error)
            raise type(error)(said if said.startswith("task ") else f"task {name!r}: {said}") from error
    return Service(mounts, Worker(mounts, args.window / 1000, args.max_batch), limits, allowed)


def _backbone(name: str | None, files: dict[str, str], read: dict[str, AdapterFile]) -> nn.Module:
    if name is not None:
        return expanded_as(create_backbone(name), next(iter(read.values())).header) if read else create_backbone(name)
    if not files:
        raise ValueError("no file says which backbone: give --backbone")
    first = next(iter(files))
    return recorded(files[first], read[first].header, {})


def _whole(flag: str, value: float) -> int:
    """Return a number to the nearest whole one; ``ValueError`` for NaN and infinity."""
    if not math.isfinite(value):
        raise ValueError(f"{flag} {value}: give a number")
    return round(value)
