"""What to hand over instead of a model that no family sees: the tower inside it, or why there is none.

A vision-language model, a detector or a depth model holds the ViT under a name of its own. What is found there is named
in the error, by the attribute path that leads to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from adaptkit.core.tree import named_modules

__all__ = ["class_path", "first_of", "said_of"]


def class_path(cls: type) -> str:
    """Return ``"package.module.Class"``."""
    return f"{cls.__module__}.{cls.__qualname__}"


def first_of(model: nn.Module, table: Mapping[str, Any]) -> Any:
    """Return what a table by class path says of the class of ``model``, or of the nearest class above it, or None."""
    return next((table[path] for path in map(class_path, type(model).__mro__) if path in table), None)


def said_of(
    model: nn.Module, family_of: Callable[[nn.Module], Callable[[nn.Module], Any] | None], refusals: Mapping[str, str]
) -> str:
    """Return what to do with a model that no family sees, as the end of a sentence about it; "" where nothing is known.

    Args:
        model: that no family sees.
        family_of: returns what sees a module, or None.
        refusals: class path -> why no family sees that class.
    """
    reason = first_of(model, refusals)
    if reason is not None:
        return f": {reason}"
    seen, refused, below = [], [], []
    for path, module in _top_down(model):
        why, family = first_of(module, refusals), family_of(module)
        if path.startswith(tuple(below)) or (why is None and family is None):
            continue
        below.append(f"{path}.")
        what = f"`model.{path}` (a {type(module).__name__})"
        try:
            if family is None:
                raise TypeError(why)
            family(module)
            seen.append(what)
        except (TypeError, AttributeError) as error:
            refused.append(f"; nor its {what}: {error}")
    if seen:
        return f" itself, but what it sees images with: hand over {' or '.join(seen)}; the rest stays beside it"
    return "".join(refused)


def _top_down(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Go through the modules inside that have parts of their own, those nearer to the top first."""
    inside = [(path, module) for path, module in named_modules(model) if path and next(module.children(), None)]
    yield from sorted(inside, key=lambda item: item[0].count("."))
