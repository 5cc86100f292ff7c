"""What gates are compared with: decisions that know nothing of the image, at a budget of MACs.

* at random (the paper's Random, table 1): every patch, head and sub-layer is kept at one rate, drawn anew for every
  image and block. Trained under these decisions it is the paper's Random+;
* by depth: the last sub-layers are left out, for every image alike.

Both train what the gates train beside them, the bottlenecks, in the same way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adaptkit.adapters.adavit import AdaViT, Random
from adaptkit.analysis import accounting
from adaptkit.core.warned import warn

__all__ = ["POLICIES", "WAYS", "at_random", "by_depth", "prepared", "share_of_each", "warn_out_of_reach"]

POLICIES = {"learned": "adaptive", "random": "random+", "static": "static"}  #: --policy -> how its score is called
#: What a comparison compares, see adavit_baselines.py.
WAYS = ("adaptive", "random", "random+", "static", "patches", "heads", "layers")
SURE = 30.0  #: a logit that no noise turns
DRAWS = 256  #: images, to know what a rate costs


def prepared(model: Any, policy: str, budget: float, size: tuple[int, int], seed: int) -> Random | None:
    """Make the model decide by a policy; returns what decides in place of the gates, None where they do it themselves.

    Gates that learn nothing are frozen. Raises ``ValueError`` where nothing is left to train, or nothing to skip by
    depth.
    """
    gates = AdaViT.of(model)
    if policy == "learned":
        return None
    gates.gates.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"--policy {policy} trains the bottlenecks, and there are none: --options '{{\"bottleneck\": 4}}'"
        )
    costs = accounting.costs(model, size)
    if policy == "random":
        return at_random(costs, budget, seed)
    if "layer" not in gates.config.gates:
        raise ValueError(f"--policy static leaves out sub-layers, and gates is {gates.config.gates}: add 'layer'")
    fix(gates, by_depth(costs, budget))
    return None


def decisions(costs: accounting.Costs, images: int, rate: float = 1.0) -> dict[str, Tensor]:
    """Return decisions of each kind that there are gates for, (images, gated blocks, ...), kept at a rate."""
    gates, generator = costs.adapter, torch.Generator().manual_seed(0)
    each = {"patch": costs.rows - costs.prefix, "head": gates.spec.num_heads, "layer": 2}
    shapes = {kind: (images, gates.spec.depth - gates.first[kind], each[kind]) for kind in gates.config.gates}
    return {f"{k}_keep": (torch.rand(shape, generator=generator) < rate).float() for k, shape in shapes.items()}


def warn_out_of_reach(costs: accounting.Costs, budget: float) -> None:
    """Warn where the gates spend more than the budget even with all of them shut."""
    least = float(accounting.macs(costs, decisions(costs, 1, 0.0))) / costs.dense
    if least > budget:
        gates = costs.adapter.config.gates
        apart = all(block.comes_apart for block in costs.blocks)
        unsplit = "" if apart or "head" not in gates else ", and this backbone computes all heads or none"
        warn(
            f"--budget {budget:g} is out of reach: with all gates shut ({', '.join(gates)}) {least:.0%} of the MACs "
            f"are left{unsplit}. Raise the budget, or let more be skipped: by 'gates' and 'first_block' in --options"
        )


def at_random(costs: accounting.Costs, budget: float, seed: int) -> Random:
    """Return random decisions whose mean MACs are ``budget`` of the dense model's: one rate for all kinds."""
    rate = share_of_each(costs, budget)
    return Random(rate, rate, rate, seed=seed)


def share_of_each(costs: accounting.Costs, budget: float) -> float:
    """Return the share of patches, heads and sub-layers alike at which ``budget`` of the dense MACs are spent."""
    low, high = 0.0, 1.0
    for _ in range(20):
        rate = (low + high) / 2
        spent = accounting.macs(costs, decisions(costs, DRAWS, rate)).mean() / costs.dense
        low, high = (low, rate) if spent > budget else (rate, high)
    return low


def by_depth(costs: accounting.Costs, budget: float) -> Tensor:
    """Return which sub-layers (gated blocks, 2: MSA, FFN) are kept: the first ones, as many as the budget allows.

    The block behind them may be kept in part, its MSA or its FFN, whichever leaves less of the budget. Where not even
    the blocks without gates fit, all that have gates are left out.
    """
    everything = decisions(costs, 1)
    count = everything["layer_keep"].shape[1]
    best, most = torch.zeros(count, 2), -1.0
    for blocks in range(count + 1):
        for part in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):
            keep = torch.zeros(count, 2)
            keep[:blocks] = 1
            if blocks < count:
                keep[blocks] = torch.tensor(part)
            spent = float(accounting.macs(costs, {**everything, "layer_keep": keep[None]})) / costs.dense
            if most < spent <= budget:
                best, most = keep, spent
    return best


@torch.no_grad()
def fix(gates: AdaViT, layers: Tensor) -> None:
    """Let the gates say this of the sub-layers (gated blocks, 2) whatever they see, and keep everything else."""
    for index, one in gates.gates.items():
        for head in (one.patch, one.head, one.layer):
            if head is not None:
                head.weight.zero_()
                head.bias.fill_(SURE)
        if one.layer is not None:
            one.layer.bias.copy_(SURE * (2 * layers[int(index) - gates.first["layer"]] - 1))
