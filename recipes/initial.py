"""Where a run starts: ``--init FILE`` and ``--adapter FILE`` bring what an earlier run trained, the head where it fits.

``--init`` fills the adapters that ``--adapter`` names, and says so where they are others. ``--adapter FILE`` attaches
what the file holds, whatever that is. Both keep the trained head where this run has the same one; else a warning says
why it was left out, and the head starts fresh.
"""

from __future__ import annotations

import argparse
import json
import warnings
from typing import Any

from torch import Tensor

import adaptkit
from adaptkit.hub.file import AdapterFile, load_into
from adaptkit.hub.fits import check_fits
from adaptkit.model.parts import differences


def initialise(model: Any, args: argparse.Namespace) -> None:
    """Give a model that was built what ``--init`` holds; and a network around a pyramid the heads of ``--adapter``.

    Raises ``ValueError`` where the file holds other adapters than the model, or is of another backbone.
    """
    pyramid = getattr(model, "pyramid", None)
    if pyramid is not None:  # ``attach`` has read the adapters of these files, and knows no network around them
        for name in args.adapter:
            file = saved(name)
            if file is not None:
                load_head(model, file, f"--adapter {name}")
    if args.init is None:
        return
    file = adaptkit.load(args.init)
    adapted = model if pyramid is None else pyramid.model
    if file.header.get("backbone") is None:
        raise ValueError(f"--init {args.init} is a LoRA in peft's layout, without a head; give it to --adapter")
    with adapted.disable_adapter():
        check_fits(file, adapted.vit)
    here = adapted.header()
    for theirs, mine in differences({**file.header, "head": None}, {**here, "head": None}):
        raise ValueError(
            f"--init {args.init} holds {theirs}, and this run has {mine}: choose with --adapter and "
            "--adapter-options what the file holds, or give the file to --adapter, which attaches it as it is"
        )
    own = adapted.adapter_state_dict()
    tensors = {k: v for k, v in file.tensors.items() if not k.startswith("head.")}
    adapted.load_adapter_state_dict(tensors | {k: v for k, v in own.items() if k.startswith("head.")})
    load_head(model, file, f"--init {args.init}")


def load_head(model: Any, file: AdapterFile, option: str) -> None:
    """Put the file's head into the model where it is the same one; else warn, and leave the model's as it is."""
    pyramid = getattr(model, "pyramid", None)
    theirs, said = file.tensors_of("head"), file.header["head"]
    if said is None:
        warnings.warn(f"{option} holds no head: this run's starts fresh", UserWarning, stacklevel=3)
        return
    own: dict[str, Tensor]
    if pyramid is None:
        mine = model.header()["head"]
        own = {k[5:]: v for k, v in model.adapter_state_dict().items() if k.startswith("head.")}
    else:
        cls = f"{type(model.network).__module__}.{type(model.network).__qualname__}"
        mine, own = {"name": None, "class": cls, "around": True}, pyramid.beside(model.network)
    why = other_head(said, mine, theirs, own)
    if why:
        warnings.warn(
            f"{option}: the adapters are taken, the trained head is left out and this run's starts fresh, for {why}",
            UserWarning,
            stacklevel=3,
        )
    elif pyramid is None:
        rest = {k: v for k, v in model.adapter_state_dict().items() if not k.startswith("head.")}
        model.load_adapter_state_dict(rest | {f"head.{k}": v for k, v in theirs.items()})
    else:
        load_into(model.network, theirs, strict=False)  # the pyramid's own keys are the ones left out


def other_head(
    said: dict[str, Any], mine: dict[str, Any] | None, theirs: dict[str, Tensor], own: dict[str, Tensor]
) -> str:
    """Say in what the file's head and this run's differ; empty where they are the same."""
    if mine is None:
        return "this run has none"
    called = [h["name"] or h["class"] for h in (said, mine)]
    if called[0] != called[1]:
        return f"it is {called[0]} and this run trains {called[1]}"
    a, b = (json.loads(json.dumps(h.get("config", {}), default=str)) for h in (said, mine))
    for key in sorted(a.keys() | b.keys()):
        if a.get(key) != b.get(key):
            return f"it has {key}={a.get(key)!r} and this run has {key}={b.get(key)!r}"
    for key in sorted(theirs.keys() ^ own.keys()):
        return f"{key} is in {'the file' if key in theirs else 'this run'} alone"
    for key, tensor in own.items():
        if tensor.shape != theirs[key].shape:
            return f"its {key} is {tuple(theirs[key].shape)} and this run's is {tuple(tensor.shape)}"
    return ""


def saved(name: str) -> AdapterFile | None:
    """Return the file that is meant by one of ``--adapter``, None for the name of an adapter."""
    from adaptkit.model.building import as_file

    return None if name in ("none", "linear") else as_file(name)


def saved_head(args: argparse.Namespace) -> str | None:
    """Return the name of the head, or of the network around the pyramid, in a file of ``--adapter`` or ``--init``."""
    names = [*args.adapter, *([args.init] if args.init else [])]
    for file in filter(None, map(saved, names)):
        head = file.header["head"]
        if head is not None:
            recipe = (file.header.get("metadata") or {}).get("recipe") or {}
            return head["name"] or recipe.get("network")
    return None
