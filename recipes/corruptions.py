"""Pictures made worse, to see what a model bears: torchvision's own transforms, in five strengths.

They are named as those of Hendrycks and Dietterich (2019), but are not theirs: compare models here, not with tables
of ImageNet-C.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

SEVERITIES = 5
#: what each strength is given, from 1 to 5
NOISE, BLUR, QUALITY = (0.04, 0.08, 0.12, 0.18, 0.26), (0.6, 1.0, 1.6, 2.4, 3.6), (50, 30, 20, 12, 7)
LIGHT, CONTRAST, SHRINK = (1.2, 1.4, 1.6, 1.8, 2.0), (0.75, 0.6, 0.45, 0.3, 0.2), (0.7, 0.5, 0.35, 0.25, 0.18)


def gaussian_noise(image: Tensor, strength: int) -> Tensor:
    return (image + NOISE[strength] * torch.randn(image.shape)).clamp(0, 1)


def gaussian_blur(image: Tensor, strength: int) -> Tensor:
    sigma = BLUR[strength]
    side = 2 * round(3 * sigma) + 1
    return F.gaussian_blur(image, [side, side], [sigma, sigma])


def jpeg(image: Tensor, strength: int) -> Tensor:
    return F.jpeg((image * 255).round().byte(), QUALITY[strength]).float() / 255


def brightness(image: Tensor, strength: int) -> Tensor:
    return F.adjust_brightness(image, LIGHT[strength])


def contrast(image: Tensor, strength: int) -> Tensor:
    return F.adjust_contrast(image, CONTRAST[strength])


def pixelate(image: Tensor, strength: int) -> Tensor:
    small = [max(1, round(side * SHRINK[strength])) for side in image.shape[-2:]]
    return F.resize(F.resize(image, small, antialias=True), list(image.shape[-2:]), F.InterpolationMode.NEAREST)


CORRUPTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    f.__name__: f for f in (gaussian_noise, gaussian_blur, jpeg, brightness, contrast, pixelate)
}


def corrupted(name: str, severity: int, seed: int = 0) -> Callable[[Tensor, int], Tensor]:
    """Return what makes an image (3, H, W) in 0..1 worse, given its number, by which the noise is drawn."""

    def alter(image: Tensor, number: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((seed * 1_000_003 + number) % 2**63)
            return CORRUPTIONS[name](image, severity - 1)

    return alter
