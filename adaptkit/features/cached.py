"""Features of a batch of images in a frozen backbone, and the windows and mirrorings that can be cut from them.

A crop of cached features is a crop of what the backbone *saw*::

    cached.crop(...)  =  the tokens of these patches, value for value, as they were with the whole image around them

It is not what the backbone would say of the cropped image, to which it would give other positions and less context:
that is near, and costs another run. The same holds of :meth:`CachedFeatures.flip`. Class and register tokens say
something of the whole image and stay as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptkit.ops.grid import cells

__all__ = ["CachedFeatures"]


class CachedFeatures(NamedTuple):
    """Features of a batch of images in a frozen backbone: all that adapters which only read need of it.

    ``AdaptedModel.extract`` makes it and ``model(cached)`` runs on it, without the backbone.
    """

    states: tuple[Tensor, ...]  #: tokens (B, P+N, D) after the blocks ``after``; N = h * w row by row
    after: tuple[int, ...]  #: indices of these blocks; the last block is always among them
    size: tuple[int, int]  #: (H, W) of the images, in pixels
    patch: int  #: side of a patch, in pixels
    image: Tensor | None = None  #: (B, C, H, W), for an adapter that reads it too
    pad: str = "corner"  #: where images that are no multiple of the patch were padded, or "centre": on all sides

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the patch tokens: the size over the patch, rounded up."""
        return cells(self.size[0], self.patch), cells(self.size[1], self.patch)

    def image_or_shape(self) -> Tensor:
        """The images, or (B, 0, H, W) where nobody reads them: their size without a channel."""
        x = self.states[0]
        return x.new_zeros(len(x), 0, *self.size) if self.image is None else self.image

    def crop(self, top: int, left: int, height: int, width: int) -> CachedFeatures:
        """Return a window of all images, given in pixels; its edges lie between patches, or on the image's border.

        Raises ``ValueError`` for another window.
        """
        self._check_corner()
        rows, columns = self._cells(top, height, 0), self._cells(left, width, 1)
        states = self._each_map(lambda tokens: tokens[:, rows, columns])
        image = None if self.image is None else self.image[..., top : top + height, left : left + width].contiguous()
        return self._replace(states=states, size=(height, width), image=image)

    def flip(self) -> CachedFeatures:
        """Return the mirror image, left and right exchanged.

        Raises ``ValueError`` where the width is no multiple of the patch: the last column is then partly padding,
        which no image has at its left.
        """
        self._check_corner()
        width = self.size[1]
        if width % self.patch:
            raise ValueError(
                f"the images are {width} pixels wide and a patch is {self.patch}: their last column is padded, and "
                f"cannot be mirrored; crop to {width - width % self.patch} pixels first"
            )
        image = None if self.image is None else self.image.flip(-1)
        return self._replace(states=self._each_map(lambda tokens: tokens.flip(2)), image=image)

    def part(self, start: int, stop: int) -> CachedFeatures:
        """Return the features of some images of the batch."""
        image = None if self.image is None else self.image[start:stop]
        return self._replace(states=tuple(x[start:stop] for x in self.states), image=image)

    @staticmethod
    def join(parts: Sequence[CachedFeatures]) -> CachedFeatures:
        """Return one batch of several, of images of one size and of the same blocks; else a ``ValueError``."""
        first = parts[0]
        for part in parts:
            if (part.after, part.size, part.patch, part.pad) != (first.after, first.size, first.patch, first.pad):
                raise ValueError(
                    f"features after blocks {list(first.after)} of {first.size} pixels, patch {first.patch}, and after "
                    f"{list(part.after)} of {part.size}, patch {part.patch} (padded: {first.pad} and {part.pad}): a "
                    "batch has one of each; crop to one size"
                )
        images = [p.image for p in parts if p.image is not None]
        states = tuple(torch.cat(each) for each in zip(*(p.states for p in parts)))
        return first._replace(states=states, image=torch.cat(images) if images else None)

    def _check_corner(self) -> None:
        """Windows are counted from the corner of the image, where the first patch is only without zeros before it."""
        if self.pad != "corner" and any(side % self.patch for side in self.size):
            raise ValueError(
                f"images of {self.size[0]}x{self.size[1]} pixels were padded on all sides (pad={self.pad!r}), so that "
                f"no window of them lies between patches of {self.patch} pixels: give images of whole patches"
            )

    def _each_map(self, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        """Change the patch tokens of every state, as (B, h, w, D); prefix tokens stay."""
        grid, changed = self.grid, []
        for state in self.states:
            prefix, tokens = state.tensor_split([state.shape[1] - grid[0] * grid[1]], dim=1)
            changed.append(torch.cat([prefix, change(tokens.unflatten(1, grid)).flatten(1, 2)], dim=1))
        return tuple(changed)

    def _cells(self, start: int, length: int, axis: int) -> slice:
        """Rows (axis 0) or columns (axis 1) of patches that a window of pixels covers."""
        side, whole, stop = ("high", "wide")[axis], self.size[axis], start + length
        if not (0 <= start < stop <= whole):
            raise ValueError(
                f"a window from {start} to {stop} pixels lies outside images that are {whole} pixels {side}"
            )
        if start % self.patch or (stop % self.patch and stop != whole):
            raise ValueError(
                f"a window from {start} to {stop} pixels cuts through patches of {self.patch} pixels (images "
                f"{whole} pixels {side}); give multiples of {self.patch}"
            )
        return slice(start // self.patch, cells(stop, self.patch))


def __getattr__(name: str) -> Any:
    if name == "Recorded":
        warnings.warn("Recorded is called CachedFeatures now; the old name will go", DeprecationWarning, stacklevel=2)
        return CachedFeatures
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
