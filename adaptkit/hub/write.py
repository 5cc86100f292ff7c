"""Files that are whole or not there: written beside their place, on the disk, and then renamed into it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

__all__ = ["check_writable", "write_atomic", "write_together"]


def write_together(folder: str | os.PathLike[str], data: Mapping[str, bytes]) -> Path:
    """Write files into a folder, the last of ``data`` last; where one fails, the folder is as it was before."""
    new = not Path(folder).exists()
    path = check_writable(folder)
    written: dict[Path, Path] = {}
    former: dict[Path, Path] = {}
    try:
        for name, content in data.items():
            written[path / name] = _temporary(path / name, content)
        for target in list(written)[:-1]:  # the last one is there or not: nothing comes after it
            if target.exists():
                former[target] = _beside(target)
                shutil.copy2(target, former[target], follow_symlinks=False)
        done: list[Path] = []
        try:
            for target, temporary in written.items():
                os.replace(temporary, target)
                done.append(target)
        except BaseException:
            for target in done:
                _put_back(target, former.get(target))
            raise
    except BaseException:
        for left in (*written.values(), *former.values()):
            left.unlink(missing_ok=True)
        if new:
            with suppress(OSError):
                path.rmdir()
        raise
    for left in former.values():
        left.unlink(missing_ok=True)
    return path


def _put_back(target: Path, former: Path | None) -> None:
    if former is None:
        target.unlink()
        return
    try:
        os.replace(former, target)
    except OSError:
        shutil.copyfile(former, target)


def check_writable(folder: str | os.PathLike[str]) -> Path:
    """Make the folder and prove that a file can be written in it, before hours of work depend on it."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {path}: {error}. Choose a folder that you may write to") from error
    return path


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, never half of one."""
    temporary = _temporary(Path(path), data)
    try:
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _temporary(target: Path, data: bytes) -> Path:
    """Write ``data`` to the disk beside ``target``, ready to be renamed; ``OSError`` names the target."""
    path = _beside(target)
    try:
        with path.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        path.chmod(0o666 & ~umask)  # mkstemp makes it private; a shared folder wants the usual mode
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, error.strerror or str(error), str(target)) from error
        raise
    return path


def _beside(target: Path) -> Path:
    """Return a new, empty file beside ``target``."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    return Path(name)
