"""One block of a frozen vision transformer, whatever backbone it is of.

It is seen as the MetaFormer equation (Yu et al. 2022, eq. 2-3)::

    x = x + scale1(attn(norm1(x)))
    x = x + scale2(mlp(norm2(x)))

in timm's names, an absent part being the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.seam import accelerated

__all__ = ["Block", "Fn", "MLPLayers", "Projections", "identity", "no_mlp_layers", "no_projections"]

Fn = Callable[[Tensor], Tensor]


def no_projections() -> None:
    """Return nothing: the attention of this block is more than linear layers around a softmax."""


def no_mlp_layers() -> None:
    """Return nothing: the FFN of this block is more than two linear layers around an activation."""


def identity(x: Tensor) -> Tensor:
    """Return ``x``: the part that a block does not have."""
    return x


class Projections(NamedTuple):
    """The linear layers around one attention, head by head: views of the backbone's own weights.

    ``norms[1](h @ key[head].T + key_bias[head])``, with ``key`` the second matrix in ``qkv``, is the key of one head,
    and the heads' outputs are joined by ``out_weight``. Only for an attention that is nothing else: plain linear
    layers, no position inside, no norm over several heads, one key and value for each query.
    """

    #: (3, heads, E, D) where they are one layer of the backbone, else three of (1, heads, E, D)
    qkv: tuple[Tensor, ...]
    qkv_bias: tuple[Tensor | None, ...]  #: (3, heads, E), or three of (1, heads, E)
    norms: tuple[Fn, Fn]  #: of q and k, over E
    out_weight: Tensor  #: (D, heads, E)
    out_bias: Tensor | None  #: (D,)


class MLPLayers(NamedTuple):
    """An FFN that is ``fc2(act(fc1(h)))`` and nothing else, from the backbone's own layers."""

    fc1: nn.Linear
    act: Fn
    fc2: nn.Linear


@dataclass(frozen=True, eq=False)
class Block:
    """One frozen block, bound to one image (rotary angles, relative bias and masks are already inside).

    ``run`` is the backbone's own forward and what ``block(x)`` calls. The parts say the same as an equation, for
    adapters that need to step inside. ``attn`` itself comes apart as
    ``out(softmax(q k^T * scale + bias) v)`` with ``q, k, v = qkv(h)``.
    """

    run: Fn  #: (B, P+N, D) -> (B, P+N, D)
    norm1: Fn
    attn: Fn
    scale1: Fn
    norm2: Fn
    mlp: Fn
    scale2: Fn
    qkv: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]  #: (B, P+N, D) -> three of (B, heads, P+N, E)
    out: Fn  #: (B, heads, P+N, E) -> (B, P+N, D)
    scale: float | None = None  #: of the logits; None is 1/sqrt(E)
    bias: Tensor | None = None  #: added to the logits, broadcast to (B, heads, P+N, P+N)
    #: ``qkv`` of some tokens only: h (B, R, D) and the index of each in the patch grid (R,), 0..N-1, or -1 for a prefix
    #: token -> three of (B, heads, R, E). None: ``qkv`` does not depend on the position and takes any tokens.
    qkv_at: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None
    #: Rotary backbones: rotate q or k (B, heads, R, E), made at index -1, to any positions (R, 2) or (B, heads, R, 2),
    #: as (y, x) in patches from the centre of the first patch, fractions too. None: no rotary positions.
    rotate: Callable[[Tensor, Tensor], Tensor] | None = None
    #: Where heads can be computed one by one; None from it where the backbone's layers do not allow that.
    projections: Callable[[], Projections | None] = no_projections
    mlp_layers: Callable[[], MLPLayers | None] = no_mlp_layers  #: ``mlp`` layer by layer, where it is that simple
    #: For figures of a block without ``qkv``: normed tokens (B, N, D) -> attention weights (B, heads, N, K), and the
    #: cell of each key (N, K), row by row. Padding keys have weight 0; what is missing from a sum of 1 went to them.
    attended: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    grid: tuple[int, int] | None = None  #: (h, w) of the patch tokens, as a block adapter gets the block
    repeatable: bool = True  #: whether the forward may run again: not where several processes must run in step

    @accelerated
    def __call__(self, x: Tensor) -> Tensor:
        """Run the backbone's own forward."""
        return self.run(x)

    def equation(self, x: Tensor) -> Tensor:
        """Run the block from its parts: the MetaFormer equation above."""
        x = x + self.scale1(self.attn(self.norm1(x)))
        return x + self.scale2(self.mlp(self.norm2(x)))

    def patch_grid(self) -> tuple[int, int]:
        """Return ``grid``, (h, w) of the patch tokens; ``ValueError`` where the block does not know it."""
        if self.grid is None:
            raise ValueError(
                "this block does not know its patch grid: run it through attach(), or give Block(grid=(h, w))"
            )
        return self.grid

    def qkv_unplaced(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``qkv`` of tokens without a position, as prefix tokens are: (B, R, D) -> three of (B, heads, R, E)."""
        if self.qkv_at is None:
            return self.qkv(h)
        return self.qkv_at(h, torch.full((h.shape[1],), -1, device=h.device))

    def attention(self, h: Tensor) -> Tensor:
        """``attn`` from ``qkv``, ``bias`` and ``out``: (B, P+N, D) -> (B, P+N, D)."""
        q, k, v = self.qkv(h)
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias, scale=self.scale))
