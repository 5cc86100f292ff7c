"""Augmentation by name: torchvision's transforms (v2), of an image alone or of an image and its mask.

    none      the whole image, squeezed to the size
    light     crops of at least 70 %, mirrored
    medium    crops of at least 40 %, mirrored, colours jittered
    strong    crops of at least 25 %, mirrored, colours jittered more, some grey, some blurred
    trivial, rand, auto    crops of at least 40 %, mirrored; then TrivialAugmentWide (Mueller and Hutter 2021),
              RandAugment (Cubuk et al. 2020) or AutoAugment's policy of ImageNet (Cubuk et al. 2019)

Images of other than three channels are cropped, mirrored and blurred alike, and their values stay as they are.
Those policies move the image, too: a mask moves with it, and what comes in from outside is ignored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from adaptkit.pictures import CHANNELS

POLICIES = ("trivial", "rand", "auto")
NAMES = ("none", "light", "medium", "strong", *POLICIES)
HELP = """of training images: none, light (crop, mirror), medium (colours, too), strong; or crop and mirror with one of
torchvision's policies, trivial, rand or auto"""
#: Of the smallest crop: its share of the image, and how far its aspect may be from the image's.
CROPS = {"light": (0.7, 1.1), "medium": (0.4, 1.25), "strong": (0.25, 1.33)}
#: What a policy does that moves pixels.
MOVES = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")


def colours(name: str, channels: int = CHANNELS) -> list[Any]:
    """Return the transforms that change colours alone; of other channels than red, green and blue, what blurs."""
    if channels != CHANNELS:
        return [v2.RandomApply([v2.GaussianBlur(5, (0.1, 2.0))], 0.2)] if name == "strong" else []
    if name == "medium":
        return [v2.ColorJitter(0.3, 0.3, 0.2, 0.05)]
    if name == "strong":
        jitter, blur = v2.ColorJitter(0.4, 0.4, 0.4, 0.1), v2.GaussianBlur(5, (0.1, 2.0))
        return [jitter, v2.RandomGrayscale(0.1), v2.RandomApply([blur], 0.2)]
    return []


def of_pixels(name: str, size: tuple[int, int], ignore: int, channels: int = CHANNELS) -> list[Any]:
    """Return the transforms of (image, mask) to ``size`` (H, W); ``ignore`` is the label of what is outside."""
    check_policy(name, channels)
    if name == "none":
        return [v2.Resize(size, antialias=True)]
    aspect = size[1] / size[0]
    least, apart = CROPS.get(name, CROPS["medium"])
    ratio = ((0.8 if apart == 1.25 else 1 / apart) * aspect, apart * aspect)
    steps: list[Any] = [v2.RandomResizedCrop(size, scale=(least, 1.0), ratio=ratio, antialias=True)]
    steps += [v2.RandomHorizontalFlip(), *colours(name, channels)]
    return [*steps, Both(policy(name), ignore)] if name in POLICIES else steps


def of_images(name: str, size: int, least: float, channels: int = CHANNELS) -> list[Any]:
    """Return the transforms of an image to ``size`` x ``size`` pixels, from crops of at least this share of it."""
    check_policy(name, channels)
    steps: list[Any] = [v2.RandomResizedCrop(size, scale=(least, 1.0), antialias=True)]
    steps += [v2.RandomHorizontalFlip(), *colours(name, channels)]
    return [*steps, policy(name)] if name in POLICIES else steps


def check_policy(name: str, channels: int) -> None:
    """``ValueError`` where a policy would change the colours of what has none."""
    if name in POLICIES and channels != CHANNELS:
        raise ValueError(
            f"--augment {name} changes red, green and blue, and these images have {channels} channels: choose none, "
            "light, medium or strong, which then crop, mirror and blur"
        )


def policy(name: str) -> Any:
    """Return one of torchvision's policies, which notes what it moves."""
    return {"trivial": Trivial, "rand": Rand, "auto": Auto}[name]()


class Noting:
    """A policy of torchvision that notes in ``moves``, if there is such a list, what it does to where pixels are."""

    moves: list[tuple[str, float]] | None = None

    def _apply_image_or_video_transform(
        self, image: Any, transform_id: str, magnitude: float, interpolation: Any, fill: Any
    ) -> Any:
        if transform_id in MOVES and self.moves is not None:
            self.moves.append((transform_id, magnitude))
        return self.done_to(image, transform_id, magnitude, interpolation, fill)

    def done_to(self, image: Any, *what: Any) -> Any:
        """Do what torchvision does, and note nothing."""
        return super()._apply_image_or_video_transform(image, *what)  # type: ignore[misc]


class Trivial(Noting, v2.TrivialAugmentWide):
    """TrivialAugmentWide."""


class Rand(Noting, v2.RandAugment):
    """RandAugment: two operations of magnitude 9."""


class Auto(Noting, v2.AutoAugment):
    """AutoAugment, the policy found on ImageNet."""


class Both(nn.Module):
    """A policy on an image, and its moves on the mask."""

    def __init__(self, policy: Any, ignore: int) -> None:
        super().__init__()
        self.policy, self.ignore = policy, ignore

    def forward(self, image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(3, H, W) and (H, W) -> the same."""
        self.policy.moves = moves = []
        image = self.policy(image)
        for what in moves:
            mask = self.policy.done_to(mask, *what, InterpolationMode.NEAREST, {tv_tensors.Mask: self.ignore})
        return image, mask
