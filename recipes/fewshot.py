"""Few images per class: what frozen features are worth, without any training.

    python -m recipes.fewshot --train digits --size 64 --shots 1 5 10 25
    python -m recipes.fewshot --train imagenet/train --val imagenet/val --backbone vit_base_patch16_224 --shots 5 10

The features of all images are computed once. Then, for each number of shots and each seed that draws them:

* ridge: least squares onto targets in {-1, 1}^K (Dosovitskiy et al. 2021, section 4.1), solved in closed form;
* k-NN: cosine similarity, votes weighted by exp(similarity / temperature) (Wu et al. 2018; DINO).

`--adapter FOLDER` asks the same of what a saved adapter makes of the tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

import adaptkit
from adaptkit.create import create_backbone
from adaptkit.hub.write import write_atomic

from . import normalisation
from .devices import copying, loading, together
from .folder import occupied
from .help import RecipeParser
from .labelled import LabelledData, check_same_classes, open_images
from .options import OVERWRITE_HELP, PRECISION_HELP, command, precision, seed_of, validation
from .order import plain_errors

TOGETHER = 32  # batches that are fetched from the device in one go
RESULT = "result.json"
BIAS = 100.0  # the constant feature: so large that the ridge leaves the intercept alone


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = RecipeParser("fewshot", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--train", required=True, help="as in recipes.classify: digits, Parquet, folder, list, Hub id")
    p.add_argument("--val", help="the same for validation; default: the split 'validation' of a Hub id")
    p.add_argument("--image-column")
    p.add_argument("--label-column")
    p.add_argument("--backbone", default="demo", help="demo, a timm name, hf-hub:..., org/repo, or a local folder")
    p.add_argument("--random-backbone", action=argparse.BooleanOptionalAction, default=False, help="for comparison")
    normalisation.options(p)
    p.add_argument("--adapter", metavar="FOLDER", help="a saved adapter, attached before the features are read")
    p.add_argument("--pool", choices=["avg", "token", "both"], help="default: token, avg where there is none")
    p.add_argument("--size", type=int, default=224)
    p.add_argument("--augment", default="crop", choices=["none", "crop"], help="none: the whole image, squeezed")
    p.add_argument("--shots", type=int, nargs="+", default=[1, 5, 10, 25], help="images per class; 0: all")
    p.add_argument("--seeds", type=seed_of, nargs="+", default=[0, 1, 2])
    p.add_argument("--l2", type=float, default=1024.0, help="of the ridge, on features of unit variance")
    p.add_argument("--neighbours", type=int, default=20)
    p.add_argument("--temperature", type=float, default=0.07)
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--workers", type=int, default=0)
    p.add_argument("--mixed-precision", default="no", choices=["no", "bf16", "fp16", "auto"], help=PRECISION_HELP)
    p.add_argument("--out", default="runs/fewshot")
    p.add_argument("--overwrite", action=argparse.BooleanOptionalAction, default=False, help=OVERWRITE_HELP)
    args = p.parse_args(argv)
    if min(args.shots) < 0 or args.neighbours < 1 or args.temperature <= 0 or args.l2 < 0:
        p.error("--shots and --l2 must not be negative, --neighbours at least 1, --temperature above 0")
    return args


# ------------------------------------------------------------------------------------------------------- features


@torch.inference_mode()
def features(model: Any, loader: DataLoader, pool: str, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """Return what the frozen model makes of each image once, (N, D) float32 and the labels (N,), on the CPU."""
    found: list[list[Tensor]] = []
    waiting: list[tuple[Tensor, Tensor]] = []
    for image, label in loader:
        with accelerator.autocast():
            out = model(image)
        parts = {"token": [out.prefix[:, :1].flatten(1)], "avg": [out.tokens.mean(1)]}
        parts["both"] = parts["token"] + parts["avg"]
        waiting.append(accelerator.gather_for_metrics((torch.cat(parts[pool], 1).float(), label)))
        if len(waiting) == TOGETHER:
            found.append(fetched(waiting))
            waiting = []
    rows, labels = zip(*found, *([fetched(waiting)] if waiting else []))
    return torch.cat(rows), torch.cat(labels)


def fetched(batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Bring batches to the CPU in one go: the device is waited for once."""
    return [torch.cat(parts).cpu() for parts in zip(*batches)]


def draw(labels: Tensor, shots: int, seed: int) -> Tensor:
    """Return the indices of ``shots`` images of each class, drawn without replacement; 0: of all images.

    Raises ``ValueError`` where a class has fewer.
    """
    if shots == 0:
        return torch.arange(len(labels))
    generator, chosen = torch.Generator().manual_seed(seed), []
    for c in labels.unique().tolist():
        members = (labels == c).nonzero()[:, 0]
        if len(members) < shots:
            raise ValueError(f"class {c} has {len(members)} images, and --shots asks for {shots}; give fewer")
        chosen.append(members[torch.randperm(len(members), generator=generator)[:shots]])
    return torch.cat(chosen)


# -------------------------------------------------------------------------------------------------- classification


def ridge(train: Tensor, labels: Tensor, held: Tensor, classes: int, l2: float) -> Tensor:
    """Return the scores (M, K) of ``held`` (M, D): w = argmin |X w - Y|^2 + l2 |w|^2 with Y in {-1, 1}^K.

    X is ``train`` (N, D) of zero mean and unit variance with a constant column. The smaller of the two systems is
    solved, (X'X + l2) w = X'Y or w = X'(XX' + l2)^-1 Y, in float64.
    """
    train, held = train.double(), held.double()
    mean, std = train.mean(0), train.std(0, unbiased=False) + 1e-5
    x, new = (torch.nn.functional.pad((z - mean) / std, (0, 1), value=BIAS) for z in (train, held))
    y = 2.0 * torch.nn.functional.one_hot(labels, classes).double() - 1.0
    n, d = x.shape
    if n >= d:
        w = torch.linalg.solve(x.T @ x + l2 * torch.eye(d, dtype=x.dtype), x.T @ y)
    else:
        w = x.T @ torch.linalg.solve(x @ x.T + l2 * torch.eye(n, dtype=x.dtype), y)
    return new @ w


def nearest(train: Tensor, labels: Tensor, held: Tensor, classes: int, k: int, temperature: float) -> Tensor:
    """Return the votes (M, K) of the ``k`` nearest by cosine for ``held`` (M, D), each exp(cosine / temperature)."""
    train, votes = torch.nn.functional.normalize(train.double(), dim=1), []
    for part in held.double().split(1024):  # (1024, N) similarities at a time
        similarity = torch.nn.functional.normalize(part, dim=1) @ train.T
        near, index = similarity.topk(min(k, len(train)), dim=1)
        weight = ((near - 1) / temperature).exp()  # cosine 1 weighs 1: no overflow at small temperatures
        votes.append(torch.zeros(len(part), classes, dtype=weight.dtype).scatter_add_(1, labels[index], weight))
    return torch.cat(votes)


def accuracies(data: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], args: argparse.Namespace) -> list[dict]:
    """Return a row for each number of shots: mean and standard deviation over the seeds, in per cent, both ways."""
    (x, y), (new, truth) = data, held
    classes, rows = int(max(y.max(), truth.max())) + 1, []
    for shots in args.shots:
        scores: dict[str, list[float]] = {"ridge": [], "knn": []}
        for seed in args.seeds[:1] if shots == 0 else args.seeds:
            chosen = draw(y, shots, seed)
            for name, votes in (
                ("ridge", ridge(x[chosen], y[chosen], new, classes, args.l2)),
                ("knn", nearest(x[chosen], y[chosen], new, classes, args.neighbours, args.temperature)),
            ):
                scores[name].append(100 * float((votes.argmax(1) == truth).double().mean()))
        row: dict[str, Any] = {"shots": shots or "all", "images": len(chosen)}
        for name, values in scores.items():
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            row[name] = {"mean": statistics.mean(values), "std": spread, "values": values}
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    """Write the rows in Markdown."""
    lines = ["| shots | images | ridge | k-NN |", "|---|---|---|---|"]
    for row in rows:
        cells = [f"{row[n]['mean']:.1f} ± {row[n]['std']:.1f}" for n in ("ridge", "knn")]
        lines.append(f"| {row['shots']} | {row['images']} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------- main


@plain_errors()
def main(argv: list[str] | None = None) -> list[dict]:
    args = parse(argv)
    mixed_precision = precision(args.mixed_precision)
    accelerator = together(Accelerator, mixed_precision=mixed_precision, dataloader_config=copying())
    with occupied(args.out, accelerator, overwrite=args.overwrite, made=(RESULT,), can_resume=False) as out:
        return run(out, args, accelerator)


def run(out: Path, args: argparse.Namespace, accelerator: Accelerator) -> list[dict]:
    """Score, in a folder that is this run's."""
    torch.manual_seed(0)  # a random backbone is the same random one on every rank
    backbone = create_backbone(args.backbone, pretrained=not args.random_backbone)
    saved = adaptkit.load(args.adapter) if args.adapter else None
    source = normalisation.source_of(adaptkit.view(backbone), args, normalisation.recorded(saved))
    model: Any = adaptkit.attach(backbone, *([saved] if saved else [])).to(accelerator.device).eval()
    prefix = getattr(model.spec, "num_prefix_tokens", 0)
    pool = args.pool or ("token" if prefix else "avg")
    if pool != "avg" and not prefix:
        raise ValueError(f"--pool {pool} needs a class token and {args.backbone} has none; use avg")
    columns, names = (args.image_column, args.label_column), (args.train, validation(args))
    (train, classes), (val, val_classes) = (open_images(n, s, columns) for n, s in zip(names, ("train", "validation")))
    check_same_classes(classes, val_classes)
    found = []
    for name, data in zip(names, (train, val)):
        rows = LabelledData(data, args.size, source, 0, args.augment, train=False, name=name)
        how = loading(accelerator.device, args.workers)
        loader = accelerator.prepare(DataLoader(rows, args.batch_size, **how))
        found.append(features(model, loader, pool, accelerator))
    results = accuracies(found[0], found[1], args)
    if accelerator.is_main_process:
        text = json.dumps({"arguments": vars(args), "pool": pool, "rows": results}, indent=2) + "\n"
        write_atomic(out / RESULT, text.encode())
        print(f"{args.backbone}, pool {pool}, {len(found[0][1])} images to draw from, {len(found[1][1])} held out\n")
        print(table(results))
    accelerator.end_training()
    return results


if __name__ == "__main__":
    command("fewshot", main)
