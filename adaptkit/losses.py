"""Losses for adaptive computation (usage against a budget, agreement with the full model), for depth, and of pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "KINDS",
    "agreement_loss",
    "annealed_budget",
    "balanced_weights",
    "check_budget",
    "dice_loss",
    "focal_loss",
    "lovasz_loss",
    "macs_loss",
    "pixel_loss",
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
    return usage_loss({"layer": macs / dense}, {"layer": check_budget(budget)}, form)


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


# --------------------------------------------------------------------------------------------------------- of pixels


def pixel_loss(logits: Tensor, target: Tensor, ignore_index: int = 255, weight: Tensor | None = None) -> Tensor:
    """Return the cross entropy, the mean over the pixels with a label: sum_i w_i ce_i / sum_i w_i; 0 without any.

    Args:
        logits: (B, K, H, W).
        target: (B, H, W) classes, or ``ignore_index``.
        ignore_index: where nothing is known.
        weight: (K,) of each class, w_i that of pixel i; None: 1.
    """
    total = F.cross_entropy(logits, target, weight, ignore_index=ignore_index, reduction="sum")
    return total / _weights(target, ignore_index, weight).sum().clamp(min=1 if weight is None else 1e-12)


def focal_loss(
    logits: Tensor, target: Tensor, ignore_index: int = 255, weight: Tensor | None = None, gamma: float = 2.0
) -> Tensor:
    """Return sum_i w_i (1 - p_i)^gamma ce_i / sum_i w_i (Lin et al. 2017, eq. 5).

    p_i is what the model gives the class of pixel i: what is already right hardly counts. At gamma 0 it is
    :func:`pixel_loss`, whose arguments these are.
    """
    entropy = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none")  # -log p, 0 where ignored
    weights = _weights(target, ignore_index, weight)
    missed = (-torch.expm1(-entropy)).clamp(min=1e-12)  # 1 - p, with its digits where p is near 1
    total = (weights * missed**gamma * entropy).sum()
    return total / weights.sum().clamp(min=1 if weight is None else 1e-12)


def dice_loss(logits: Tensor, target: Tensor, ignore_index: int = 255, weight: Tensor | None = None) -> Tensor:
    """Return 1 - D, D the mean over the classes in ``target`` of 2 sum_i p_i g_i / (sum_i p_i^2 + sum_i g_i^2).

    p is the softmax of the logits, g is 1 on the pixels of the class and 0 on others, i runs over the pixels with a
    label of the whole batch (Milletari et al. 2016, V-Net, section 3, for each class). A class counts the same whether
    it covers much or little, which is what thin things need. Arguments as of :func:`pixel_loss`; ``weight`` of the
    classes in the mean. 0 where no pixel has a label.
    """
    known = target != ignore_index
    classes = logits.shape[1]
    truth = F.one_hot(torch.where(known, target, 0), classes).movedim(-1, 1) * known[:, None]  # (B, K, H, W)
    p = logits.softmax(1) * known[:, None]
    both, size = (x.sum((0, 2, 3)) for x in (p * truth, p.square() + truth))
    weights = truth.sum((0, 2, 3)).gt(0) * (1.0 if weight is None else weight)
    dice = 2 * both / size.clamp(min=1e-6)
    return (weights * (1 - dice)).sum() / weights.sum().clamp(min=1e-12)


def lovasz_loss(logits: Tensor, target: Tensor, ignore_index: int = 255, weight: Tensor | None = None) -> Tensor:
    """Return the Lovász-softmax loss (Berman et al. 2018, eq. 8 to 11): the mean over the classes in ``target``.

    Of each class it is the Lovász extension of the Jaccard loss 1 - IoU, over the pixels with a label of the whole
    batch. The error of a pixel is m_i = 1 - p_i where it is of the class, p_i elsewhere, p the softmax of the logits.
    The extension takes the pixels from the largest error down: sum_k m_k (J_k - J_(k-1)), J_k the Jaccard loss where
    the first k are wrong and all others right. Where p is 0 or 1 it is 1 - IoU itself. Arguments as of
    :func:`pixel_loss`; ``weight`` of the classes in the mean. 0 where no pixel has a label.
    """
    known = target != ignore_index
    truth = F.one_hot(torch.where(known, target, 0), logits.shape[1]).movedim(-1, 0) * known  # (K, B, H, W)
    p = logits.softmax(1).movedim(1, 0) * known
    errors = (truth - p).abs()
    # Class by class, so that no more than one is sorted at a time. The order has no gradient.
    steps = torch.stack([_jaccard_steps(error, true) for error, true in zip(errors.detach(), truth)])
    weights = truth.sum((1, 2, 3)).gt(0) * (1.0 if weight is None else weight)
    each = (errors * steps).sum((1, 2, 3))
    return (weights * each).sum() / weights.sum().clamp(min=1e-12)


def balanced_weights(pixels: Tensor) -> Tensor:
    """Return N / (K n_k) for each of the K classes, n_k its pixels and N those of all (King and Zeng 2001, section 3).

    Every class then weighs the same as a whole. One that was not seen gets the weight of the rarest that was.

    Args:
        pixels: (K,) counts. ``ValueError`` where all are 0.
    """
    if not (pixels > 0).any():
        raise ValueError("no class has a pixel, so that none can be weighed against another; check the labels")
    counts = pixels.double()
    rarest = counts[counts > 0].min()
    return (counts.sum() / (len(counts) * torch.where(counts > 0, counts, rarest))).float()


def _weights(target: Tensor, ignore_index: int, weight: Tensor | None) -> Tensor:
    """The weight of each pixel, 0 where it is ignored."""
    known = target != ignore_index
    return known if weight is None else weight[torch.where(known, target, 0)] * known


def _jaccard_steps(errors: Tensor, truth: Tensor) -> Tensor:
    """J_k - J_(k-1) of each pixel, in the pixels' own order; of one class, (B, H, W).

    With G pixels of the class, c of them and n others among the first k, J_k = 1 - (G - c) / (G + n). A pixel of the
    class adds 1 / (G + n), another (G - c) / ((G + n) (G + n - 1)), which keeps the digits that a difference of two
    Jaccard losses loses.
    """
    order = errors.flatten().argsort(descending=True, stable=True)  # of equal errors the same in every run
    true = truth.flatten()[order]
    found = true.cumsum(0)
    left = true.sum() - found  # G - c
    union = left + torch.arange(1, len(true) + 1, device=true.device)  # G + n
    step = torch.where(true > 0, 1, left.to(errors.dtype) / (union - 1).clamp(min=1)) / union
    return torch.empty_like(errors).view(-1).scatter_(0, order, step).view_as(errors)
