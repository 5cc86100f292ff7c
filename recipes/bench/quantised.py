"""Memory of a training step on a frozen ViT-L in float32, bf16, int8 and nf4, and how far its outputs are off.

    python -m recipes.bench.quantised                                  # ViT-L/16, 224 pixels, batch 1
    python -m recipes.bench.quantised --rows bf16 "nf4, bitsandbytes" --size 512 --batch 2
    python -m recipes.bench.quantised --device cuda

The linear layers of the blocks are quantised, all else of the backbone is bf16; adapters are trained in float32. Each
row is a process of its own, which builds a backbone of the same random weights (nothing is downloaded) and attaches the
file that the float32 row saved: one file for all precisions. A step is forward, backward from given gradients of every
map, and AdamW.

``weights`` are the bytes of the frozen backbone as it is stored. ``peak`` is what the process holds at most in its
second step, when there are gradients and moments, above what it held before there was a model. ``tokens`` and ``maps``
are off by ||y - y32|| / ||y32||. nf4's levels are made for weights that are normally distributed, as these are, and
random ones have no outliers: take the errors as the least, and measure those of your backbone.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import adaptkit
from adaptkit.core.packed import in_fewer_bits
from adaptkit.model.offloading import bytes_of
from adaptkit.ops import pool

from .measure import machine, status

ADAPTERS: dict[str, Any] = {
    "vit-adapter, extractors only": ("vit-adapter", {"injector": False}),
    "vit-split": ("vit-split", {}),
}


#: row -> (dtype of the frozen weights, library that makes it; see adaptkit.core.packed)
ROWS: dict[str, tuple[str, str | None]] = {
    "float32": ("float32", None),
    "bf16": ("bfloat16", None),
    "int8, torchao": ("int8", "torchao"),
    "int8, bitsandbytes": ("int8", "bitsandbytes"),
    "nf4, bitsandbytes": ("nf4", "bitsandbytes"),
}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_large_patch16_224", help="a timm name; weights are random")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--adapters", nargs="+", default=list(ADAPTERS), choices=list(ADAPTERS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)  # (row, adapter, folder), in a process of its own
    return parser.parse_args(argv)


def backbone(args: argparse.Namespace, row: str, name: str = "") -> nn.Module:
    """The same random weights, rounded to bf16, which each row then holds in its own way."""
    import timm

    torch.manual_seed(0)
    host = timm.create_model(name or args.backbone, num_classes=0, dynamic_img_size=True).bfloat16()
    return in_fewer_bits(host.to(args.device), *ROWS[row]).eval()


def held(args: argparse.Namespace) -> float:
    """MiB that are held now."""
    if args.device.startswith("cuda"):
        return torch.cuda.memory_allocated() / 2**20
    gc.collect()
    pool.release()
    return status("VmRSS") / 2**10


def peak_of(run: Callable[[], object], args: argparse.Namespace) -> float:
    """MiB that are held at most while this runs."""
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / 2**20
    held(args)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    run()
    return status("VmHWM") / 2**10


def step_of(model: adaptkit.AdaptedModel, image: Tensor) -> Callable[[], None]:
    """A training step on these images."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def step() -> None:
        maps = model(image).maps
        torch.autograd.backward(maps, [torch.full_like(m, 1 / m.numel()) for m in maps])
        optimizer.step()
        optimizer.zero_grad()

    return step


def measured(args: argparse.Namespace) -> dict[str, float]:
    """One row: weights and peak in MiB, and how far tokens and maps are off those that float32 left in the folder."""
    row, adapter, folder = args.row
    file, reference = Path(folder) / "adapter", Path(folder) / "outputs.pt"
    image = torch.randn(args.batch, 3, args.size, args.size, generator=torch.Generator().manual_seed(1)).to(args.device)
    warmed(args, row, adapter)
    before = held(args)
    host = backbone(args, row)
    weights = bytes_of(host) / 2**20
    torch.manual_seed(0)
    model = adaptkit.attach(host, file if file.exists() else ADAPTERS[adapter]).to(args.device).eval()
    with torch.no_grad():
        features = model(image)
    outputs = {"tokens": [features.tokens.float().cpu()], "maps": [m.float().cpu() for m in features.maps]}
    del features
    if not file.exists():
        model.save(file)
        torch.save(outputs, reference)
    exact = torch.load(reference)
    off = {name: distance(found, exact[name]) for name, found in outputs.items()}
    del outputs, exact
    step = step_of(model.train(), image)
    step()  # gradients and moments are there from now on
    return {"weights": weights, "peak": peak_of(step, args) - before, **off}


def warmed(args: argparse.Namespace, row: str, adapter: str) -> None:
    """Take a step of a small model, so that libraries are loaded and have made what they keep."""
    model = adaptkit.attach(backbone(args, row, "vit_tiny_patch16_224"), ADAPTERS[adapter]).to(args.device)
    step_of(model, torch.randn(1, 3, 64, 64, device=args.device))()


def distance(found: list[Tensor], exact: list[Tensor]) -> float:
    """||y - y32|| / ||y32|| over all tensors."""
    square = sum(float((a - b).double().square().sum()) for a, b in zip(found, exact, strict=True))
    return (square / sum(float(b.double().square().sum()) for b in exact)) ** 0.5


def alone(args: argparse.Namespace, row: str, adapter: str, folder: str) -> dict[str, float]:
    """Measure a row in a fresh process that returns what it frees."""
    given = [
        part for name in ("backbone", "size", "batch", "threads", "device") for part in (f"--{name}", vars(args)[name])
    ]
    command = [sys.executable, "-m", "recipes.bench.quantised", *map(str, given), "--row", row, adapter, folder]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{row} with {adapter} failed: {done.stderr[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> None:
    """Print one table."""
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    if args.row:
        print(json.dumps(measured(args)))
        return
    there = [row for row in args.rows if importlib.util.find_spec(ROWS[row][1] or "torch")]
    print(
        f"{args.backbone}, {args.size} x {args.size} pixels, batch {args.batch}, random weights; "
        f"{machine(args.threads, args.device)}\n"
    )
    head = ["frozen weights", "trained", "weights, MiB", "peak of a step, MiB", "tokens off", "maps off"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|", flush=True)
    for adapter in args.adapters:
        with tempfile.TemporaryDirectory() as folder:
            for row in dict.fromkeys(["float32", *there]):
                said = alone(args, row, adapter, folder)
                errors = ["0" if row == "float32" else f"{said[name]:.1e}" for name in ("tokens", "maps")]
                cells = [row, adapter, f"{said['weights']:.0f}", f"{said['peak']:.0f}", *errors]
                if row in there:
                    print("| " + " | ".join(cells) + " |", flush=True)
    for row in args.rows:
        if row not in there:
            print(f"\n{row}: {ROWS[row][1]} is not installed")


if __name__ == "__main__":
    main()
