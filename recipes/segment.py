"""Semantic segmentation: train an adapter and a head beside a frozen ViT.

    python -m recipes.segment --train train.parquet --val val.parquet --num-classes 11 --backbone demo \
        --adapter vit-adapter --head fpn --size 240 320 --steps 400 --out runs/seg

On several GPUs start it with `torchrun --nproc_per_node 4 -m recipes.segment ...` or `accelerate launch`. A killed
run goes on with `--resume`: data order, augmentation and dropout depend on the step alone, so the result is the same.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchmetrics.classification import MulticlassJaccardIndex

import adaptkit
from adaptkit.file import check_writable
from adaptkit.hosts import create_backbone
from recipes.data import SegmentationData, check_labels, open_dataset

# ---------------------------------------------------------------------------------------------------- arguments


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="segment", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--train", required=True, help="Parquet file, Hub data set id, or folder with images/ and masks/")
    p.add_argument("--val", help="the same for validation; default: the split 'validation' of a Hub id")
    p.add_argument("--image-column", help="default: the first column of images")
    p.add_argument("--mask-column", help="default: the second column of images, or one named label, mask, ...")
    p.add_argument("--num-classes", type=int, required=True)
    p.add_argument("--ignore-index", type=int, default=255)
    p.add_argument("--backbone", default="demo", help="demo, a timm name, hf-hub:..., org/repo, or a local folder")
    p.add_argument("--random-backbone", action="store_true", help="random weights, for comparison")
    p.add_argument("--adapter", default="vit-adapter", help="vit-adapter, sfp, none")
    p.add_argument("--adapter-options", type=json.loads, default={}, help="JSON, e.g. '{\"injector\": false}'")
    p.add_argument("--head", default=None, help="fpn or linear; default: fpn, linear without adapter")
    p.add_argument("--size", type=int, nargs=2, default=(240, 320), metavar=("H", "W"))
    p.add_argument("--steps", type=int, default=400)
    p.add_argument("--batch-size", type=int, default=8, help="per process")
    p.add_argument("--accumulate", type=int, default=1, help="batches per optimiser step")
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--weight-decay", type=float, default=0.01)
    p.add_argument("--warmup", type=float, default=0.05, help="share of the steps")
    p.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    p.add_argument("--mixed-precision", default="no", choices=["no", "bf16", "fp16"])
    p.add_argument("--workers", type=int, default=0)
    p.add_argument("--eval-every", type=int, default=0, help="steps; 0: at the end only")
    p.add_argument("--save-every", type=int, default=100, help="steps between checkpoints; 0: none")
    p.add_argument("--tracker", default=None, help="tensorboard, wandb, ...; metrics.jsonl is always written")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default="runs/segment")
    p.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    args = p.parse_args(argv)
    args.head = args.head or ("linear" if args.adapter == "none" else "fpn")
    if args.steps < 1 or args.batch_size < 1 or args.accumulate < 1:
        p.error("--steps, --batch-size and --accumulate must be at least 1")
    if args.head == "linear" and args.adapter != "none":
        p.error(f"--head linear reads the tokens, so {args.adapter}'s pyramid would not be trained; use --head fpn")
    return args


# --------------------------------------------------------------------------------------------------------- data


class Steps(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index): shuffled epochs laid end to end, starting at any step. Position decides everything."""

    def __init__(self, samples: int, batch: int, start: int, stop: int, seed: int) -> None:
        self.samples, self.batch, self.start, self.stop, self.seed = samples, batch, start, stop, seed
        self.batch_size, self.drop_last = batch, False  # accelerate reads both when it shares batches over ranks

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, torch.empty(0)
        for step in range(self.start, self.stop):
            batch = []
            for position in range(step * self.batch, (step + 1) * self.batch):
                if position // self.samples != epoch:
                    epoch = position // self.samples
                    generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                    order = torch.randperm(self.samples, generator=generator)
                batch.append((epoch, int(order[position % self.samples])))
            yield batch


# -------------------------------------------------------------------------------------------------------- model


def build(args: argparse.Namespace) -> adaptkit.AdaptedModel:
    backbone = create_backbone(args.backbone, pretrained=not args.random_backbone)
    adapters = [] if args.adapter == "none" else [(args.adapter, args.adapter_options)]
    return adaptkit.attach(backbone, *adapters, head=(args.head, {"num_classes": args.num_classes})).train()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """No decay on vectors: norms, biases, and gamma, which decay would hold at zero."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def cosine(step: int, steps: int, warmup: float) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine to zero."""
    rise = max(1, round(warmup * steps))
    return (step + 1) / rise if step < rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


# --------------------------------------------------------------------------------------------------------- loop


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, accelerator: Accelerator, args: argparse.Namespace) -> float:
    """mIoU over the whole set, each image counted once however many ranks share it."""
    metric = MulticlassJaccardIndex(args.num_classes, ignore_index=args.ignore_index, sync_on_compute=False)
    training = model.training
    model.eval()
    for image, mask in loader:
        with accelerator.autocast():
            prediction = model(image).logits.argmax(1)
        prediction, mask = accelerator.gather_for_metrics((prediction, mask))
        metric.update(prediction.cpu(), mask.cpu())
    model.train(training)
    return float(metric.compute())


def keep_adapter_only(accelerator: Accelerator) -> None:
    """Make ``save_state`` write adapter and head instead of the whole frozen backbone, and read them back."""

    def save(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        weights.clear()
        if accelerator.is_main_process:
            accelerator.unwrap_model(models[0]).save(Path(folder) / "adapter")

    def restore(models: list[nn.Module], folder: str) -> None:
        tensors = adaptkit.load(Path(folder) / "adapter").tensors
        accelerator.unwrap_model(models.pop()).load_adapter_state_dict(tensors)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(restore)


def checkpoints(out: Path) -> list[Path]:
    return sorted(p for p in (out / "checkpoints").glob("step-*") if p.is_dir() and p.suffix == "")


def save_checkpoint(accelerator: Accelerator, out: Path, step: int, args: argparse.Namespace) -> None:
    """Write beside, then rename: a kill leaves the last checkpoint whole. The newest two are kept."""
    final = out / "checkpoints" / f"step-{step:08d}"
    unfinished = final.with_suffix(".tmp")
    accelerator.save_state(str(unfinished), safe_serialization=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (unfinished / "progress.json").write_text(json.dumps({"step": step, "arguments": lasting(args)}))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(unfinished, final)
        for old in checkpoints(out)[:-2]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def lasting(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that a resumed run must share with the run it goes on with."""
    free = {"resume", "out", "workers", "eval_every", "save_every", "tracker"}
    return json.loads(json.dumps({k: v for k, v in vars(args).items() if k not in free}))


def resume_step(out: Path, args: argparse.Namespace) -> tuple[Path | None, int]:
    found = checkpoints(out)
    if not found:
        return None, 0
    progress = json.loads((found[-1] / "progress.json").read_text())
    then, now = progress["arguments"], lasting(args)
    changed = [k for k in now if then.get(k) != now[k]]
    if changed:
        raise ValueError(
            f"{found[-1]} was trained with {', '.join(f'{k}={then.get(k)!r}' for k in changed)}; now it is "
            f"{', '.join(f'{k}={now[k]!r}' for k in changed)}. Resume with the same arguments, or choose another --out"
        )
    return found[-1], progress["step"]


def train(
    model: nn.Module, data: Dataset, val: DataLoader, accelerator: Accelerator, args: argparse.Namespace
) -> tuple[float, float]:
    """Train for ``--steps`` optimiser steps; returns mIoU and the seconds of training alone."""
    out, world = Path(args.out), accelerator.num_processes
    checkpoint, first = resume_step(out, args) if args.resume else (None, 0)
    k = args.accumulate
    order = Steps(len(data), args.batch_size, first * k * world, args.steps * k * world, args.seed)  # type: ignore[arg-type]
    loader = DataLoader(data, batch_sampler=order, num_workers=args.workers)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: cosine(s // world, args.steps, args.warmup))
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    keep_adapter_only(accelerator)
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        accelerator.print(f"resumed from {checkpoint}, step {first}")

    trained = [p for p in model.parameters() if p.requires_grad]
    log, started = Log(out, accelerator, args, first), time.time()
    for i, (image, mask) in enumerate(loader):
        step = first + i // k
        set_seed(
            args.seed * 1_000_003 + first * k + i, device_specific=True
        )  # dropout belongs to the step, not to the run
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(image).logits.float(), mask, ignore_index=args.ignore_index)
            if not torch.isfinite(accelerator.gather(loss.detach())).all():
                stop_at_nan(out, step)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trained, args.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if (i + 1) % k:
            continue
        done = step + 1
        log.step(done, loss, image.shape[0] * world * k, schedule.get_last_lr()[0])
        if args.eval_every and done % args.eval_every == 0 and done < args.steps:
            log.score(done, evaluate(model, val, accelerator, args))
        if args.save_every and done % args.save_every == 0 and done < args.steps:
            save_checkpoint(accelerator, out, done, args)
    seconds = time.time() - started
    score = evaluate(model, val, accelerator, args)
    log.score(args.steps, score)
    log.close()
    return score, seconds


def stop_at_nan(out: Path, step: int) -> None:
    kept = checkpoints(out)
    where = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was written yet"
    raise SystemExit(f"the loss is not finite at step {step}: stopped before the update; {where}. Try a smaller --lr")


class Log:
    """A progress bar with loss, images/s and time left; metrics.jsonl; and the tracker of the user's choice."""

    def __init__(self, out: Path, accelerator: Accelerator, args: argparse.Namespace, first: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.accelerator, self.main = accelerator, accelerator.is_main_process
        columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[say]}"))
        self.bar = Progress(*columns, TimeRemainingColumn(), disable=not self.main)
        self.task = self.bar.add_task("train", total=args.steps, completed=first, say="")
        self.bar.start()
        self.file = (out / "metrics.jsonl").open("a" if first else "w") if self.main else None
        self.images, self.clock = 0, time.time()

    def write(self, row: dict[str, Any]) -> None:
        if self.file is not None:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def step(self, step: int, loss: Tensor, images: int, lr: float) -> None:
        self.images += images
        self.bar.advance(self.task)
        if step % 10 and self.bar.tasks[0].remaining:  # reading the loss waits for the device
            return
        rate = self.images / (time.time() - self.clock)
        self.images, self.clock = 0, time.time()
        self.bar.update(self.task, say=f"loss {loss.item():.3f}  {rate:.1f} images/s")
        self.write({"step": step, "loss": loss.item(), "images_per_s": round(rate, 2), "lr": lr})

    def score(self, step: int, miou: float) -> None:
        self.bar.print(f"step {step}: mIoU {100 * miou:.2f}")
        self.write({"step": step, "miou": miou})
        self.images, self.clock = 0, time.time()

    def close(self) -> None:
        self.bar.stop()
        if self.file is not None:
            self.file.close()


# --------------------------------------------------------------------------------------------------------- main


def peak_memory() -> float:
    """Peak memory in MiB: of the GPU, or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    out = check_writable(args.out)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.accumulate,
        log_with=args.tracker,
        project_dir=str(out),
    )
    if args.tracker:
        accelerator.init_trackers("adaptkit-segment", config={k: str(v) for k, v in vars(args).items()})
    set_seed(args.seed)
    model = build(args)
    source = model.vit.source()
    columns = (args.image_column, args.mask_column)
    train_set = SegmentationData(open_dataset(args.train, "train", columns), args.size, source, args.seed, train=True)
    val_set = SegmentationData(open_dataset(args.val or args.train, "validation", columns), args.size, source)
    for name, data in (("--train", train_set), ("--val", val_set)):
        check_labels(data, args.num_classes, args.ignore_index, name)
    val = accelerator.prepare(DataLoader(val_set, batch_size=args.batch_size, num_workers=args.workers))
    score, seconds = train(model, train_set, val, accelerator, args)

    # Save, attach to a fresh backbone, and see that the score is the same.
    memory, folder = peak_memory(), out / "adapter"
    if accelerator.is_main_process:
        model.save(folder, task="semantic-segmentation", size=list(args.size), miou=score)
    accelerator.wait_for_everyone()
    set_seed(args.seed)  # a random backbone is the same random one
    again = adaptkit.attach(create_backbone(args.backbone, pretrained=not args.random_backbone), folder)
    score_again = evaluate(again.to(accelerator.device), val, accelerator, args)
    if accelerator.is_main_process:
        result = {
            "adapter": args.adapter,
            "options": args.adapter_options,
            "head": args.head,
            "miou": round(100 * score, 2),
            "miou_reattached": round(100 * score_again, 2),
            "seconds": round(seconds, 1),
            "peak_memory_mib": round(memory),
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "file_bytes": (folder / "adapter_model.safetensors").stat().st_size,
        }
        (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        same = "the same" if score_again == score else f"{100 * abs(score_again - score):.4f} apart"
        print(f"saved {folder}; mIoU {100 * score:.2f}, attached to a fresh backbone {100 * score_again:.2f}: {same}")
        print(json.dumps(result))
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, TypeError, OSError) as error:  # the user's to mend: the message says how
        raise SystemExit(f"segment: {error}") from error
