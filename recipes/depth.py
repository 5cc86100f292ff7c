"""Monocular depth: an adapter and a depth head beside a frozen ViT.

    python -m recipes.depth --train drawn:200 --val drawn:50 --max-depth 10 --size 96 128 --adapter sfp --steps 200
    python -m recipes.depth --train nyu/train --val nyu/test --depth-scale 1000 --max-depth 10 --config nyu-vit-adapter

Data: folders with images/ and depth/, Parquet files or a Hub id with two columns of images, or rooms drawn by formula
(`drawn:COUNT`). A depth map is a 16-bit image, value / `--depth-scale` metres; 0, and what lies outside
`--min-depth`..`--max-depth`, was not measured and is ignored.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

import adaptkit
from adaptkit.losses import silog_loss
from adaptkit.pictures import Picture, check_pair, numbers, pair

from . import channels
from .augment import colours
from .channels import backbone_of, trained_parts
from .data import filled, open_dataset
from .drawn import rooms
from .engine import run
from .labels import some
from .normalisation import normalise, source_of
from .options import adapters, command, parser, read, validation
from .order import Rows
from .scores.depth import DepthScores
from .summary import Summary
from .task import Task

DEPTH_NAMES = ("depth", "depths", "depth_map", "disparity", "label", "mask")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = parser("depth", __doc__, adapter=["vit-adapter"])
    p.add_argument(
        "--image-column", help="default: the one column of images, or the one named image; of a folder: images"
    )
    p.add_argument(
        "--depth-column",
        help="default: the other column of images, or the one named depth, ...; of a folder, its folder of depths",
    )
    p.add_argument("--depth-suffix", metavar="_END", help="as a_END.png beside a.jpg. Default: _depth, _gt, ...")
    p.add_argument("--depth-scale", type=float, default=1000.0, help="values per metre: NYU 1000, KITTI 256")
    p.add_argument("--max-depth", type=float, required=True, help="metres: NYU 10, KITTI 80")
    p.add_argument("--min-depth", type=float, default=1e-3, help="metres")
    p.add_argument("--bins", type=int, default=256, help="0: one channel, log depth")
    p.add_argument("--variance-focus", type=float, default=0.85, help="of the loss; 1: blind to a common scale")
    p.add_argument("--size", type=int, nargs=2, default=(240, 320), metavar=("H", "W"))
    channels.options(p)
    args = read(p, argv)
    if args.depth_scale <= 0:
        p.error(f"--depth-scale {args.depth_scale}: give values per metre, above 0")
    return args


class DepthData(Rows):
    """Pairs (image (C, H, W) normalised as the backbone wants it, depth (1, H, W) in metres, 0 where not measured).

    Training samples are cut out at 8/9 of the image's scale, mirrored and, of three channels, coloured at random; none
    is rescaled, for that would change what depth a size means.
    """

    def __init__(self, data: Any, source: Any, args: argparse.Namespace, train: bool) -> None:
        super().__init__(data, args.seed, "--train" if train else "--val")
        self.channels = len(source.mean)
        self.scale, self.range = args.depth_scale, (args.min_depth, args.max_depth)
        size = tuple(args.size)
        steps: list[Any] = [v2.Resize(size, antialias=True)]
        if train:
            larger = [round(side * 9 / 8) for side in size]
            steps = [v2.Resize(larger, antialias=True), v2.RandomCrop(size), v2.RandomHorizontalFlip()]
            steps += colours("medium", self.channels)
        to_float = v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)
        self.transform = v2.Compose([to_float, *steps, normalise(source)])

    def reading(self) -> dict[str, Any]:
        return {"scale": self.scale, "range": list(self.range)}

    def make(self, row: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Row with image and depth map -> (image, depth)."""
        image, depth = pair(row["image"], row["mask"], self.metres(row["mask"]), "a depth map")
        image, depth = self.transform(image, tv_tensors.Mask(depth[None]))
        return image.as_subclass(Tensor), depth.as_subclass(Tensor)

    def metres(self, picture: Picture) -> np.ndarray:
        """Depth map -> (H, W) metres; 0 where nothing was measured. A colour image is a ``ValueError``."""
        return metres_of(picture, self.scale, *self.range)


def metres_of(picture: Picture, scale: float, low: float, high: float) -> np.ndarray:
    """Depth map of ``scale`` values per metre -> (H, W) metres; 0 outside of ``low`` to ``high`` metres."""
    depth = stored_depth(picture).astype(np.float32) / np.float32(scale)
    return np.where((depth >= low) & (depth <= high), depth, np.float32(0))


def stored_depth(picture: Picture) -> np.ndarray:
    """Depth map -> its values (H, W)."""
    return numbers(picture, "a depth map", "store one 16-bit value per pixel (a PNG of mode I;16)", palette=False)


def build(args: argparse.Namespace) -> adaptkit.AdaptedModel:
    backbone = backbone_of(args)
    head = adaptkit.DepthHeadConfig(args.max_depth, args.min_depth, args.bins)
    return adaptkit.attach(backbone, *adapters(args), head=head, train_backbone=trained_parts(backbone, args)).train()


def data(args: argparse.Namespace, model: Any, train: bool) -> DepthData:
    name, split, option = (args.train, "train", "--train") if train else (validation(args), "validation", "--val")
    if name.startswith("drawn:"):
        drawn = rooms(int(name.removeprefix("drawn:")), seed=0 if train else 1, scale=args.depth_scale)
        opened = filled(drawn, name, args.streaming)
    else:
        columns = (args.image_column, args.depth_column)
        opened = open_dataset(name, split, columns, args.streaming, DEPTH_NAMES, args.depth_suffix)
    if train:
        channels.settle(args, model.vit, opened, option)
    rows = DepthData(opened, source_of(model.vit, args), args, train)
    if not args.streaming:
        check_depth(rows, option, args)
    return rows


def check_depth(rows: DepthData, name: str, args: argparse.Namespace, most: int = 20) -> None:
    """Look at some depth maps before training.

    Raises ``ValueError`` where none has a depth in the range, and for a map of another size than its image.
    """
    seen = Summary(name, "pixels", len(rows))
    for index, row in some(rows.data, 100 * most):
        sizes = rows.read(row, index, pixels=False)
        check_pair(sizes["image"], sizes["mask"], "a depth map")
        seen.looked += 1
        seen.sizes.append(sizes["image"].upright)
    found = [rows.read({"mask": rows.data[i]["mask"]}, i)["mask"] for i in range(min(len(rows), most))]
    if not any((rows.metres(picture) > 0).any() for picture in found):
        values = [stored_depth(picture) for picture in found]
        low, high = (float(v) for v in (min(np.nanmin(v) for v in values), max(np.nanmax(v) for v in values)))
        raise ValueError(
            f"{name}: no pixel of the first {len(found)} depth maps lies in {args.min_depth}..{args.max_depth} metres: "
            f"their values are {low:g}..{high:g}, at --depth-scale {args.depth_scale:g} values per metre"
        )
    metres = [rows.metres(picture) for picture in found]
    known = np.concatenate([depth[depth > 0] for depth in metres])
    seen.facts = [
        f"depths of the first {len(found)}: {known.min():.3g} to {known.max():.3g} m, median {np.median(known):.3g} m; "
        f"{known.size / sum(depth.size for depth in metres):.0%} of the pixels are measured"
    ]
    rows.summary = seen


def loss(model: nn.Module, batch: list[Tensor], args: argparse.Namespace) -> Tensor:
    image, depth = batch
    return silog_loss(model(image).logits, depth, args.variance_focus)


def predict(model: nn.Module, batch: list[Tensor], args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    image, depth = batch
    return model(image).logits.float(), depth


def metric(args: argparse.Namespace) -> DepthScores:
    return DepthScores()


PERCENT = ("delta1", "delta2", "delta3")
LOWER = ("abs_rel", "rmse", "silog")
TASK = Task(
    "depth", "depth-estimation", "delta1", PERCENT, build, data, loss, predict, metric, lower=LOWER, native=False
)


def task(args: argparse.Namespace) -> Task:
    """What these options train."""
    return TASK


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    return run(task(args), args)


if __name__ == "__main__":
    command("depth", main)
