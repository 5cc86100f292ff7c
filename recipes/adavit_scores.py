"""What a way of deciding gives: accuracy, MACs and speed; and the shift that brings gates to their budget."""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adaptkit.adapters.adavit import AdaViT, Random
from adaptkit.analysis import accounting
from adaptkit.losses import KINDS, usage

from .labelled import Labelled
from .normalisation import source_of

FINE, MOST = 0.002, 1024.0  #: of a shift of logits: how fine it is found, and how far it may go


class Score(NamedTuple):
    """What one way of deciding gives."""

    accuracy: float  # in 0..1
    macs: accounting.Summary  # share of the dense model's
    usage: dict[str, float]
    aux: dict[str, Tensor]  # decisions of all images
    shares: Tensor  # (n,) MACs of each, of the dense model's; none where no gate decides


@torch.no_grad()
def evaluate(
    model: Any, data: Labelled, order: Tensor, args: argparse.Namespace, device: torch.device, costs: accounting.Costs
) -> Score:
    """Run the images in this order, as the model decides; ``costs`` are those of its parts."""
    model.eval()
    hits, spent, kept = [], [], []
    for image, label in data.batches(order, args.batch_size, source_of(model.vit, args), device):
        features = model(image)
        hits.append(features.logits.argmax(1) == label)
        if features.aux:
            spent.append(accounting.macs(costs, features.aux) / costs.dense)
            kept.append({k: v for k, v in features.aux.items() if k.endswith("_keep")})
    aux = {k: torch.cat([part[k] for part in kept]).cpu() for k in (kept[0] if kept else {})}
    shares = torch.cat(spent).cpu() if spent else torch.zeros(0)
    macs = accounting.summary(shares) if spent else accounting.Summary(1.0, 1.0, 1.0)
    return Score(float(torch.cat(hits).float().mean()), macs, {k: float(v) for k, v in usage(aux).items()}, aux, shares)


def random_at(model: Any, share: float, rates: dict[str, float], score: Callable[[Tensor], Score], count: int) -> Score:
    """Score random decisions that cost ``share``: the model's own rates, all to one power that fits the cost."""
    gates, low, high = AdaViT.of(model), 0.0, 4.0
    some, everything = torch.arange(min(count, 256)), torch.arange(count)

    def draw(power: float, order: Tensor) -> Score:
        with gates.deciding(Random(**{kind: max(rate, 1e-3) ** power for kind, rate in rates.items()}, seed=0)):
            return score(order)

    for _ in range(10):
        power = (low + high) / 2
        low, high = (power, high) if draw(power, some).macs.mean > share else (low, power)
    return draw((low + high) / 2, everything)


@torch.inference_mode()
def images_per_second(model: Any, data: Labelled, args: argparse.Namespace, device: torch.device) -> Iterator[float]:
    """Yield the rates of the dense backbone with its head and of the adaptive model: medians, taking turns."""
    order = torch.arange(min(len(data.labels), 4 * args.batch_size))
    batches = [x for x, _ in data.batches(order, args.batch_size, source_of(model.vit, args), device)]
    gates, seconds = AdaViT.of(model), {True: [], False: []}
    for _ in range(5):
        for dense in (True, False):
            started = time.perf_counter()
            for image in batches:
                with gates.opened() if dense else contextlib.nullcontext():
                    model(image).logits.sum().item()
            seconds[dense].append(time.perf_counter() - started)
    for dense in (True, False):
        yield len(order) / statistics.median(seconds[dense])


@torch.no_grad()
def calibrate(model: Any, data: Labelled, args: argparse.Namespace, device: torch.device, most: int = 512) -> float:
    """Shift the gates by one number (see :func:`shifted`) so that the thresholded decisions spend the budget.

    Sampled decisions with a rate of one half and thresholded ones are not the same, so the budget that was trained
    for is not quite what evaluation spends. Bisection on training images mends that. Returns the shift.
    """
    gates = AdaViT.of(model)
    order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(args.seed))[:most]
    costs = accounting.costs(model, (args.size, args.size))
    biases = [(bias, bias.clone()) for bias in shifted(gates)]

    def spent(by: float) -> float:
        for bias, value in biases:
            bias.copy_(value + by)
        return evaluate(model, data, order, args, device, costs).macs.mean

    low, high = -16.0, 16.0
    while low > -MOST and spent(low) > args.budget:  # tokens, and so logits, are large in some backbones
        low, high = 2 * low, low
    while high - low > FINE:
        middle = (low + high) / 2
        low, high = (low, middle) if spent(middle) > args.budget else (middle, high)
    for bias, value in biases:
        bias.copy_(value + low)  # never above the budget
    return low


def shifted(gates: AdaViT) -> list[nn.Parameter]:
    """Return the biases that one number is added to, to spend more or less.

    They are those of the patch gates where every gated block has one: a patch more or less changes little, while a head
    or sub-layer is often decided alike for all images, so that a shift of its gate switches it for all of them at once.
    Otherwise those of all gates, for patches alone may then not spend little enough.
    """
    heads = {kind: [getattr(one, kind) for one in gates.gates.values()] for kind in KINDS}
    chosen = [*chain(*heads.values())] if None in heads["patch"] else heads["patch"]
    return [head.bias for head in chosen if head is not None]
