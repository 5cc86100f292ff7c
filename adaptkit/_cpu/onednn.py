"""Products of some hundred rows with frozen float32 weights, on a CPU in oneDNN's own tensors.

``F.linear`` hands float32 to the BLAS that torch was built with, on x86 MKL. A tensor that is ``to_mkldnn()`` goes to
oneDNN, which uses the widest registers of every processor: 15 to 20 % less time on some hundred rows. (For thousands of
rows see :mod:`adaptkit._cpu.linear`.) A good part of that time is spent on laying the weight out, for each product
anew; ``Prepacked`` does so once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit._cpu.packed_attention import index
from adaptkit.adapters.adavit.layouts import Layouts

__all__ = ["Prepacked", "is_available", "is_profitable", "linear", "linear_of_heads", "mlp", "rounded"]

LARGE = 2**18  # numbers in a weight, from which on the product outweighs the way there and back
ROWS = 128  # for which weights are laid out
PLAIN = (Tensor, nn.Parameter)  # and no subclass, sharded or quantised

_OPS = torch.ops.mkldnn


def is_available() -> bool:
    """Whether torch was built with it and nobody has switched it off."""
    return torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled  # type: ignore[attr-defined]


def rounded(rows: int) -> int:
    """Return how many rows to ask for where ``rows`` are wanted, at most 6 % more: sixteen numbers in each octave.

    oneDNN compiles code for each number of rows that it meets, in two milliseconds, and keeps the last thousand.
    """
    step = 1 << max(0, rows.bit_length() - 5)
    return -(-rows // step) * step


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` of rows (R, D)."""
    return F.linear(x.to_mkldnn(), weight, bias).to_dense() if is_profitable(weight) else F.linear(x, weight, bias)


def linear_of_heads(x: Tensor, weight: Tensor, bias: Tensor | None, places: list[int]) -> Tensor:
    """Rows (R, D), weight (n, heads, E, D), bias (n, heads, E) -> (R, n, heads at these places, E).

    The weights of the heads are copied, to lie together.
    """
    heads = index(places)
    weight, bias = weight.index_select(1, heads), None if bias is None else bias.index_select(1, heads).flatten()
    return linear(x, weight.flatten(0, 2), bias).view(len(x), *weight.shape[:3])


def mlp(x: Tensor, fc1: nn.Linear, act: Callable[[Tensor], Tensor], fc2: nn.Linear) -> Tensor:
    """``fc2(act(fc1(x)))`` of rows (R, D)."""
    if not (is_profitable(fc1.weight) and is_profitable(fc2.weight)):
        return fc2(act(fc1(x)))
    hidden = F.linear(x.to_mkldnn(), fc1.weight, fc1.bias)
    exact = isinstance(act, nn.GELU) and act.approximate == "none"
    hidden = F.gelu(hidden) if exact else act(hidden.to_dense()).to_mkldnn()
    return F.linear(hidden, fc2.weight, fc2.bias).to_dense()


class Prepacked:
    """The same products with weights that are laid out for oneDNN once, at their first use, and held in ``layouts``.

    Each takes its memory a second time. The layout is one for some hundred rows of any number. A weight that was
    changed in place or replaced is laid out anew, but not one that was changed behind autograd's back, through
    ``.data``. ``torch.compile`` emits the same operators for frozen weights.
    """

    def __init__(self, layouts: Layouts) -> None:
        self._held: dict[tuple[int, torch.Size, tuple[int, ...]], _Held] = layouts.held

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``F.linear`` of rows (R, D)."""
        if not _prepackable(weight):
            return F.linear(x, weight, bias)
        return _OPS._linear_pointwise(x, self._laid_out(weight)[0], bias, "none", [], "")

    def linear_of_heads(self, x: Tensor, weight: Tensor, bias: Tensor | None, places: list[int]) -> Tensor:
        """Rows (R, D), weight (n, heads, E, D), bias (n, heads, E) -> (R, n, heads at these places, E).

        Each head is laid out by itself, so that any choice of them needs no copy.
        """
        if not _prepackable(weight):
            return linear_of_heads(x, weight, bias, places)
        laid_out = self._laid_out(weight, heads=True)
        biases = [None] * weight.shape[1] if bias is None else bias.transpose(0, 1).flatten(1).unbind()
        found = [_OPS._linear_pointwise(x, laid_out[j], biases[j], "none", [], "") for j in places]
        return torch.stack(found, 1).view(len(x), len(places), weight.shape[0], weight.shape[2]).transpose(1, 2)

    def mlp(self, x: Tensor, fc1: nn.Linear, act: Callable[[Tensor], Tensor], fc2: nn.Linear) -> Tensor:
        """``fc2(act(fc1(x)))`` of rows (R, D)."""
        if isinstance(act, nn.GELU) and _prepackable(fc1.weight):
            hidden = _OPS._linear_pointwise(x, self._laid_out(fc1.weight)[0], fc1.bias, "gelu", [], act.approximate)
        else:
            hidden = act(self.linear(x, fc1.weight, fc1.bias))
        return self.linear(hidden, fc2.weight, fc2.bias)

    def _laid_out(self, weight: Tensor, heads: bool = False) -> list[Tensor]:
        """Of a weight (D', D) alone, or of each head in (n, heads, E, D)."""
        key = weight.data_ptr(), weight.shape, weight.stride()
        version = 0 if weight.is_inference() else weight._version
        held = self._held.get(key)
        if held is None or held.version != version:
            parts = weight.detach().transpose(0, 1).flatten(1, 2).unbind() if heads else [weight.detach()]
            laid_out = [_OPS._reorder_linear_weight(part.contiguous(), ROWS) for part in parts]
            held = self._held[key] = _Held(weight, version, laid_out)
        return held.laid_out


class _Held(NamedTuple):
    weight: Tensor  # kept, so that no other tensor comes to lie in its place
    version: int
    laid_out: list[Tensor]


@cache
def _prepacks() -> bool:
    """Whether this torch has the operators, and they say what ``F.linear`` says."""
    plain: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the caller made the default
    x, weight = (torch.linspace(-1, 1, 16 * n, **plain).view(n, 16) for n in (5, 24))
    bias = torch.linspace(-1, 1, 24, **plain)
    try:
        laid_out = _OPS._reorder_linear_weight(weight, ROWS)
        bare = _OPS._linear_pointwise(x, laid_out, None, "none", [], "")
        gelu = _OPS._linear_pointwise(x, laid_out, bias, "gelu", [], "none")
    except (AttributeError, RuntimeError):  # no operator of the name, none for this processor, other arguments
        return False
    pairs = (bare, F.linear(x, weight)), (gelu, F.gelu(F.linear(x, weight, bias)))
    return all(torch.allclose(found, wanted, atol=1e-5) for found, wanted in pairs)


def _prepackable(weight: Tensor) -> bool:
    return type(weight) in PLAIN and weight.dtype == torch.float32 and _prepacks()


def is_profitable(weight: Tensor) -> bool:
    """Whether the product with this weight outweighs the way there and back."""
    plain = type(weight) in PLAIN and weight.dtype == torch.float32 and weight.is_contiguous()
    return plain and weight.numel() >= LARGE
