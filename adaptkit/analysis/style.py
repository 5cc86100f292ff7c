"""One style for every figure: colours that anyone can tell apart, vector output, nothing that means nothing.

A figure is drawn by a result: what was measured, as numbers, and :meth:`Drawn.figure` and :meth:`Drawn.save`, which
need matplotlib (``pip install 'adaptkit-vit[figures]'``). It never touches pyplot, so that notebooks and servers keep
their own state.
"""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from adaptkit.analysis.draw import to_picture
from adaptkit.core.view import Source
from adaptkit.predict.palette import palette

__all__ = ["COLOURS", "MAP", "WIDTH", "Drawn", "colour_bar", "panels", "pictured", "share", "show", "star"]

COLOURS = tuple(f"#{r:02x}{g:02x}{b:02x}" for r, g, b in palette(12))  #: of curves and groups, one after another
MAP = "viridis"  #: of values: even in lightness, so that it reads in grey as well
WIDTH = 6.75  #: of a page of two columns, in inches
SUFFIXES = (".pdf", ".svg", ".png")
STYLE: Any = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7, "xtick.labelsize": 7,
    "ytick.labelsize": 7, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "lines.linewidth": 1.4, "lines.markersize": 3,
    "legend.frameon": False, "savefig.dpi": 200, "figure.dpi": 150, "image.interpolation": "nearest",
    "pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "adaptkit",
}  # fmt: skip


class Drawn(ABC):
    """A result that can be drawn."""

    @abstractmethod
    def draw(self, figure: Any) -> None:
        """Draw on an empty matplotlib figure, and give it its size."""

    def figure(self) -> Any:
        """Return a matplotlib ``Figure``. Raises ``ImportError`` where matplotlib is missing."""
        with styled() as make:
            figure = make(layout="constrained")
            self.draw(figure)
        return figure

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the figure as ``.pdf``, ``.svg`` or ``.png``, and return where it is.

        The same numbers give the same bytes. Raises ``ValueError`` for another suffix.
        """
        path = Path(path).expanduser()
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{path}: a figure is written as {', '.join(SUFFIXES)}; end the name with one of these")
        date = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(path.suffix.lower(), {})
        with styled():
            self.figure().savefig(path, metadata=date)
        return path

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        page = io.BytesIO()
        with styled():
            self.figure().savefig(page, format="png")
        return page.getvalue()


@contextmanager
def styled() -> Iterator[Any]:
    """Inside, matplotlib draws in our style; yields its ``Figure``. Raises ``ImportError`` where it is missing."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "figures are drawn by matplotlib, which is not installed: pip install 'adaptkit-vit[figures]'"
        ) from error
    with matplotlib.rc_context(STYLE):
        yield Figure


def pictured(images: Tensor | Sequence[Tensor], source: Source) -> tuple[np.ndarray, ...]:
    """Normalised images, each (C, H, W) -> their pixels (H, W, 3) as they were, 8 bits."""
    return tuple(np.asarray(to_picture(image, source)) for image in images)


def panels(
    figure: Any, count: int, most: int, aspect: float = 1.0, title: float = 0.22, width: float = WIDTH, bar: float = 0.0
) -> list[Any]:
    """Give the figure so many panels for pictures, at most ``most`` in a row, and the height that they need.

    Rows are as full as they can be, and a last one that is not stands in the middle, so that no panel is empty.
    ``aspect`` is height over width of a picture, ``title`` the inches above each, ``bar``
    those beside all for the meaning of the colours.
    """
    rows = -(-count // most)
    columns = next((c for c in range(most, most // 2, -1) if count % c == 0), -(-count // rows))
    rows = -(-count // columns)
    side = min(width / columns, 2.2)
    figure.set_size_inches(side * columns + bar, rows * (side * aspect + title))
    grid = figure.add_gridspec(rows, 2 * columns)
    made = []
    for i in range(count):
        row, column = divmod(i, columns)
        missing = columns - (count - row * columns if row == rows - 1 else columns)
        left = 2 * column + missing
        axes = figure.add_subplot(grid[row, left : left + 2])
        axes.set_axis_off()
        made.append(axes)
    return made


def show(
    axes: Any, picture: np.ndarray | None, heat: np.ndarray | None = None, stride: int = 1, alpha: float = 0.65,
    **options: Any,
) -> Any:  # fmt: skip
    """Show a picture (H, W, 3), and over it values (h, w) whose cells have ``stride`` pixels; returns the last shown.

    Cells that reach over the edge of the picture, where it was padded, are cut there.
    """
    shown = None
    if picture is not None:
        shown = axes.imshow(picture)
    if heat is not None:
        extent = (-0.5, heat.shape[1] * stride - 0.5, heat.shape[0] * stride - 0.5, -0.5)
        shown = axes.imshow(heat, extent=extent, alpha=alpha, **{"cmap": MAP, **options})
    if picture is not None:
        axes.set_xlim(-0.5, picture.shape[1] - 0.5)
        axes.set_ylim(picture.shape[0] - 0.5, -0.5)
    return shown


def share(values: Tensor, most: float = 0.99) -> np.ndarray:
    """Values (h, w) over their 99th percentile, at most 1: one patch that gets nearly all hides no other."""
    top = values.flatten().quantile(most).clamp_min(values.amax() * 1e-3).clamp_min(1e-30)
    return (values / top).clamp(max=1).numpy()


def star(axes: Any, query: tuple[float, float], size: float = 9) -> None:
    """Mark a query at the pixel (y, x)."""
    y, x = query
    axes.plot([x], [y], marker="*", markersize=size, color="#ffd500", markeredgecolor="black", markeredgewidth=0.7)


def colour_bar(figure: Any, shown: Any, axes: Sequence[Any], label: str) -> None:
    """Say what the colours of these panels mean."""
    bar = figure.colorbar(shown, ax=list(axes), shrink=0.8, aspect=25, pad=0.02)
    bar.set_label(label)
    bar.outline.set_linewidth(0.4)
    bar.solids.set_alpha(1)
