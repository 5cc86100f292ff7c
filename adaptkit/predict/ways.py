"""How a picture is looked at: whole or tile by tile, at which scales, mirrored or not."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

__all__ = ["Ways"]


@dataclass(frozen=True)
class Ways:
    """The published ways of evaluating dense predictions.

    ``Ways()`` looks at the whole picture once, at the size of the training. ``slide=(512, 512)`` moves a window over
    the picture at its own size, as ADE20K (stride 341) and Cityscapes (stride 768 for 1024) are scored; logits are
    averaged where tiles overlap. ``scales`` and ``flip`` average probabilities over several looks, at these multiples
    of the size, and mirrored too.
    """

    slide: tuple[int, int] | None = None  #: (h, w) of the window, in pixels; None: the whole picture at once
    stride: tuple[int, int] | None = None  #: of the window; None: two thirds of it
    #: shorter side in pixels, a classifier's crop in proportion; "native": the whole picture at its own size; None: as
    #: trained, native where it slides
    resize: int | str | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    blend: str = "mean"  #: of overlapping tiles: "mean", as published, or "hann", which weighs a tile's middle more
    batch_size: int = 8  #: images, or tiles, that run at once

    def __post_init__(self) -> None:
        for name, value in (("slide", self.slide), ("stride", self.stride)):
            if value is not None and (len(value) != 2 or min(value) < 1):
                raise ValueError(f"{name}={value}: give height and width in pixels, at least 1")
        if self.stride is not None and self.slide is None:
            raise ValueError(f"stride={self.stride} is of a window: give slide=(h, w) too")
        if self.slide is not None and self.stride is not None and any(s > w for s, w in zip(self.stride, self.slide)):
            raise ValueError(f"stride={self.stride} is larger than the window slide={self.slide}: pixels are left out")
        if not self.scales or min(self.scales) <= 0 or not all(map(math.isfinite, self.scales)):
            raise ValueError(f"scales={self.scales}: give factors above 0, e.g. (0.5, 1.0, 1.5)")
        if isinstance(self.resize, str) and self.resize != "native":
            raise ValueError(f"resize={self.resize!r}: give the shorter side in pixels, or 'native'")
        if self.resize is not None and not isinstance(self.resize, str) and _whole("resize", self.resize) < 1:
            raise ValueError(f"resize={self.resize}: give at least 1 pixel")
        if self.blend not in ("mean", "hann"):
            raise ValueError(f"blend={self.blend!r}: choose 'mean' or 'hann'")
        if _whole("batch_size", self.batch_size) < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")

    @property
    def looks(self) -> list[tuple[float, bool]]:
        """Every (scale, mirrored) that is averaged."""
        return [(scale, mirrored) for scale in self.scales for mirrored in ((False, True) if self.flip else (False,))]

    @property
    def step(self) -> tuple[int, int]:
        """The stride of the window."""
        if self.slide is None:
            raise ValueError("there is no window: slide is None")
        return self.stride or (max(1, self.slide[0] * 2 // 3), max(1, self.slide[1] * 2 // 3))


def _whole(name: str, value: object) -> int:
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(f"{name}={value!r}: give a whole number") from error
