"""What the commands print with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress", "table"]


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[], None]]:
    """Show how far a loop is, in a terminal; yields what to call after each turn."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        row = bar.add_task(what, total=total)
        yield lambda: bar.advance(row)


def table(title: str, rows: list[tuple[str, str]]) -> None:
    """Print rows of two cells under a title; what a file says is shown and not done."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from adaptkit.core.printable import printable

    drawn = Table(title=Text(printable(title)), title_justify="left", show_header=False)
    drawn.add_column(no_wrap=True, style="bold")
    drawn.add_column(overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(printable(cell)) for cell in row))  # as Text it is no markup
    Console().print(drawn)
