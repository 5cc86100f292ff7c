"""Images of one, four, thirteen channels: the backbone for them, and how they are normalised where nobody says.

    --channels 13 --expand zero      a backbone of three channels reads ten more (``adaptkit.expand_channels``); the
                                     new rows of its patch embedding are trained, and are in the adapter's file
    mean_c, std_c                    of channel c over all pixels of up to 256 training images, evenly chosen, in the
                                     values that a file gives (``adaptkit.bands``), for more than three channels
                                     where neither --mean and --std nor the backbone say them

A backbone of as many channels by itself needs no option, but in detect and panoptic, which look at their images first.
What was measured stands in place of --mean and --std: in the log, in ``config.yaml`` and in the adapter's file, so that
whoever reads the file normalises alike.
"""

from __future__ import annotations

import argparse
from typing import Any, get_args

import torch
from torch import nn

import adaptkit
from adaptkit.core.packed import in_fewer_bits
from adaptkit.create import create_backbone
from adaptkit.model.expand import How
from adaptkit.pictures import CHANNELS, colours, read_row

from .labels import some
from .normalisation import floats
from .order import undecoded

MOST = 256  #: images that are measured
NEW = "*.new_channels"  #: the rows of an expanded backbone
CHANNELS_HELP = """of the images, .npy or TIFF (GeoTIFF, too), the first three red, green and blue: a backbone of three
is expanded to N; default: as many as it has"""
EXPAND_HELP = """how the rows of the further channels start: at zero (default), so that the backbone first says what it
says of red, green and blue; at the mean of the three; or between those of the nearest colours, see --wavelengths"""
WAVELENGTHS_HELP = "with --expand wavelength: the centre of each channel after the third, in nanometres"


def options(p: argparse.ArgumentParser) -> None:
    """Add ``--channels``, ``--expand`` and ``--wavelengths``."""
    p.add_argument("--channels", type=int, metavar="N", help=CHANNELS_HELP)
    p.add_argument("--expand", choices=get_args(How), help=EXPAND_HELP)
    p.add_argument("--wavelengths", type=float, nargs="+", metavar="NM", help=WAVELENGTHS_HELP)


def backbone_of(args: argparse.Namespace) -> nn.Module:
    """Return the backbone that the options name, in ``--backbone-dtype``, expanded to ``--channels``.

    Raises ``ValueError`` where it has another number of channels, or cannot be expanded so.
    """
    backbone = create_backbone(args.backbone, pretrained=not args.random_backbone)
    dtype = getattr(args, "backbone_dtype", None)
    backbone = backbone if dtype is None else in_fewer_bits(backbone, dtype)
    wanted, has = getattr(args, "channels", None), adaptkit.view(backbone).spec.channels
    if wanted in (None, has):
        if wanted is not None and (args.expand or args.wavelengths):
            raise ValueError(f"--expand is of other channels: {args.backbone} has these {has} by itself; leave it out")
        return backbone
    if getattr(args, "cache_features", None):
        raise ValueError(
            f"--cache-features keeps what a frozen backbone says, and the rows of --channels {wanted} are trained: "
            "give one of them, or a backbone that was trained on as many channels"
        )
    if dtype not in (None, "float32"):
        raise ValueError(
            f"--backbone-dtype {dtype} is for frozen weights, and the rows of --channels {wanted} are trained: give "
            "one of them"
        )
    if has != CHANNELS or wanted < CHANNELS:
        raise ValueError(
            f"--channels {wanted}: {args.backbone} reads {has}, and three are expanded to more; give a backbone of "
            f"{wanted} channels, such as a folder that timm or transformers saved"
        )
    return adaptkit.expand_channels(backbone, wanted, args.expand or "zero", args.wavelengths)


def trained_parts(backbone: nn.Module, args: argparse.Namespace) -> list[str]:
    """Return ``--train-backbone``, and the new rows of a backbone that :func:`backbone_of` expanded."""
    expanded = any(name.endswith(NEW[1:]) for name, _ in backbone.named_parameters())
    return [*args.train_backbone, *([NEW] if expanded and NEW not in args.train_backbone else [])]


def of_files(args: argparse.Namespace) -> int:
    """Return as how many channels images are looked at before there is a backbone: ``--channels``, else three."""
    return args.channels or CHANNELS


def as_images(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the ``path`` of a picture, as ``coco`` makes them -> rows with an ``image`` for :func:`settle`."""
    return [{"image": {"bytes": None, "path": str(row["path"])}} for row in rows]


def settle(args: argparse.Namespace, vit: Any, rows: Any, name: str) -> None:
    """Measure ``--mean`` and ``--std`` on training rows where nobody says them of more than three channels."""
    channels, source = vit.spec.channels, vit.source()
    if channels <= CHANNELS or args.mean is not None or args.std is not None:
        return
    if len(source.mean) == channels == len(source.std):
        return
    args.mean, args.std, count = measured(rows, channels, name)
    said = "; ".join(f"{' '.join(f'{v:.5g}' for v in values)}" for values in (args.mean, args.std))
    print(f"{name}: mean and std of {channels} channels, measured on {count} images: {said}", flush=True)


def measured(rows: Any, channels: int, name: str) -> tuple[list[float], list[float], int]:
    """Rows with an ``image`` -> mean and standard deviation of each channel, and how many images were looked at.

    Raises ``ValueError`` for a channel that is the same everywhere: it cannot be brought to a deviation of 1.
    """
    pixels, total, squares, count = 0, torch.zeros(channels).double(), torch.zeros(channels).double(), 0
    for index, row in some(undecoded(rows), MOST):
        found = read_row({"image": row["image"]}, f"{name}: row {index}", channels=channels)["image"]
        values = floats(colours(found)).flatten(1).double()
        # Around the mean so far: of numbers far from 0 a sum of squares keeps no digit of the deviation.
        more, mean = values.shape[1], values.mean(1)
        apart = mean - total / max(pixels, 1)
        squares += (values - mean[:, None]).square().sum(1) + apart.square() * (pixels * more / (pixels + more))
        pixels, total, count = pixels + more, total + values.sum(1), count + 1
    mean, std = total / pixels, (squares / pixels).sqrt()
    flat = [i for i, (m, s) in enumerate(zip(mean.tolist(), std.tolist())) if s <= 1e-6 * abs(m) or s == 0]
    if flat:
        raise ValueError(
            f"{name}: channel {flat[0]} (from 0) is {mean[flat[0]]:g} in every pixel of {count} images and says "
            "nothing: leave it out of the files, or give --mean and --std"
        )
    # As many digits as mean anything, so that the numbers can be typed.
    return [float(f"{v:.6g}") for v in mean.tolist()], [float(f"{v:.6g}") for v in std.tolist()], count
