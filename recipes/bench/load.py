"""How long does it take to import the package, and to attach an adapter from the disk?

    python -m recipes.bench.load

Imports are timed in fresh processes, in turns. Attaching is timed after the imports, on a backbone that is there: the
file is read, checked against the backbone and its tensors are put in place.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

import adaptkit

from .measure import in_turns, machine

ADAPTERS = ("sfp", "vit-adapter", "metaformer", "lora")
IMPORTS = ("torch", "adaptkit")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["vit_small_patch16_224", "vit_base_patch16_224"])
    parser.add_argument("--adapters", nargs="+", default=list(ADAPTERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args(argv)


def importing(name: str) -> float:
    """Seconds of ``import name`` in a fresh process, the start of Python left out."""
    code = f"import time; t = time.perf_counter(); import {name}; print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main(argv: list[str] | None = None) -> None:
    """Print two tables."""
    import timm

    args = arguments(argv)
    torch.set_num_threads(args.threads)
    taken: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(args.rounds):
        for name in IMPORTS:
            taken[name].append(importing(name))
    torch_alone, package = (statistics.median(taken[name]) for name in IMPORTS)
    print(f"Medians of {args.rounds} on {machine(args.threads)}\n")
    print("| import | seconds | ratio |\n|---|---|---|")
    print(f"| torch | {torch_alone:.2f} | 1.00 |\n| adaptkit | {package:.2f} | {package / torch_alone:.2f} |\n")

    print("| backbone | adapter | file, MB | attach from the disk, s |\n|---|---|---|---|")
    warnings.filterwarnings("ignore", message=".*other weights.*")
    for backbone in args.backbones:
        host = timm.create_model(backbone, num_classes=0).eval()
        for adapter in args.adapters:
            with tempfile.TemporaryDirectory() as folder:
                model = adaptkit.attach(host, adapter)
                model.save(folder)
                model.detach()
                size = (Path(folder) / "adapter_model.safetensors").stat().st_size / 1e6

                def attach(host: torch.nn.Module = host, folder: str = folder) -> None:
                    adaptkit.attach(host, folder).detach()

                took = in_turns({"attach": attach}, args.rounds)["attach"]
            print(f"| {backbone} | {adapter} | {size:.1f} | {took:.2f} |", flush=True)


if __name__ == "__main__":
    main()
