"""How the objects that a user meets show themselves: a title and a few rows, in a terminal and in a notebook.

A class says what there is by ``_shown()``, title and rows, and takes ``__repr__`` and ``_repr_html_`` from here.
"""

from __future__ import annotations

import dataclasses
import html
import textwrap
from collections.abc import Sequence
from typing import Any

from adaptkit.core.printable import printable

__all__ = ["Rows", "Shown", "as_html", "as_text", "changed", "counted", "listed"]

Rows = list[tuple[str, str]]
WIDTH = 110  #: characters of a line of text
MOST = 400  #: characters of one cell


class Shown:
    """Mixin: ``repr`` is :func:`as_text` and a notebook shows :func:`as_html`, both of ``_shown()``."""

    def _shown(self) -> tuple[str, Rows]:
        """Title and rows."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return as_text(*self._shown())

    def _repr_html_(self) -> str:
        return as_html(*self._shown())


def as_text(title: str, rows: Rows) -> str:
    """Return the title, and a line for each row, its continuations under its own column."""
    width = max((len(name) for name, _ in rows), default=0)
    lines = [printable(title)]
    for name, value in rows:
        first, rest = f"  {name:<{width}}  ", " " * (width + 4)
        lines += textwrap.wrap(_cell(value), WIDTH, initial_indent=first, subsequent_indent=rest) or [first.rstrip()]
    return "\n".join(lines)


def as_html(title: str, rows: Rows) -> str:
    """Return a table; whatever a file says in it is text and nothing else."""
    cells = "".join(
        f'<tr><th style="text-align:left;vertical-align:top">{html.escape(name)}</th>'
        f'<td style="text-align:left">{html.escape(_cell(value))}</td></tr>'
        for name, value in rows
    )
    return f"<div><b>{html.escape(printable(title))}</b><table>{cells}</table></div>"


def changed(config: Any) -> str:
    """Return the fields of a config, a dataclass, that differ from their defaults; ``defaults`` where none does."""
    said = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        made = field.default_factory
        default = made() if made is not dataclasses.MISSING else field.default
        if value != default:
            said.append(f"{field.name}={value!r}")
    return ", ".join(said) or "defaults"


def counted(number: int, what: str) -> str:
    """``1 block``, ``1,200 parameters``."""
    return f"{number:,} {what if number == 1 else what + 's'}"


def listed(names: Sequence[str], most: int = 3) -> str:
    """``a, b, c and 2 more``."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _cell(value: str) -> str:
    text = printable(value)
    return text if len(text) <= MOST else text[: MOST - 4] + " ..."
