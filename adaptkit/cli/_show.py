"""What the commands print with."""

from __future__ import annotations

__all__ = ["table"]


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
