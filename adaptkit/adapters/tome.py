"""Token merging (ToMe; Bolya et al., ICLR 2023): r patch tokens fewer after the attention of each block, no training.

Between attention and MLP of each block the patch tokens are split by turns into sets A and B; each of A proposes the
one of B whose key is most like its own, and the r best proposals are merged (section 3)::

    score = K_A K_B^T            K: keys, the mean over heads, each of length 1
    x_b  <- (s_b x_b + sum_a s_a x_a) / (s_b + sum_a s_a),    s_b <- s_b + sum_a s_a
    softmax(q k^T * scale + log s) v                          s: patches in the token of the key ("proportional")

Class and register tokens are counted where A and B are told apart and never merge. What goes on is the prefix, what is
left of A, then B. Every block gives its patches back on the full grid, each as a copy of the token that it is in, so
that features, pyramids, heads and other adapters see the order that they know. Where nobody has changed them on the
way, the next block goes on with the merged tokens themselves; else with the mean of each token's patches.

Rotary positions are not in the paper: here a merged token lies at the mean position of its patches, and keys are
compared after rotation. A relative position bias (BEiT) has no merged form and is refused, and so are windows. The
matching has no gradient and the adapter nothing to train: its file is a config without tensors, and other adapters may
be trained beside it. AdaViT, DAT-KV and VPT step inside the blocks too: only one of the four can be attached.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.adapters.base import Aux, Openable
from adaptkit.core.block import Block, Fn
from adaptkit.core.layers import check_numbers
from adaptkit.core.registry import register_adapter
from adaptkit.core.view import Spec, View
from adaptkit.seam import full_precision

__all__ = ["ToMe", "ToMeConfig", "schedule"]


@dataclass(frozen=True)
class ToMeConfig:
    """How many tokens are merged in each block."""

    #: tokens that disappear in a block, at most half of its patch tokens: in every block, or block by block, 0 in those
    #: that are not given. ``(8, -1.0)``, a pair with a float, says ``r=8, inflect=-1.0``.
    r: int | tuple[int, ...] = 8
    #: slope of a line over the blocks with mean r: 0 constant, -1 from 2r to 0, 1 from 0 to 2r
    inflect: float = 0.0
    proportional: bool = True  #: log of the size of the key in the attention; off for a backbone trained as MAE is

    def __post_init__(self) -> None:
        if isinstance(self.r, list | tuple):
            if len(self.r) == 2 and isinstance(self.r[1], float):
                r, inflect = self.r
                object.__setattr__(self, "r", r)
                object.__setattr__(self, "inflect", inflect)
            else:
                object.__setattr__(self, "r", tuple(self.r))
        check_numbers(self)
        counts = self.r if isinstance(self.r, tuple) else (self.r,)
        if any(not isinstance(count, int) or isinstance(count, bool) or count < 0 for count in counts):
            raise ValueError(
                f"r={self.r} is no number of tokens; give one of 0 or more, a list of such for the blocks, or a pair "
                "(r, inflect) whose second number is a float: (8, -1.0)"
            )
        if not -1 <= self.inflect <= 1:
            raise ValueError(f"inflect={self.inflect} would merge less than no token; give -1 to 1")
        if self.inflect and isinstance(self.r, tuple):
            raise ValueError(
                f"inflect={self.inflect} bends one r, and r={list(self.r)} is a list: leave out one of them"
            )


def schedule(config: ToMeConfig, depth: int) -> tuple[int, ...]:
    """Return how many tokens each block is asked to merge, from int(r (1 - inflect)) to 2r - that in equal steps."""
    r = config.r
    if isinstance(r, tuple):
        if len(r) > depth:
            raise ValueError(f"r={list(r)} is for {len(r)} blocks, the backbone has {depth}: give at most one for each")
        return (*r[:depth], *(0 for _ in range(depth - len(r))))
    first = int(r * (1 - config.inflect))
    step = (2 * r - 2 * first) / max(depth - 1, 1)
    return tuple(int(first + step * i) for i in range(depth))


class Stream(NamedTuple):
    """The merged tokens between two blocks: T = P + M of them, for N patches."""

    tokens: Tensor  #: (B, T, D)
    size: Tensor  #: (B, M, 1) patches in each
    token: Tensor  #: (B, N) which of the M each patch is in
    places: Tensor | None  #: (B, M, 2) mean (y, x) of their patches, in patches; None: they do not matter
    full: Tensor  #: (B, P+N, D) what the block gave

    @staticmethod
    def taken(aux: Aux) -> Stream | None:
        """Take what the last block left there, if any."""
        found = {name: aux.pop(f"tome.{name}", None) for name in Stream._fields}
        return None if found["tokens"] is None else Stream(**found)  # type: ignore[arg-type]

    def leave(self, aux: Aux) -> None:
        """Leave it for the next block."""
        aux.update({f"tome.{name}": x for name, x in self._asdict().items() if x is not None})

    def at(self, x: Tensor) -> Tensor:
        """(B, P+N, D) as the next block gets them -> (B, T, D): means of their patches, where they were changed."""
        if x is self.full:
            return self.tokens
        prefix, patches = x.tensor_split([x.shape[1] - self.token.shape[1]], dim=1)
        zeros = patches.new_zeros(*self.size.shape[:2], x.shape[2], dtype=self.size.dtype)
        sums = zeros.scatter_add(1, _rows(self.token, patches), patches.to(zeros.dtype))
        return torch.cat([prefix, (sums / self.size).to(x.dtype)], dim=1)


class Matching(NamedTuple):
    """Which patch tokens become part of which others: n tokens, a of them in A, b in B."""

    gone: Tensor  #: (B, r) of A: those that are merged
    stays: Tensor  #: (B, a - r) of A: the others
    partner: Tensor  #: (B, r) of B: with which
    first: int  #: where A begins among the patch tokens, 0 or 1: even places are A, class and register tokens counted

    @staticmethod
    @torch.no_grad()
    def of(keys: Tensor, r: int, prefix: int) -> Matching:
        """By keys (B, heads, P+n, E), the first P of which never merge."""
        first = prefix % 2
        with full_precision(keys):
            mean = keys.mean(1)[:, prefix:]
            metric = F.normalize(mean.to(_wide(mean)), dim=-1)
            best, partner = (metric[:, first::2] @ metric[:, 1 - first :: 2].mT).max(-1)  # (B, a)
        gone, stays = best.sort(dim=1, descending=True).indices.tensor_split([r], dim=1)
        if prefix:  # the authors restore the order where there is a class token
            stays = stays.sort(dim=1).values
        return Matching(gone, stays, partner.gather(1, gone), first)

    def sums(self, x: Tensor) -> Tensor:
        """(B, n, C) -> (B, n - r, C): what is left of A, then B with what is merged into it."""
        a, b = x[:, self.first :: 2], x[:, 1 - self.first :: 2]
        merged = b.scatter_add(1, _rows(self.partner, x), a.gather(1, _rows(self.gone, x)))
        return torch.cat([a.gather(1, _rows(self.stays, x)), merged], dim=1)

    def moved(self, token: Tensor) -> Tensor:
        """Places among n tokens (B, N) -> where these are among the n - r."""
        left, count = self.stays.shape[1], self.stays.shape[1] + self.gone.shape[1]
        ranks = torch.arange(left, device=token.device).expand_as(self.stays)
        to = torch.cat([self.stays, self.gone], dim=1).argsort(dim=1)  # undoes the order that it was in
        of_a = torch.cat([ranks, left + self.partner], dim=1).gather(1, to)
        in_a = token % 2 == self.first
        of_b = left + token // 2
        return torch.where(in_a, of_a.gather(1, (token // 2).clamp_max(count - 1)), of_b)


def merged(stream: Stream, keys: Tensor, r: int) -> Stream:
    """Tokens after the attention and their keys (B, heads, T, E) -> the stream with r tokens fewer."""
    tokens, size, token, places, full = stream
    prefix = tokens.shape[1] - size.shape[1]
    matching = Matching.of(keys, r, prefix)
    sizes = matching.sums(size)
    weighted = matching.sums(tokens[:, prefix:] * size) / sizes  # sums in the sizes' dtype, float32 at least
    if places is not None:
        places = matching.sums(places * size) / sizes
    tokens = torch.cat([tokens[:, :prefix], weighted.to(tokens.dtype)], dim=1)
    return Stream(tokens, sizes, matching.moved(token), places, full)


@register_adapter("tome", ToMeConfig)
class ToMe(Openable):
    """Merges patch tokens that are alike. ``Features.aux`` says which:

    ``patch_token`` (B, N), the token that each patch ended in, and ``token_size`` (B, M), the patches in each.
    """

    inside = True

    def __init__(self, spec: Spec, config: ToMeConfig) -> None:
        super().__init__(spec, config)
        self.r = schedule(config, spec.depth)  #: asked of each block

    def counts(self, patches: int) -> tuple[int, ...]:
        """Return how many tokens each block merges where an image has so many patches: at most half of those left."""
        found: list[int] = []
        for r in self.r:
            found.append(min(r, (patches - sum(found)) // 2))
        return tuple(found)

    @torch.no_grad()
    def check_blocks(self, view: View) -> None:
        """Refuse a backbone whose attention has positions that a merged token has not."""
        if view.sharded:  # each block is looked at all the same when it runs
            return
        name, side = type(view.backbone).__name__, 4 * view.spec.patch_size
        weight = next(view.backbone.parameters())
        image = torch.zeros(1, view.spec.channels, side, side, device=weight.device, dtype=weight.dtype)
        for block in view.blocks(image, (4, 4)):  # type: ignore[attr-defined]
            check(block, name)
        if block.qkv_at is not None and block.rotate is not None:  # which knows only now whether it can
            row, still = weight.new_zeros(1, 1, view.spec.embed_dim), torch.full((1,), -1, device=weight.device)
            block.rotate(block.qkv_at(row, still)[0], torch.zeros(1, 2, device=weight.device))

    def wrap(self, block: Block, index: int, aux: Aux) -> Fn:
        """The backbone's own block before the first that merges; from there on with fewer tokens inside."""
        if self.open or not any(self.r[: index + 1]):
            return block
        check(block, "this backbone")
        return partial(self._run, block, index, aux)

    def _run(self, block: Block, index: int, aux: Aux, x: Tensor) -> Tensor:
        grid = block.patch_grid()
        before = Stream.taken(aux)
        stream = _begun(block, grid, x) if before is None else before._replace(tokens=before.at(x))
        q, k, v = _qkv(block, block.norm1(stream.tokens), None if before is None else stream)
        bias = None
        if before is not None and self.config.proportional:
            prefix = stream.tokens.shape[1] - stream.size.shape[1]
            bias = F.pad(stream.size.log().mT, (prefix, 0))[:, None].to(q.dtype)  # (B, 1, 1, T)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=block.scale)
        stream = stream._replace(tokens=stream.tokens + block.scale1(block.out(o)))
        r = self.counts(grid[0] * grid[1])[index]
        stream = merged(stream, k, r) if r else stream
        x = stream.tokens
        x = x + block.scale2(block.mlp(block.norm2(x)))
        full = _unmerged(x, stream)
        if index == self.spec.depth - 1:
            aux["patch_token"], aux["token_size"] = stream.token, stream.size[..., 0]
        else:
            stream._replace(tokens=x, full=full).leave(aux)
        return full


def check(block: Block, backbone: str) -> None:
    """Raise ``TypeError`` for a block with positions that a merged token has not."""
    if block.bias is not None:
        raise TypeError(
            f"tome merges tokens, and {backbone} adds a bias for each pair of places to its attention, which merged "
            "tokens have not; attach 'adavit' to it, which leaves tokens out, or tome to a ViT with absolute or rotary "
            "positions"
        )
    if block.qkv_at is not None and block.rotate is None:
        raise TypeError(
            f"tome merges tokens to places between patches, and the rotary positions of {backbone} are known at whole "
            "patches alone; attach it to timm's or transformers' copy of these weights"
        )


def _begun(block: Block, grid: tuple[int, int], x: Tensor) -> Stream:
    """Every patch of tokens (B, P+N, D) by itself."""
    count, wide = grid[0] * grid[1], _wide(x)
    token = torch.arange(count, device=x.device).expand(x.shape[0], -1)
    places = None
    if block.rotate is not None:
        y, across = token // grid[1], token % grid[1]
        places = torch.stack([y, across], dim=-1).to(wide)
    return Stream(x, x.new_ones(x.shape[0], count, 1, dtype=wide), token, places, x)


def _qkv(block: Block, h: Tensor, stream: Stream | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, heads, T, E) of normed tokens h (B, T, D); rotary ones are turned to their mean places."""
    if stream is None or stream.places is None or block.qkv_at is None or block.rotate is None:
        return block.qkv(h)
    q, k, v = block.qkv_unplaced(h)
    prefix, places = h.shape[1] - stream.size.shape[1], stream.places[:, None]  # the same for every head
    q, k = (torch.cat([y[:, :, :prefix], block.rotate(y[:, :, prefix:], places)], dim=2) for y in (q, k))
    return q, k, v


def _unmerged(x: Tensor, stream: Stream) -> Tensor:
    """Tokens (B, T, D) -> (B, P+N, D): a copy for each patch."""
    prefix, patches = x.tensor_split([x.shape[1] - stream.size.shape[1]], dim=1)
    return torch.cat([prefix, patches.gather(1, _rows(stream.token, x))], dim=1)


def _rows(index: Tensor, x: Tensor) -> Tensor:
    """Places (B, n) for each channel of x (B, ., C): (B, n, C)."""
    return index[..., None].expand(-1, -1, x.shape[-1])


def _wide(x: Tensor) -> torch.dtype:
    """Return the dtype in which tokens are added up."""
    return torch.promote_types(x.dtype, torch.float32)
