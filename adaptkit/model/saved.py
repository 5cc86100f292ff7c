"""Adapters and heads from a file: what its header says of them is checked before anything is built, and what it would
build, by names, shapes and dtypes, before anything is allocated.

Two things bound the work. A module is first built on the meta device, where a tensor has a shape and no values; and
building it may take no more calls of torch than one with the file's own tensors could, so that ten thousand layers are
refused after the first few.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from adaptkit.core.registry import Entry, configured
from adaptkit.hub.file import FLOATS, AdapterFile
from adaptkit.hub.packages import needs

__all__ = ["Bounded", "build", "check_tensors", "configured_by"]

#: How many calls of torch building a module takes, and how many values are made on the way, beside the file's.
CALLS, CALLS_PER_TENSOR, SPARE = 5000, 50, 1 << 20
#: What initialises a tensor in place.
INITIALISERS = {
    "normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_",
    "constant_", "ones_", "zeros_", "zero_", "fill_", "erfinv_", "mul_", "add_", "clamp_",
}  # fmt: skip
FACTORIES = {"empty", "zeros", "ones", "full", "rand", "randn", "eye"}


def configured_by(file: AdapterFile, said: Mapping[str, Any], known: dict[str, Entry], kind: str) -> tuple[Entry, Any]:
    """Return entry and config of an adapter or head as a header says them; ``kind`` is "adapter" or "head".

    Raises ``ValueError`` that names the file and the option: for an unknown or missing one, another type, a value that
    the config refuses.
    """
    name, options = said["name"], said["config"]
    where = f"{file.path}, {kind} {name!r}"
    try:
        entry = known.get(name)
        if entry is None:
            try:
                return configured((name, options), known, kind)  # which says what there is
            except ValueError as error:
                raise ValueError(f"{error}{needs(said)}") from error
        return entry, entry.from_file(options)
    except Exception as error:  # of a plug-in's config, too
        raise ValueError(f"{where}: {_said(error)}") from error


def build(
    make: Callable[[], nn.Module],
    tensors: dict[str, Tensor],
    where: str,
    translate: Callable[[Any, dict[str, Tensor]], dict[str, Tensor]] = lambda module, tensors: tensors,
    backbone: nn.Module | None = None,
) -> nn.Module:
    """Return the module that ``make`` builds, with these tensors.

    Args:
        make: builds the module.
        tensors: of the file.
        where: names file and method in errors.
        translate: from the module and the file's tensors to those by the module's own names.
        backbone: whose layers it builds around, which have values, so that it is not built on the meta device first.

    Raises ``ValueError`` where it cannot be built, or has other tensors than the file; nothing large is allocated then.
    """
    try:
        if backbone is None:
            with torch.device("meta"), Bounded(tensors):
                plan = make()
            check_tensors(plan.state_dict(), translate(plan, tensors), where)
        with Bounded(tensors, backbone):
            module = make()
        own = translate(module, tensors)
        check_tensors(module.state_dict(), own, where)
    except Exception as error:
        said = _said(error)
        raise ValueError(said if said.startswith(where) else f"{where}: {said}") from error
    module.load_state_dict(own)
    return module


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"cannot be built as the header says: {error!r:.500}"


class Bounded(TorchFunctionMode):
    """Build a module within bounds, in this thread, and leave its parameters as they are allocated.

    The file has the values of every parameter. Until memory is written to, it takes none: an allocation beyond the
    bounds is refused in time. Raises ``ValueError`` where the file's own tensors are far from enough for the module.
    """

    def __init__(self, tensors: Mapping[str, Tensor], backbone: nn.Module | None = None) -> None:
        super().__init__()
        self.given = len(tensors)
        self.calls = CALLS + CALLS_PER_TENSOR * len(tensors)
        self.values = SPARE + 2 * sum(t.numel() for t in tensors.values())
        if backbone is not None:  # there is one of it for each layer at most, and some keep a matrix beside it
            self.calls += CALLS_PER_TENSOR * sum(1 for _ in backbone.modules())
            self.values += 4 * sum(p.numel() for p in backbone.parameters())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        self.calls -= 1
        if name in INITIALISERS:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, nn.Parameter) or (isinstance(tensor, Tensor) and tensor.is_meta):
                return tensor
        made = func(*args, **kwargs)
        if name in FACTORIES and not made.is_meta:
            self.values -= made.numel()
        if min(self.calls, self.values) < 0:
            what = "layers" if self.calls < 0 else "values"
            raise ValueError(f"its config makes more {what} than the file's {self.given} tensors are for")
        return made


def check_tensors(
    own: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    where: str,
    remedy: str = "the file does not match its own header: save it again",
) -> None:
    """Raise ``ValueError`` where the keys, shapes or dtypes of ``given`` are not those of ``own``.

    One floating-point type may stand for another, as for a model in half precision; no number becomes another kind.
    """
    missing, unexpected = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(
            f"{where}: {len(missing)} tensors are missing ({', '.join(missing[:3])}), {len(unexpected)} are not "
            f"expected ({', '.join(unexpected[:3])}); {remedy}"
        )
    for key, tensor in own.items():
        there = given[key]
        if tensor.shape != there.shape:
            raise ValueError(f"{where}: {key} has shape {tuple(there.shape)}, this model needs {tuple(tensor.shape)}")
        if tensor.dtype != there.dtype and not (tensor.dtype in FLOATS and there.dtype in FLOATS):
            raise ValueError(f"{where}: {key} has {there.dtype}, this model needs {tensor.dtype}: save it again")
