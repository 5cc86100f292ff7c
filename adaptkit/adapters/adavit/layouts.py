"""Copies of a backbone's weights as some processor multiplies them best."""

from __future__ import annotations

from typing import Any

__all__ = ["Layouts"]


class Layouts:
    """Weights that are laid out at their first use and held, for as long as :meth:`AdaViT.prepacked` lasts.

    The fast path that uses them fills them: see ``adaptkit._cpu.onednn``. A copy of the model starts without.
    """

    def __init__(self) -> None:
        self.held: dict[Any, Any] = {}

    def __reduce__(self) -> tuple[type[Layouts], tuple[()]]:  # what is laid out cannot be copied nor saved
        return Layouts, ()
