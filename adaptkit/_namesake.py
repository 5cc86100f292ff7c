"""On the package index ``adaptkit`` is another project's, with the same import name: no environment can hold both.

Imported first by the package: it raises ``ImportError`` where the other one is installed too.
"""

from collections.abc import Iterable
from importlib.metadata import Distribution, distributions

from adaptkit.version import DISTRIBUTION

__all__ = ["check"]

NAME = "adaptkit"
#: of this project while it was installed by that name, too
SUMMARY = "Small trainable modules for frozen vision transformers: attach, train, save, share."


def check(found: Iterable[Distribution]) -> None:
    """Raise ``ImportError`` if one of these distributions, all called ``adaptkit``, is not this project."""
    for other in found:
        summary = other.metadata["Summary"] if other.metadata is not None else None
        if summary == SUMMARY:
            continue
        raise ImportError(
            f"the installed distribution {NAME!r} {other.version} ({summary or 'without a summary'}) in "
            f"{other.locate_file('')} is another project; it has the import name of this one, {DISTRIBUTION!r}, so "
            f"that each overwrites files of the other: pip uninstall -y {NAME} {DISTRIBUTION}, then pip install "
            f"{DISTRIBUTION}"
        )


check(distributions(name=NAME))
