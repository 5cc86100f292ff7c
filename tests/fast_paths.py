"""What every fast path is tried on: arguments of the text that it stands in for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Example(NamedTuple):
    """One call of a text.

    ``make(dtype=dtype)`` returns its arguments, the same numbers in every dtype; tensors that want a gradient say so.
    """

    id: str
    make: Callable[..., tuple[Any, ...]]
    sums: tuple[int, ...]  #: the terms of each sum that a number of the result goes through, for the error model
    backward: tuple[int, ...] = ()  #: of a gradient; by default twice those, and the rows that a weight is summed over
    training: bool = True  #: whether it is differentiated; else it runs without gradients


def gathered() -> dict[str, list[Example]]:
    """Examples of every file in ``tests/_cpu`` that has them, by the qualified name of the text."""
    found: dict[str, list[Example]] = {}
    for file in sorted((Path(__file__).parent / "_cpu").glob("examples_*.py")):
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found |= module.EXAMPLES
    return found
