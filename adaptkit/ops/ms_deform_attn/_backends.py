"""Which backend runs a call: the one asked for, or the fastest that can.

| backend | where | what |
|---|---|---|
| ``"c"`` | CPU, where a C compiler is found | ``kernel.c``, compiled on first use and kept in the user's cache |
| ``"triton"`` | CUDA, where Triton is installed | kernels of ``_triton.py`` |
| ``"embedding_bag"`` | CPU and CUDA | plain torch with a backward of its own; the same bits each time |
| ``"gather"`` | everywhere | plain operators: for exports and for the transforms of ``torch.func`` |
| ``"grid_sample"`` | everywhere | the papers' own form, the reference |

The first three are modules with a ``forward`` and a ``backward``, run inside one custom operator.
"""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from adaptkit.seam import is_transformed

NAMES = ("auto", "c", "triton", "embedding_bag", "gather", "grid_sample")
_MODULES = {"c": "_c", "triton": "_triton", "embedding_bag": "_bag"}
_VARIABLE = "ADAPTKIT_OPS"
_TINY = 2**15  # points times channels, under which grid_sample costs less than the sixty operators around embedding_bag

_default = os.environ.get(_VARIABLE, "auto")
_source = f"the environment variable {_VARIABLE}"


def set_backend(name: str) -> None:
    """Choose the backend of all calls that do not name one, in this process; ``"auto"`` gives the choice back.

    The environment variable ``ADAPTKIT_OPS`` is what it is at first. Raises ``ValueError`` for an unknown name. A known
    one that cannot run where the tensors are is an error of the call.
    """
    global _default, _source
    _default, _source = _known(name, "backend"), "set_backend"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Do as `set_backend` does, inside of a ``with`` block."""
    global _default, _source
    before = _default, _source
    set_backend(name)
    try:
        yield
    finally:
        _default, _source = before


def _known(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source}={name!r} is unknown; choose one of {', '.join(NAMES)}")
    return name


def choose(name: str, value: Tensor, weights: Tensor) -> str:
    """Return what this call takes: a plain form, or the custom operator's backend, which may be "auto" still.

    "auto" is settled inside of the operator, so that no compiler traces into it.
    """
    if _known(name, "backend") == "auto":
        if torch.compiler.is_exporting() or is_transformed():
            return "gather"
        name = _known(_default, _source)
    if name != "auto":
        return name
    if value.device.type not in ("cpu", "cuda"):
        return "grid_sample"
    if torch.compiler.is_compiling() or type(value) is not Tensor:  # a tensor without data compiles no kernel
        return name
    tiny = value.device.type == "cpu" and weights.numel() * value.shape[3] < _TINY
    return "grid_sample" if tiny and why_not("c", value, weights) else name


def implementation(name: str, value: Tensor, weights: Tensor) -> ModuleType:
    """Return the module that runs a call of the custom operator.

    Raises ``RuntimeError`` where the one asked for cannot.
    """
    if name == "auto":
        first = "c" if value.device.type == "cpu" else "triton"
        # Atomic additions come in any order: those who ask torch for equal bits do not get them.
        ordered = first == "triton" and torch.are_deterministic_algorithms_enabled()
        name = "embedding_bag" if ordered or why_not(first, value, weights) else first
    else:
        reason = why_not(name, value, weights)
        if reason:
            raise RuntimeError(f"ms_deform_attn with backend={name!r} cannot run: {reason}; use backend='auto'")
    return _module(name)


def why_not(name: str, value: Tensor, weights: Tensor) -> str | None:
    """Return why a fast backend cannot run a call, or None if it can."""
    if name == "embedding_bag":
        return None
    if name not in _MODULES:
        return f"it is none of the operator's, {', '.join(_MODULES)}"
    try:
        return _module(name).why_not(value, weights)
    except ImportError as error:
        return f"{error}"


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"adaptkit.ops.ms_deform_attn.{_MODULES[name]}")
