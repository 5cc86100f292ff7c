"""How fast is deformable attention, and in how much memory? Every backend beside every peer that is installed.

    python -m recipes.bench.ops                         # the four main shapes, both cores of this machine
    python -m recipes.bench.ops --shapes "inj S" --size 224 --batch 1 --threads 1

The shapes are those of a ViT-Adapter on images of ``size`` pixels: an injector (inj: every token of the ViT reads
three levels, strides 8, 16, 32) and an extractor (ext: every cell of those levels reads the tokens), S with 6 heads of
64 channels, B with 12 heads of 32 (deform_ratio 0.5). A query reads 4 points a level, its own place plus N(0, 2 cells).

All implementations get the same tensors and take turns; a cell has the median over the rounds, forward alone and
forward with backward, and how many times faster than the first row that is. Memory is what one call adds to the peak
of a fresh process. An output that is not that of the reference in float64 is an error.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from adaptkit.ops import ms_deform_attn

from .measure import machine, seconds, status

Operator = Callable[[Tensor, list[tuple[int, int]], Tensor, Tensor], Tensor]
WIDTHS = {"S": (6, 64), "B": (12, 32)}  # heads, channels of a head
SHAPES = ("inj S", "ext S", "inj B", "ext B")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--size", type=int, default=512, help="side of the image in pixels, a multiple of 32")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-memory", action="store_true", help="skip the fresh processes that measure memory")
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)  # implementation, shape, forward or both
    args = parser.parse_args(argv)
    if args.size < 32 or args.size % 32:
        parser.error(f"--size is {args.size}, expected a multiple of 32: the coarsest level has stride 32")
    return args


# Implementations


def core() -> Operator:
    """The papers' code in pure Python, as transformers has it: grid_sample per level, stacked."""
    from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

    module = MultiScaleDeformableAttention()
    return lambda value, shapes, places, weights: module(value, None, shapes, None, places, weights, 64)


def compiled() -> Operator:
    """torch-ms-deform-attn: C++ and CUDA, built when it is installed."""
    from torch_ms_deform_attn import ms_deform_attn as peer

    return lambda value, shapes, places, weights: peer(value, *layout(shapes, value), places, weights, len(value))


def deformops() -> Operator:
    """deformops: Triton on CUDA, eager torch on CPU."""
    from deformops.registry import msda

    return lambda value, shapes, places, weights: msda(value, *layout(shapes, value), places, weights)


def layout(shapes: list[tuple[int, int]], value: Tensor) -> tuple[Tensor, Tensor]:
    """Sizes (L, 2) and first pixels (L,) of the levels."""
    sizes = torch.tensor(shapes, device=value.device)
    pixels = sizes.prod(1)
    return sizes, pixels.cumsum(0) - pixels


def ours(backend: str) -> Callable[[], Operator]:
    """One of our backends, by name."""
    return lambda: lambda *inputs: ms_deform_attn(*inputs, backend=backend)


IMPLEMENTATIONS: dict[str, Callable[[], Operator]] = {
    "transformers (grid_sample core)": core,
    "torch-ms-deform-attn": compiled,
    "deformops": deformops,
    "adaptkit grid_sample": ours("grid_sample"),
    "adaptkit embedding_bag": ours("embedding_bag"),
    "adaptkit c": ours("c"),
    "adaptkit triton": ours("triton"),
}


def available(device: str) -> tuple[dict[str, Operator], dict[str, str]]:
    """Return the implementations that run here, and why the others do not."""
    running, missing = {}, {}
    for name, make in IMPLEMENTATIONS.items():
        try:
            operator = make()
            operator(*inputs("inj S", 32, 1, device))
        except (ImportError, RuntimeError, SyntaxError) as error:  # newer syntax than this Python's
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            running[name] = operator
    return running, missing


# Inputs


def inputs(shape: str, size: int, batch: int, device: str) -> tuple[Tensor, list[tuple[int, int]], Tensor, Tensor]:
    """Value (N, S, H, D), shapes of the levels, places (N, Q, H, L, 4, 2) and weights (N, Q, H, L, 4)."""
    side, (heads, dim) = size // 16, WIDTHS[shape[-1]]
    tokens, pyramid = [(side, side)], [(2 * side, 2 * side), (side, side), (side // 2, side // 2)]
    read, asking = (pyramid, tokens) if shape.startswith("inj") else (tokens, pyramid)
    generator = torch.Generator().manual_seed(0)
    here = torch.cat([centres(*grid) for grid in asking])  # (Q, 2)
    cells = torch.tensor([(w, h) for h, w in read])[:, None]  # (L, 1, 2)
    points = (batch, len(here), heads, len(read), 4)
    places = here[:, None, None, None] + 2 * torch.randn(*points, 2, generator=generator) / cells
    weights = torch.rand(points, generator=generator).flatten(3).softmax(-1).view(points)
    value = torch.randn(batch, sum(h * w for h, w in read), heads, dim, generator=generator)
    return value.to(device), read, places.to(device), weights.to(device)


def centres(h: int, w: int) -> Tensor:
    """(h * w, 2) places of the cells of a grid, as (x, y) in [0, 1]."""
    y, x = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)


# Time and memory


def check(name: str, operator: Operator, tensors) -> None:
    """Raise unless the output is that of the reference."""
    value, shapes, places, weights = tensors
    expected = ms_deform_attn(value.double(), shapes, places.double(), weights.double(), backend="grid_sample")
    off = ((operator(*tensors) - expected).abs().max() / expected.abs().max()).item()
    if not off < 1e-4:
        raise RuntimeError(f"{name} is off by {off:.1e} of the largest output: nothing to compare")


def call(operator: Operator, tensors, backward: bool) -> None:
    """One call, with its backward or without."""
    value, shapes, places, weights = tensors
    if not backward:
        with torch.no_grad():
            operator(value, shapes, places, weights)
        return
    leaves = [tensor.detach().requires_grad_() for tensor in (value, places, weights)]
    out = operator(leaves[0], shapes, *leaves[1:])
    torch.autograd.grad(out, leaves, torch.ones_like(out))


def times(operators: dict[str, Operator], args: argparse.Namespace, shape: str) -> dict[str, tuple[float, float]]:
    """Median milliseconds of forward, and of forward with backward."""
    tensors = inputs(shape, args.size, args.batch, args.device)
    for name, operator in operators.items():
        check(name, operator, tensors)
    taken: dict[tuple[str, bool], list[float]] = {(name, way): [] for name in operators for way in (False, True)}
    for turn in range(args.rounds + 1):
        for (name, backward), found in taken.items():
            spent = seconds(lambda: call(operators[name], tensors, backward), args.device)  # noqa: B023
            if turn:  # the first one warms up
                found.append(1e3 * spent)
    medians = {key: statistics.median(found) for key, found in taken.items()}
    return {name: (medians[name, False], medians[name, True]) for name in operators}


def peak(args: argparse.Namespace) -> float:
    """MiB that one call adds to the peak of this process; the same operator has run on a small input before."""
    name, shape, way = args.cell
    operator = IMPLEMENTATIONS[name]()
    call(operator, inputs(shape, 32, 1, args.device), way == "both")
    tensors = inputs(shape, args.size, args.batch, args.device)
    if args.device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call(operator, tensors, way == "both")
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    call(operator, tensors, way == "both")
    return (status("VmHWM") - before) / 2**10


def memory(name: str, shape: str, args: argparse.Namespace) -> tuple[float, float]:
    """Peak MiB of forward, and of forward with backward, each in a fresh process that returns what it frees."""
    common = ["--size", args.size, "--batch", args.batch, "--threads", args.threads, "--device", args.device]
    found = []
    for way in ("forward", "both"):
        command = [sys.executable, "-m", "recipes.bench.ops", *map(str, common), "--cell", name, shape, way]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"measuring the memory of {name} failed: {done.stderr[-1000:]}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return found[0], found[1]


# Table


def main(argv: list[str] | None = None) -> None:
    """Print one table."""
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    if args.cell:
        print(json.dumps(peak(args)))
        return
    operators, missing = available(args.device)
    with_memory = not args.no_memory
    if with_memory and not Path("/proc/self/clear_refs").exists():
        raise SystemExit("memory is measured by /proc, which this system does not have; give --no-memory")
    rows: dict[str, list[str]] = {name: [] for name in operators}
    for shape in args.shapes:
        measured = times(operators, args, shape)
        first = next(iter(measured.values()))
        for name, (forward, both) in measured.items():
            cell = f"{forward:.1f} / {both:.1f} ({first[0] / forward:.1f}x / {first[1] / both:.1f}x)"
            if with_memory:
                cell += ", {:.0f} / {:.0f} MiB".format(*memory(name, shape, args))
            rows[name].append(cell)

    print(f"Forward / forward with backward in ms (times faster than the first row){', peak MiB' * with_memory}.")
    print(
        f"{args.size} x {args.size} pixels, batch {args.batch}, float32, median of {args.rounds}. "
        f"{machine(args.threads, args.device)}.\n"
    )
    print("| | " + " | ".join(args.shapes) + " |\n" + "|---" * (len(args.shapes) + 1) + "|")
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells) + " |")
    for name, reason in missing.items():
        print(f"\nNot here: {name} ({reason})")


if __name__ == "__main__":
    main()
