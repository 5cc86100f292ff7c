"""How far apart two ways to compute one number may be: a model of rounding, not what one machine happened to give.

A number is computed by sums, one after the other, of so many terms each; another machine takes the terms in another
order, in groups of another size, with or without fused products. Each operation rounds by at most u = eps / 2 of what
it has so far. Such errors are independent of each other, so that those of n terms grow like sqrt(n), and a sum errs by
more than LIMIT sqrt(n) u of the magnitude with a probability below 2 exp(-LIMIT^2 / 2), which is 1e-13 (Higham and
Mary, SIAM J. Sci. Comput. 41, 2019). The magnitude is that of the largest number on the way: by default of the largest
number expected, for a small one among large ones is what is left of them. Where a norm divides by what is nearly nothing
the errors before it grow: by how much is seen when the input is off by one rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LIMIT = 8.0  #: standard deviations


def rounding(dtype: torch.dtype, *sums: int) -> float:
    """Share of the magnitude by which a number may be off that is computed by sums of so many terms."""
    return LIMIT * torch.finfo(dtype).eps / 2 * math.sqrt(sum(sums))


def transformer(depth: int, dim: int, tokens: int) -> tuple[int, ...]:
    """The sums of so many blocks: four products and the norms before them, logits, and what attention adds up."""
    return depth * (dim, dim, dim, tokens, dim, dim, dim, 4 * dim)


def assert_rounds_to(
    found: Tensor | Sequence[Tensor],
    expected: Tensor | Sequence[Tensor],
    *sums: int,
    magnitude: Tensor | float | None = None,
    moved: Sequence[Tensor] | Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Compare two ways to compute the same numbers.

    Args:
        found, expected: tensors, or as many tensors each.
        sums: the number of terms of each sum that a number goes through.
        magnitude: of what is rounded, for each number or for all; by default the largest number expected.
        moved: what is expected of an input that is :func:`one_rounding_off`, where errors may grow on the way.
        dtype: what the sums are rounded to; by default the less precise of what is compared.
    """
    if not isinstance(found, Tensor):
        assert len(found) == len(expected)
        for a, b, c in zip(found, expected, moved or expected):
            assert_rounds_to(a, b, *sums, magnitude=magnitude, moved=c, dtype=dtype)
        return
    assert isinstance(expected, Tensor)
    assert found.shape == expected.shape
    if not expected.numel():
        return
    dtype = dtype or max(found.dtype, expected.dtype, key=lambda d: torch.finfo(d).eps)
    a, b = found.detach().double(), expected.detach().double()
    size = b.abs().max() if magnitude is None else torch.as_tensor(magnitude, dtype=torch.float64)
    off = (a - b).abs()
    assert moved is None or isinstance(moved, Tensor)
    grown = 0.0 if moved is None else LIMIT * (moved.detach().double() - b).abs().max()
    allowed = (rounding(dtype, *sums) * size + grown).clamp(min=torch.finfo(dtype).tiny).expand_as(off)
    assert (off <= allowed).all(), (  # so that NaN fails, too
        f"off by {float(off.nan_to_num(math.inf).max()):.2e}, at worst {float((off / allowed).nan_to_num(math.inf).max()):.2f} "
        f"of what rounding allows ({float(allowed.min()):.2e} to {float(allowed.max()):.2e})"
    )


def one_rounding_off(x: Tensor) -> Tensor:
    """Each number exchanged for the next one above or below."""
    up = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    return torch.nextafter(x, torch.where(up, math.inf, -math.inf).to(x))


def chance(rate: float, draws: int) -> float:
    """How far the rate of that many independent draws may be off: six standard deviations."""
    return 6 * math.sqrt(rate * (1 - rate) / draws)
