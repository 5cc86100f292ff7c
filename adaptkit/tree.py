"""The tree of modules of a backbone, looked at without touching it.

A tool may have put a wrapper around a part of the tree: ``torch.compile`` an ``OptimizedModule``, activation
checkpointing a ``CheckpointWrapper``. A wrapper holds one module and runs it; what it holds is what the tree means. So
the *plain* path of a layer is the one without wrappers, and stays the same whatever is wrapped.
"""

from __future__ import annotations

import dis
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, pairwise
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

__all__ = ["acts_by_hook", "at_rest", "blocks_of", "locate", "named_modules", "plain_name", "skeleton", "unwrapped"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CHECKPOINTING = ("grad_checkpointing", "gradient_checkpointing")  # of timm and transformers
#: What people call in a hook to take a note: it returns None, and tensors have none of these but the last.
_NOTES = ("append", "appendleft", "extend", "insert", "update", "put", "print", "__setitem__")
#: Under which name a wrapper holds its module: torch.compile, checkpoint_wrapper, FSDP 1.
HELD = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


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


def skeleton(root: nn.Module, own: Callable[[nn.Module], nn.Module] = unwrapped) -> nn.Module:
    """Return a copy of the tree that shares every tensor with it.

    Each module is a new object of the same class with the same attributes, so that modes, options, hooks and children
    can be changed there, and the user's own modules know nothing of it. Parameters and buffers are the very same. What
    an attribute says of a module of the tree, it says of the copy: a method that was put on one object, for instance,
    or a function around the method that was there before.

    Args:
        root: of the tree.
        own: returns the module that is meant by one of the tree, in place of a wrapper for instance.
    """
    made: dict[int, nn.Module] = {}

    def copied(module: nn.Module) -> nn.Module:
        module = own(module)
        if id(module) not in made:
            new = made[id(module)] = module.__class__.__new__(module.__class__)
            new.__dict__.update(vars(module))
            new.__dict__["_compiled_call_impl"] = None  # nn.Module.compile() bound it to the original
            new.__dict__["_parameters"], new.__dict__["_buffers"] = dict(module._parameters), dict(module._buffers)
            new.__dict__["_modules"] = {n: None if m is None else copied(m) for n, m in module._modules.items()}
        return made[id(module)]

    top, said = copied(root), _Said(made)
    for module in made.values():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                module.__dict__[name] = said.again(value)
    return top


def at_rest(copy: nn.Module) -> nn.Module:
    """Put a skeleton in eval mode, without hooks and without gradient checkpointing; returns it."""
    for module in copy.modules():
        own = module.__dict__
        own["training"] = False
        own.update({name: type(own[name])() for name in _HOOKS if name in own})
        own.update({name: False for name in _CHECKPOINTING if name in own})
    return copy


class _Said:
    """What attributes say of modules, said of their copies.

    Args:
        made: the copy of each module, by the ``id`` of the original.
    """

    def __init__(self, made: dict[int, nn.Module]) -> None:
        self.made = made
        self.functions: dict[int, FunctionType] = {}  # by the id of the original: one may hold itself

    def again(self, value: Any) -> Any:
        """Return an attribute of the copy: containers are its own, and modules and what calls them are the copy's."""
        if isinstance(value, nn.Module):
            return self.made.get(id(value), value)
        if isinstance(value, MethodType):
            return MethodType(self.again(value.__func__), self.again(value.__self__))
        if isinstance(value, partial):
            words = {k: self.again(v) for k, v in value.keywords.items()}
            return partial(self.again(value.func), *map(self.again, value.args), **words)
        if isinstance(value, FunctionType):
            return self._function(value)
        if type(value) in (list, tuple):
            return type(value)(map(self.again, value))
        if type(value) in (dict, OrderedDict):
            return type(value)((k, self.again(v)) for k, v in value.items())
        return value

    def _function(self, value: FunctionType) -> FunctionType:
        if id(value) in self.functions:
            return self.functions[id(value)]
        if not self._knows(value, set()):
            return value
        cells = tuple(CellType() for _ in value.__closure__ or ())
        new = FunctionType(value.__code__, value.__globals__, value.__name__, None, cells)
        self.functions[id(value)] = new
        for cell, old in zip(cells, value.__closure__ or ()):
            cell.cell_contents = self.again(_content(old))
        new.__defaults__, new.__kwdefaults__ = self.again(value.__defaults__), self.again(value.__kwdefaults__)
        return new

    def _knows(self, value: Any, seen: set[int]) -> bool:
        """Whether one comes from this value to a module of the tree."""
        if id(value) in seen:
            return False
        seen.add(id(value))
        if isinstance(value, nn.Module):
            return id(value) in self.made
        return any(self._knows(part, seen) for part in _parts(value))


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, FunctionType):
        yield from map(_content, value.__closure__ or ())
        yield from (value.__defaults__, value.__kwdefaults__)
    elif type(value) in (list, tuple):
        yield from value
    elif type(value) in (dict, OrderedDict):
        yield from value.values()


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # of a variable that has no value yet
        return None


def acts_by_hook(module: nn.Module) -> bool:
    """Whether a forward hook of this module may change what it computes: one that returns something, ever.

    Hooks are read and not called, for they belong to somebody.
    """
    return not all(map(_only_watches, chain(module._forward_pre_hooks.values(), module._forward_hooks.values())))


def _only_watches(hook: Any) -> bool:
    """Whether a hook is a function all of whose ways out return None, or what a call as ``seen.append(x)`` returns."""
    while isinstance(hook, MethodType | partial):
        hook = hook.__func__ if isinstance(hook, MethodType) else hook.func
    if not isinstance(hook, FunctionType):
        return False
    steps = list(dis.get_instructions(hook))
    notes = any(step.argval in _NOTES for step in steps)
    for before, last in pairwise(steps):
        nothing = (before.opname, before.argval) == ("LOAD_CONST", None) or (notes and before.opname == "CALL")
        if last.opname == "RETURN_VALUE" and not nothing:
            return False
        if last.opname == "RETURN_CONST" and last.argval is not None:
            return False
    return True


def blocks_of(host: nn.Module, depth: int) -> list[nn.Module]:
    """Return the host's ``depth`` blocks: the elements of one list of that length, or of one list for each stage.

    A block in a wrapper is the one inside. Raises ``TypeError`` for a host whose blocks are not found.
    """
    lists = [m for m in host.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m)]
    plain = [[unwrapped(block) for block in m] for m in lists]
    alike = [m for m in plain if len({type(block) for block in m}) == 1 and any(True for _ in m[0].children())]
    for kept in alike:
        if len(kept) == depth:
            return kept
    for cls in {type(m[0]) for m in alike}:
        found = [block for m in alike if type(m[0]) is cls for block in m]
        if len(found) == depth:
            return found
    raise TypeError(f"{type(host).__name__}: no list of its {depth} blocks was found")
