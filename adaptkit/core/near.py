"""What a user may have meant: one rule for names of adapters, heads, tasks, options and files."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path

__all__ = ["beside", "hint", "looks_like_path", "nearest"]

CUTOFF = 0.6  #: of difflib's ratio, its own default


def nearest(name: object, known: Iterable[object]) -> str | None:
    """Return the known name that is most like ``name``; None where none is.

    Upper and lower case, hyphens, underscores, blanks and dots make no difference: ``ViT_Adapter`` is
    ``vit-adapter``. Beyond that difflib decides.
    """
    by_key: dict[str, str] = {}
    for one in known:
        by_key.setdefault(_key(one), str(one))
    found = difflib.get_close_matches(_key(name), by_key, 1, CUTOFF)
    return by_key[found[0]] if found else None


def hint(name: object, known: Iterable[object]) -> str:
    """Return `` (did you mean 'vit-adapter'?)`` to be put behind a wrong name, or nothing where no name is near."""
    found = nearest(name, known)
    return "" if found is None or found == name else f" (did you mean {found!r}?)"


def beside(path: str | os.PathLike[str]) -> str:
    """Return :func:`hint` for a path that does not exist, from what lies in its folder."""
    wanted = Path(path)
    try:
        names = [one.name for one in wanted.parent.iterdir()]
    except OSError:
        return ""
    found = nearest(wanted.name, names)
    return "" if found is None or found == wanted.name else f" (did you mean {str(wanted.parent / found)!r}?)"


def looks_like_path(name: object) -> bool:
    """Whether a text can only mean a place on this disk, so that the Hub is not asked when nothing is there.

    It begins with ``./``, ``../``, ``/`` or ``~``, holds a backslash or more than one slash, or its first folder exists
    here: ``runs/seg`` where there is a folder ``runs``.
    """
    if isinstance(name, os.PathLike):
        return True
    if not isinstance(name, str) or not name:
        return False
    first, slash, _ = name.partition("/")
    if first in ("", ".", "..") or name.startswith("~") or "\\" in name or name.count("/") > 1:
        return True
    return bool(slash) and Path(first).is_dir()


def _key(name: object) -> str:
    return re.sub(r"[-_.\s]", "", str(name).lower())
