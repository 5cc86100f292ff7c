"""How the gates of AdaViT's recipe are trained: they learn what to keep, then the bottlenecks learn to live with it.

While a gate is sampled it often keeps what it will not keep in the end, and the bottlenecks learn to make good for what
will not be missing. So in the middle of the run the gates settle: they decide by threshold, as in evaluation, and learn
no more, as a network is tuned after it was pruned. What they decide still depends on each image.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from io import FileIO
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from adaptkit.adapters.adavit import AdaViT, Random
from adaptkit.analysis import accounting
from adaptkit.losses import agreement_loss, annealed_budget, macs_loss, usage, usage_loss

from .adavit_policies import share_of_each
from .adavit_scores import shifted
from .devices import BACKEND, sent
from .finite import Finite
from .labelled import Labelled
from .log import EVERY, append
from .normalisation import source_of
from .optimising import cosine
from .order import folded
from .stopping import Stop, Stopped

__all__ = ["Progress", "dense_logits", "shift", "train"]

CLIP = 1.0  #: largest norm of the gradients


def train(
    model: nn.Module, data: Labelled, accelerator: Accelerator, args: argparse.Namespace, policy: Random | None = None
) -> None:
    """Train what requires a gradient: the gates, and the bottlenecks where there are any.

    ``policy`` decides in place of the gates; theirs alone are pulled to the budget. Where nothing but gates is trained,
    they learn to the end.
    """
    adapted: Any = model
    gates, source = AdaViT.of(model), source_of(adapted.vit, args)
    costs, learned = accounting.costs(adapted, (args.size, args.size)), args.policy == "learned"
    of_gates = [p for p in gates.gates.parameters() if p.requires_grad]
    known = set(map(id, of_gates))
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    settled = args.steps // 2 if learned and others else args.steps
    of_each = share_of_each(costs, args.budget) if args.budget_loss == "usage" else None
    optimizer = torch.optim.AdamW([{"params": of_gates}, {"params": others}], lr=args.lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(folded(args.seed * 1000 + accelerator.process_index))
    order = torch.randint(len(data.labels), (args.steps * args.batch_size,), generator=generator)
    seen, places = order.unique(return_inverse=True)
    full = dense_logits(model, data.batches(seen, args.batch_size, source, accelerator.device), accelerator)
    model = torch.compile(model, backend=BACKEND, mode=args.compile) if args.compile else model
    model, optimizer = accelerator.prepare(model, optimizer)
    batches, finite = data.batches(order, args.batch_size, source, accelerator.device), Finite(accelerator)
    batches = zip(batches, sent(places, accelerator.device).split(args.batch_size))
    with Progress(accelerator, args) as progress, Stop() as stop:
        for step, ((image, label), place) in enumerate(batches):
            learn = learned and step < settled  # of the gates
            gates.gates.train(step < settled)  # in training mode they sample
            rate = args.lr * cosine(step, args.steps, 0.05)
            for group, lr in zip(optimizer.param_groups, (rate if learn else 0.0, rate)):
                group["lr"] = lr
            with gates.deciding(policy):
                features = model(image)
            logits, spent = features.logits.float(), accounting.macs(costs, features.aux)
            budget = annealed_budget(step, settled // 2, args.budget) if learned else args.budget
            task = F.cross_entropy(logits, label) + agreement_loss(logits, full[place])
            loss = task
            if learn and of_each is None:
                loss = task + args.weight * macs_loss(spent, costs.dense, budget)
            elif learn:
                kept = annealed_budget(step, settled // 2, of_each)
                loss = task + args.weight * usage_loss(features.aux, kept, "absolute")
            finite.see(step, loss)
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.unscale_gradients()
            for parameters in (of_gates, others):  # apart: the budget pulls at the gates far harder than the task
                torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            share = spent.detach().mean() / costs.dense
            if learned and not learn:
                shift(gates, budget - accelerator.reduce(share, reduction="mean"))
            if step % EVERY == 0 or step == args.steps - 1:
                finite.check(step + 1)
                progress.write(step, task, features.aux, gates, share, budget)
            progress.advance()
            stopped = stop.agreed(accelerator, step + 1) if step + 1 < args.steps else 0
            if stopped:
                raise Stopped(step + 1, None, stopped)
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # autocast is for training: what is scored is float32


@torch.no_grad()
def shift(gates: AdaViT, by: Tensor | float) -> None:
    """Add one number to the biases by which a budget is met.

    After each step it is the budget less what the batch spent, both as shares of the dense model's MACs. So the biases
    come to rest where the budget is met, whatever the bottlenecks do to the tokens meanwhile.
    """
    for bias in shifted(gates):
        bias.add_(by)


@torch.no_grad()
def dense_logits(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], accelerator: Accelerator) -> Tensor:
    """Return what the model says with all gates open: the frozen classifier, so once for each image. (K, classes)."""
    with AdaViT.of(model).opened(), accelerator.autocast():
        return torch.cat([model(image).logits.float() for image, _ in batches])


class Progress:
    """A progress bar, and metrics.jsonl with usage as it was sampled and as it would be thresholded."""

    def __init__(self, accelerator: Accelerator, args: argparse.Namespace) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.main = accelerator.is_main_process
        columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[say]}"))
        self.bar = Bar(*columns, TimeRemainingColumn(), disable=not self.main)
        self.task = self.bar.add_task("train", total=args.steps, say="")
        self.path = Path(args.out) / "metrics.jsonl"

    def __enter__(self) -> Progress:
        self.bar.start()
        self.file = FileIO(self.path, "w") if self.main else None
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        if self.file is not None:
            self.file.close()

    def advance(self) -> None:
        self.bar.advance(self.task)

    def write(self, step: int, task: Tensor, aux: Any, gates: AdaViT, share: Tensor, budget: float) -> None:
        loss, macs = task.item(), share.item()
        self.bar.update(self.task, say=f"loss {loss:.3f}  MACs {macs:.0%} for {budget:.0%}")
        row = {"step": step, "loss": loss, "macs": macs, "budget": budget}
        for name, decisions in (("sampled", usage(aux)), ("thresholded", usage(gates.thresholded(aux)))):
            row.update({f"{name}_{kind}": kept.item() for kind, kept in decisions.items()})
        if self.file is not None:
            append(self.file, row)
