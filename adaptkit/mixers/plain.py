"""Mixers without a parameter: identity, a frozen random matrix, pooling (Yu et al. 2022, sections 3.2 and 4.3), and the
Fourier transform (Lee-Thorp et al. 2022)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.mixers.base import Mixer

__all__ = ["Fourier", "Identity", "Pool", "RandomMixing"]


class Identity(Mixer):
    """Mix nothing: ``y = x``."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        return x


class Pool(Mixer):
    """PoolFormer's mixer (eq. 4): ``y = mean over size x size neighbours - x``.

    At the border the mean is over the neighbours that exist. The block's residual adds ``x`` again, hence the minus;
    ``minus=False`` leaves it out.
    """

    def __init__(self, dim: int, size: int = 3, minus: bool = True) -> None:
        super().__init__()
        if size < 1 or size % 2 == 0:
            raise ValueError(f"size={size} has no centre; choose an odd one: 3, 5, 7 or 9")
        self.size, self.minus = size, minus

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W); with the minus, zero where the map is constant."""
        mean = F.avg_pool2d(x, self.size, stride=1, padding=self.size // 2, count_include_pad=False)
        return mean - x if self.minus else mean


class RandomMixing(Mixer):
    """A frozen global matrix: ``y_i = sum_j A_ij x_j``, A the row-softmax of uniform numbers in [0, 1).

    A number is a hash of the seed and the two cells alone. So there is nothing to save; and on another grid the same
    pair of cells has the same number, only the softmax runs over other neighbours.
    """

    def __init__(self, dim: int, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        matrix = self.matrix((x.shape[-2], x.shape[-1]), x.device).to(x.dtype)
        return (x.flatten(2) @ matrix.mT).unflatten(2, x.shape[-2:])

    def matrix(self, grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
        """Return A (h*w, h*w) for a grid (h, w); its rows sum to one."""
        y, x = (torch.arange(n, device=device) for n in grid)
        cell = (y[:, None] * 65536 + x).flatten()  # a cell has one number on every grid
        return _uniform(_hash(_hash(cell + self.seed * 0x9E3779B1)[:, None] + cell)).softmax(dim=-1)


class Fourier(Mixer):
    """The real part of the Fourier transform over the places, as FNet has it over a sentence::

        y = Re(F_h x F_w) = C_h x C_w - S_h x S_w,    F = C - i S,  C = cos(2 pi j k / n) / sqrt(n), and S its sine

    Every place gets something of all others. It is written in products with C and S, which every dtype and every
    export has, and which torch's counter of operations sees; the grids of ViTs are small. FNet transforms the channels
    too; here, as with every mixer, they stay apart.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        (ch, sh), (cw, sw) = (_waves(n, x) for n in x.shape[-2:])
        return ch @ x @ cw - sh @ x @ sw


def _waves(n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return C and S (n, n)."""
    k = torch.arange(n, device=like.device)
    angle = 2 * math.pi / n * (k[:, None] * k % n).to(torch.float32)  # below one turn: no digit is lost
    return (angle.cos() / n**0.5).to(like.dtype), (angle.sin() / n**0.5).to(like.dtype)


def _hash(n: Tensor) -> Tensor:
    """Scatter integers over 0 .. 2^32 - 1 (a 32-bit mix of multiplications and shifts), alike on every device."""
    n = n & 0xFFFFFFFF
    for _ in range(2):
        n = ((n ^ (n >> 16)) * 0x45D9F3B) & 0xFFFFFFFF  # below 2^59: no overflow
    return n ^ (n >> 16)


def _uniform(n: Tensor) -> Tensor:
    return n.to(torch.float32) / 2**32
