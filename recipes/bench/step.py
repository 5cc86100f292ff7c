"""A training step of ViT-Adapter: time and memory, beside the authors' data flow and a plain ViT that is fully trained.

    python -m recipes.bench.step                       # ViT-S, 512 pixels, batch 2, all four maps
    python -m recipes.bench.step --rounds 9 --modes "authors' data flow" injectors
    python -m recipes.bench.step --backbone vit_base_patch16_224 --device cuda --amp bfloat16
    python -m recipes.bench.step --reference           # and the same modes as their papers write them

A step is forward, backward from given gradients of every map (for the plain ViT, of its tokens) and AdamW. The modes
take turns in one process and medians are printed; memory is what one step adds to the peak of a process of its own,
after a first step has made gradients and moments. Before anything is timed, the maps of ``injectors`` and of the
authors' data flow are compared, with the same weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import adaptkit
from adaptkit.ops import pool

from .measure import in_turns, machine, status
from .official_flow import OfficialFlow

Step = Callable[[Tensor], object]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_small_patch16_224", help="a timm name; weights are random")
    parser.add_argument("--size", type=int, default=512, help="a multiple of 32")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", choices=["bfloat16", "float16"], help="autocast; float32 without")
    parser.add_argument("--compile", metavar="BACKEND", help="run through torch.compile, for instance by inductor")
    parser.add_argument("--reference", action="store_true", help="a column more: ours inside adaptkit.reference()")
    parser.add_argument("--no-memory", action="store_true", help="time alone")
    parser.add_argument("--peak", help=argparse.SUPPRESS)  # the memory of one mode, in a process of its own
    return parser.parse_args(argv)


def backbone(args: argparse.Namespace) -> Any:
    """The same random ViT each time."""
    import timm

    torch.manual_seed(0)
    with torch.device(args.device):
        return timm.create_model(args.backbone, num_classes=0, dynamic_img_size=True)


def training(args: argparse.Namespace, model: nn.Module, maps: Callable[[Any], Any], run: Step | None = None) -> Step:
    """One step of a model whose forward returns ``maps(...)``."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    amp = getattr(torch, args.amp) if args.amp else None
    forward = torch.compile(run or model, backend=args.compile) if args.compile else run or model

    gradients: dict[torch.Size, Tensor] = {}

    def gradient(m: Tensor) -> Tensor:
        if m.shape not in gradients:
            gradients[m.shape] = torch.randn_like(m) / m.numel()
        return gradients[m.shape]

    def step(image: Tensor) -> None:
        with torch.autocast(args.device.split(":")[0], amp, enabled=amp is not None):
            outputs = maps(forward(image))
        torch.autograd.backward(outputs, [gradient(m) for m in outputs])
        del outputs
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain(args: argparse.Namespace) -> Step:
    """The ViT alone, every weight trained."""
    vit = backbone(args).train()
    return training(args, vit, lambda tokens: [tokens], vit.forward_features)


def adapted(args: argparse.Namespace, **options: Any) -> adaptkit.AdaptedModel:
    """Our ViT-Adapter."""
    return adaptkit.attach(backbone(args), ("vit-adapter", options)).to(args.device).train()


def authors(args: argparse.Namespace, ours: adaptkit.AdaptedModel | None = None) -> OfficialFlow:
    """The authors' data flow with the weights of ours."""
    adapter: Any = (ours or adapted(args)).adapters["vit-adapter"]
    config = adapter.config
    flow = OfficialFlow(backbone(args), config.deform_num_heads, config.deform_ratio, config.drop_path)
    named = {k.replace(".ffn.dwconv.", ".ffn.dwconv.dwconv."): v for k, v in adapter.state_dict().items()}
    missing, unexpected = flow.load_state_dict(named, strict=False)
    if unexpected or any(not key.startswith("vit.") for key in missing):
        raise RuntimeError(f"not the same model: {missing} missing, {unexpected} unexpected")
    return flow.to(args.device).train()


def ours(args: argparse.Namespace, **options: Any) -> Step:
    """A step of ours from images."""
    return training(args, adapted(args, **options), lambda features: features.maps)


def cached(args: argparse.Namespace) -> Step:
    """A step of ours from cached features; the backbone has run before."""
    model = adapted(args, injector=False)
    step = training(args, model, lambda features: features.maps)
    seen: dict[tuple[int, ...], Any] = {}

    def run(image: Tensor) -> None:
        key = tuple(image.shape)
        if key not in seen:
            seen[key] = model.extract(image)
        step(seen[key])

    return run


MODES: dict[str, Callable[[argparse.Namespace], Step]] = {
    "authors' data flow": lambda args: training(args, authors(args), lambda maps: maps),
    "plain ViT, fully trained": plain,
    "injectors": ours,
    "injectors, checkpoint": lambda args: ours(args, checkpoint=True),
    "injectors, without stride 4": lambda args: ours(args, strides=(8, 16, 32)),
    "extractors only": lambda args: ours(args, injector=False),
    "extractors only, cached": cached,
}
PEERS = ("authors' data flow", "plain ViT, fully trained")  # the modes in which nothing is ours


def as_text(step: Step) -> Step:
    """The same step with no fast path taken."""

    def run(image: Tensor) -> None:
        with adaptkit.reference():
            step(image)

    return run


@torch.no_grad()
def check(args: argparse.Namespace) -> float:
    """Largest difference of the maps, relative to the largest value; ``RuntimeError`` where they are not the same."""
    ours = adapted(args, gamma_init=0.5).double().eval()
    flow = authors(args, ours).double().eval()
    image = torch.randn(1, 3, 128, 96, dtype=torch.float64, device=args.device)
    pairs = zip(ours(image).maps, flow(image), strict=True)
    off = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    if not off < 1e-6:
        raise RuntimeError(f"our maps and the authors' are {off:.1e} of the largest value apart: nothing to compare")
    return off


def image_of(args: argparse.Namespace, size: int) -> Tensor:
    """(B, 3, size, size)."""
    return torch.randn(args.batch, 3, size, size, device=args.device)


def peak(args: argparse.Namespace) -> float:
    """MiB that one step adds to the peak."""
    step = MODES[args.peak](args)
    image = image_of(args, args.size)
    step(image)  # gradients, moments and cached features were there before
    if args.device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(image)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    pool.release()  # what is kept from step to step counts
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    step(image)
    return (status("VmHWM") - before) / 2**10


def memory(args: argparse.Namespace, mode: str) -> float:
    """Peak MiB of a mode, in a fresh process that returns what it frees."""
    names = ["backbone", "size", "batch", "threads", "device"]
    names += [name for name in ("amp", "compile") if getattr(args, name)]
    given = [part for name in names for part in (f"--{name}", str(getattr(args, name)))]
    command = [sys.executable, "-m", "recipes.bench.step", *given, "--peak", mode]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {mode} failed: {done.stderr[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> None:
    """Print one table."""
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    if args.peak:
        print(json.dumps(peak(args)))
        return
    off = check(args)
    image = image_of(args, args.size)
    steps = {mode: MODES[mode](args) for mode in args.modes}
    if args.reference:
        steps |= {f"{mode}, text": as_text(step) for mode, step in steps.items() if mode not in PEERS}
    took = in_turns({mode: lambda s=step: s(image) for mode, step in steps.items()}, args.rounds, args.device)  # type: ignore[misc]
    taken = {} if args.no_memory else {mode: memory(args, mode) for mode in args.modes}
    first = args.modes[0]
    precision = f"{args.amp or 'float32'}{', compiled' if args.compile else ''}"
    print(
        f"{args.backbone}, ViT-Adapter, {args.size} x {args.size} pixels, batch {args.batch}, "
        f"{precision}; medians of {args.rounds} on {machine(args.threads, args.device)}. Maps of "
        f"'injectors' and of the authors' data flow differ by {off:.0e} (float64).\n"
    )
    head = ["mode", "ms per step", "times faster"]
    head += ["with reference()"] if args.reference else []
    head += ["MiB", "of the first"] if taken else []
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for mode in args.modes:
        text = took.get(f"{mode}, text")
        cells = [mode, f"{1e3 * took[mode]:.0f}", f"{took[first] / took[mode]:.2f}"]
        cells += ["" if text is None else f"{took[first] / text:.2f}"] if args.reference else []
        cells += [f"{taken[mode]:.0f}", f"{taken[mode] / taken[first]:.2f}"] if taken else []
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
