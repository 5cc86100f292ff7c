"""Maps of a large picture, made and used a band of rows at a time.

An aerial picture of 6000 x 4000 pixels and 150 classes has 14 GB of logits. So everything here is a generator of bands
(K, n, W), top to bottom, and no step holds more than it needs: a row of tiles, two rows to interpolate between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["BUDGET", "places", "rebanded", "resized_rows", "slid_rows"]

BUDGET = 64 << 20  #: bytes of a band

Forward = Callable[[Tensor], Tensor]  #: images (B, C, h, w) -> maps (B, K, h, w)


def places(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin, so that they cover ``length``: every ``stride``, the last one moved back inside.

    >>> places(1000, 512, 341)
    [0, 341, 488]
    """
    count = max(0, -(-(length - window) // stride)) + 1
    return [max(0, min(i * stride, length - window)) for i in range(count)]


def slid_rows(
    forward: Forward, image: Tensor, window: tuple[int, int], stride: tuple[int, int], batch: int, blend: str = "mean"
) -> Iterator[Tensor]:
    """Average the maps of overlapping tiles of an image (C, H, W); yields bands (K, n, W) that no later tile changes.

    As mmsegmentation's sliding inference: a pixel's logits are the mean over the tiles that hold it. With
    ``blend="hann"`` the mean is weighted by the window sin^2, so that a tile's border counts least.
    """
    height, width = image.shape[-2:]
    size = min(window[0], height), min(window[1], width)
    tops, lefts = places(height, window[0], stride[0]), places(width, window[1], stride[1])
    weight = _weight(size, blend, image.device)
    held: Tensor | None = None  # (K, n, W) sums of the rows from `first` on
    counts = torch.zeros(0, width, device=image.device)
    first = 0
    for number, top in enumerate(tops):
        tiles = [image[:, top : top + size[0], left : left + size[1]] for left in lefts]
        maps = torch.cat([forward(torch.stack(tiles[i : i + batch])) for i in range(0, len(tiles), batch)])
        more = top + size[0] - first - counts.shape[0]
        held = maps.new_zeros(maps.shape[1], 0, width) if held is None else held
        held, counts = F.pad(held, (0, 0, 0, more)), F.pad(counts, (0, 0, 0, more))
        for left, tile in zip(lefts, maps):
            held[:, top - first :, left : left + size[1]] += tile * weight
            counts[top - first :, left : left + size[1]] += weight
        done = (tops[number + 1] if number + 1 < len(tops) else height) - first
        yield held[:, :done] / counts[:done]
        held, counts, first = held[:, done:].clone(), counts[done:].clone(), first + done


def _weight(size: tuple[int, int], blend: str, device: torch.device) -> Tensor:
    """(h, w) of a tile: ones, or a Hann window, which is above 0 everywhere."""
    if blend == "mean":
        return torch.ones(size, device=device)
    rows, columns = (torch.sin(torch.pi * (torch.arange(n, device=device) + 0.5) / n).square() for n in size)
    return rows[:, None] * columns


def resized_rows(bands: Iterable[Tensor], size: tuple[int, int], to: tuple[int, int]) -> Iterator[Tensor]:
    """Interpolate bands of a map (K, h, w) bilinearly to (K, H, W), as ``F.interpolate(align_corners=False)``."""
    if size == to:
        yield from bands
        return
    (height, width), scale = to, size[0] / to[0]
    place = ((torch.arange(height) + 0.5) * scale - 0.5).clamp(min=0)  # in rows of the map
    low = place.long().clamp(max=size[0] - 1)
    high = (low + 1).clamp(max=size[0] - 1)
    share = (place - low).float()
    held: Tensor | None = None
    first = done = 0
    for band in bands:
        held = band if held is None else torch.cat([held, band], 1)
        ready = int(torch.searchsorted(high, first + held.shape[1]))  # rows whose two neighbours are there
        most = max(1, BUDGET // (4 * held.shape[0] * width))
        for start in range(done, ready, most):
            stop = min(start + most, ready)
            above, below, part = (x[start:stop].to(held.device) for x in (low, high, share))
            rows = torch.lerp(held[:, above - first], held[:, below - first], part[:, None].to(held.dtype))
            yield F.interpolate(rows[None], (stop - start, width), mode="bilinear", align_corners=False)[0]
        done = ready
        if done < height:
            keep = min(int(low[done]) - first, held.shape[1])  # shrinking passes over rows that are still to come
            held, first = held[:, keep:], first + keep


def rebanded(bands: Iterable[Tensor], heights: Sequence[int]) -> Iterator[Tensor]:
    """Cut bands anew, so that several streams of them go side by side."""
    held: list[Tensor] = []
    source, there = iter(bands), 0
    for height in heights:
        while there < height:
            held.append(next(source))
            there += held[-1].shape[1]
        whole = held[0] if len(held) == 1 else torch.cat(held, 1)
        yield whole[:, :height]
        held, there = [whole[:, height:]], there - height
