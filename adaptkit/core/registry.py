"""Names to adapters and heads, class paths to backbone families.

Nothing is listed by hand: the modules of ``adaptkit/backbones``, ``adaptkit/adapters`` and ``adaptkit/heads`` are
imported on first use, and each registers what it defines. So are the modules that other installed packages name by an
entry point of the group ``adaptkit.plugins``::

    [project.entry-points."adaptkit.plugins"]
    my-adapter = "my_package.my_adapter"
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import pkgutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from adaptkit.core.near import hint
from adaptkit.core.schema import check_fields, fields_of
from adaptkit.core.towers import Found, class_path, first_of, parts_of, said_of
from adaptkit.core.tree import unwrapped
from adaptkit.core.view import View
from adaptkit.core.warned import warn

__all__ = [
    "OWN_FAMILY",
    "Entry",
    "ForeignLayout",
    "adapters",
    "configured",
    "families",
    "heads",
    "inside",
    "layouts",
    "register_adapter",
    "register_family",
    "register_head",
    "register_layout",
    "register_refusal",
    "view",
]

T = TypeVar("T", bound=type)

#: What errors say of a class that no family sees.
OWN_FAMILY = "subclass adaptkit.core.view.ViT and decorate it with @adaptkit.register_family('package.module.Class')"


class Entry(NamedTuple):
    """A registered method: its module class and its config, a frozen dataclass."""

    name: str
    module: type[nn.Module]
    config: type[Any]

    def configure(self, options: dict[str, Any]) -> Any:
        """Build the config from JSON-like options; an unknown option is a ``ValueError`` that names the known ones."""
        if hasattr(self.config, "configure"):
            return self.config.configure(options)
        known = [f.name for f in dataclasses.fields(self.config)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(
                f"{self.name!r} has no option {', '.join(repr(o) + hint(o, known) for o in unknown)}; its options are "
                f"{', '.join(known)}"
            )
        return self.config(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})

    def from_file(self, options: dict[str, Any]) -> Any:
        """Build the config from what a file says, types checked first: ``ValueError`` names the option."""
        if hasattr(self.config, "from_file"):
            return self.config.from_file(options)
        if not hasattr(self.config, "configure"):
            check_fields(options, self.config, "config")
        return self.configure(options)


class ForeignLayout(NamedTuple):
    """How another library saves its adapters: a folder whose ``adapter_model.safetensors`` has no header of ours."""

    #: the folder -> the config in it, or None where it is not of this layout
    config_of: Callable[[Path], dict[str, Any] | None]
    #: that config and the tensors -> header and tensors as our file has them
    read: Callable[[dict[str, Any], dict[str, Tensor]], tuple[dict[str, Any], dict[str, Tensor]]]


_FAMILIES: dict[str, Callable[[nn.Module], View]] = {}
_SHAPES: dict[tuple[str, ...], Callable[[nn.Module], View]] = {}
_REFUSALS: dict[str, str] = {}
_ADAPTERS: dict[str, Entry] = {}
_HEADS: dict[str, Entry] = {}
_LAYOUTS: dict[str, ForeignLayout] = {}


def register_family(*class_paths: str, having: tuple[str, ...] = ()) -> Callable[[T], T]:
    """Class decorator: this view sees backbones of these classes (``"package.module.Class"``) and subclasses.

    ``having``: attributes by which a class of any other name is taken for one of them, where code is handed on as
    files and not as a package. ``attach`` proves what is seen; the names alone prove nothing.
    """

    def register(cls: T) -> T:
        _FAMILIES.update(dict.fromkeys(class_paths, cls))
        if having:
            _SHAPES[having] = cls
        return cls

    return register


def register_refusal(reason: str, *class_paths: str) -> None:
    """Let :func:`view` say why no family can see these classes; ``reason`` ends with what to do instead."""
    _REFUSALS.update(dict.fromkeys(class_paths, reason))


def _register(table: dict[str, Entry], name: str, config: type[Any]) -> Callable[[T], T]:
    def register(cls: T) -> T:
        table[name] = Entry(name, cls, config)
        return cls

    return register


def register_adapter(name: str, config: type[Any]) -> Callable[[T], T]:
    """Class decorator: ``attach(model, name)`` builds this adapter as ``cls(spec, config)``.

    One whose ``takes_backbone`` is true is built as ``cls(spec, config, backbone)``.
    """
    return _register(_ADAPTERS, name, config)


def register_head(name: str, config: type[Any]) -> Callable[[T], T]:
    """Class decorator: ``attach(..., head=config)`` builds this head as ``cls(spec, config, strides)``.

    ``strides``: of the maps in ``Features.maps``, in pixels, finest first; ``()`` where no map is made.
    """
    return _register(_HEADS, name, config)


def register_layout(name: str, layout: ForeignLayout) -> None:
    """Let ``adaptkit.load`` read folders of another library."""
    _LAYOUTS[name] = layout


@functools.cache
def _discover(folder: str) -> None:
    package = importlib.import_module(f"adaptkit.{folder}")
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):  # parts of the others, which register nothing
            importlib.import_module(f"{package.__name__}.{module.name}")
    _plugins()


@functools.cache
def _plugins() -> None:
    """Import what other packages bring. One that fails is left out with a warning: it must not stop the others."""
    for point in metadata.entry_points(group="adaptkit.plugins"):
        try:
            point.load()
        except Exception as error:
            package = point.dist.name if point.dist else "unknown"
            warn(
                f"the plug-in {point.name!r} of package {package} ({point.value}) could not be imported and is left "
                f"out: {error!r}. Repair or uninstall that package",
            )


def families() -> dict[str, Callable[[nn.Module], View]]:
    """Return every known backbone class path and the view that sees it."""
    _discover("backbones")
    return _FAMILIES


def adapters() -> dict[str, Entry]:
    """Return every adapter by name."""
    _discover("adapters")
    return _ADAPTERS


def layouts() -> dict[str, ForeignLayout]:
    """Return every known layout of another library, by its name."""
    _discover("adapters")
    return _LAYOUTS


def heads() -> dict[str, Entry]:
    """Return every head by name."""
    _discover("heads")
    return _HEADS


def check_module(model: Any) -> None:
    """Raise ``TypeError`` for a backbone that is no ``nn.Module`` in Python, with what to hand over instead."""
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("this backbone was scripted or traced, and adapters run its blocks one by one: hand over the "
                        "module that was scripted")  # fmt: skip
    if isinstance(model, nn.Module):
        return
    if isinstance(model, str):
        remedy = f"build it first, timm.create_model({model!r}) or transformers.AutoModel.from_pretrained({model!r})"
    elif isinstance(model, type):
        remedy = f"this is the class {model.__name__}: hand over a model of it"
    elif isinstance(getattr(model, "model", None), nn.Module):
        remedy = "hand over its .model"
    else:
        remedy = "hand over a model of timm, transformers, torchvision, open_clip or torch.hub"
    raise TypeError(f"the backbone is a {type(model).__name__} and no nn.Module; {remedy}")


def view(model: nn.Module) -> Any:
    """See ``model`` as a :class:`~adaptkit.core.view.ViT` or :class:`~adaptkit.core.hierarchical.HierarchicalViT`.

    Raises ``TypeError`` for what is no module, for an unknown class, naming the known ones and how to add a family, and
    for a backbone that was compiled or wrapped as a whole.
    """
    check_module(model)
    if unwrapped(model) is not model or model._compiled_call_impl is not None:
        how = type(model).__name__ if unwrapped(model) is not model else f"{type(model).__name__}.compile()"
        raise TypeError(
            f"this backbone was compiled or wrapped as a whole ({how}), and adapters run its blocks one by one, past "
            f"that; hand over the plain {type(unwrapped(model)).__name__} and compile the adapted model "
            "(`torch.compile(adaptkit.attach(backbone, ...))`), or compile or wrap its blocks"
        )
    family = _family_of(model)
    if family is not None:
        try:
            return family(model)
        except AttributeError as error:
            raise TypeError(
                f"this {type(model).__name__} is not built as {_as_built(model)}: {error}. Hand "
                f"over one whose parts are that class's own, or register a family for it: {OWN_FAMILY}"
            ) from error
    known = families()
    said = said_of(model, *inside(model), first_of(model, _REFUSALS))
    if said:
        raise TypeError(f"no family sees {class_path(type(model))}{said}")
    names = ", ".join(sorted({path.rpartition(".")[2] for path in known}))
    raise TypeError(
        f"no family sees {class_path(type(model))}; known backbones: {names}. Another class "
        f"needs a family: {OWN_FAMILY}"
    )


def inside(model: nn.Module) -> tuple[list[Found], list[Found]]:
    """Return the parts of a model that a family sees, and those that it refuses, the outermost of each."""
    return parts_of(model, _family_of, _REFUSALS)


def _family_of(model: nn.Module) -> Callable[[nn.Module], View] | None:
    """Return what sees a model, by its class or one above it, else by the names of its attributes; None: nothing."""
    family = first_of(model, families())
    if family is None and first_of(model, _REFUSALS) is None:
        family = next((f for names, f in _SHAPES.items() if all(hasattr(model, name) for name in names)), None)
    return family


def _as_built(model: nn.Module) -> str:
    known = families()
    return next((path for path in map(class_path, type(model).__mro__) if path in known), "its attributes say")


def configured(arg: Any, known: dict[str, Entry], kind: str) -> tuple[Entry, Any]:
    """Return the entry and config of a name, a config or a (name, options) pair; ``kind`` is "adapter" or "head".

    Raises ``TypeError`` for anything else, ``ValueError`` for an unknown name or option.
    """
    for entry in known.values():
        if dataclasses.is_dataclass(arg) and type(arg) is entry.config:
            return entry, arg
        if hasattr(entry.config, "converted") and entry.config.converted(arg) is not None:
            return entry, entry.config.converted(arg)
    name, options = arg if isinstance(arg, tuple) and len(arg) == 2 else (arg, {})
    if not isinstance(name, str | os.PathLike) or not isinstance(options, dict):
        raise TypeError(
            f"{arg!r} is no {kind}: give a name ({', '.join(sorted(known))}), its config, a pair (name, options), or "
            "a saved adapter"
        )
    if str(name) not in known:
        raise ValueError(
            f"no {kind} is named {str(name)!r} and no file is there{hint(name, known)}; the {kind}s are "
            f"{', '.join(sorted(known))}"
        )
    entry = known[str(name)]
    try:
        return entry, entry.configure(options)
    except TypeError as error:
        needed = fields_of(entry.config)[1] - options.keys() if dataclasses.is_dataclass(entry.config) else ()
        if needed:
            said = ", ".join(sorted(needed))
            raise ValueError(f"{kind} {str(name)!r} needs more options: {said}, as in ({name!r}, {{...}})") from error
        raise ValueError(f"{kind} {str(name)!r} cannot be made with {options}: {error}") from error
