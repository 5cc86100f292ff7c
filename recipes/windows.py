"""Random windows and mirror images of what a frozen backbone saw: augmentation for which it need not run again.

``--crop-features H W`` and ``--flip-features`` act on the tokens of the whole image, which are read from a cache or
extracted on the spot; the image, where an adapter reads it, and the target are cut alike. The tokens of a window are
those of the whole image, value for value (``adaptkit.features.cached``), so a cached run trains what an uncached one
trains. They are near to what the backbone would say of the window alone, not equal: it saw more.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data import default_collate as stacked

from adaptkit import AdaptedModel
from adaptkit.features.cached import CachedFeatures

from .order import folded


class Place(NamedTuple):
    """Where a window lies, in pixels, and whether it is mirrored."""

    top: int
    left: int
    mirrored: int


class Windows:
    """Windows of ``size`` (None: all of it) on the grid of ``patch`` in images of ``whole`` pixels."""

    def __init__(
        self, size: tuple[int, int] | None, flip: bool, whole: tuple[int, int], patch: int, seed: int = 0
    ) -> None:
        self.size, self.flip, self.whole, self.patch, self.seed = size or whole, flip, whole, patch, seed
        named = f"--crop-features {self.size[0]} {self.size[1]}"
        if size is not None and any(side < 1 or side % patch for side in size):
            raise ValueError(f"{named}: a patch of this backbone has {patch} pixels; give multiples of {patch}")
        if any(side > all_of_it for side, all_of_it in zip(self.size, whole)):
            raise ValueError(f"{named} is larger than the images, {whole[0]} x {whole[1]} pixels (--size)")
        if flip and self.size[1] % patch:
            raise ValueError(
                f"--flip-features: the images are {whole[1]} pixels wide and a patch is {patch}: their last column is "
                f"padded, and cannot be mirrored; choose a multiple of {patch} for --size, or give --crop-features"
            )

    @staticmethod
    def of(args: argparse.Namespace, rows: Any, model: Any) -> Windows | None:
        """Read the options; None where they are not given."""
        if args.crop_features is None and not args.flip_features:
            return None
        image = check_recordable("--crop-features and --flip-features are", rows, model)[0]
        size = None if args.crop_features is None else (args.crop_features[0], args.crop_features[1])
        return Windows(size, args.flip_features, (image.shape[-2], image.shape[-1]), model.spec.patch_size, args.seed)

    def draw(self, epoch: int, index: int) -> Place:
        """Draw the window of one sample in one epoch; whoever asks, and in what order, gets the same."""
        key = folded((self.seed * 1_000_003 + epoch) * 1_000_003 + index)
        generator = torch.Generator().manual_seed(~key)  # another stream than the sample's own, which has this key
        choices = [(whole - side) // self.patch + 1 for whole, side in zip(self.whole, self.size)]
        row, column, mirrored = (int(torch.randint(n, (), generator=generator)) for n in (*choices, 2))
        return Place(row * self.patch, column * self.patch, mirrored if self.flip else 0)

    def cut(self, seen: CachedFeatures, place: Place) -> CachedFeatures:
        """Cut the window out of the features."""
        part = seen.crop(place.top, place.left, *self.size)
        return part.flip() if place.mirrored else part

    def cut_target(self, target: Any, place: Place) -> Any:
        """Cut it out of a target (..., H, W); what is no map of the image, such as a label, stays."""
        if not isinstance(target, Tensor) or target.ndim < 2:
            return target
        if tuple(target.shape[-2:]) != self.whole:
            raise ValueError(f"a target of {tuple(target.shape)} is no map of an image of {self.whole} pixels")
        height, width = self.size
        part = target[..., place.top : place.top + height, place.left : place.left + width]
        return part.flip(-1) if place.mirrored else part.contiguous()


class Windowed(Dataset):
    """Samples whose window is cut after the backbone ran: (image, target in the window, place)."""

    def __init__(self, rows: Any, windows: Windows) -> None:
        self.rows, self.windows = rows, windows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Any, Place]:
        image, target = self.rows[key]
        place = self.windows.draw(*key)
        return image, self.windows.cut_target(target, place), place

    def collate(self, samples: list[tuple[Tensor, Any, Place]]) -> tuple[Tensor, Any, list[Place]]:
        """Samples -> batch, with the places as numbers: as a tensor on a GPU they would have to be asked for."""
        images, targets, places = zip(*samples)
        return stacked(images), stacked(targets), list(places)

    def cached(self, batches: Iterable[Any], model: AdaptedModel) -> Iterator[tuple[CachedFeatures, Any]]:
        """Run the backbone on whole images and yield (what it saw in their windows, targets)."""
        for image, target, places in batches:
            seen = model.extract(image)
            parts = [self.windows.cut(seen.part(i, i + 1), p) for i, p in enumerate(places)]
            yield CachedFeatures.join(parts), target


def check_recordable(options: str, rows: Any, model: Any) -> tuple[Tensor, Any]:
    """Return the first sample; ``ValueError`` where samples or model are such that features do not stand for images."""
    sample = rows[0, 0]
    if len(sample) != 2 or not isinstance(sample[1], Tensor | int):
        raise ValueError(f"{options} for samples of one image and one tensor: segment, classify, depth")
    if not isinstance(model, AdaptedModel):
        raise ValueError(f"{options} for the heads of adaptkit (fpn, linear, ...), not for a network of its own")
    model.reads()  # says why not, where an adapter needs the backbone to run
    return sample
