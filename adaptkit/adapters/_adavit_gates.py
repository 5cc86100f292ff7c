"""The decision heads of AdaViT (section 3.2), what they decide, and policies that decide in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.losses import KINDS
from adaptkit.ops.gumbel import gumbel_sigmoid
from adaptkit.vit import Spec

__all__ = ["Decision", "Gates", "Given", "Policy", "Random", "Usage"]


class Usage(NamedTuple):
    """How much a decision keeps."""

    everything: bool  #: whether nothing is off
    patch: float  #: share of the patches that is kept, over all images; 1 without such a gate
    head: float
    layer: float


class Decision(NamedTuple):
    """What one block does for each image; None where it has no such gate, which keeps everything."""

    patch: Tensor | None  #: (B, N)
    head: Tensor | None  #: (B, heads)
    layer: Tensor | None  #: (B, 2): MSA, FFN

    def usage(self) -> Usage:
        """Read how much is kept: the one time that the host waits for the device."""
        given = [keep for keep in self if keep is not None]
        numbers = iter(torch.stack([number for keep in given for number in (keep.min(), keep.mean())]).tolist())
        pairs = [(1.0, 1.0) if keep is None else (next(numbers), next(numbers)) for keep in self]
        return Usage(min(least for least, _ in pairs) > 0, *(mean for _, mean in pairs))


Policy = Callable[[int, Decision], Decision]  #: block index and the gates' own decision -> what is done


class Random:
    """Keep patches, heads and sub-layers at random with these rates: the baseline of the paper's table 1."""

    def __init__(self, patch: float = 1.0, head: float = 1.0, layer: float = 1.0, seed: int = 0) -> None:
        self.rates = (patch, head, layer)
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, index: int, own: Decision) -> Decision:
        """Draw anew for every image and block; the kinds that the block has gates for."""
        return Decision(*(None if k is None else self._draw(k, rate) for k, rate in zip(own, self.rates)))

    def _draw(self, like: Tensor, rate: float) -> Tensor:
        return (torch.rand(like.shape, generator=self.generator) < rate).to(like)


class Given:
    """Decide as another forward did: from its ``Features.aux``."""

    def __init__(self, aux: Mapping[str, Tensor], first: Mapping[str, int]) -> None:
        self.keep = {kind: aux[f"{kind}_keep"].detach() for kind in KINDS if f"{kind}_keep" in aux}
        self.first = dict(first)

    def __call__(self, index: int, own: Decision) -> Decision:
        """Return the recorded decision of block ``index``."""
        recorded = {kind: self.keep[kind][:, index - self.first[kind]] for kind in self.keep}
        return Decision(*(None if k is None else recorded[kind] for kind, k in zip(KINDS, own)))


class Gates(nn.Module):
    """The gates of one block: a linear layer each, on the class token or on every patch token.

    The layers start with zero weights and a bias that keeps everything, so that at the start the decision is the
    same for every image: all on.
    """

    def __init__(self, spec: Spec, config: Any, kinds: Sequence[str]) -> None:
        super().__init__()
        self.config = config
        cells = 1 if config.patch_policy == "token" else config.grid[0] * config.grid[1]
        self.patch = self._layer(spec.dim, cells) if "patch" in kinds else None
        self.head = self._layer(spec.dim, spec.heads) if "head" in kinds else None
        self.layer = self._layer(spec.dim, 2) if "layer" in kinds else None

    def _layer(self, dim: int, out: int) -> nn.Linear:
        layer = nn.Linear(dim, out)
        nn.init.zeros_(layer.weight)
        nn.init.constant_(layer.bias, self.config.keep_bias)
        return layer

    def forward(self, x: Tensor, h: Tensor, grid: tuple[int, int]) -> tuple[Decision, Decision]:
        """Tokens x (B, P+N, D) and their first norm h -> the decisions and their logits.

        The class token decides as it enters the block, before the norm; where a host has none, the mean of the
        patch tokens does. Everything is computed in float32 (or float64), whatever the autocast dtype: a rounded
        logit may decide otherwise.
        """
        prefix = x.shape[1] - grid[0] * grid[1]
        kind = x.device.type
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            token = x[:, 0] if prefix else x.mean(1)
            logits = Decision(
                self._patch_logits(token, h, grid),
                None if self.head is None else _linear(self.head, token),
                None if self.layer is None else _linear(self.layer, token),
            )
            c = self.config
            thresholds = (c.patch_threshold, c.head_threshold, c.layer_threshold)
            keep = (
                None if z is None else gumbel_sigmoid(z, c.temperature, t, noise=self.training)
                for z, t in zip(logits, thresholds)
            )
            return Decision(*keep), logits

    def _patch_logits(self, token: Tensor, h: Tensor, grid: tuple[int, int]) -> Tensor | None:
        """Class token (B, D) or normed tokens (B, P+N, D) -> (B, N)."""
        if self.patch is None:
            return None
        if self.config.patch_policy == "token":  # the prefix tokens go along: cutting them off would copy the rest
            return _linear(self.patch, h)[:, -grid[0] * grid[1] :, 0]
        logits = _linear(self.patch, token).unflatten(1, (1, *self.config.grid))
        if tuple(self.config.grid) != tuple(grid):
            logits = F.interpolate(logits, size=grid, mode="bilinear", align_corners=False)
        return logits.flatten(1)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    if x.dtype == layer.weight.dtype == dtype:
        return F.linear(x, layer.weight, layer.bias)
    return F.linear(x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))
