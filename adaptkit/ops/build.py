"""Compile a C file into a shared library of the user's cache, once.

The library's name carries a digest of all that it depends on: the source, the compiler and its version, the flags, the
features of this CPU (it is compiled for them) and torch's OpenMP runtime, whose threads it shares. It is compiled under
another name and then moved, so that there is never half a library, whoever else compiles at the same time.

To load a library is to run it, so it is checked first: a regular file of the user's that nobody else can write, in a
folder that nobody else can write, whose last bytes are the digest of those before them. The digest is part of the file
(the loader ignores what follows a library), so that one rename puts both in place. What fails is compiled again.
"""

import ctypes
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
from collections.abc import Mapping, Sequence
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


def load(
    source: Path, defines: dict[str, str], functions: Mapping[str, type | None], flags: Sequence[str] = ()
) -> ctypes.CDLL:
    """Return the library compiled from ``source``, with these functions and the types that they return.

    Raises `BuildError` if there is none, it cannot be loaded, or lacks one of the functions.
    """
    path = shared_library(source, defines, flags)
    try:
        library = ctypes.CDLL(path)
        for name, result in functions.items():
            getattr(library, name).restype = result
    except (OSError, AttributeError) as error:
        raise BuildError(f"{path} was compiled from {source.name} and is not what that describes: {error}") from error
    return library


def warn_slow(reason: str) -> None:
    """Say why plain operators do the work of a kernel.

    The first reason of a process is a warning where it can be mended; the others are most often the same one.
    """
    level = logging.INFO if _reasons or sys.platform != "linux" else logging.WARNING
    _reasons.append(reason)
    _log.log(level, "a compiled kernel is not used, and what takes its place is slower: %s", reason)


_reasons: list[str] = []  # that were said


def shared_library(source: Path, defines: dict[str, str], flags: Sequence[str] = ()) -> str:
    """Return the path of the library compiled from ``source`` with these macros, and flags beside ours.

    Raises `BuildError` if there is no compiler, it fails, or the cache cannot be written or is not the user's own.
    """
    compiler = _compiler()
    arch = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    flags = [*_FLAGS, arch, *flags, *(f"-D{name}={text}" for name, text in defines.items())]
    runtime = _openmp_runtime()
    parts = ["sealed", source.read_text(), *compiler, _run([*compiler, "--version"]), *flags, _cpu(), *runtime]
    key = hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()[:20]
    library = _cache_folder() / f"{source.parent.name}-{key}.so"
    fault = _fault(library, key)
    if fault is None:
        return str(library)
    if os.path.lexists(library):
        _log.warning("%s is not loaded, and compiled again: %s", library, fault)
    try:
        # In a folder of its own, which leaves nothing behind when the compiler fails.
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            new = Path(scratch) / library.name
            _run([*compiler, *flags, str(source), "-o", str(new), "-Wl,--as-needed", *runtime, "-lm"])
            _seal(new, key)
            os.replace(new, library)
        _sync(library.parent)
    except OSError as error:
        raise BuildError(f"{library} cannot be written: {error}; set XDG_CACHE_HOME to a folder of yours") from error
    return str(library)


def _digest(content: bytes, key: str) -> bytes:
    """Of a library and of the key in its name: the library of another source is no good under this name."""
    return hashlib.sha256(key.encode() + content).digest()


def _seal(library: Path, key: str) -> None:
    """Write the digest of a library at its end, and all of it to the disk."""
    with library.open("r+b") as file:
        file.write(_digest(file.read(), key))
        file.flush()
        os.fchmod(file.fileno(), 0o600)
        os.fsync(file.fileno())


def _fault(library: Path, key: str) -> str | None:
    """Return why this file must not be loaded, or None if it is what the user compiled, byte for byte."""
    try:  # O_NONBLOCK: to open a pipe would wait for somebody who writes to it
        handle = os.open(library, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        return "it is a symbolic link" if library.is_symlink() else str(error)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            return "it is no regular file"
        reason = _not_private(status)
        if reason:
            return f"it {reason}"
        with open(handle, "rb", closefd=False) as file:
            content = file.read()
    except OSError as error:
        return str(error)
    finally:
        os.close(handle)
    size = hashlib.sha256().digest_size
    if content[-size:] != _digest(content[:-size], key):
        return "its bytes are not those that were compiled"
    return None


def _not_private(status: os.stat_result) -> str | None:
    """Return what is wrong if others could have written it."""
    if status.st_uid != os.getuid():
        return f"belongs to user {status.st_uid}, and this is user {os.getuid()}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written by others (mode {stat.S_IMODE(status.st_mode):o})"
    return None


def _sync(folder: Path) -> None:
    """Write the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _compiler() -> list[str]:
    if sys.platform != "linux":
        raise BuildError(f"it is compiled on Linux only, and this is {sys.platform}")
    said = os.environ.get("CC", "")
    try:
        asked = shlex.split(said)
    except ValueError as error:
        raise BuildError(f"CC={said!r} is no command line: {error}; quote it as for a shell, or unset it") from error
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
        minutes = _SECONDS // 60
        raise BuildError(
            f"{command[0]} did not end in {minutes} minutes and was stopped: is it waiting for something?"
        ) from error
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
    reason = _not_private(status)
    if reason:  # whoever could write there may have left something to be loaded, which other rights would not undo
        raise BuildError(
            f"the cache {folder} {reason}: delete it (rm -r {shlex.quote(str(folder))}), it is made anew; or set "
            "XDG_CACHE_HOME to a folder of yours"
        )
    return folder
