"""How images are normalised: as the backbone says, or as the user does; unknown is an error."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from adaptkit.core.view import Source
from adaptkit.pictures import CHANNELS

HELP = """of the images that the backbone was pretrained on, for values in 0..1, in the order of the channels or
one number for all; default: what the backbone says of itself"""


def options(p: argparse.ArgumentParser) -> None:
    """Add ``--mean`` and ``--std``."""
    p.add_argument("--mean", type=float, nargs="+", metavar="R", help=HELP)
    p.add_argument("--std", type=float, nargs="+", metavar="R", help="the same, standard deviation")


def source_of(
    view: Any, args: argparse.Namespace, trained: tuple[tuple[float, ...], tuple[float, ...]] | None = None
) -> Source:
    """Return what the backbone knows of itself, with the mean and the standard deviation of each channel to be used.

    Args:
        view: of the backbone.
        args: of a recipe with :func:`options`; they go before what the backbone says.
        trained: those that a saved file was trained with (:func:`recorded`), which go before it too.

    Raises ``ValueError`` where no one says them, or they are not a number for each channel, those of ``std`` above 0.
    """
    source, channels = view.source(), getattr(getattr(view, "spec", None), "channels", CHANNELS)
    mean, std = given(args, channels) or trained or (source.mean, source.std)
    if not mean or not std:
        raise ValueError(
            f"the backbone {source.id or args.backbone} does not say how its images are normalised; pass --mean R G B "
            "--std R G B, for values in 0..1: --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225 if it is ImageNet's, "
            "--mean 0.5 --std 0.5 if it maps to -1..1"
        )
    if len(mean) != channels or len(std) != channels:
        raise ValueError(
            f"the backbone {source.id or args.backbone} says mean {list(mean)} and std {list(std)}, and a picture is "
            f"read as {channels} channels; pass --mean and --std with {channels} numbers each"
        )
    return source._replace(mean=tuple(mean), std=tuple(std))


def given(args: argparse.Namespace, channels: int | None = None) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return ``--mean`` and ``--std``, a number for each channel; None where they were not given.

    ``channels`` is not known before there is a backbone: then they are as they were typed, and only looked at.
    """
    mean, std = args.mean, args.std
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise ValueError(f"--mean {mean} and --std {std}: give both, or neither")
    for flag, values in (("--mean", mean), ("--std", std)):
        if len(values) not in (1, channels or len(values)):
            raise ValueError(f"{flag} has {len(values)} numbers; give {channels}, or one for all channels")
    if min(std) <= 0:
        raise ValueError(f"--std {' '.join(map(str, std))}: a standard deviation is above 0")
    n = channels or max(len(mean), len(std))
    return tuple(mean * (n // len(mean))), tuple(std * (n // len(std)))


def to_record(args: argparse.Namespace, channels: int = CHANNELS) -> dict[str, Any]:
    """Return what a saved file must say of the images beside what the backbone says: the options, where given."""
    chosen = given(args, channels)
    return {} if chosen is None else {"mean": list(chosen[0]), "std": list(chosen[1])}


def floats(image: Tensor) -> Tensor:
    """(C, H, W) as ``pictures.colours`` reads it -> plain float32: eight bits become 0..1, floats stay as they are."""
    return v2.functional.to_dtype(image, torch.float32, scale=True).as_subclass(Tensor)


def normalise(source: Source) -> v2.Normalize:
    """The transform; ``ValueError`` where the source does not know its mean and standard deviation."""
    if not source.mean or not source.std:
        raise ValueError("this backbone does not say how its images are normalised; give its source a mean and a std")
    return v2.Normalize(list(source.mean), list(source.std))


def recorded(file: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return mean and standard deviation that a saved file was trained with; None where it (or None) does not say."""
    if file is None:
        return None
    for said in (file.header.get("metadata") or {}, file.header["backbone"] or {}):
        if said.get("mean") and said.get("std"):
            return tuple(said["mean"]), tuple(said["std"])
    return None
