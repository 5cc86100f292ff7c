"""How a model wants its images: framed and normalised as it was trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from adaptkit.core.view import Source
from adaptkit.predict.pixels import pixels

__all__ = ["Transform", "transform_of"]


@dataclass(frozen=True)
class Transform:
    """Picture -> tensor: ``transform(image)`` of a path, PIL image, array or tensor -> (C, h, w), normalised.

    First the sides: both to ``size`` if that is (h, w), the shorter one to ``size`` if that is a number, with the other
    in proportion; as they are if it is None. Then a square of ``crop`` pixels is cut from the middle.
    """

    size: int | tuple[int, int] | None
    crop: int | None
    mean: tuple[float, ...]  #: channel by channel, for values in 0..1
    std: tuple[float, ...]
    interpolation: str = "bilinear"

    def __call__(self, image: Any) -> Tensor:  # noqa: D102  the class says it
        return self.normalise(self.frame(pixels(image, len(self.mean))))

    def framed(self, height: int, width: int, scale: float = 1.0) -> tuple[int, int]:
        """(H, W) of a picture -> (h, w) that it is brought to, before the crop; ``scale`` times larger."""
        if isinstance(self.size, tuple):
            h, w = (float(v) for v in self.size)
        else:
            shorter = min(height, width)
            size = shorter if self.size is None else self.size
            h, w = size * height / shorter, size * width / shorter
            if self.crop is not None and scale == 1.0:  # of classification: as torchvision's and timm's Resize has it
                h, w = int(h), int(w)
        return max(1, round(h * scale)), max(1, round(w * scale))

    def frame(self, image: Tensor, scale: float = 1.0) -> Tensor:
        """(C, H, W) in 0..1 -> (C, h, w), resized with antialiasing and cropped."""
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2 import functional as F

        size = self.framed(image.shape[-2], image.shape[-1], scale)
        if size != tuple(image.shape[-2:]):
            how = InterpolationMode(self.interpolation)
            smooth = how in (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)
            image = F.resize(image, list(size), how, antialias=smooth)
        return image if self.crop is None else F.center_crop(image, [self.crop, self.crop])

    def normalise(self, image: Tensor) -> Tensor:
        """(..., C, h, w) in 0..1 -> the same, normalised."""
        from torchvision.transforms.v2 import functional as F

        return F.normalize(image, list(self.mean), list(self.std))

    def resized(self, size: int | None) -> Transform:
        """Return the transform for another shorter side, the crop in proportion; None: the whole picture as it is."""
        if self.crop is None or size is None:
            return replace(self, size=size, crop=None)
        before = min(self.size) if isinstance(self.size, tuple) else self.size or self.crop
        return replace(self, size=size, crop=max(1, min(size, round(self.crop * size / before))))


def transform_of(source: Source, said: Mapping[str, Any], answers: str, channels: int) -> Transform:
    """Return the transform that a file says, or else the backbone.

    Args:
        source: what the backbone knows of itself.
        said: metadata of the file: ``size`` (a side, or height and width), ``mean``, ``std`` and ``framing``, which of
            ``"crop"``, ``"squash"`` and ``"shorter"`` the training used.
        answers: what is predicted. A class is one for the image, and images are framed as squares; other answers are
            maps of the whole picture, which keeps its shape.
        channels: of the image.

    Raises ``ValueError`` where nobody says how images are normalised.
    """
    mean, std = _normalisation(source, said, channels)
    size = said.get("size")
    how = "bicubic" if source.interpolation == "lanczos" else source.interpolation or "bilinear"
    if answers == "classification":
        if isinstance(size, list | tuple):
            height, width = (int(side) for side in size)
            if height != width:
                return Transform((height, width), None, mean, std)
            size = height
        if not isinstance(size, int):
            return Transform((source.crop,) * 2 if source.squash else source.resize or 224,
                             source.crop or 224, mean, std, how)  # fmt: skip
        squash = said.get("framing") == "squash"
        return Transform((size, size) if squash else round(size * 8 / 7), size, mean, std)
    squash = answers == "panoptic" or (answers == "detection" and said.get("framing") == "squash")
    if squash and isinstance(size, list | tuple):
        return Transform((int(size[0]), int(size[1])), None, mean, std)
    shorter = min(size) if isinstance(size, list | tuple) else size or source.crop or 224
    return Transform(int(shorter), None, mean, std)


def _normalisation(
    source: Source, said: Mapping[str, Any], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean, std = said.get("mean") or source.mean, said.get("std") or source.std
    if not mean or not std:
        raise ValueError(
            f"neither the file nor the backbone {source.id or 'of this model'} says how images are normalised: save "
            "with mean= and std=, or normalise yourself and call model(image)"
        )
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"mean {list(mean)} and std {list(std)} are not for the {channels} channels of the backbone")
    return tuple(float(v) for v in mean), tuple(float(v) for v in std)
