"""Muon: momentum with orthogonal updates for the matrices of what is trained, AdamW for the rest."""

from __future__ import annotations

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
            for p in (p for p in group["params"] if p.grad is not None):
                if not self.state[p]:  # AdamW asks for the step of each parameter when it reads a checkpoint
                    self.state[p].update(step=torch.tensor(0.0), mean=torch.zeros_like(p))
                mean = self.state[p]["mean"]
                mean.lerp_(p.grad, 1 - MOMENTUM)
                update = orthogonal(p.grad.lerp(mean, MOMENTUM).flatten(1))
                size = 0.2 * max(update.shape) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update.view_as(p), alpha=group["lr"] * size)
        try:
            self.param_groups = [g for g in groups if not g.get("orthogonal")]
            super().step()
        finally:
            self.param_groups = groups


def matrices(model: nn.Module) -> set[int]:
    """Return the ids of the trained weights that are matrices: of linear layers, and of convolutions in one group."""
    layers = [m for m in model.modules() if getattr(m, "groups", 1) == 1 and not isinstance(m, TABLES)]
    weights = [w for m in layers if (w := m._parameters.get("weight")) is not None and w.requires_grad]
    return {id(w) for w in weights if w.ndim > 1 and min(w.flatten(1).shape) >= LEAST}


def orthogonal(matrix: Tensor) -> Tensor:
    """Bring all singular values near one by five Newton-Schulz steps of degree five."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    x = x.bfloat16() if x.is_cuda else x.float()  # the steps correct themselves, so few digits do
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x if wide is matrix else x.T).to(matrix.dtype)
