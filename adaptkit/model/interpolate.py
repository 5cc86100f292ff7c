"""Two files of one structure, and the file between them (WiSE-FT, Wortsman et al., CVPR 2022, eq. 1).

    theta = (1 - t) theta_a + t theta_b

tensor by tensor: adapters, head, and trained parts of the backbone. Of LoRA the factors are interpolated, not their
product. t = 0 is the first file and t = 1 the second, bit for bit.
"""

from __future__ import annotations

import json
import numbers
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptkit.hub.card import card_beside
from adaptkit.hub.file import FLOATS, AdapterFile, write_folder
from adaptkit.hub.fits import other_parts
from adaptkit.hub.header import say_spec
from adaptkit.model.building import as_file
from adaptkit.model.parts import differences

__all__ = ["interpolate"]

COUNTERS = ("num_batches_tracked",)  #: integers that only count: the larger is kept
FRAMING = ("mean", "std", "classes", "task")  #: metadata that say what inputs and outputs mean


def interpolate(file_a: Any, file_b: Any, t: float, folder: str | os.PathLike[str] | None = None) -> AdapterFile:
    """Return the adapter at ``t`` between two saved ones, ready for ``attach`` and ``hotswap_adapter``.

    Args:
        file_a: at t = 0: a folder, ``"org/name"`` on the Hub, or what ``adaptkit.load`` returns.
        file_b: at t = 1.
        t: between 0 and 1.
        folder: where to write it; None: nowhere.

    Raises ``ValueError`` that names both sides where methods, options, backbone, shapes, task, classes or
    normalisation are not the same, and for another ``t``; ``TypeError`` for what is no saved adapter.
    """
    if not isinstance(t, numbers.Real):
        raise TypeError(f"t={t!r} is no number; give one between 0, the first file, and 1, the second")
    if not 0 <= t <= 1:
        raise ValueError(f"t={t} is not between 0, the first file, and 1, the second")
    a, b = _file(file_a), _file(file_b)
    if folder is not None and a.header["backbone"] is None:
        raise ValueError(
            f"{a.path} is a folder of peft, which says nothing of its backbone, and what is saved here does: leave "
            "folder out, attach the result to the backbone, and model.save it"
        )
    _check_headers(a, b)
    _check_tensors(a, b)
    said = {k: v for k, v in _metadata(a).items() if _metadata(b).get(k) == v}
    header = {**(a.header if t < 1 else b.header), "metadata": said if 0 < t < 1 else _metadata(a if t == 0 else b)}
    tensors = {name: _between(name, x, b.tensors[name], t) for name, x in a.tensors.items()}
    if folder is None:
        return AdapterFile(Path(f"{a.path} .. {b.path} at {t}"), header, tensors)
    return AdapterFile(write_folder(folder, header, tensors, card_beside(Path(folder), header)), header, tensors)


def _file(given: Any) -> AdapterFile:
    file = as_file(given)
    if file is None:
        said = repr(given) if isinstance(given, str | os.PathLike) else f"a {type(given).__name__}"
        raise TypeError(f"{said} is no saved adapter: give its folder, or adaptkit.load(folder)")
    return file


def _metadata(file: AdapterFile) -> dict[str, Any]:
    return file.header.get("metadata") or {}


def _check_headers(a: AdapterFile, b: AdapterFile) -> None:
    for one, other in differences(a.header, b.header):
        _refuse(a, one, b, other, "both need the same methods and options")
    parts = [json.dumps(f.header.get("train_backbone") or []) for f in (a, b)]
    if parts[0] != parts[1]:
        _refuse(a, f"train_backbone={parts[0]}", b, f"train_backbone={parts[1]}", "both need the same parts")
    for key in FRAMING:
        values = [_metadata(f).get(key) for f in (a, b)]
        if values[0] != values[1]:
            _refuse(a, f"{key}={values[0]}", b, f"{key}={values[1]}", "both need the same task and images")
    saved = [f.header["backbone"] for f in (a, b)]
    if None in saved:
        return
    if a.spec[1:] != b.spec[1:]:
        _refuse(a, say_spec(a.spec), b, say_spec(b.spec), "both need the same backbone")
    for key in ("mean", "std"):
        if saved[0][key] != saved[1][key]:
            _refuse(a, f"{key}={saved[0][key]}", b, f"{key}={saved[1][key]}", "both need the same normalisation")
    two: Any = saved[1]
    layers = other_parts(a, two.get("digest") or {}, lambda: two.get("sums") or {}, lambda: two["fingerprint"])
    if layers:
        listed = ", ".join(layers[:4]) + " and more" * (len(layers) > 4)
        name = saved[0]["source"] or saved[0]["class"]
        _refuse(a, f"been trained on {listed} of {name}", b, "on other weights there", "both need the same backbone")


def _check_tensors(a: AdapterFile, b: AdapterFile) -> None:
    for name in sorted(a.tensors.keys() | b.tensors.keys()):
        one, other = (
            f"{name} of {tuple(f.tensors[name].shape)}" if name in f.tensors else f"no {name}" for f in (a, b)
        )
        if one != other:
            _refuse(a, one, b, other, "both need the same tensors")
        x, y = a.tensors[name], b.tensors[name]
        if x.dtype not in FLOATS and not name.endswith(COUNTERS) and not torch.equal(x, y):
            _refuse(a, f"other integers in {name}", b, "its own", "indices cannot be interpolated")


def _refuse(a: AdapterFile, one: str, b: AdapterFile, other: str, remedy: str) -> None:
    raise ValueError(f"{a.path} has {one}, {b.path} has {other}: {remedy} to lie on one line")


def _between(name: str, x: Tensor, y: Tensor, t: float) -> Tensor:
    if t in (0, 1):
        return (x if t == 0 else y).clone()
    if x.dtype not in FLOATS:
        return torch.maximum(x, y)
    wide = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
    return torch.lerp(x.to(wide), y.to(wide), t).to(x.dtype)
