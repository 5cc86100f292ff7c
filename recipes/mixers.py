"""Does the structure of an adapter matter more than its token mixer, when the backbone is frozen?

    python -m recipes.mixers --train camvid-train.parquet --val camvid-val.parquet --num-classes 11 --out runs/mixers

MetaFormer (Yu et al. 2022) says so of networks trained from scratch: it is the block that makes them, not attention.
Here the block is an adapter beside each frozen block of the demonstration backbone, a linear head on its tokens
segments, and everything else is held equal: images, order, steps, learning rate, seeds. Three comparisons:

* every mixer at equal parameters: bottlenecks are widened until the totals match that of the largest mixer;
* every mixer at equal width;
* the block without its residual, its MLP, its norms, or any of them, around one mixer (``--ablate``), at equal
  parameters too, and no adapter at all.

It writes results.json, table.md and chart.png. A score is the mean over the seeds, its spread their standard deviation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image, ImageDraw
from torch import Tensor

import adaptkit
from adaptkit.adapters.metaformer import MetaFormer
from adaptkit.core.view import Source, Spec
from adaptkit.create import create_backbone
from adaptkit.hub.write import write_atomic
from adaptkit.mixers import list_mixers

from . import normalisation
from .data import SegmentationData, open_dataset
from .devices import together
from .folder import begin, occupied
from .help import RecipeParser
from .look import check_labels
from .normalisation import source_of
from .optimising import cosine, parameter_groups
from .options import OVERWRITE_HELP, command, seed_of
from .scores.segmentation import confusion, mean_iou

ABLATIONS: dict[str, dict[str, Any]] = {
    "no residual": {"residual": False},
    "no MLP": {"mlp_ratio": 0.0},
    "no norm": {"norm": "none"},
    "none of the three": {"residual": False, "mlp_ratio": 0.0, "norm": "none"},
}

# ---------------------------------------------------------------------------------------------------- arguments


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = RecipeParser(prog="mixers", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--train", required=True, help="Parquet file, Hub data set id, or folder with images/ and masks/")
    p.add_argument("--val", required=True, help="the same for validation")
    p.add_argument("--num-classes", type=int, required=True)
    p.add_argument("--ignore-index", type=int, default=255)
    p.add_argument("--backbone", default="demo", help="as in recipes.segment")
    normalisation.options(p)
    p.add_argument("--mixers", nargs="+", default=list_mixers(), choices=list_mixers(), metavar="MIXER")
    p.add_argument("--ablate", default="pool", choices=list_mixers(), metavar="MIXER", help="the block taken apart")
    p.add_argument("--width", type=int, default=32, help="of the bottleneck at equal width")
    p.add_argument("--size", type=int, nargs=2, default=(128, 160), metavar=("H", "W"))
    p.add_argument("--steps", type=int, default=100)
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--seeds", type=seed_of, nargs="+", default=[0, 1])
    p.add_argument("--out", default="runs/mixers")
    p.add_argument("--overwrite", action=argparse.BooleanOptionalAction, default=False, help=OVERWRITE_HELP)
    return p.parse_args(argv)


# -------------------------------------------------------------------------------------------------------- rows


def count(spec: Spec, options: dict[str, Any]) -> int:
    """Parameters of the adapter, without building it."""
    with torch.device("meta"):
        adapter = MetaFormer(spec, adaptkit.MetaFormerConfig(**options))
    return sum(p.numel() for p in adapter.parameters())


def matched(spec: Spec, options: dict[str, Any], target: int) -> dict[str, Any]:
    """Return these options with the even width whose total comes nearest to ``target`` parameters."""
    low, high = 1, 1
    while count(spec, {**options, "width": 2 * high}) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(spec, {**options, "width": 2 * middle}) < target else (low, middle)
    widths = [2 * low, 2 * high]
    return {**options, "width": min(widths, key=lambda w: abs(count(spec, {**options, "width": w}) - target))}


def rows(args: argparse.Namespace, spec: Spec) -> list[dict[str, Any]]:
    """Return what is compared: a table, a name and the adapter's options each."""
    base = {"width": args.width}
    target = max(count(spec, {**base, "mixer": name}) for name in args.mixers)
    planned: list[tuple[str, str, dict[str, Any] | None]] = []
    for name in args.mixers:
        planned.append(("mixer, equal parameters", name, matched(spec, {**base, "mixer": name}, target)))
    for name in args.mixers:
        planned.append(("mixer, equal width", name, {**base, "mixer": name}))
    for name, options in ABLATIONS.items():
        taken = matched(spec, {**base, "mixer": args.ablate, **options}, target)
        planned.append(("structure, equal parameters", f"{args.ablate}, {name}", taken))
    planned.append(("structure, equal parameters", "no adapter", None))
    return [
        {"table": t, "name": n, "options": o, "parameters": 0 if o is None else count(spec, o)} for t, n, o in planned
    ]


# --------------------------------------------------------------------------------------------------------- data


def load(name: str, split: str, source: Source, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Images (K, 3, H, W) as the backbone wants them and masks (K, H, W), all in memory: they are small."""
    may_be = {"classes": args.num_classes, "ignore": args.ignore_index}
    data = SegmentationData(open_dataset(name, split), args.size, source, **may_be, name=name)
    check_labels(data, args.num_classes, args.ignore_index, name, train=split == "train")
    images, masks = zip(*(data[i] for i in range(len(data))))
    return torch.stack(images), torch.stack(masks)


# --------------------------------------------------------------------------------------------------------- loop


def train(row: dict[str, Any], seed: int, data: tuple[Tensor, Tensor], args: argparse.Namespace) -> Any:
    """Train adapter and head; the seed decides their start, the order of the images and which are mirrored."""
    torch.manual_seed(seed)
    adapters = [] if row["options"] is None else [("metaformer", row["options"])]
    backbone = create_backbone(args.backbone)
    model = adaptkit.attach(backbone, *adapters, head=("linear", {"num_classes": args.num_classes})).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01, args.lr), lr=args.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, args.steps, 0.1))
    order = torch.Generator().manual_seed(seed)
    for _ in range(args.steps):
        chosen = torch.randint(len(data[0]), (args.batch_size,), generator=order)
        image, mask = data[0][chosen], data[1][chosen]
        if torch.rand((), generator=order) < 0.5:
            image, mask = image.flip(-1), mask.flip(-1)
        loss = F.cross_entropy(model(image).logits, mask, ignore_index=args.ignore_index, reduction="sum")
        (loss / (mask != args.ignore_index).sum().clamp(min=1)).backward()  # zero where no pixel has a label
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


@torch.inference_mode()
def miou(model: Any, data: tuple[Tensor, Tensor], args: argparse.Namespace) -> float:
    """Mean intersection over union in per cent, over the classes that occur."""
    batches = zip(data[0].split(args.batch_size), data[1].split(args.batch_size))
    guesses = ((model(image).logits.argmax(1), mask) for image, mask in batches)
    counts = torch.stack([confusion(g, mask, args.num_classes, args.ignore_index) for g, mask in guesses]).sum(0)
    return 100 * float(mean_iou(torch.stack([counts.diag(), counts.sum(0), counts.sum(1)])))


# ------------------------------------------------------------------------------------------------------- report


def table(results: list[dict[str, Any]]) -> str:
    """Write the three tables in Markdown, and what they say of the question."""
    lines = []
    for title in dict.fromkeys(r["table"] for r in results):
        lines += [f"**{title}**", "", "| | width | parameters | mIoU | spread | s/step |", "|---|---|---|---|---|---|"]
        for r in (r for r in results if r["table"] == title):
            width = "-" if r["options"] is None else r["options"]["width"]
            lines.append(
                f"| {r['name']} | {width} | {r['parameters']:,} | {r['mean']:.2f} | ± {r['spread']:.2f} "
                f"| {r['seconds_per_step']:.3f} |"
            )
        lines.append("")
    return "\n".join([*lines, verdict(results)]) + "\n"


def verdict(results: list[dict[str, Any]]) -> str:
    """Compare how far the mixers lie apart with what taking the block apart costs, and both with chance."""
    mixers = {r["name"]: r["mean"] for r in results if r["table"] == "mixer, equal parameters"}
    ablated = {r["name"]: r["mean"] for r in results if r["table"].startswith("structure") and r["options"] is not None}
    best, worst = max(mixers, key=mixers.__getitem__), min(mixers, key=mixers.__getitem__)
    apart = mixers[best] - mixers[worst]
    ends = f"{best} {mixers[best]:.2f}, {worst} {mixers[worst]:.2f}"
    said = f"At equal parameters the {len(mixers)} mixers lie {apart:.2f} points apart ({ends})"
    base = next((name for name in mixers if any(a.startswith(f"{name}, ") for a in ablated)), None)
    if base is None:
        return f"{said}; give --ablate one of these mixers to compare that with the structure."
    gone = min(ablated, key=ablated.__getitem__)
    cost = mixers[base] - ablated[gone]
    said += f". Taking the block of {base} apart costs up to {cost:.2f} points ({gone})."
    seeds = min(len(r["scores"]) for r in results)
    if seeds < 2:
        return f"{said} One seed does not tell what of it is chance: give --seeds two or more."
    error = (statistics.mean(r["spread"] ** 2 for r in results) / seeds) ** 0.5  # of a mean, pooled over the rows
    chance = error * expected_range(len(mixers))
    said += f" By chance alone (a mean is good to {error:.2f}) that many equal mixers would lie {chance:.2f} apart."
    if abs(cost - apart) < 2 * 2**0.5 * error:
        return f"{said} Whether structure or mixer matters more here cannot be told at this number of seeds."
    return f"{said} Here the {'structure' if cost > apart else 'mixer'} matters more."


def expected_range(n: int) -> float:
    """Return how far the largest and the smallest of ``n`` standard normal numbers lie apart on average."""
    draws = torch.randn(20_000, n, generator=torch.Generator().manual_seed(0))
    return float((draws.amax(1) - draws.amin(1)).mean())


def chart(results: list[dict[str, Any]], path: Path) -> None:
    """Draw one bar per row, its spread as a line over the end, a colour per table."""
    line, left, right = 22, 330, 420
    image = Image.new("RGB", (left + right + 80, line * len(results) + 20), "white")
    draw = ImageDraw.Draw(image)
    most = max(r["mean"] + r["spread"] for r in results) or 1.0
    colours = dict(zip(dict.fromkeys(r["table"] for r in results), ("#3b6ea5", "#8fb3d9", "#c9803c")))
    for i, r in enumerate(results):
        y, end = 10 + i * line, left + right * r["mean"] / most
        reach = right * r["spread"] / most
        draw.text((10, y + 3), f"{r['table']}: {r['name']}", fill="black")
        draw.rectangle((left, y + 2, end, y + line - 4), fill=colours[r["table"]])
        draw.line((end - reach, y + line // 2, end + reach, y + line // 2), fill="black", width=2)
        draw.text((left + right + 20, y + 3), f"{r['mean']:.2f}", fill="black")
    image.save(path)


# --------------------------------------------------------------------------------------------------------- main


MADE = ("results.json", "table.md", "chart.png")  # what a run leaves


def key_of(row: dict[str, Any]) -> str:
    """Rows of one key are trained once."""
    return json.dumps(row["options"], sort_keys=True)


def write(out: Path, args: argparse.Namespace, results: list[dict[str, Any]], done: dict[str, dict[str, Any]]) -> None:
    """Write what is known so far."""
    for row in results:
        row.update(done.get(key_of(row), {}))
    text = json.dumps({"arguments": vars(args), "rows": results}, indent=2) + "\n"
    write_atomic(out / "results.json", text.encode())


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    process = together(PartialState)
    with occupied(args.out, process, overwrite=args.overwrite, made=MADE, can_resume=False) as out:
        run_in(out, args, process)


def run_in(out: Path, args: argparse.Namespace, process: PartialState) -> None:
    """Train and score all rows, in a folder that is this run's."""
    vit = adaptkit.view(create_backbone(args.backbone))
    source = source_of(vit, args)
    train_data, val_data = load(args.train, "train", source, args), load(args.val, "validation", source, args)
    results = rows(args, vit.spec)
    if process.is_main_process:
        begin(out, MADE)
    # A mixer that is the target has one width in both tables: it is trained once. Several processes share the work.
    planned: dict[str, dict[str, Any]] = {}
    for row in results:
        planned.setdefault(key_of(row), row)
    mine, started = list(planned.items())[process.process_index :: process.num_processes], time.time()
    done: dict[str, dict[str, Any]] = {}
    for i, (key, row) in enumerate(mine):
        scores, clock = [], 0.0
        for seed in args.seeds:
            began = time.time()
            model = train(row, seed, train_data, args)
            clock += time.time() - began
            scores.append(miou(model, val_data, args))
        done[key] = {
            "scores": [round(s, 3) for s in scores],
            "mean": statistics.mean(scores),
            "spread": statistics.stdev(scores) if len(scores) > 1 else 0.0,
            "seconds_per_step": clock / args.steps / len(args.seeds),
        }
        progress = f"[{i + 1}/{len(mine)}, {time.time() - started:.0f} s]"
        print(f"{progress} {row['table']}: {row['name']} {done[key]['mean']:.2f}", flush=True)
        if process.is_main_process:
            write(out, args, results, done)
    done = {key: score for part in gather_object([done]) for key, score in part.items()}
    main_process = process.is_main_process
    process.destroy_process_group()
    if not main_process:
        return
    write(out, args, results, done)
    text = table(results)
    write_atomic(out / "table.md", text.encode())
    chart(results, out / "chart.png")
    print("\n" + text)


if __name__ == "__main__":
    command("mixers", main)
