"""Checkpoints of the shared loop: adapter, head, optimiser, schedule, step, average, and the best so far.

``checkpoints/step-00000100/`` never holds the frozen backbone, and is whole or not there. One is gone on with only by a
run with the same options, but for those that change nothing of what is trained, and those that ``--change`` names.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from adaptkit.hub.write import write_atomic

from .finite import checkpoints
from .folder import check_run, run_of
from .options import CHANGEABLE
from .task import Task

#: What changes nothing of what is trained.
FREE = {
    "resume", "overwrite", "out", "config", "change", "eval_every", "save_every", "tracker", "offload",
}  # fmt: skip


def keep_adapter_only(task: Task, accelerator: Accelerator) -> None:
    """Make ``save_state`` write adapter and head instead of the whole frozen backbone, and read them back."""

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        weights.clear()
        if accelerator.is_main_process:
            task.save(accelerator.unwrap_model(models[0]), Path(folder) / "adapter")

    def restore(models: list[Any], folder: str) -> None:
        task.restore(accelerator.unwrap_model(models.pop()), Path(folder) / "adapter")

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(restore)


def save_checkpoint(
    accelerator: Accelerator, out: Path, step: int, args: argparse.Namespace, more: dict[str, Any] | None = None
) -> None:
    """Write beside, then rename: a kill leaves the last checkpoint whole. The newest two are kept.

    ``more`` goes into ``progress.json``; what the folder keeps as the best so far is copied with it.

    Raises ``OSError`` where it cannot be written, and leaves those that are there.
    """
    final = checkpoint_at(out, step)
    unfinished = final.with_suffix(".tmp")
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed while it wrote
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(unfinished), safe_serialization=True)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if (out / "best").is_dir():
                shutil.copytree(out / "best", unfinished / "best")
            kept = lasting(args, accelerator.num_processes)
            progress = {"step": step, "run": run_of(out), "arguments": kept, **(more or {})}
            write_atomic(unfinished / "progress.json", json.dumps(progress).encode())
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own
        shutil.rmtree(unfinished, ignore_errors=True)
        there = [str(path) for path in checkpoints(out)[-1:]]
        raise OSError(
            f"the checkpoint {final} cannot be written: {error}. Make room, then go on with --resume"
            + (f" from {there[0]}" if there else "")
        ) from error
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(unfinished, final)
        for old in checkpoints(out)[:-2]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def restore_best(out: Path, checkpoint: Path) -> None:
    """Put back the best of that time: the folder may hold one of steps that come again."""
    shutil.rmtree(out / "best", ignore_errors=True)
    if (checkpoint / "best").is_dir():
        shutil.copytree(checkpoint / "best", out / "best")


def checkpoint_at(out: Path, step: int) -> Path:
    """Return the folder of a checkpoint."""
    return out / "checkpoints" / f"step-{step:08d}"


def progress_of(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint says of its run: step, name and arguments."""
    return json.loads((checkpoint / "progress.json").read_text())


def lasting(args: argparse.Namespace, processes: int) -> dict[str, Any]:
    """The arguments that a resumed run must share with the run it goes on with."""
    free = FREE | (set() if args.streaming else {"workers"})
    kept = {k: v for k, v in vars(args).items() if k not in free}
    return json.loads(json.dumps({**kept, "processes": processes}))


def newest(out: Path) -> Path:
    """Return the newest checkpoint; ``ValueError`` where there is none."""
    found = checkpoints(out)
    if not found:
        raise ValueError(
            f"--resume: {out / 'checkpoints'} holds no checkpoint to go on from; start without --resume, and with "
            "--overwrite where the folder holds what a run left"
        )
    return found[-1]


def resume_step(out: Path, args: argparse.Namespace, processes: int) -> tuple[Path, int]:
    """Return the newest checkpoint and its step.

    Raises ``ValueError`` where there is none, or it is of other arguments and ``--change`` does not name them.
    """
    found = newest(out)
    progress = progress_of(found)
    check_run(found, progress.get("run"), out)
    then, now = progress["arguments"], lasting(args, processes)
    changed = [k for k in now if then.get(k) != now[k]]
    meant = [k for k in changed if k in getattr(args, "change", ())]
    if changed != meant:
        left = [k for k in changed if k not in meant]
        named = f" --change {' '.join(k.replace('_', '-') for k in left)}," if set(left) <= set(CHANGEABLE) else ""
        raise ValueError(
            f"{found} was trained with {', '.join(f'{k}={then.get(k)!r}' for k in left)}; now it is "
            f"{', '.join(f'{k}={now[k]!r}' for k in left)}. Resume with the same arguments,{named} or choose another "
            "--out"
        )
    if args.steps < progress["step"]:
        raise ValueError(f"{found} has {progress['step']} steps behind it, and --steps is {args.steps}; give more")
    return found, progress["step"]
