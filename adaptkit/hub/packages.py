"""Where a plug-in's adapter, head or family comes from, so that a file can say what it needs."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["needs", "origin_of"]

#: of a distribution: letters, digits and what may stand between them (the packaging specification of names)
DISTRIBUTION = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9])?")
MODULE = re.compile(r"[^\W\d]\w{0,98}")


def origin_of(cls: type) -> dict[str, str]:
    """Return what a header says of where a class comes from: nothing for adaptkit's own.

    ``package``, the distribution to install, where one holds the class: the one whose entry point of the group
    ``adaptkit.plugins`` leads to its module or top-level package, else the one whose files it is among. Where none
    does, ``module``, its top-level name: a module of the user's own, which no index has.
    """
    top = cls.__module__.partition(".")[0]
    if top in ("adaptkit", "__main__", "builtins"):
        return {}
    package = _distribution(cls.__module__)
    return {"package": package} if package else {"module": top}


@functools.lru_cache(maxsize=256)
def _distribution(module: str) -> str:
    top = module.partition(".")[0]
    points = sorted(metadata.entry_points(group="adaptkit.plugins"), key=lambda point: point.module != module)
    for point in points:
        if point.dist is not None and point.module.partition(".")[0] == top:
            return point.dist.name
    file = getattr(sys.modules.get(top), "__file__", None)
    for name in metadata.packages_distributions().get(top, ()):
        # A module here may have the name of one that is installed and not imported.
        if file is not None and Path(file).is_relative_to(Path(str(metadata.distribution(name).locate_file("")))):
            return name
    return ""


def needs(said: Mapping[str, Any]) -> str:
    """Return what to add to an error about a method or family that is not here; empty where the file does not know.

    A file may say anything: what is no name of a package or module is left out.
    """
    package, module = said.get("package"), said.get("module")
    if isinstance(package, str) and DISTRIBUTION.fullmatch(package):
        return f". It is of the package {package}: if you trust it, pip install {package}"
    if isinstance(module, str) and MODULE.fullmatch(module):
        return f". It was registered by the module {module}, which no package holds: import that first"
    return ""
