"""Hard decisions with a gradient: the Gumbel-sigmoid of AdaViT (Meng et al., CVPR 2022, section 3.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adaptkit.seam import constant, is_transformed

__all__ = ["gumbel_sigmoid"]


def gumbel_sigmoid(logits: Tensor, temperature: float, threshold: float, noise: bool) -> Tensor:
    """Decide: 1 where ``sigmoid((logits + noise) / temperature) > threshold``, else 0.

    The difference of the paper's two Gumbel samples has the logistic distribution, which is what is drawn here. The
    value is exactly 0 or 1; the gradient is that of the sigmoid (straight-through). Temperature and threshold are
    the same with and without noise, so that what is trained is what is evaluated.

    Args:
        logits: any shape, float32 or float64.
        temperature: above 0; larger is softer in the gradient, and noise then matters less.
        threshold: between 0 and 1.
        noise: draw noise (training), or decide deterministically (evaluation).

    Returns a tensor of the shape of ``logits``, of zeros and ones.
    """
    differentiated = logits.requires_grad or is_transformed()  # in forward mode nothing requires a gradient
    if not (noise or differentiated):  # the same comparison before the sigmoid
        return (logits > temperature * math.log(threshold / (1 - threshold))).to(logits.dtype)
    if noise:
        tiny = torch.finfo(logits.dtype).tiny
        uniform = torch.rand_like(logits).clamp(tiny, 1 - torch.finfo(logits.dtype).eps)
        logits = logits + uniform.log() - (-uniform).log1p()
    soft = torch.sigmoid(logits / temperature)
    hard = (soft > threshold).to(soft.dtype)
    return hard - constant(soft) + soft if differentiated else hard
