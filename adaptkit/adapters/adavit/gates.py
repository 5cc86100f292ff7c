"""The decision heads of AdaViT (section 3.2), what they decide, and policies that decide in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.adapters.adavit.config import AdaViTConfig
from adaptkit.core.view import Spec
from adaptkit.losses import KINDS
from adaptkit.ops.gumbel import gumbel_sigmoid
from adaptkit.seam import full_precision

__all__ = ["Decision", "DecisionHead", "Gates", "Given", "Policy", "Random"]


class Decision(NamedTuple):
    """What one block does for each image; None where it has no such gate, which keeps everything."""

    patch: Tensor | None  #: (B, N)
    head: Tensor | None  #: (B, heads)
    layer: Tensor | None  #: (B, 2): MSA, FFN

    def keeps_everything(self) -> bool:
        """Whether nothing is off. Reads one number from the device, so the host waits for it."""
        given = [keep for keep in self if keep is not None]
        return bool(torch.stack([keep.min() for keep in given]).min() > 0)


Policy = Callable[[int, Decision], Decision]  #: block index and the gates' own decision -> what is done


class Random:
    """Keep patches, heads and sub-layers at random with these rates: the baseline of the paper's table 1.

    With a ``seed`` the draws come from a generator of its own, else from torch's, whose state gradient checkpointing
    restores before it runs a block again.
    """

    def __init__(self, patch: float = 1.0, head: float = 1.0, layer: float = 1.0, seed: int | None = None) -> None:
        self.rates = (patch, head, layer)
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __call__(self, index: int, own: Decision) -> Decision:
        """Draw anew for every image and block; the kinds that the block has gates for."""
        return Decision(*(None if k is None else self._draw(k, rate) for k, rate in zip(own, self.rates)))

    def _draw(self, like: Tensor, rate: float) -> Tensor:
        if self.generator is None:
            return (torch.rand(like.shape, device=like.device) < rate).to(like)
        if torch._C._current_graph_task_id() >= 0:  # inside of a backward pass: it would draw other decisions
            raise RuntimeError("Random(seed=...) cannot run a block again for gradient checkpointing: leave seed out")
        return (torch.rand(like.shape, generator=self.generator) < rate).to(like)


class Given:
    """Decide as another forward did: from its ``Features.aux``."""

    def __init__(self, aux: Mapping[str, Tensor], first: Mapping[str, int]) -> None:
        self.keep = {kind: aux[f"{kind}_keep"].detach() for kind in KINDS if f"{kind}_keep" in aux}
        self.first = dict(first)

    def __call__(self, index: int, own: Decision) -> Decision:
        """Return the recorded decision of block ``index``."""
        return Decision(
            *(None if k is None else self.keep[kind][:, index - self.first[kind]] for kind, k in zip(KINDS, own))
        )


class Gates(nn.Module):
    """The gates of one block, a linear layer each (AdaViT, section 3.2)::

        keep = 1[sigmoid((logits + noise) / temperature) > threshold]      noise in training only

    The patch gate looks at every patch token (``patch_policy="token"``) or at the class token (``"class"``), the others
    at the class token. The layers start with zero weights, so that at the start the decision is the same for every
    image: all on by ``keep_bias``, or as ``layer_bias`` has it.
    """

    def __init__(self, spec: Spec, config: AdaViTConfig, kinds: Sequence[str], layer_bias: float) -> None:
        super().__init__()
        self.config = config
        self.has_class_token = spec.num_prefix_tokens > 0  # or they are registers alone, see AdaViT.check_blocks
        cells = 1 if config.patch_policy == "token" else config.grid[0] * config.grid[1]
        self.patch = DecisionHead(spec.embed_dim, cells, config.keep_bias) if "patch" in kinds else None
        self.head = DecisionHead(spec.embed_dim, spec.num_heads, config.keep_bias) if "head" in kinds else None
        self.layer = DecisionHead(spec.embed_dim, 2, layer_bias) if "layer" in kinds else None

    def forward(self, x: Tensor, h: Tensor, grid: tuple[int, int]) -> tuple[Decision, Decision]:
        """Tokens x (B, P+N, D) and their first norm h -> the decisions and their logits.

        The class token decides as it enters the block, before the norm; where the backbone has none, the mean of the
        patch tokens does.
        """
        with full_precision(x):  # a rounded logit may decide otherwise
            patches = grid[0] * grid[1]
            token = x[:, 0] if self.has_class_token else x[:, -patches:].mean(1)  # (B, D)
            logits = Decision(
                None if self.patch is None else self._patch_logits(self.patch, token, h, grid),
                None if self.head is None else self.head(token),
                None if self.layer is None else self.layer(token),
            )
            return self.decide(logits), logits

    def decide(self, logits: Decision) -> Decision:
        """Logits -> zeros and ones, in training sampled."""
        c = self.config
        thresholds = (c.patch_threshold, c.head_threshold, c.layer_threshold)
        return Decision(
            *(
                None if z is None else gumbel_sigmoid(z, c.temperature, threshold, noise=self.training)
                for z, threshold in zip(logits, thresholds)
            )
        )

    def _patch_logits(self, gate: DecisionHead, token: Tensor, h: Tensor, grid: tuple[int, int]) -> Tensor:
        """Class token (B, D) or normed tokens (B, P+N, D) -> (B, N)."""
        if self.config.patch_policy == "token":  # the prefix tokens go along: cutting them off would copy the rest
            return gate(h)[:, -grid[0] * grid[1] :, 0]
        logits = gate(token).unflatten(1, (1, *self.config.grid))  # (B, 1, rows, columns)
        if tuple(self.config.grid) != tuple(grid):
            logits = F.interpolate(logits, size=grid, mode="bilinear", align_corners=False)
        return logits.flatten(1)


class DecisionHead(nn.Linear):
    """A linear layer that says one bias at the start, and computes in float32 or more whatever it is stored in."""

    def __init__(self, dim: int, decisions: int, keep_bias: float) -> None:
        super().__init__(dim, decisions)
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, keep_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> logits (..., decisions)."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))
