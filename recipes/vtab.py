"""VTAB-1k: nineteen small tasks of 1000 training images, one adapter setting for all (Zhai et al. 2019).

    python -m recipes.vtab --data vtab-1k --backbone vit_base_patch16_224.augreg_in21k --adapter lora --config vtab-lora
    python -m recipes.vtab --data 'my-org/vtab-{task}' --tasks cifar dtd svhn --adapter metaformer

`--data` is a folder or a pattern with {task} in it. Of a folder, a task is `<task>/train800val200.txt` and
`<task>/test.txt` (lists of images, the layout in which VTAB-1k is passed around) or `<task>/train.parquet` and
`<task>/test.parquet`; a pattern is a Hub id with the splits train and test.

The score is top-1 on the test set; the result is the mean of the means of the three groups. A task that is not there is
named, and then the mean is over the others and says so. A run that was stopped goes on with `--resume`.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState

from adaptkit.hub.write import check_writable, write_atomic

from . import classify
from .checkpoints import checkpoints, lasting
from .devices import together
from .folder import occupied
from .options import command, parser, read

GROUPS = {
    "Natural": {
        "caltech101": 102, "cifar": 100, "dtd": 47, "oxford_flowers102": 102, "oxford_iiit_pet": 37, "sun397": 397,
        "svhn": 10,
    },
    "Specialized": {"diabetic_retinopathy": 5, "eurosat": 10, "patch_camelyon": 2, "resisc45": 45},
    "Structured": {
        "clevr_count": 8, "clevr_dist": 6, "dmlab": 6, "dsprites_loc": 16, "dsprites_ori": 16, "kitti": 4,
        "smallnorb_azi": 18, "smallnorb_ele": 9,
    },
}  # fmt: skip
TASKS = {task: classes for group in GROUPS.values() for task, classes in group.items()}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = parser("vtab", __doc__, steps=1600, batch_size=64, augment="none", save_every=0, train="")
    classify.add_options(p)
    p.add_argument("--data", required=True, help="a folder, or a Hub id with {task} in it")
    p.add_argument(
        "--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), metavar="TASK", help="default: all 19"
    )
    args = read(p, argv)
    if args.train or args.val:
        p.error("--train and --val are given by --data for each task")
    classify.check(args)
    return args


class Found(NamedTuple):
    """Where the data of one task are."""

    train: str
    val: str


def find(data: str, task: str) -> Found | None:
    """Return where a task's data are, or None."""
    if "{task}" in data:
        name = data.replace("{task}", task)
        return Found(f"{name}@train", f"{name}@test")
    folder = Path(data) / task
    for train, test in (("train800val200.txt", "test.txt"), ("train.parquet", "test.parquet")):
        if (folder / train).is_file() and (folder / test).is_file():
            return Found(str(folder / train), str(folder / test))
    return None


def run_task(task: str, found: Found, args: argparse.Namespace) -> dict[str, Any]:
    """Train and test one task, or read what a finished run with the same arguments said."""
    own = copy.deepcopy(args)
    own.train, own.val, own.out = found.train, found.val, str(Path(args.out) / task)
    own.image_column = own.label_column = None
    own.num_classes, own.streaming = TASKS[task], False
    done, asked = Path(own.out) / "done.json", lasting(own, together(PartialState).num_processes)
    asked.pop("tasks")
    if args.resume and done.is_file():
        finished = json.loads(done.read_text())
        if finished["arguments"] == asked:
            return finished["result"]
    if args.resume and not checkpoints(Path(own.out)):  # of the sweep, whose tasks are not all begun
        own.resume, own.overwrite = False, True
    if together(PartialState).is_main_process:
        done.unlink(missing_ok=True)  # it was of another run
    result = classify.fit(own, last=False)
    if together(PartialState).is_main_process:
        write_atomic(done, json.dumps({"arguments": asked, "result": result}).encode())
    return result


def summary(scores: dict[str, float]) -> dict[str, Any]:
    """Return the mean of each group that has a task, their mean, and the tasks that are missing."""
    groups = {
        g: statistics.mean(scores[t] for t in tasks if t in scores)
        for g, tasks in GROUPS.items()
        if scores.keys() & tasks
    }
    mean = statistics.mean(groups.values()) if groups else None
    return {"groups": groups, "mean": mean, "missing": [t for t in TASKS if t not in scores]}


def table(scores: dict[str, float]) -> str:
    """Write the scores in Markdown, group by group, and over what the mean is."""
    said = summary(scores)
    lines = ["| group | task | top-1 |", "|---|---|---|"]
    for group, tasks in GROUPS.items():
        lines += [f"| {group} | {t} | {f'{scores[t]:.1f}' if t in scores else 'missing'} |" for t in tasks]
        if group in said["groups"]:
            share = f"{len(scores.keys() & tasks)} of {len(tasks)}"
            lines.append(f"| **{group}** | **mean of {share}** | **{said['groups'][group]:.1f}** |")
    if said["mean"] is None:
        return "\n".join(lines)
    whole = "19 tasks in 3 groups" if not said["missing"] else (
        f"{len(scores)} of 19 tasks in {len(said['groups'])} of 3 groups; without {', '.join(said['missing'])}"
    )  # fmt: skip
    return "\n".join([*lines, "", f"mean of group means: {said['mean']:.2f} ({whole})"])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    out = check_writable(args.out)
    where = {task: find(args.data, task) for task in args.tasks}
    if not any(where.values()):
        raise ValueError(
            f"{args.data} holds no task: expected e.g. {args.tasks[0]}/train800val200.txt with test.txt beside it, or "
            f"{args.tasks[0]}/train.parquet with test.parquet"
        )
    with occupied(out, together(PartialState), resume=True):  # each task has a folder of its own, which asks
        return run_all(out, where, args)


def run_all(out: Path, where: dict[str, Found | None], args: argparse.Namespace) -> dict[str, Any]:
    """Run the tasks that are there, and write what they say together."""
    results = {}
    main_process = together(PartialState).is_main_process
    for task, found in where.items():
        if found is None:
            if main_process:
                print(f"{task}: not in {args.data}", flush=True)
            continue
        results[task] = run_task(task, found, args)
    scores = {task: result["top1"] for task, result in results.items()}
    report = {"scores": scores, **summary(scores), "results": results}
    if main_process:
        write_atomic(out / "result.json", (json.dumps(report, indent=2) + "\n").encode())
        write_atomic(out / "table.md", (table(scores) + "\n").encode())
        print("\n" + table(scores))
    together(PartialState).destroy_process_group()
    return report


if __name__ == "__main__":
    command("vtab", main)
