"""``adaptkit list``: adapters, heads and backbone families."""

from __future__ import annotations

import argparse
from typing import Any

from adaptkit.cli._show import table

__all__ = ["add", "run"]


def add(commands: Any) -> None:
    """Add the command and its arguments."""
    commands.add_parser("list", help="adapters, heads and backbone families")


def _first_line(thing: Any) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0]


def run(args: argparse.Namespace) -> None:
    """Print what the registry finds, plug-ins included."""
    from adaptkit.core import registry

    for title, entries in (("adapters", registry.adapters()), ("heads", registry.heads())):
        table(title, [(name, _first_line(entry.module)) for name, entry in sorted(entries.items())])
    backbones: dict[str, list[str]] = {}
    for path in sorted(registry.families()):
        library, _, name = path.partition(".")[0], None, path.rpartition(".")[2]
        backbones.setdefault(library, []).append(name)
    table("backbones", [(library, ", ".join(names)) for library, names in backbones.items()])
