"""Compile a C file into a shared library of the user's cache, once.

The library's name carries a digest of all that it depends on: the source, the compiler and its version, the flags, the
features of this CPU (it is compiled for them) and torch's OpenMP runtime, whose threads it shares. It is compiled under
another name and then moved, so that there is never half a library, whoever else compiles at the same time.
"""

import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

_COMPILERS = ("gcc", "cc", "clang")
# Products and sums are not contracted, so that a point falls into the same cell as in torch, and whole coordinates are
# whole. NaN and infinity keep their meaning; only errno and traps are given up.
_FLAGS = shlex.split("-O3 -std=gnu11 -shared -fPIC -fopenmp -ffp-contract=off -fno-math-errno -fno-trapping-math")
_SECONDS = (
    1800  # a busy machine takes its time over what is done in three seconds; only a compiler that hangs ends here
)

_log = logging.getLogger(__name__)


class BuildError(RuntimeError):
    """There is no library, and the text says why."""


def shared_library(source: Path, defines: dict[str, str], flags: Sequence[str] = ()) -> str:
    """Return the path of the library compiled from ``source`` with these macros, and flags beside ours.

    Raises `BuildError` if there is no compiler, it fails, or the cache cannot be written or is not the user's own.
    """
    compiler = _compiler()
    arch = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    flags = [*_FLAGS, arch, *flags, *(f"-D{name}={text}" for name, text in defines.items())]
    runtime = _openmp_runtime()
    parts = [source.read_text(), *compiler, _run([*compiler, "--version"]), *flags, _cpu(), *runtime]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    folder = _cache_folder()
    library = folder / f"{source.parent.name}-{digest}.so"
    if not library.exists():
        try:
            # In a folder of its own, which leaves nothing behind when the compiler fails.
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                new = Path(scratch) / library.name
                _run([*compiler, *flags, str(source), "-o", str(new), "-Wl,--as-needed", *runtime, "-lm"])
                os.replace(new, library)
        except OSError as error:
            raise BuildError(
                f"{library} cannot be written: {error}; set XDG_CACHE_HOME to a folder of yours"
            ) from error
    return str(library)


def _compiler() -> list[str]:
    if sys.platform != "linux":
        raise BuildError(f"it is compiled on Linux only, and this is {sys.platform}")
    asked = shlex.split(os.environ.get("CC", ""))
    for command in [asked] if asked else [[name] for name in _COMPILERS]:
        found = shutil.which(command[0])
        if found:
            return [found, *command[1:]]
    raise BuildError(f"no C compiler: none of {', '.join(asked[:1] or _COMPILERS)} is on the PATH; install gcc")


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
    except subprocess.TimeoutExpired as error:
        _log.warning(
            "%s did not end in %d minutes and was stopped: is it waiting for something?", command[0], _SECONDS // 60
        )
        raise BuildError(f"{command[0]} did not end in {_SECONDS // 60} minutes") from error
    if done.returncode:
        raise BuildError(f"{command[0]} failed with status {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout


@cache
def _cpu() -> str:
    """What code for "this CPU" depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    wanted = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(wanted)}))


@cache
def _openmp_runtime() -> list[str]:
    """The GNU OpenMP library that torch has loaded: one pool of threads for both, and torch's own number of them."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[-1] for line in lines if ".so" in line}
    loaded = sorted(path for path in paths if Path(path).name.startswith("libgomp"))
    own = [path for path in loaded if Path(path).is_relative_to(Path(torch.__file__).parent)]
    return (own or loaded)[:1]


def _cache_folder() -> Path:
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adaptkit"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError) as error:
        raise BuildError(f"the cache cannot be made: {error}; set XDG_CACHE_HOME to a folder of yours") from error
    # Code is loaded from here: nobody else may have put it there.
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(f"the cache {folder} belongs to or can be written by others; run chmod 700 on it, or move it")
    return folder
