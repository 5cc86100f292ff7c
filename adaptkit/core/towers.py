"""What to hand over instead of a model that no family sees: the tower inside it, or why there is none.

A vision-language model, a detector or a depth model holds the ViT under a name of its own. What is found there is named
in the error, by the attribute path that leads to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from adaptkit.core.tree import named_modules

__all__ = ["Found", "class_path", "first_of", "parts_of", "said_of"]


class Found(NamedTuple):
    """A part of a model."""

    path: str  #: of attributes, from the model
    module: nn.Module
    reason: str  #: why it is refused; "" where it is seen

    def __str__(self) -> str:
        return f"`model.{self.path}` (class {type(self.module).__name__})"


def class_path(cls: type) -> str:
    """Return ``"package.module.Class"``."""
    return f"{cls.__module__}.{cls.__qualname__}"


def first_of(model: nn.Module, table: Mapping[str, Any]) -> Any:
    """Return what a table by class path says of the class of ``model``, or of the nearest class above it, or None."""
    return next((table[path] for path in map(class_path, type(model).__mro__) if path in table), None)


def parts_of(
    model: nn.Module, family_of: Callable[[nn.Module], Callable[[nn.Module], Any] | None], refusals: Mapping[str, str]
) -> tuple[list[Found], list[Found]]:
    """Return the parts of ``model`` that a family sees, and those that are refused, with the reason.

    The outermost alone: what is inside one of them is not looked at.

    Args:
        model: that no family sees.
        family_of: returns what sees a module, or None.
        refusals: class path -> why no family sees that class.
    """
    seen: list[Found] = []
    refused: list[Found] = []
    below: list[str] = []
    for path, module in _top_down(model):
        why, family = first_of(module, refusals), family_of(module)
        if path.startswith(tuple(below)) or (why is None and family is None):
            continue
        below.append(f"{path}.")
        try:
            if family is None:
                raise TypeError(why)
            family(module)
            seen.append(Found(path, module, ""))
        except (TypeError, AttributeError) as error:
            refused.append(Found(path, module, str(error)))
    return seen, refused


def said_of(model: nn.Module, seen: list[Found], refused: list[Found], reason: str | None) -> str:
    """Return what to do with a model that no family sees, as the end of a sentence about it; "" where nothing is known.

    ``reason``: why its own class is refused, if it is.
    """
    if reason is not None:
        return f": {reason}"
    if not seen:
        return "".join(f"; nor its {part}: {part.reason}" for part in refused)
    ways = " or ".join(map(str, seen))
    return (
        f" as a whole; hand over what sees images in it, {ways}: the rest of the {type(model).__name__} stays beside it"
    )


def _top_down(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Go through the modules inside that have parts of their own, those nearer to the top first."""
    inside = [(path, module) for path, module in named_modules(model) if path and next(module.children(), None)]
    yield from sorted(inside, key=lambda item: item[0].count("."))
