"""From what ``attach`` is given to modules: names, configs and files -> parts -> adapters, head, trained parts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from adaptkit.adapters.base import WeightAdapter
from adaptkit.core import registry
from adaptkit.core.near import looks_like_path
from adaptkit.core.registry import configured
from adaptkit.core.view import View
from adaptkit.core.warned import warn
from adaptkit.hub.backbone import expansion
from adaptkit.hub.digest import NEW_CHANNELS
from adaptkit.hub.file import AdapterFile, load_into
from adaptkit.hub.fits import check_fits
from adaptkit.hub.packages import needs
from adaptkit.hub.repository import is_hub_id, load
from adaptkit.model.saved import build, check_tensors, configured_by
from adaptkit.model.trained import TrainedBackbone, named, parameters

__all__ = ["Part", "as_file", "build_adapter", "build_backbone", "build_head", "parts_of", "view_of"]


class Part(NamedTuple):
    """One adapter to build: what, how, and from which file its tensors come."""

    entry: registry.Entry
    config: Any
    file: AdapterFile | None


def as_file(arg: Any) -> AdapterFile | None:
    """Return the saved adapter that is meant, or None for a name, a config or a pair."""
    if isinstance(arg, AdapterFile):
        return arg
    if not isinstance(arg, str | os.PathLike) or str(arg) in registry.adapters():
        return None
    is_place = Path(arg).expanduser().exists() or looks_like_path(arg) or is_hub_id(arg)
    return load(arg) if is_place else None


def view_of(model: nn.Module, args: Sequence[Any]) -> Any:
    """See the backbone; where no family does, say which package brings one, if a saved adapter among ``args`` knows."""
    try:
        return registry.view(model)
    except TypeError as error:
        files = (as_file(arg) for arg in args)
        said = [needs(f.header["backbone"] or {}) for f in files if f is not None]
        if not any(said):
            raise
        raise TypeError(f"{error}{''.join(said)}") from error


def parts_of(args: Sequence[Any], vit: View, strict: bool) -> tuple[list[Part], list[AdapterFile]]:
    """Return the parts to build for these arguments of ``attach``, and the files among them."""
    parts: list[Part] = []
    files: list[AdapterFile] = []
    for arg in args:
        file = as_file(arg)
        if file is None:
            parts.append(Part(*configured(arg, registry.adapters(), "adapter"), None))
            continue
        check_fits(file, vit, strict)
        files.append(file)
        saved = file.header["adapters"]
        parts += [Part(*configured_by(file, said, registry.adapters(), "adapter"), file) for said in saved]
    return parts, files


def build_adapter(part: Part, vit: View) -> nn.Module:
    """Build an adapter, with the tensors of its file."""
    cls: Any = part.entry.module
    weight = issubclass(cls, WeightAdapter)

    def make() -> nn.Module:
        return cls(vit.spec, part.config, *([vit.backbone] if cls.takes_backbone else []))

    if part.file is None:
        return make()
    where = f"{part.file.path}, adapter {part.entry.name!r}"
    tensors = part.file.tensors_of(part.entry.name)
    # Layers of peft are built around those of the backbone, which have values.
    return build(make, tensors, where, cls.translated, backbone=vit.backbone if weight else None)


def build_head(
    head: Any, file: AdapterFile | None, spec: Any, strides: tuple[int, ...]
) -> tuple[nn.Module | None, registry.Entry | None]:
    """Build a head, with the tensors of its file; a module of the user's is taken as it is."""
    if head is None:
        return None, None
    where = "" if file is None else f"{file.path}, head"
    tensors = {} if file is None else file.tensors_of("head")
    if isinstance(head, nn.Module):
        if file is not None:
            check_tensors(head.state_dict(), tensors, where)
            load_into(head, tensors)
        return head, None
    entry, config = head

    def make() -> nn.Module:
        return entry.module(spec, config, strides)

    return make() if file is None else build(make, tensors, where), entry


def build_backbone(vit: View, given: Sequence[str], files: Sequence[AdapterFile]) -> TrainedBackbone | None:
    """Build the parts of the backbone that are trained too: those given, or those of a file; None of none.

    Raises ``ValueError`` where they are not this backbone's, or both name some.
    """
    saved = [f for f in files if f.header.get("train_backbone")]
    given = (given,) if isinstance(given, str) else tuple(given)
    parts = tuple(saved[0].header["train_backbone"]) if saved else given
    if len(saved) > 1 or (saved and given and given != parts):
        other = f"{saved[1].path}, too" if len(saved) > 1 else f"you give train_backbone={list(given)}"
        raise ValueError(f"{saved[0].path} holds trained parts of the backbone ({', '.join(parts)}), and {other}: "
                         "there is one backbone, so give one of them")  # fmt: skip
    if not parts:
        return None
    if vit.sharded:
        raise ValueError("the backbone is sharded: train parts of it before shard(), or train it whole elsewhere")
    if not saved:
        half = [name for name, p in parameters(vit.backbone) if p.dtype == torch.float16 and named(name, parts)]
        if half:
            warn(
                f"{half[0]} is trained in the backbone's float16, in which AdamW's eps of 1e-8 is 0 and its steps are "
                "NaN: load the backbone in bfloat16 or float32",
            )
        return TrainedBackbone(vit.spec, vit.backbone, parts)
    tensors = saved[0].tensors_of("backbone")
    strange = sorted(set(tensors) - {name for name, _ in parameters(vit.backbone)})
    if strange:
        trained_on = saved[0].header["backbone"]
        home = "a backbone of the library it was trained in"
        if trained_on.get("expanded") and all(name.endswith(NEW_CHANNELS) for name in strange):
            home = expansion(trained_on, "a backbone of three channels")
        raise ValueError(
            f"{saved[0].path} holds trained tensors of a {saved[0].header['backbone']['class']}, this backbone is a "
            f"{type(vit.backbone).__name__}, which calls them otherwise ({', '.join(strange[:3])}): attach it to {home}"
        )
    try:
        built = TrainedBackbone(vit.spec, vit.backbone, parts)
    except ValueError as error:
        raise ValueError(f"{saved[0].path}: {error}") from error
    check_tensors(built.copies.state_dict(), tensors, f"{saved[0].path}, backbone")
    built.copies.load_state_dict(tensors)
    return built
