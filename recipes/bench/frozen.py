"""Which way of adapting a frozen backbone is best: at equal steps and at equal seconds, each at its own learning rate.

    python -m recipes.bench.frozen --backbone dinov2_small --train camvid-train.parquet \
        --val camvid-val.parquet --num-classes 11 --size 364 476 --window 168 224 --out runs/frozen

Each stage is a folder of ordinary runs of `recipes.segment` below --out:

1. ``tune``, with --tune: the learning rate, seed 0, half of the steps, on the first four fifths of the training images,
   scored on the last fifth, so that --val chooses nothing. The same grid for each method; where its best rate is the
   grid's first or last, the next one is tried, too. Without --tune the rates are `RATES`.
2. ``steps``: the same optimiser steps for each, each seed, on all training images.
3. ``seconds``: the same training time for each, that of the method in the middle of stage 2, by the seconds of a step
   measured there.

Methods that only read the backbone train on cached features: the backbone sees each of two views of a whole image once
(--size), and each step reads a new window of it (--window), mirrored every other time. The others run the backbone in
each step, on whole images. The heads of pixels learn by cross-entropy and dice alike, all methods with Muon, which
leaves a linear head and other small matrices to AdamW; ``--optimizer adamw`` is the recipes' default.

Runs that have ended are not made again: the same command goes on. Every further option is the recipe's, see
`adaptkit train segment --help`. The authors' data flow of ViT-Adapter is the same function, so that its score is the
same; what it costs is measured by `recipes.bench.step`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from adaptkit.analysis.style import COLOURS, Drawn
from adaptkit.hub.write import check_writable, write_atomic

from .. import segment
from ..compare import Asked, make, state
from ..data import open_rows
from ..options import seed_of

#: Adapters, options and head of each method, as the recipe takes them.
METHODS: dict[str, list[str]] = {
    "linear": ["--adapter", "none", "--head", "linear"],
    "fpn": ["--adapter", "none", "--head", "fpn"],
    "sfp": ["--adapter", "sfp", "--head", "fpn"],
    "lora": ["--adapter", "lora", "--head", "fpn"],
    "adapter-plus": ["--adapter", "adapter-plus", "--head", "fpn"],
    "rein": ["--adapter", "rein", "--head", "fpn"],
    "vit-split": ["--adapter", "vit-split", "--head", "fpn"],
    "plain-mask": ["--adapter", "none", "--head", "plain-mask"],
    "extractors": ["--adapter", "vit-adapter", "--adapter-options", '{"injector": false}', "--head", "fpn"],
    "vit-adapter": ["--adapter", "vit-adapter", "--head", "fpn"],
    "lora+vit-adapter": ["--adapter", "lora", "vit-adapter", "--head", "fpn"],
}
#: Learning rates to start from; --tune finds those of a backbone and a set.
RATES = {
    "linear": 1e-2, "fpn": 1e-3, "sfp": 1e-3, "lora": 1e-3, "adapter-plus": 1e-3, "rein": 1e-3,
    "vit-split": 3e-4, "plain-mask": 3e-4, "extractors": 1e-3, "vit-adapter": 1e-3, "lora+vit-adapter": 1e-3,
}  # fmt: skip
GRID = (3e-4, 1e-3, 3e-3)  #: of learning rates
FACTOR = 10**0.5  #: from one rate to the next
LIMITS = (2e-5, 5e-2)  #: no rate beyond
READS = ("extractors", "vit-split", "plain-mask", "linear", "fpn", "sfp")  #: those that only read the backbone
PIXELS = ["--loss", "cross-entropy", "dice"]  #: of heads that class pixels; plain-mask has its own


@dataclass(frozen=True)
class Bench:
    """Where runs go, and what all of them share."""

    out: Path
    common: list[str]  #: options of the recipe
    window: list[int] | None  #: of cached features
    jobs: int  #: runs at once
    caches: dict[str, str] = field(default_factory=dict)  #: by method: the name of the cache that serves it

    def run(self, runs: Sequence[Asked]) -> list[dict[str, Any]]:
        """Make the runs that are not there; returns their results, in order."""
        told = [(run, state(run, segment)) for run in runs]
        with ThreadPoolExecutor(self.jobs) as pool:
            failed = [name for names in pool.map(lambda one: make("segment", [one]), told) for name in names]
        if failed:
            raise SystemExit(f"failed, see above: {', '.join(failed)}; the same command makes them again")
        return [json.loads((run.out / "result.json").read_text()) for run in runs]

    def ordered(self, methods: Iterable[str]) -> list[str]:
        """Those first that fill a cache for others."""
        order = list(self.caches)
        return sorted(methods, key=lambda method: order.index(method) if method in order else len(order))

    def asked(self, stage: str, method: str, name: str, options: dict[str, Any]) -> Asked:
        """One run of a method in a stage."""
        out = self.out / stage / f"{method}-{name}"
        given = [str(word) for flag, value in options.items() for word in (f"--{flag}", value)]
        given += [] if method == "plain-mask" else PIXELS
        if self.window and method in self.caches:
            folder = self.out / "features" / f"{Path(options['train']).stem}-{options['seed']}-{self.caches[method]}"
            given += ["--views", "2", "--cache-features", str(folder), "--flip-features"]
            given += ["--crop-features", *map(str, self.window)]
        return Asked(method, int(options["seed"]), out, [*self.common, *METHODS[method], *given, "--out", str(out)])


def reads(method: str, common: Sequence[str]) -> frozenset[int]:
    """Build the method's model and ask it after which blocks it reads the backbone."""
    files = ["--train", "none", "--val", "none", "--random-backbone"]
    model: Any = segment.build(segment.parse([*common, *METHODS[method], *files]))
    return frozenset(model.reads()[0])


def caches_of(blocks: Mapping[str, frozenset[int]]) -> dict[str, str]:
    """Blocks that methods read -> the cache that serves each, ``"2-5-8-11"``; those first that fill one for others."""
    order = sorted(blocks, key=lambda method: -len(blocks[method]))
    serving = {method: next(blocks[one] for one in order if blocks[method] <= blocks[one]) for method in order}
    return {method: "-".join(map(str, sorted(held))) for method, held in serving.items()}


def rate_text(rate: float) -> str:
    """As it is given and written down: two figures."""
    return f"{rate:.1e}"


# --------------------------------------------------------------------------------------------------- the three stages


def split(train: str, folder: Path) -> tuple[Path, Path]:
    """Write the first four fifths of the training images and the last as files of their own, once.

    The last, not every fifth: the next frames of a video nearly repeat each other.
    """
    fit, held = folder / "fit.parquet", folder / "held.parquet"
    if not (fit.is_file() and held.is_file()):
        rows = open_rows(train, "train", "runs/data")
        end = len(rows) * 4 // 5
        for path, part in ((fit, range(end)), (held, range(end, len(rows)))):
            rows.select(part).to_parquet(str(path))
    return fit, held


def tuned(scores: Callable[[list[float]], list[float]]) -> float:
    """Return the best learning rate: of the grid, or beyond the end where the best one is.

    Args:
        scores: of each of some rates, higher is better.
    """
    known = dict(zip(GRID, scores(list(GRID))))
    while True:
        best = max(known, key=lambda rate: known[rate])
        further = best / FACTOR if best == min(known) else best * FACTOR if best == max(known) else None
        if further is None or not LIMITS[0] <= further <= LIMITS[1]:
            return best
        known[further] = scores([further])[0]


def tune(bench: Bench, methods: Sequence[str], data: tuple[Path, Path], steps: int) -> dict[str, float]:
    """Stage 1: return the learning rate of each method."""
    files = {"train": data[0], "val": data[1], "steps": steps, "seed": 0}

    def scores(method: str, rates: list[float]) -> list[float]:
        options = [{**files, "lr": rate_text(rate)} for rate in rates]
        runs = [bench.asked("tune", method, f"lr{one['lr']}", one) for one in options]
        return [result["miou"] for result in bench.run(runs)]

    found = {m: tuned(lambda rates, m=m: scores(m, rates)) for m in bench.ordered(methods)}  # type: ignore[misc]
    return {method: found[method] for method in methods}


def stage(bench: Bench, name: str, rates: dict[str, float], seeds: Sequence[int], options: dict[str, dict[str, Any]]
          ) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """Stages 2 and 3: return the results of each method, seed by seed."""
    # seed by seed, so that all methods can be compared after a third of the time
    plan = [(method, seed) for seed in seeds for method in bench.ordered(rates)]
    runs = [bench.asked(name, method, f"seed{seed}", {**options[method], "lr": rate_text(rates[method]), "seed": seed})
            for method, seed in plan]  # fmt: skip
    fills = {bench.caches[method]: method for method in reversed(bench.caches)}.values()
    bench.run([run for run in runs if run.adapter in fills])  # the caches that others read, too
    results = bench.run(runs)
    return {method: [r for (m, _), r in zip(plan, results) if m == method] for method in rates}


# --------------------------------------------------------------------------------------------------- what is shown


HEAD = ("", "rate", "equal steps", "equal seconds", "steps in them", "trained", "s / step", "peak MiB")


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def table(rates: dict[str, float], steps: dict[str, Any], seconds: dict[str, Any] | None) -> str:
    """Return the Markdown table: mIoU by method, and what it costs."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for method, results in steps.items():
        timed = (seconds or {}).get(method)
        cells = (
            f"`{method}`", f"{rates[method]:.0e}", spread([r["miou"] for r in results]),
            spread([r["miou"] for r in timed]) if timed else "", str(timed[0]["steps"]) if timed else "",
            f"{results[0]['trained_parameters'] / 1e6:.2f} M", f"{pace(results):.2f}",
            f"{statistics.median(r['peak_memory_mib'] for r in results):.0f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def pace(results: list[dict[str, Any]]) -> float:
    """Seconds of a training step."""
    return statistics.median(r["seconds"] / r["steps"] for r in results)


class Chart(Drawn):
    """Score against trained parameters, seconds of a step and memory, a point for each method."""

    def __init__(self, results: dict[str, list[dict[str, Any]]]) -> None:
        self.results = results

    def draw(self, figure: Any) -> None:
        figure.set_size_inches(6.75, 2.8)
        axes = figure.subplots(1, 3, sharey=True)
        costs: list[tuple[str, Callable[[list[dict[str, Any]]], float]]] = [
            ("trained parameters, millions", lambda r: float(r[0]["trained_parameters"]) / 1e6),
            ("seconds of a step", pace),
            ("peak memory, GiB", lambda r: statistics.median(one["peak_memory_mib"] for one in r) / 1024),
        ]
        for axis, (label, cost) in zip(axes, costs):
            for (method, results), colour in zip(self.results.items(), COLOURS):
                scores = [r["miou"] for r in results]
                axis.errorbar(cost(results), statistics.mean(scores), fmt="o", color=colour, label=method, capsize=2,
                              yerr=statistics.stdev(scores) if len(scores) > 1 else None)  # fmt: skip
            axis.set_xlabel(label)
        axes[0].set_xscale("log")
        axes[0].set_ylabel("mIoU, %")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5)


# --------------------------------------------------------------------------------------------------- the command


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)  # fmt: skip
    p.add_argument("--train", required=True, help="Parquet file or Hub id")
    p.add_argument("--val", required=True, help="the same, for the scores of stages 2 and 3")
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    p.add_argument("--seeds", nargs="+", type=seed_of, default=[0, 1, 2])
    p.add_argument("--steps", type=int, default=4000, help="of each run of stage 2 (default: 4000)")
    p.add_argument("--seconds", type=float, help="of training in stage 3; 0: leave the stage out")
    p.add_argument("--tune", action="store_true", help="find the learning rates first")
    p.add_argument("--window", nargs=2, type=int, metavar=("H", "W"),
                   help="of cached features; default: no cache, whole images for all")  # fmt: skip
    p.add_argument("--jobs", type=int, default=1, help="runs at once, the threads shared among them (default: 1)")
    p.add_argument("--out", default="runs/frozen")
    return p.parse_known_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args, rest = parse(argv)
    check_writable(args.out)
    out = Path(args.out)
    os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // args.jobs))
    common = ["--batch-size", "4", "--save-every", "0", "--optimizer", "muon", *rest]
    caches = caches_of({m: reads(m, common) for m in args.methods if m in READS}) if args.window else {}
    bench = Bench(out, common, args.window, args.jobs, caches)

    rates = {method: RATES[method] for method in args.methods}
    if args.tune:
        rates = tune(bench, args.methods, split(args.train, out), max(1, args.steps // 2))

    data = {"train": args.train, "val": args.val}
    steps = stage(bench, "steps", rates, args.seeds, {m: {**data, "steps": args.steps} for m in rates})
    budget = statistics.median(pace(r) for r in steps.values()) * args.steps if args.seconds is None else args.seconds
    seconds = None
    if budget:
        counts = {method: max(1, round(budget / pace(results))) for method, results in steps.items()}
        seconds = stage(bench, "seconds", rates, args.seeds, {m: {**data, "steps": counts[m]} for m in rates})

    text = table(rates, steps, seconds)
    write_atomic(out / "table.md", text.encode())
    Chart(steps).save(out / "frozen.svg")
    print(f"{text}\n\n{args.steps} steps of training; equal seconds: {budget:.0f}" if budget else text)
    return {"rates": rates, "steps": steps, "seconds": seconds}


if __name__ == "__main__":
    main(sys.argv[1:])
