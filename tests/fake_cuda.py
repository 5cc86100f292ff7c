"""A GPU that is not there: what a model would ask of one, operator by operator.

Fake tensors say they lie on a GPU and hold no numbers, so that the path taken on one can be followed without having
it: which operators run, which of them copy between host and device, and which wait for the device's answer.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ASKS = ("tolist", "item", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__", "masked_select")
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2")


class Recorder(TorchDispatchMode):
    """Counts operators; ``copies`` and ``waits`` are those at which the host and the device meet, and from where."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.copies: list[str] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if not func._schema.name.startswith("prim::"):
            self.operators[str(func)] += 1
        indices = args[1] if name in ("index", "index_put", "index_put_", "_unsafe_index") else ()
        if name in WAITS or any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in indices):
            self.waits.append(f"{func} from {_origin()}")
        out = func(*args, **kwargs)
        if name in ("_to_copy", "copy_", "copy"):
            devices = {t.device.type for t in tree_leaves((args, out)) if isinstance(t, Tensor)}
            if len(devices) > 1:
                self.copies.append(f"{func} from {_origin()}")
        return out


class Questions(TorchFunctionMode):
    """Notes what asks real tensors for their values: on a GPU each of these waits."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = args[1] if func is Tensor.__getitem__ and isinstance(args[1], tuple) else args[1:2]
        is_mask = func is Tensor.__getitem__ and any(isinstance(m, Tensor) and m.dtype == torch.bool for m in masks)
        if func.__name__ in _ASKS or is_mask:
            self.asked.append(func.__name__)
        with torch._C.DisableTorchFunction():  # what a method is made of is not asked for by us
            return func(*args, **(kwargs or {}))


class Stalls(Questions):
    """The questions of one function, with all that it calls.

    Not of what reads the data, nor AdamW's count of its steps: both are on the CPU whatever the device. Nor of the
    check of an image's values, which is made on the CPU alone (``tests/test_cuda_path.py`` would see it on a GPU).
    """

    ELSEWHERE = ("/torch/utils/data/", "/torch/optim/", "/recipes/order.py", "/adaptkit/model/image.py")

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.code = function.__code__

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = len(self.asked)
        out = super().__torch_function__(func, types, args, kwargs)
        if len(self.asked) > before:
            codes = [frame.f_code for frame, _ in traceback.walk_stack(None)]
            elsewhere = any(place in code.co_filename for code in codes for place in self.ELSEWHERE)
            if self.code not in codes or elsewhere:
                self.asked.pop()
        return out


def _origin() -> str:
    """The innermost lines of this project that are running."""
    frames = [f for f in traceback.extract_stack() if "/adaptkit/" in f.filename or "/timm/" in f.filename
              or "/transformers/" in f.filename or "/peft/" in f.filename]  # fmt: skip
    return " < ".join(f"{'/'.join(f.filename.split('/')[-2:])}:{f.lineno} {f.name}" for f in reversed(frames[-2:]))


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Inside, ``device="cuda"`` makes fake tensors."""
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        yield mode


def moved(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The model's parameters and buffers as fake ones on the GPU, in its place."""

    def move(tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        with torch.no_grad():
            return mode.from_tensor(tensor).detach().to("cuda")

    return model._apply(move)


def backward(outputs: Sequence[Tensor], given: Sequence[Tensor] | None = None) -> dict[Tensor, Tensor]:
    """Gradients for every leaf, of the outputs' sum or with these of the outputs: the graph walked node by node.

    The engine itself asks the driver which devices it has, and ends there without one. (Checkpoints ask which backward
    pass is running: it is one.)
    """
    roots = [(t.grad_fn, t.output_nr, t) for t in outputs if t.grad_fn is not None]
    waiting = _consumers([node for node, _, _ in roots])
    grads: dict[Any, list[Tensor | None]] = {}
    leaves: dict[Tensor, Tensor] = {}
    with torch.no_grad(), mock.patch.object(torch._C, "_current_graph_task_id", return_value=0):
        for i, (node, at, t) in enumerate(roots):
            _add(grads, node, at, torch.ones_like(t) if given is None else given[i])
        ready = [node for node in dict.fromkeys(node for node, _, _ in roots) if not waiting[node]]
        while ready:
            node = ready.pop()
            grad = grads.pop(node, None)
            if isinstance(node, _ACCUMULATES):
                if grad is not None:
                    leaves[node.variable] = grad[0]
                continue
            found = _run(node, grad)
            edges = [edge for edge in node.next_functions if edge[0] is not None]
            for (then, at), one in zip(edges, found, strict=True):
                if one is not None:
                    _add(grads, then, at, one)
                waiting[then] -= 1
                if not waiting[then]:
                    ready.append(then)
    return leaves


_ACCUMULATES = type(torch.ones(1, requires_grad=True).view(1).grad_fn.next_functions[0][0])


def _run(node: Any, given: list[Tensor | None] | None) -> list[Tensor | None]:
    """What a node gives to each input that wants a gradient."""
    wanted = [then is not None for then, _ in node.next_functions]
    if given is None:
        return [None] * sum(wanted)
    if isinstance(node, torch.autograd.function.BackwardCFunction):  # it answers for inputs that are no tensors too
        found, wanted = node.apply(*given), node.needs_input_grad
    else:
        found = node(*given)
    found = found if isinstance(found, tuple) else (found,)
    return [grad for grad, is_wanted in zip(found, wanted) if is_wanted]


def _add(grads: dict[Any, list[Tensor | None]], node: Any, at: int, grad: Tensor) -> None:
    metadata = node._input_metadata
    slots = grads.setdefault(node, [None] * len(metadata))
    if grad.shape != tuple(metadata[at].shape):
        grad = grad.sum_to_size(metadata[at].shape)
    if grad.dtype != metadata[at].dtype:
        grad = grad.to(metadata[at].dtype)
    slots[at] = grad if slots[at] is None else slots[at] + grad


def _consumers(roots: Sequence[Any]) -> Counter[Any]:
    """How many edges lead to each node."""
    edges: Counter[Any] = Counter()
    seen, stack = set(roots), list(dict.fromkeys(roots))
    while stack:
        for then, _ in stack.pop().next_functions:
            if then is None:
                continue
            edges[then] += 1
            if then not in seen:
                seen.add(then)
                stack.append(then)
    return edges
