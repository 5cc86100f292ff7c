"""AdaViT on a frozen classifier: train the gates to a budget of MACs, and compare with the dense model.

    python -m recipes.adavit --data digits --size 64 --budget 0.5
    python -m recipes.adavit --data crops:train.parquet --val crops:val.parquet --size 64 --budget 0.5
    accelerate launch -m recipes.adavit --data imagenet-1k --backbone deit_small_patch16_224 --size 224

1. The classifier: the backbone's own where it has the right classes, else a linear head on its frozen features.
2. The gates, everything else frozen: cross-entropy, KL to the same model with all gates open, and the distance from
   the budget in MACs, which comes down from 1 in the first half of the run.
3. One shift of all gates' biases, found on training images, brings the thresholded decisions to the budget.
4. The table: dense, adaptive, and random decisions of the same cost.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

import adaptkit
from adaptkit.adapters.adavit import AdaViT, Random
from adaptkit.analysis import accounting, kept_patches, usage_by_depth
from adaptkit.create import create_backbone
from adaptkit.hub.write import write_atomic
from adaptkit.losses import agreement_loss, annealed_budget, check_budget, macs_loss, usage

from . import normalisation
from .devices import BACKEND, together
from .finite import Finite
from .folder import begin, occupied
from .help import RecipeParser
from .labelled import Labelled, open_labelled
from .log import EVERY, append
from .normalisation import source_of
from .optimising import cosine
from .options import MODES, OVERWRITE_HELP, PRECISION_HELP, command, precision, seed_of
from .order import folded
from .stopping import Stop, Stopped

MADE = ("metrics.jsonl", "result.json", "adapter", "kept_patches.png", "usage.png")  # what a run leaves

# ---------------------------------------------------------------------------------------------------- arguments


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = RecipeParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default="digits", help="digits, crops:FILE, a Parquet file, a folder, or a Hub id")
    p.add_argument("--val", help="the same for validation; default: the split 'validation' of --data")
    p.add_argument("--backbone", default="demo", help="demo, a timm name, hf-hub:..., org/repo, or a local folder")
    normalisation.options(p)
    p.add_argument("--size", type=int, default=64, help="side of the images in pixels")
    p.add_argument("--budget", type=float, default=0.5, help="MACs to spend, as a share of the dense model's")
    p.add_argument("--options", type=json.loads, default={"bottleneck": 4}, help="of the adapter, JSON")
    p.add_argument("--head-steps", type=int, default=1000, help="for the classifier; 0: the backbone's own")
    p.add_argument("--steps", type=int, default=800)
    p.add_argument("--batch-size", type=int, default=64, help="per process")
    p.add_argument("--lr", type=float, default=5e-3)
    p.add_argument("--weight", type=float, default=4.0, help="of the budget's loss")
    p.add_argument("--mixed-precision", default="no", choices=["no", "bf16", "fp16", "auto"], help=PRECISION_HELP)
    p.add_argument("--compile", nargs="?", const="default", choices=MODES, metavar="MODE",
                   help="train through torch.compile; evaluation packs what is kept, and runs as it is")  # fmt: skip
    p.add_argument("--seed", type=seed_of, default=0)
    p.add_argument("--out", default="runs/adavit")
    p.add_argument("--overwrite", action=argparse.BooleanOptionalAction, default=False, help=OVERWRITE_HELP)
    args = p.parse_args(argv)
    check_budget(args.budget, "--budget")
    if args.steps < 1 or args.batch_size < 1:
        p.error("--steps and --batch-size must be at least 1")
    return args


# ------------------------------------------------------------------------------------------------- the classifier


def classifier(backbone: nn.Module, data: Labelled, args: argparse.Namespace, device: torch.device) -> Any:
    """Return a linear head trained on the frozen features."""
    config = adaptkit.ClassifierHeadConfig(len(data.classes), pool="avg")
    model = adaptkit.attach(backbone, head=config).to(device).eval()
    head: Any = model.head
    with torch.no_grad():
        order = torch.arange(len(data.labels))
        pooled = [head.pool(model(x)).float() for x, _ in data.batches(order, 128, source_of(model.vit, args), device)]
    features, labels = torch.cat(pooled), data.labels.to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=1e-2)
    for step in range(args.head_steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * cosine(step, args.head_steps, 0.05)
        chosen = torch.randint(len(labels), (256,), device=device)
        loss = F.cross_entropy(head.classifier(head.norm(features[chosen])), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.detach()
    return head


def build(data: Labelled, args: argparse.Namespace, device: torch.device) -> Any:
    """Return the frozen classifier with gates to be trained."""
    backbone = create_backbone(args.backbone)
    if args.head_steps == 0:
        return adaptkit.attach(backbone, ("adavit", args.options)).to(device).train()
    head = classifier(backbone, data, args, device)
    model: Any = adaptkit.attach(backbone, ("adavit", args.options), head=head.config)
    model.head.load_state_dict(head.state_dict())
    model.head.requires_grad_(False)
    return model.to(device).train()


# -------------------------------------------------------------------------------------------------------- training


def train(model: nn.Module, data: Labelled, accelerator: Accelerator, args: argparse.Namespace) -> None:
    """Train what requires a gradient: the gates, and the bottlenecks where there are any."""
    adapted: Any = model
    gates, source = AdaViT.of(model), source_of(adapted.vit, args)
    costs = accounting.costs(adapted, (args.size, args.size))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.0)
    model = torch.compile(model, backend=BACKEND, mode=args.compile) if args.compile else model
    model, optimizer = accelerator.prepare(model, optimizer)
    generator = torch.Generator().manual_seed(folded(args.seed * 1000 + accelerator.process_index))
    order = torch.randint(len(data.labels), (args.steps * args.batch_size,), generator=generator)
    batches, finite = data.batches(order, args.batch_size, source, accelerator.device), Finite(accelerator)
    with Progress(accelerator, args) as progress, Stop() as stop:
        for step, (image, label) in enumerate(batches):
            optimizer.param_groups[0]["lr"] = args.lr * cosine(step, args.steps, 0.05)
            with gates.opened(), torch.no_grad(), accelerator.autocast():
                full = model(image).logits.float()
            features = model(image)
            logits, spent = features.logits.float(), accounting.macs(costs, features.aux)
            budget = annealed_budget(step, args.steps // 2, args.budget)
            task = F.cross_entropy(logits, label) + agreement_loss(logits, full)
            loss = task + args.weight * macs_loss(spent, costs.dense, budget)
            finite.see(step, loss)
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % EVERY == 0 or step == args.steps - 1:
                finite.check(step + 1)
                progress.write(step, task, features.aux, gates, spent.detach().mean() / costs.dense, budget)
            progress.advance()
            stopped = stop.agreed(accelerator, step + 1) if step + 1 < args.steps else 0
            if stopped:
                raise Stopped(step + 1, None, stopped)


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


@torch.no_grad()
def calibrate(model: Any, data: Labelled, args: argparse.Namespace, device: torch.device, most: int = 512) -> float:
    """Shift all gates' biases by one number so that the thresholded decisions spend the budget; returns the shift.

    Sampled decisions with a rate of one half and thresholded ones are not the same, so the budget that was trained
    for is not quite what evaluation spends. Bisection on training images mends that.
    """
    gates = AdaViT.of(model)
    order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(args.seed))[:most]
    biases = [(p, p.clone()) for name, p in gates.gates.named_parameters() if name.endswith("bias")]
    low, high, shift = -4.0, 4.0, 0.0
    for _ in range(12):
        shift = (low + high) / 2
        for parameter, value in biases:
            parameter.copy_(value + shift)
        if evaluate(model, data, order, args, device).macs.mean > args.budget:
            high = shift
        else:
            low = shift
    for parameter, value in biases:
        parameter.copy_(value + low)  # never above the budget
    return low


# ---------------------------------------------------------------------------------------------------------- scores


class Score(NamedTuple):
    """What one way of deciding gives."""

    accuracy: float  # in 0..1
    macs: accounting.Summary  # share of the dense model's
    usage: dict[str, float]
    aux: dict[str, Tensor]  # decisions of all images


@torch.no_grad()
def evaluate(model: Any, data: Labelled, order: Tensor, args: argparse.Namespace, device: torch.device) -> Score:
    """Run the images in this order, as the model decides."""
    model.eval()
    costs = accounting.costs(model, (args.size, args.size))
    hits, spent, kept = [], [], []
    for image, label in data.batches(order, args.batch_size, source_of(model.vit, args), device):
        features = model(image)
        hits.append(features.logits.argmax(1) == label)
        if features.aux:
            spent.append(accounting.macs(costs, features.aux) / costs.dense)
            kept.append({k: v for k, v in features.aux.items() if k.endswith("_keep")})
    aux = {k: torch.cat([part[k] for part in kept]).cpu() for k in (kept[0] if kept else {})}
    macs = accounting.summary(torch.cat(spent)) if spent else accounting.Summary(1.0, 1.0, 1.0)
    return Score(float(torch.cat(hits).float().mean()), macs, {k: float(v) for k, v in usage(aux).items()}, aux)


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


# ------------------------------------------------------------------------------------------------------------ main


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    accelerator = together(Accelerator, mixed_precision=precision(args.mixed_precision))
    with occupied(args.out, accelerator, overwrite=args.overwrite, made=MADE, can_resume=False) as out:
        run_in(out, args, accelerator)


def run_in(out: Path, args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Train and compare, in a folder that is this run's."""
    set_seed(folded(args.seed, 31))
    device = accelerator.device
    data = open_labelled(args.data, "train", args.size)
    held = open_labelled(args.val or args.data, "validation", args.size)
    model = build(data, args, device)
    if accelerator.is_main_process:
        begin(out, MADE)
    train(model, data, accelerator, args)
    main_process = accelerator.is_main_process
    accelerator.end_training()  # what follows is one process's work
    if not main_process:
        return
    shift = calibrate(model, data, args, device)
    everything = torch.arange(len(held.labels))

    def score(order: Tensor) -> Score:
        return evaluate(model, held, order, args, device)

    gates = AdaViT.of(model)
    with gates.opened():
        dense = score(everything)
    adaptive = score(everything)
    random = random_at(model, adaptive.macs.mean, adaptive.usage, score, len(everything))
    source = source_of(model.vit, args)
    off = model.verify(next(held.batches(everything, args.batch_size, source, device))[0])
    rates = list(images_per_second(model, held, args, device))
    costs = accounting.costs(model, (args.size, args.size))
    scores = {"budget": args.budget, "accuracy": adaptive.accuracy}
    folder = model.save(out / "adapter", task="image-classification", **normalisation.to_record(args), **scores)
    image = next(held.batches(everything[:1], 1, source, device))[0]
    drawn = draw(model, image, adaptive.aux, out)

    result = {
        "data": args.data, "images": [len(data.labels), len(held.labels)], "classes": len(data.classes),
        "gmacs": costs.dense / 1e9, "budget": args.budget, "shift": shift,
        "accuracy": {"dense": dense.accuracy, "adaptive": adaptive.accuracy, "random": random.accuracy},
        "macs": adaptive.macs._asdict(), "random_macs": random.macs.mean, "usage": adaptive.usage,
        "images_per_s": rates, "packed_minus_masked": off,
    }  # fmt: skip
    write_atomic(out / "result.json", (json.dumps(result, indent=2) + "\n").encode())
    kept = " / ".join(f"{adaptive.usage[k]:.2f}" for k in adaptive.usage)
    print(f"\n{args.data}: {len(data.labels)} training and {len(held.labels)} validation images, ", end="")
    print(f"{costs.dense / 1e9:.3f} GMACs dense, kept {' / '.join(adaptive.usage)} {kept}\n")
    print("| | accuracy | MACs mean | p50 | p95 | images/s |")
    print("|---|---|---|---|---|---|")
    print(f"| dense | {dense.accuracy:.1%} | 100% | 100% | 100% | {rates[0]:.0f} |")
    print(f"| adaptive | {adaptive.accuracy:.1%} | {' | '.join(f'{m:.0%}' for m in adaptive.macs)} | {rates[1]:.0f} |")
    print(f"| random decisions | {random.accuracy:.1%} | {' | '.join(f'{m:.0%}' for m in random.macs)} | |")
    print(f"\npacked equals masked to {off:.1e}; saved {folder}; {drawn}")


def draw(model: Any, image: Tensor, aux: dict[str, Tensor], out: Path) -> str:
    """Draw what one image keeps, and the usage of all; say where it is, or why not: the training is not lost by it."""
    try:
        kept_patches(model, image, out / "kept_patches.png")
        usage_by_depth(aux, AdaViT.of(model).first).save(out / "usage.png")
    except ImportError as error:
        return f"no pictures: {error}"
    return f"drew {out}/kept_patches.png and {out}/usage.png"


if __name__ == "__main__":
    command("adavit", main)
