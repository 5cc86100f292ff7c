"""What a GPU makes of adaptkit: every adapter checked against the CPU, then time and memory, in one table.

    python -m recipes.bench.gpu                 # under eight minutes on one GPU
    python -m recipes.bench.gpu --dry-run       # on a CPU, tiny: runs every line of this file; its figures say nothing

Rows are printed as they come, medians all: the operator in float32 and bfloat16, alone in forward and in backward,
beside every peer that is installed; AdaViT packed beside dense; features shared by tasks; the training step of a
ViT-Adapter of every size in every mode, eager and then compiled. "Times faster" is beside the first row of a group, for
compiled steps beside the authors' data flow in eager mode. What the minutes do not suffice for is named at the end.

Without a GPU, and without --dry-run, the exit code is 2. It is 1 where an adapter or an operator computes something
else on the GPU than on the CPU.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import adaptkit
from adaptkit.adapters.adavit import Given

from . import adavit, ops, step
from .measure import in_turns, machine

TOLERANCE = 1e-3  # of the norm: float32 in another order stays far below, TF32 and bfloat16 do not
RATES = (0.5, 0.65, 0.8)  # patches, heads and sub-layers that AdaViT keeps


@dataclass(frozen=True)
class Plan:
    """How large everything is."""

    device: str = "cuda"
    compiler: str = "inductor"
    rounds: int = 7
    calls: int = 20  #: of the operator between two looks at the clock
    shapes: tuple[str, ...] = ops.SHAPES  #: of the operator
    operator_size: int = 512
    operator_batch: int = 8
    backbones: tuple[str, ...] = ("vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")
    sizes: tuple[int, ...] = (512, 896)
    batch: int = 2
    checked: str = "vit_small_patch16_224"
    checked_size: int = 224
    gated: str = "deit_small_patch16_224"
    gated_size: int = 224
    gated_batches: tuple[int, ...] = (64, 1)
    tasks: int = 4
    compiled_modes: tuple[str, ...] = tuple(step.MODES)


TINY = Plan(
    device="cpu", compiler="eager", rounds=1, calls=1, shapes=("inj S",), operator_size=32, operator_batch=1,
    backbones=("vit_tiny_patch16_224",), sizes=(64,), checked="vit_tiny_patch16_224", checked_size=64,
    gated="deit_tiny_patch16_224", gated_size=64, gated_batches=(2,), tasks=2,
    compiled_modes=("injectors", "extractors only, cached"),
)  # fmt: skip


@dataclass
class Row:
    """One line of the table; ``ms`` is None where something was not measured, and ``note`` says why."""

    group: str
    case: str
    ms: float | None = None
    faster: float | None = None
    mib: float | None = None
    note: str = ""
    wrong: bool = False

    def __str__(self) -> str:
        cells = [
            self.group,
            self.case,
            *map(_number, (self.ms, self.faster)),
            "" if self.mib is None else f"{self.mib:.0f}",
        ]
        return "| " + " | ".join([*cells, "WRONG: " * self.wrong + self.note]) + " |"


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.3g}"


class Deadline:
    """Says whether there is time for another cell; what came too late is listed."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes
        self.late: list[str] = []

    def allows(self, what: str) -> bool:
        """Whether ``what`` may begin."""
        if time.monotonic() < self.end:
            return True
        self.late.append(what)
        return False


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny sizes")
    parser.add_argument("--minutes", type=float, default=7.0, help="no cell begins later than this")
    parser.add_argument(
        "--hub-kernel", action="store_true", help="time the CUDA kernel that transformers downloads, too"
    )
    return parser.parse_args(argv)


# Is it right?


def checks(plan: Plan) -> Iterator[Row]:
    """Outputs and gradients of every adapter on the device, beside those of the same weights on the CPU."""
    for name in adaptkit.list_adapters():
        off = difference(name, plan)
        yield Row("check", name, note=f"off by {off:.0e}", wrong=not off < TOLERANCE)  # NaN too


def difference(name: str, plan: Plan) -> float:
    """The largest distance of a tensor from the CPU's, relative to its norm, in float32."""
    import timm

    torch.manual_seed(0)
    backbone = timm.create_model(plan.checked, num_classes=0, dynamic_img_size=True)
    model = adaptkit.attach(backbone, name).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:  # what begins as zeros hides what comes behind it
                p.add_(0.02 * torch.randn(p.shape, generator=generator))
    image = torch.randn(2, 3, plan.checked_size, plan.checked_size, generator=generator)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected = outcome(model, image)
        found = outcome(model.to(plan.device), image.to(plan.device))
    distances = [(a - b).norm() / b.norm() for a, b in zip(found, expected, strict=True)]
    return float(torch.stack(distances).max())  # NaN if one is


def outcome(model: nn.Module, image: Tensor) -> list[Tensor]:
    """Outputs, and the gradient of a fixed function of them as one vector, on the CPU."""
    model.zero_grad()
    features = model(image)
    outputs = [features.tokens, *features.maps]
    torch.stack([out.square().mean() for out in outputs]).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return [tensor.detach().double().cpu() for tensor in (*outputs, gradient)]


# The operator


def operator_rows(plan: Plan, hub_kernel: bool, deadline: Deadline) -> Iterator[Row]:
    """Forward and backward of deformable attention, each alone."""
    running, missing = ops.available(plan.device)
    if hub_kernel:
        running["transformers (kernel of the Hub)"] = downloaded()
    for shape in plan.shapes:
        tensors = ops.inputs(shape, plan.operator_size, plan.operator_batch, plan.device)
        for name, operator in list(running.items()):
            try:
                ops.check(name, operator, tensors)
            except RuntimeError as error:
                del running[name]
                yield Row(f"operator {shape}", name, note=str(error), wrong=True)
        for dtype in (torch.float32, torch.bfloat16):
            group = f"operator {shape}, {str(dtype).removeprefix('torch.')}"
            if deadline.allows(group):
                yield from operators(group, running, tensors, dtype, plan)
    yield from (Row("operator", name, note=f"not here: {reason}") for name, reason in missing.items())


def operators(group: str, running: dict[str, ops.Operator], tensors: Any, dtype: torch.dtype, plan: Plan) -> list[Row]:
    """Rows of all implementations for one shape and dtype."""
    value, shapes, places, weights = tensors
    ways: dict[str, dict[str, Callable[[], object]]] = {"forward": {}, "backward": {}}
    rows = []
    for name, operator in running.items():
        # Ours reads places in float32 beside values in bfloat16, as autocast gives them; peers want one dtype.
        places_dtype = torch.float32 if name.startswith("adaptkit") else dtype
        inputs = [value.to(dtype), places.to(places_dtype), weights.to(places_dtype)]
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        try:
            out = operator(leaves[0], shapes, *leaves[1:])
            torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
        except RuntimeError as error:
            rows.append(Row(group, name, note=f"does not take it: {str(error).splitlines()[0]}"))
            continue

        def forward(run: ops.Operator = operator, given: list[Tensor] = inputs) -> None:
            with torch.no_grad():
                for _ in range(plan.calls):
                    run(given[0], shapes, *given[1:])

        def backward(out: Tensor = out, leaves: list[Tensor] = leaves) -> None:
            grad = torch.ones_like(out)
            for _ in range(plan.calls):
                torch.autograd.grad(out, leaves, grad, retain_graph=True)

        ways["forward"][name], ways["backward"][name] = forward, backward
    for way, runs in ways.items():
        rows += compared(group, {f"{name}, {way}": run for name, run in runs.items()}, plan, calls=plan.calls)
    return rows


def downloaded() -> ops.Operator:
    """The CUDA kernel of Deformable DETR that transformers takes from the Hub (package ``kernels``)."""
    from kernels import get_kernel

    module = get_kernel("kernels-community/deformable-detr").layers.MultiScaleDeformableAttention()

    def run(value: Tensor, shapes: list[tuple[int, int]], places: Tensor, weights: Tensor) -> Tensor:
        sizes, first = ops.layout(shapes, value)
        return module(value, sizes, shapes, first, places, weights, 64)

    return run


def compared(group: str, runs: dict[str, Callable[[], object]], plan: Plan, calls: int = 1) -> list[Row]:
    """Rows of what takes turns, beside the first."""
    if not runs:
        return []
    taken = in_turns(runs, plan.rounds, plan.device)
    first = next(iter(taken.values()))
    return [
        Row(group, name, 1e3 * spent / calls, first / spent, peak(runs[name], plan)) for name, spent in taken.items()
    ]


def peak(run: Callable[[], object], plan: Plan) -> float | None:
    """MiB that a call adds to what is allocated on the GPU; None on a CPU."""
    if not plan.device.startswith("cuda"):
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


# AdaViT, and features for several tasks


@torch.inference_mode()
def adavit_rows(plan: Plan, deadline: Deadline) -> Iterator[Row]:
    """Decisions drawn at random: packed and masked beside the dense backbone."""
    import timm

    backbone = timm.create_model(plan.gated, img_size=plan.gated_size).eval().to(plan.device)
    dense = copy.deepcopy(backbone)
    model = adaptkit.attach(backbone, ("adavit", {"first_block": 0})).eval().to(plan.device)
    gates: Any = model.adapters["adavit"]
    for batch in plan.gated_batches:
        group = f"{plan.gated} with AdaViT, batch {batch}"
        if not deadline.allows(group):
            continue
        image = torch.randn(batch, 3, plan.gated_size, plan.gated_size, device=plan.device)
        decided = adavit.Recorded(model, [image], RATES)

        def way(execution: str, image: Tensor = image, given: Given = decided.given[0]) -> Callable[[], object]:
            def run() -> object:
                with gates.executing(execution), gates.deciding(given):
                    return model(image)

            return run

        runs: dict[str, Callable[[], object]] = {"dense": lambda image=image: dense(image)}  # type: ignore[misc]
        runs |= {f"{name}, {decided.share:.0%} of the MACs": way(name) for name in ("packed", "auto", "masked")}
        yield from compared(group, runs, plan)


@torch.inference_mode()
def shared_rows(plan: Plan, deadline: Deadline) -> Iterator[Row]:
    """Several tasks on one backbone: a model for each, and one pass for all."""
    import timm

    for name in plan.backbones:
        size, group = plan.sizes[0], f"{name}, {plan.tasks} tasks at {plan.sizes[0]}"
        if not deadline.allows(group):
            continue
        backbone = timm.create_model(name, num_classes=0, dynamic_img_size=True).eval()
        tasks = {f"task {i}": ("vit-adapter", {"injector": False}) for i in range(plan.tasks)}
        heads = {task: ("linear", {"num_classes": 5}) for task in tasks}
        many = adaptkit.attach_many(copy.deepcopy(backbone), tasks, heads).eval().to(plan.device)
        alone = adaptkit.attach(backbone, tasks["task 0"], head=heads["task 0"]).eval().to(plan.device)
        image = torch.randn(plan.batch, 3, size, size, device=plan.device)

        def one_by_one(model: nn.Module = alone, image: Tensor = image) -> None:
            for _ in range(plan.tasks):
                model(image)

        def together(model: Any = many, image: Tensor = image) -> None:
            model(image)

        yield from compared(group, {"a model for each": one_by_one, "shared features": together}, plan)


# The training step


def step_rows(plan: Plan, deadline: Deadline) -> Iterator[Row]:
    """Forward, backward and AdamW under bfloat16 autocast: every mode, at every size, of every backbone.

    Compiled steps come last, mode by mode, for a compiler takes longer than everything else.
    """
    sides = [(size, name) for size in plan.sizes for name in plan.backbones]
    cells = [(None, *side, mode) for side in sides for mode in step.MODES]
    cells += [(plan.compiler, *side, mode) for mode in plan.compiled_modes for side in sides]
    first: dict[tuple[int, str], float] = {}
    for compiler, size, name, mode in cells:
        group = f"{name} at {size}, bfloat16{', compiled' if compiler else ''}"
        if not deadline.allows(f"{group}, {mode}"):
            continue
        row = one_step(group, mode, name, size, plan, compiler)
        if row.ms is not None:
            row.faster = first.setdefault((size, name), row.ms) / row.ms
        yield row


def one_step(group: str, mode: str, name: str, size: int, plan: Plan, compiler: str | None) -> Row:
    """Build a model, time it and let it go: a large one is there once. One that fails says so and stops nothing."""
    given = ["--backbone", name, "--size", size, "--batch", plan.batch, "--device", plan.device, "--amp", "bfloat16"]
    args = step.arguments([str(part) for part in given] + (["--compile", compiler] if compiler else []))
    try:
        run, image = step.MODES[mode](args), step.image_of(args, size)
        (row,) = compared(group, {mode: lambda: run(image)}, plan)
    except RuntimeError as error:  # out of memory, or what a compiler raises
        return Row(group, mode, note=f"{type(error).__name__}: {str(error).splitlines()[0]}")
    finally:
        torch.compiler.reset()
    return row


# Table


def main(argv: list[str] | None = None) -> int:
    """Print the table; return the exit code."""
    args = arguments(argv)
    if not args.dry_run and not torch.cuda.is_available():
        print("this benchmark needs a GPU, and torch finds none; --dry-run tries it on the CPU", file=sys.stderr)
        return 2
    plan, deadline, right = TINY if args.dry_run else Plan(), Deadline(args.minutes), True
    title = "DRY RUN, its figures say nothing: " if args.dry_run else ""
    print(f"{title}{machine(torch.get_num_threads(), plan.device)}; medians of {plan.rounds}, batch {plan.batch}\n")
    print("| what | case | ms | times faster | MiB | note |\n|---|---|---|---|---|---|")
    parts = (
        checks(plan),
        operator_rows(plan, args.hub_kernel, deadline),
        adavit_rows(plan, deadline),
        shared_rows(plan, deadline),
        step_rows(plan, deadline),
    )
    for row in itertools.chain(*parts):
        print(row, flush=True)
        right &= not row.wrong
    for late in deadline.late:
        print(f"\nNot measured within {args.minutes:g} minutes: {late}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
