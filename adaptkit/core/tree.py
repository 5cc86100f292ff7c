"""The tree of modules of a backbone, looked at without touching it.

A tool may have put a wrapper around a part of the tree: ``torch.compile`` an ``OptimizedModule``, activation
checkpointing a ``CheckpointWrapper``. A wrapper holds one module and runs it; what it holds is what the tree means. So
the *plain* path of a layer is the one without wrappers, and stays the same whatever is wrapped.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

__all__ = [
    "at_rest",
    "blocks_of",
    "evaluating",
    "locate",
    "named_modules",
    "nested",
    "plain_name",
    "skeleton",
    "unwrapped",
]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CHECKPOINTING = ("grad_checkpointing", "gradient_checkpointing")  # of timm and transformers
#: Under which name a wrapper holds its module: torch.compile, checkpoint_wrapper, FSDP 1.
HELD = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, every module is in eval mode; afterwards each is as it was.

    A model that is in it already is not touched, so that several threads may run it at once.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside any number of wrappers; a module without one is returned as it is."""
    while True:
        held = next((name for name in HELD if module._modules.get(name) is not None), None)
        if held is None:
            return module
        module = module._modules[held]  # type: ignore[assignment]


def plain_name(name: str) -> str:
    """Return the name of a module, parameter or buffer without the wrappers on its way."""
    return ".".join(part for part in name.split(".") if part not in HELD)


def named_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Go through the tree by plain paths, each module under every name that it has; wrappers are left out."""
    for name, module in root.named_modules(remove_duplicate=False):
        if unwrapped(module) is module:
            yield plain_name(name), module


def locate(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Return the module that holds the one at a plain path, and the name under which it holds it.

    Raises ``AttributeError`` where the tree has no such path.
    """
    *parents, name = path.split(".")
    module = unwrapped(root)
    for part in parents:
        child = module._modules.get(part)
        if child is None:
            raise AttributeError(f"{type(root).__name__} has no module {path!r}")
        module = unwrapped(child)
    if module._modules.get(name) is None:
        raise AttributeError(f"{type(root).__name__} has no module {path!r}")
    return module, name


def nested(root: nn.Module, path: str) -> nn.Module:
    """Return the module at a path below ``root``; empty ones are made where there is none yet."""
    for part in path.split(".") if path else ():
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    return root


def skeleton(root: nn.Module, own: Callable[[nn.Module], nn.Module] = unwrapped) -> nn.Module:
    """Return a copy of the tree that shares every tensor with it.

    Each module is a new object of the same class with the same attributes, so that modes, options, hooks and children
    can be changed there, and the user's own modules know nothing of it. Parameters and buffers are the very same. What
    an attribute says of a module of the tree, it says of the copy: a method that was put on one object, for instance.

    Args:
        root: of the tree.
        own: returns the module that is meant by one of the tree, in place of a wrapper for instance.
    """
    made: dict[int, nn.Module] = {}

    def copied(module: nn.Module) -> nn.Module:
        module = own(module)
        if id(module) not in made:
            # Not the class's own __new__: FSDP2's builds a module of the class it wraps.
            new = made[id(module)] = object.__new__(module.__class__)
            new.__dict__.update(vars(module))
            new.__dict__["_compiled_call_impl"] = None  # nn.Module.compile() bound it to the original
            new.__dict__["_parameters"], new.__dict__["_buffers"] = dict(module._parameters), dict(module._buffers)
            new.__dict__["_modules"] = {n: None if m is None else copied(m) for n, m in module._modules.items()}
        return made[id(module)]

    top = copied(root)
    for module in made.values():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                module.__dict__[name] = _said_of(made, value)
    return top


def at_rest(copy: nn.Module) -> nn.Module:
    """Put a skeleton in eval mode, without hooks and without gradient checkpointing; returns it."""
    for module in copy.modules():
        own = module.__dict__
        own["training"] = False
        own.update({name: type(own[name])() for name in _HOOKS if name in own})
        own.update({name: False for name in _CHECKPOINTING if name in own})
    return copy


def _said_of(made: dict[int, nn.Module], value: Any) -> Any:
    """Return an attribute of the copy: containers are its own, and modules and their methods are those of the copy."""
    again = partial(_said_of, made)
    if isinstance(value, nn.Module):
        return made.get(id(value), value)
    if isinstance(value, MethodType):
        return MethodType(value.__func__, again(value.__self__))
    if isinstance(value, partial):
        return partial(again(value.func), *map(again, value.args), **{k: again(v) for k, v in value.keywords.items()})
    if type(value) in (list, tuple):
        return type(value)(map(again, value))
    if type(value) in (dict, OrderedDict):
        return type(value)((k, again(v)) for k, v in value.items())
    return value


def blocks_of(backbone: nn.Module, depth: int) -> list[nn.Module]:
    """Return the backbone's ``depth`` blocks: the elements of one list of that length, or of one list for each stage.

    A block in a wrapper is the one inside. Raises ``TypeError`` for a backbone whose blocks are not found.
    """
    lists = [m for m in backbone.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m)]
    plain = [[unwrapped(block) for block in m] for m in lists]
    alike = [m for m in plain if len({type(block) for block in m}) == 1 and any(True for _ in m[0].children())]
    for kept in alike:
        if len(kept) == depth:
            return kept
    for cls in {type(m[0]) for m in alike}:
        found = [block for m in alike if type(m[0]) is cls for block in m]
        if len(found) == depth:
            return found
    raise TypeError(f"{type(backbone).__name__}: no list of its {depth} blocks was found")
