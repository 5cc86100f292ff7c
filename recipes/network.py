"""Networks of other libraries on an adapter's pyramid (``adaptkit.networks``), as the recipes ask for them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from adaptkit.hub.fits import normalised_by_file
from adaptkit.networks.network import BUILDERS, Network, build, load, restore, save

from .channels import backbone_of

__all__ = [
    "BUILDERS",
    "Network",
    "again",
    "build",
    "check_mask2former",
    "load",
    "mask2former_options",
    "mask2former_recipe",
    "restore",
    "save",
]


def mask2former_options(p: argparse.ArgumentParser) -> None:
    """Add the sizes of Mask2Former to a command line; the defaults are the paper's."""
    p.add_argument("--width", type=int, default=256, help="channels of the network, a multiple of 32")
    p.add_argument("--queries", type=int, default=100)
    p.add_argument("--layers", type=int, nargs=2, default=(6, 9), metavar=("PIXEL", "DECODER"))
    p.add_argument("--points", type=int, default=12544, help="of each mask that the loss looks at")


def check_mask2former(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse sizes that cannot be built."""
    if args.width < 32 or args.width % 32:
        p.error(f"--width {args.width}: give a multiple of 32, for its norms have 32 groups")
    if min(args.queries, args.points, *args.layers) < 1:
        p.error("--queries, --points and --layers must be at least 1")


def mask2former_recipe(args: argparse.Namespace) -> dict[str, Any]:
    """What :func:`mask2former` needs of the command line."""
    return {"width": args.width, "queries": args.queries, "layers": list(args.layers), "points": args.points}


def again(args: argparse.Namespace, folder: Path) -> nn.Module:
    """Load what was saved around a fresh backbone."""
    with normalised_by_file():  # so are the images of the run
        return load(folder, backbone_of(args))
