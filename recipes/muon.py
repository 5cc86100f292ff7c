"""Muon: momentum with orthogonal updates for the matrices of what is trained, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

TABLES = (nn.Embedding, nn.EmbeddingBag)  #: their weight is a row for each entry, not a matrix
LEAST = 16  #: of a side: a classifier of few classes, LoRA of a small rank and kernels of one channel are no matrices
MOMENTUM = 0.95


class Muon(torch.optim.AdamW):
    """Momentum whose update is made orthogonal (Jordan 2024), scaled to the size of an AdamW step (Liu et al. 2025).

    M <- 0.95 M + 0.05 G;   W <- (1 - lr decay) W - lr 0.2 sqrt(max(D, C)) orthogonal(0.05 G + 0.95 M)

    for the matrices of groups with ``"orthogonal": True``, a kernel (D, C, h, w) as (D, C h w); the others learn by
    AdamW. One learning rate suits both.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update everything that has a gradient."""
        groups = self.param_groups
        for group in (g for g in groups if g.get("orthogonal")):
            for alike in by_shape(p for p in group["params"] if p.grad is not None):
                updates = orthogonal(torch.stack([self.momentum(p).flatten(1) for p in alike]))
                size = 0.2 * max(updates.shape[1:]) ** 0.5
                for p, update in zip(alike, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(update.view_as(p), alpha=group["lr"] * size)
        try:
            self.param_groups = [g for g in groups if not g.get("orthogonal")]
            super().step()
        finally:
            self.param_groups = groups

    def momentum(self, p: Tensor) -> Tensor:
        """Take the gradient into the momentum; returns what of both is made orthogonal (Nesterov's)."""
        if not self.state[p]:  # AdamW asks for the step of each parameter when it reads a checkpoint
            self.state[p].update(step=torch.tensor(0.0), mean=torch.zeros_like(p))
        mean: Tensor = self.state[p]["mean"].lerp_(p.grad, 1 - MOMENTUM)
        return torch.lerp(p.grad, mean, MOMENTUM)


def by_shape(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Those of one shape together: a GPU multiplies many small matrices as fast as one."""
    found: dict[torch.Size, list[Tensor]] = {}
    for p in parameters:
        found.setdefault(p.shape, []).append(p)
    return list(found.values())


def matrices(model: nn.Module) -> set[int]:
    """Return the ids of the trained weights that are matrices: of linear layers, and of convolutions in one group."""
    layers = [m for m in model.modules() if getattr(m, "groups", 1) == 1 and not isinstance(m, TABLES)]
    weights = [w for m in layers if (w := m._parameters.get("weight")) is not None and w.requires_grad]
    return {id(w) for w in weights if w.ndim > 1 and min(w.flatten(1).shape) >= LEAST}


def orthogonal(matrices: Tensor) -> Tensor:
    """Bring all singular values of (..., D, C) near one by five Newton-Schulz steps of degree five."""
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    x = wide / (torch.linalg.matrix_norm(wide, keepdim=True) + 1e-7)
    x = x.bfloat16() if x.is_cuda else x.float()  # the steps correct themselves, so few digits do
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x if wide is matrices else x.mT).to(matrices.dtype)
