"""What is said of a backbone that is not what its view says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from adaptkit.core.hierarchical import HierarchicalViT
from adaptkit.core.view import View

__all__ = ["FAILURES", "differs", "name_of", "remedy", "tried"]

FAILURES = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError)


def tried(view: View, where: str, run: Callable[[], Any]) -> Any:
    """Run it; ``TypeError`` that names the backbone where it cannot be run."""
    try:
        return run()
    except FAILURES as error:
        raise TypeError(f"{name_of(view.backbone)} could not be run on {where}: {error}; {remedy(view)}") from error


def differs(view: View, what: str, off: float) -> TypeError:
    """Say what differs, and by how much."""
    seen_by, by = type(view).__name__, "in shape" if off == float("inf") else f"by {off:.1%}"
    return TypeError(f"{name_of(view.backbone)} is not what {seen_by} sees of it: {what} differ {by}; {remedy(view)}")


def remedy(view: View) -> str:
    """Say what to do."""
    cls = type(view.backbone)
    base = "core.hierarchical.HierarchicalViT" if isinstance(view, HierarchicalViT) else "core.view.ViT"
    return (
        "hand over a plain model of the class that it derives from, or register a family of its own: subclass "
        f"adaptkit.{base} and decorate it with @adaptkit.register_family('{cls.__module__}.{cls.__qualname__}')"
    )


def name_of(backbone: nn.Module) -> str:
    """Return the full name of a class."""
    return f"{type(backbone).__module__}.{type(backbone).__qualname__}"
