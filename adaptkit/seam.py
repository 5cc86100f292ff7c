"""The seam between a method as its paper writes it and code that does the same faster on one device.

An adapter's file holds the *text*: plain modules, plain torch, ``forward`` in every module. It is the definition, runs
everywhere, and is what CUDA, ``torch.compile``, ``torch.export``, autocast, hooks, ``torch.func`` and second
derivatives get. A *fast path* is registered for a piece of it from outside, in :mod:`adaptkit._cpu`::

    class Extractor(nn.Module):
        @accelerated
        def forward(self, c, x, grids): ...          # the text

    @fast_path(Extractor.forward)
    def extractor(self, c, x, grids): ...            # the same, faster

One predicate, :func:`may_be_fast`, decides for all of them. ``tests/test_seam.py`` holds each to its text.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

__all__ = [
    "FastPath",
    "accelerated",
    "bound",
    "constant",
    "fast_path",
    "fast_paths",
    "full_precision",
    "is_reference",
    "is_timeable",
    "is_traced",
    "is_transformed",
    "may_be_fast",
    "modes",
    "must_wait",
    "product_dtype",
    "records_gradients",
    "reference",
    "twice",
    "without_autocast",
]

F = TypeVar("F", bound=Callable[..., Any])

#: Set to 1, it runs the text everywhere in this process, as :func:`reference` does in a block.
VARIABLE = "ADAPTKIT_REFERENCE"

_reference: ContextVar[bool] = ContextVar("reference", default=os.environ.get(VARIABLE, "0") not in ("", "0"))
_registered: dict[str, FastPath] = {}


class FastPath(NamedTuple):
    """What may run in place of a text."""

    text: Callable[..., Any]
    run: Callable[..., Any]
    is_supported: Callable[..., bool]  #: of the same arguments: whether it knows this case, beside what holds for all


def _always(*args: Any, **kwargs: Any) -> bool:
    return True


def accelerated(text: F) -> F:
    """Mark a function or a ``forward`` as a text for which a fast path may be registered."""
    name = f"{text.__module__}.{text.__qualname__}"

    @functools.wraps(text)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return text(*args, **kwargs)
        path = _registered.get(name)
        if path is None or not may_be_fast((*args, *kwargs.values())) or not path.is_supported(*args, **kwargs):
            return text(*args, **kwargs)
        return path.run(*args, **kwargs)

    run.text = text  # type: ignore[attr-defined]
    return run  # type: ignore[return-value]


def fast_path(marked: Callable[..., Any], is_supported: Callable[..., bool] = _always) -> Callable[[F], F]:
    """Register the decorated function in place of a text that is marked as :func:`accelerated`."""
    text: Callable[..., Any] = marked.text  # type: ignore[attr-defined]

    def register(run: F) -> F:
        _registered[f"{text.__module__}.{text.__qualname__}"] = FastPath(text, run, is_supported)
        return run

    return register


def fast_paths() -> dict[str, FastPath]:
    """Return all that are registered, by the qualified name of their text."""
    return dict(_registered)


# -------------------------------------------------------------------------------------------- which of the two runs


@contextmanager
def reference() -> Iterator[None]:
    """Inside, every method runs as its paper writes it: no fast path is taken.

    The environment variable ``ADAPTKIT_REFERENCE=1`` does so for a whole process. What torch's own kernels cannot do
    is not changed by it: its flash attention has neither a second derivative nor a tangent in forward mode, and raises
    "derivative for ... is not implemented" or "does not support" it. Run the forward pass inside of
    ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`` for those.
    """
    token = _reference.set(True)
    try:
        yield
    finally:
        _reference.reset(token)


def is_reference() -> bool:
    """Whether :func:`reference` or the environment variable asks for the text."""
    return _reference.get()


def bound(run: F, state: Iterable[tuple[object, str]] = ()) -> F:
    """Return ``run`` as it runs now, for a checkpoint that calls it again in the backward pass.

    It then runs as text or fast path as it does here, and finds the attributes of ``state``, pairs of object and name,
    as they are now: ``model.eval()`` between forward and backward changes nothing.
    """
    if torch.compiler.is_compiling():  # it runs the text in any case, and the graph has its modes
        return run
    before, now = _reference.get(), [(owner, name, getattr(owner, name)) for owner, name in state]

    def again(*args: Any, **kwargs: Any) -> Any:
        changed = [(o, name, value, getattr(o, name)) for o, name, value in now if getattr(o, name) is not value]
        token = _reference.set(before)
        try:
            for owner, name, value, _ in changed:
                setattr(owner, name, value)
            return run(*args, **kwargs)
        finally:
            for owner, name, _, later in changed:
                setattr(owner, name, later)
            _reference.reset(token)

    return again  # type: ignore[return-value]


def modes(modules: Iterable[nn.Module]) -> list[tuple[object, str]]:
    """Return the state of :func:`bound` that says whether these modules are in training mode."""
    return [] if torch.compiler.is_compiling() else [(module, "training") for module in modules]


def without_autocast(backward: F) -> F:
    """Mark the backward of a fast path: its forward ran without autocast, and so does it, whoever calls it."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return backward(ctx, *grads)
        with torch.autocast("cpu", enabled=False):
            return backward(ctx, *grads)

    return run  # type: ignore[return-value]


def may_be_fast(args: Iterable[Any]) -> bool:
    """Whether a fast path may run on these arguments: tensors, modules, and tuples of them.

    It may on plain float32 tensors on a CPU, in eager mode, where nobody looks into what it passes over: no hook, no
    other module in the place of one of ours, no autocast, no transform of ``torch.func``, no dispatch mode (fake
    tensors, FLOP counters, tracing), no compiler, no ``torch.jit`` trace.
    """
    if _reference.get() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch.is_autocast_enabled("cpu") or is_transformed():
        return False
    if torch._C._len_torch_dispatch_stack():
        return False
    return all(_is_plain(arg) for arg in args)


def is_transformed() -> bool:
    """Whether this runs inside a transform of ``torch.func``, or with tangents of forward-mode differentiation."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


# A compiler asks while it traces, inside of the transform that it traces. This is what
# `torch.compiler.assume_constant_result` does, without importing the compiler.
is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def constant(x: Tensor) -> Tensor:
    """``x`` without its derivative, in any mode: ``detach()`` lets the tangent of forward mode through."""
    if not is_transformed():
        return x.detach()
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.view(bits).view(x.dtype)


def _is_plain(arg: Any) -> bool:
    if isinstance(arg, Tensor):
        return _is_plain_tensor(arg)
    if isinstance(arg, nn.Module):
        return _is_untouched(arg)
    if isinstance(arg, tuple | list):
        return all(_is_plain(part) for part in arg)
    return True


def _is_plain_tensor(x: Tensor) -> bool:
    plain = type(x) is Tensor or type(x) is nn.Parameter
    return plain and x.device.type == "cpu" and (x.dtype == torch.float32 or not x.is_floating_point())


def _is_untouched(module: nn.Module) -> bool:
    """Whether everything below is torch's or ours, unchanged, and nobody waits for it to run."""
    if torch_module._has_any_global_hook():
        return False
    for part in module.modules():
        own = part.__dict__
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return False
        if "forward" in own or own.get("_compiled_call_impl") is not None:
            return False
        if not type(part).__module__.startswith(("torch.nn.modules.", "adaptkit.")):
            return False
        for values in (own["_parameters"].values(), own["_buffers"].values()):
            if not all(value is None or _is_plain_tensor(value) for value in values):
                return False
    return True


# ---------------------------------------------------------------------------------------------- what a text may ask


def is_traced() -> bool:
    """Whether a graph is being recorded, to be run on other numbers: no shape may depend on one."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def records_gradients() -> bool:
    """Whether autograd records what runs here, for a backward pass that may come."""
    return torch.is_grad_enabled()


def must_wait(x: Tensor) -> bool:
    """Whether to read a number of ``x`` the host must wait for a device that works beside it: for any but a CPU.

    Under :func:`reference` a CPU counts as one, so that what runs on a GPU can be followed there.
    """
    return x.device.type != "cpu" or is_reference()


def is_timeable(x: Tensor) -> bool:
    """Whether operators on ``x`` really run, and nobody counts or traces them: it is no fake tensor."""
    return type(x) is Tensor and not x.is_meta and not torch._C._len_torch_dispatch_stack() and not is_traced()


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Inside, autocast is off for the device of ``x``."""
    if not torch.is_autocast_enabled(x.device.type):  # a graph need not hold what changes nothing
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which ``x`` is multiplied: that of autocast where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


# ------------------------------------------------------------------------------------------- derivatives of derivatives


def twice(text: Callable[..., Any], args: Sequence[Any], *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of ``text(*args)`` that can be differentiated again, one for each of ``args``.

    A fast path has a backward pass of its own, which autograd cannot look into. Where its gradients are to have
    gradients (``create_graph=True``, so that gradients are enabled inside of it) it asks the text for them::

        class Fast(torch.autograd.Function):
            @staticmethod
            @without_autocast
            def backward(ctx, grad):
                if torch.is_grad_enabled():
                    return seam.twice(text, (*ctx.saved_tensors, ctx.scale), grad)
                ...  # the fast way

    ``args`` are what the function's forward was given, ``grads`` the gradients of its outputs. The text must be a
    function of ``args`` alone: what is drawn, like a dropped path, is one of them, and so are the parameters that want
    a gradient (``torch.func.functional_call`` puts them into a module).
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), reference():
        # Names of their own: what one argument owes to another is for the graph outside.
        own = [arg.view_as(arg) if isinstance(arg, Tensor) and arg.requires_grad else arg for arg in args]
        out = text(*own)
        pairs = [
            (y, grad)
            for y, grad in zip((out,) if isinstance(out, Tensor) else out, grads, strict=True)
            if grad is not None and y.requires_grad
        ]
        wanted = [arg for arg in own if isinstance(arg, Tensor) and arg.requires_grad]
        if not pairs or not wanted:
            return (None,) * len(own)
        outputs, given = zip(*pairs)
        made = iter(torch.autograd.grad(outputs, wanted, given, create_graph=create_graph, allow_unused=True))
    return tuple(next(made) if isinstance(arg, Tensor) and arg.requires_grad else None for arg in own)
