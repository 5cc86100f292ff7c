"""Which head ``attach`` builds, and from which file its tensors come."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from torch import Tensor, nn

from adaptkit.core.registry import configured, heads
from adaptkit.core.warned import warn
from adaptkit.hub.file import AdapterFile
from adaptkit.model.saved import configured_by

__all__ = ["head_of"]


def head_of(arg: Any, files: list[AdapterFile]) -> tuple[Any, AdapterFile | None]:
    """Return the head to build (or the module given) and the file its tensors come from.

    Args:
        arg: as ``attach(head=...)`` takes it.
        files: the saved adapters among the other arguments.

    Without ``arg`` it is the saved head. With one that equals the saved head it is trained as the file says; with
    another one the trained head is left out, with a warning.

    Raises ``ValueError`` where it is not clear which saved head is meant, or one cannot be built here.
    """
    saved = [f for f in files if f.header["head"] is not None]
    if saved and saved[0].header["head"].get("around") and (arg is None or isinstance(arg, nn.Module)):
        raise ValueError(
            f"{saved[0].path} holds a network around the adapter ({saved[0].header['head']['class']}): build it around "
            "as_pyramid(adaptkit.attach(backbone, ...)), the adapters those of the file, and call pyramid.load(folder, "
            "network); or give the adapters a head of their own by its name"
        )
    if arg is None:
        return _the_saved_one(saved)
    chosen = arg if isinstance(arg, nn.Module) else configured(arg, heads(), "head")
    same = [f for f in saved if _equal(chosen, f)]
    if len(same) > 1:
        raise ValueError(
            f"{same[0].path} and {same[1].path} both hold this head, each trained in its own way; take the head out of "
            "one: dataclasses.replace(file, header={**file.header, 'head': None})"
        )
    for file in saved:
        if file not in same:
            warn(
                f"the trained head in {file.path} ({_said(file)}) is left out, for head= asks for another "
                f"({_asked(chosen)}). Give the same one to keep it",
            )
    return chosen, same[0] if same else None


def _the_saved_one(saved: list[AdapterFile]) -> tuple[Any, AdapterFile | None]:
    if not saved:
        return None, None
    if len(saved) > 1:
        raise ValueError(f"{saved[0].path} and {saved[1].path} both bring a head; say which with head=")
    head = saved[0].header["head"]
    if head["name"] is None:
        raise ValueError(
            f"the head in {saved[0].path} is a custom module ({head['class']}); build it and pass it as head="
        )
    return configured_by(saved[0], head, heads(), "head"), saved[0]


def _equal(chosen: Any, file: AdapterFile) -> bool:
    """Whether this is the head that the file holds: the same method and options, or a module of the same tensors."""
    head = file.header["head"]
    if head["name"] is None:
        return isinstance(chosen, nn.Module) and not head.get("around") and _fits(chosen, file)
    try:
        entry, config = configured_by(file, head, heads(), "head")
    except ValueError:  # of a plug-in that is not here, or of a newer version
        return False
    if not isinstance(chosen, nn.Module):
        return chosen[0] is entry and _json(chosen[1]) == _json(config)
    own: Any = getattr(chosen, "config", None)
    return type(chosen) is entry.module and type(own) is type(config) and _json(own) == _json(config)


def _fits(module: nn.Module, file: AdapterFile) -> bool:
    own = {k: v.shape for k, v in module.state_dict().items() if isinstance(v, Tensor)}
    return own == {k: v.shape for k, v in file.tensors_of("head").items()}


def _json(config: Any) -> Any:
    """A config as a file holds it, where tuples are lists."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def _said(file: AdapterFile) -> str:
    head = file.header["head"]
    return head["class"] if head["name"] is None else _method(head["name"], head["config"])


def _asked(chosen: Any) -> str:
    if isinstance(chosen, nn.Module):
        return f"a {type(chosen).__module__}.{type(chosen).__qualname__}"
    return _method(chosen[0].name, dataclasses.asdict(chosen[1]))


def _method(name: str, config: dict[str, Any]) -> str:
    return ", ".join([repr(name), *(f"{k}={v!r}" for k, v in config.items())])
