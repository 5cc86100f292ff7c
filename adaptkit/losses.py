"""Losses for adaptive computation (usage against a budget, agreement with the full model) and for depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "KINDS",
    "agreement_loss",
    "annealed_budget",
    "check_budget",
    "macs_loss",
    "silog_loss",
    "usage",
    "usage_loss",
]

KINDS = ("patch", "head", "layer")
Form = Literal["squared", "absolute"]


def usage(aux: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the mean share that is kept, a scalar per kind, from ``Features.aux`` (or any ``{kind: decisions}``).

    In training these are the sampled decisions, with a gradient.
    """
    found = {kind: aux.get(f"{kind}_keep", aux.get(kind)) for kind in KINDS}
    return {kind: keep.mean() for kind, keep in found.items() if keep is not None}


def usage_loss(aux: Mapping[str, Tensor], budget: float | Mapping[str, float], form: Form = "squared") -> Tensor:
    """Sum over the kinds of (usage - budget), squared (AdaViT, eq. 8) or absolute (the official code).

    Args:
        aux: ``Features.aux``, or decisions or their means by kind: ``"patch"``, ``"head"``, ``"layer"``.
        budget: the share to keep, in (0, 1]; one for all kinds that are there, or one per kind.
        form: ``"squared"``, or ``"absolute"``, which pulls as hard near the budget as far from it.

    Returns a scalar. Raises ``ValueError`` for a budget outside (0, 1], a kind that has no decisions, no decisions
    at all, or an unknown form.
    """
    if form not in ("squared", "absolute"):
        raise ValueError(f"form={form!r} is not a choice; choose one of 'squared', 'absolute'")
    means = usage(aux)
    budgets = dict(budget) if isinstance(budget, Mapping) else dict.fromkeys(means, budget)
    unknown = sorted(budgets.keys() - means.keys())
    if unknown or not means:
        raise ValueError(
            f"there is a budget for {', '.join(unknown) or 'nothing'}, and there are decisions for "
            f"{', '.join(means) or 'nothing'}; give budgets for the kinds that have gates"
        )
    terms = [means[kind] - check_budget(share, f"the {kind} budget") for kind, share in budgets.items()]
    return sum((t.square() if form == "squared" else t.abs() for t in terms), start=terms[0].new_zeros(()))


def macs_loss(macs: Tensor, dense: float, budget: float, form: Form = "absolute") -> Tensor:
    """Return the distance of the batch's mean share of MACs from one budget.

    Args:
        macs: (B,) MACs of each image, differentiable in the decisions:
            ``adaptkit.analysis.accounting.macs(costs, aux)``.
        dense: MACs of the whole model: ``costs.dense``.
        budget: the share of ``dense`` to spend, in (0, 1].
        form: as in :func:`usage_loss`.

    Returns a scalar. Raises ``ValueError`` for a budget outside (0, 1] or an unknown form.
    """
    return usage_loss({"layer": macs / dense}, {"layer": budget}, form)


def agreement_loss(logits: Tensor, full: Tensor, temperature: float = 1.0) -> Tensor:
    """Return KL(full || adaptive), the mean over images, times ``temperature`` squared.

    Args:
        logits: (B, classes) with decisions.
        full: (B, classes) of the same model with all gates open, ``with adapter.opened(): model(image)``; its
            gradient is stopped.
        temperature: of both softmaxes; above 0.
    """
    target = (full.detach() / temperature).log_softmax(-1)
    say = (logits / temperature).log_softmax(-1)
    return F.kl_div(say, target, log_target=True, reduction="batchmean") * temperature**2


def annealed_budget(step: int, steps: int, budget: float) -> float:
    """Return the budget at ``step``: from 1 at step 0 in a straight line to ``budget`` at ``steps``, then constant.

    Raises ``ValueError`` for a budget outside (0, 1].
    """
    check_budget(budget)
    return budget if step >= steps else 1.0 - (1.0 - budget) * max(step, 0) / steps


def check_budget(budget: float, name: str = "the budget") -> float:
    """Return a budget that is a share of the whole; ``ValueError`` for one outside (0, 1]."""
    if not 0.0 < budget <= 1.0:
        raise ValueError(f"{name} is {budget}, and a share of the whole lies in (0, 1]; 0.5 keeps half of it")
    return float(budget)


def silog_loss(depth: Tensor, target: Tensor, variance_focus: float = 0.85) -> Tensor:
    """Return the scale-invariant logarithmic loss (Eigen et al. 2014): sqrt(mean(d^2) - variance_focus mean(d)^2).

    d = log(depth) - log(target) over all pixels with a target. At 1 a common scale costs nothing, at 0 it is a plain
    error of logarithms.

    Args:
        depth: predicted, positive, any shape.
        target: measured, of the same shape; 0 or less where nothing was measured. Without any target the loss is 0.
    """
    known = target > 0
    d = depth.float().clamp_min(1e-6).log() - target.float().clamp_min(1e-6).log()
    count = known.sum().clamp_min(1)
    mean = (d * known).sum() / count
    square = (d.square() * known).sum() / count
    return (square - variance_focus * mean.square()).clamp_min(1e-12).sqrt() * known.any()
