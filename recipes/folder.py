"""The folder of a run: one process writes to it at a time, and what is in it is of one run."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from adaptkit.hub.write import check_writable, write_atomic

try:
    import fcntl
except ImportError:  # no POSIX system: two runs in one folder are then not noticed
    fcntl = None  # type: ignore[assignment]

MADE = (
    "checkpoints",
    "metrics.jsonl",
    "result.json",
    "adapter",
    "best",
    "config.yaml",
)  # what a run of the shared loop leaves
LOCK, RUN = ".lock", "run.json"


@contextmanager
def occupied(
    out: str | os.PathLike[str],
    process: Any,
    resume: bool = False,
    overwrite: bool = False,
    made: Sequence[str] = MADE,
    can_resume: bool = True,
) -> Iterator[Path]:
    """Make the folder, and let no other run write to it until this one ends, in whatever way.

    Args:
        out: ``--out``.
        process: the ``Accelerator`` or ``PartialState``. The first process looks, and all hear what it found.
        resume, overwrite: the options.
        made: names of what such a run leaves in its folder.
        can_resume: whether the recipe has ``--resume``.

    Raises ``ValueError`` where another run writes to it, or it holds one and neither option is given.
    """
    folder, lock, found = check_writable(out), None, [""]
    if process.is_main_process:
        try:
            lock = _locked(folder)
            _check(folder, resume, overwrite, made, can_resume)
        except (ValueError, OSError) as error:
            found = [str(error)]
    try:
        broadcast_object_list(found)
        if found[0]:
            raise ValueError(found[0])
        yield folder
    finally:
        if lock is not None:
            os.close(lock)  # and with it the lock goes, as it does when the process dies


def begin(out: Path, made: Sequence[str] = MADE) -> None:
    """Delete what an earlier run left, and name the new one; only its first process calls this."""
    for name in (*made, RUN):
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    name_run(out, uuid.uuid4().hex)


def adopt(out: Path, run: str | None) -> None:
    """Give a folder without a name that of the run whose checkpoint is gone on with."""
    if run_of(out) is None:
        name_run(out, run or uuid.uuid4().hex)


def name_run(out: Path, run: str) -> None:
    """Say in the folder whose it is."""
    write_atomic(out / RUN, (json.dumps({"run": run, "command": shlex.join(sys.argv)}) + "\n").encode())


def run_of(out: Path) -> str | None:
    """Return the name of the run whose folder this is; None where it has none."""
    path = out / RUN
    return json.loads(path.read_text())["run"] if path.is_file() else None


def check_run(checkpoint: Path, run: str | None, out: Path) -> None:
    """Raise ``ValueError`` where a checkpoint is of another run than its folder. One without a name fits."""
    here = run_of(out)
    if run is not None and here is not None and run != here:
        raise ValueError(
            f"{checkpoint} is of run {run}, and {out} is the folder of run {here}: take the checkpoint away, or go on "
            "with it in a folder of its own, --out"
        )


def _locked(folder: Path) -> int:
    """Lock the folder. The system gives the lock back when the process dies; its children do not share it."""
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if fcntl is not None:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        said = os.pread(handle, 4096, 0).decode(errors="replace").strip() or "another process"
        os.close(handle)
        raise ValueError(
            f"{said} writes to {folder}: wait until it ends, or stop it, or choose another --out ({error.strerror})"
        ) from error
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()} ({shlex.join(sys.argv)[:500]})\n".encode(), 0)
    return handle


def _check(folder: Path, resume: bool, overwrite: bool, made: Sequence[str], can_resume: bool) -> None:
    if resume and overwrite:
        raise ValueError("--resume goes on with the run in the folder, --overwrite deletes it: give one of them")
    found = [name for name in made if (folder / name).exists()]
    if found and not resume and not overwrite:
        resuming = "go on with it with --resume, " if can_resume else ""
        raise ValueError(
            f"{folder} holds an earlier run ({', '.join(found)}): {resuming}delete it with --overwrite, or choose "
            "another --out"
        )
