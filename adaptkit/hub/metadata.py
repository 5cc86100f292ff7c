"""What a user says of a saved adapter, as JSON can hold it."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence, Set
from datetime import date, time, timedelta
from enum import Enum
from typing import Any
from uuid import UUID

import torch
from torch import Tensor

from adaptkit.core.near import hint

__all__ = ["KNOWN", "check_names", "plain"]

#: Metadata that something reads: the card, ``inspect``, prediction, or whoever builds the model again.
KNOWN = (
    "task", "license", "license_name", "license_link", "dataset", "datasets", "metrics",
    "classes", "palette", "labels", "size", "framing", "mean", "std", "recipe",
)  # fmt: skip
#: Options of ``push`` itself, which a wrong name may have meant.
OPTIONS = ("private", "token", "revision", "commit_message", "extra")

Convert = Callable[[Any, str], Any]  #: a part of a value, and where it stands -> that part as JSON has it


def check_names(metadata: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for a name that nothing reads, such as ``licence=``."""
    for name in metadata:
        if name not in KNOWN:
            raise ValueError(
                f"{name}= is no metadata that anything reads{hint(name, (*KNOWN, *OPTIONS))}; known are "
                f"{', '.join(KNOWN)}. Metadata of your own go into extra={{{name!r}: ...}}"
            )


def plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``metadata`` with values that JSON has: what is written is what is read.

    NumPy and torch scalars and arrays become numbers and lists, tuples and sets lists, paths, devices and dtypes
    strings, dates ISO 8601, durations seconds, an enum its value, a dataclass a dict. NaN and infinity, which JSON
    does not have, become ``None``: a metric that is not defined must not cost the trained weights.

    Raises ``ValueError`` for anything else; it names the key.
    """
    seen: list[int] = []  # the containers that are open, so that one inside itself is found

    def convert(value: Any, where: str) -> Any:
        if id(value) in seen:
            raise ValueError(f"metadata {where} holds itself, which JSON cannot say. Leave it out")
        seen.append(id(value))
        try:
            return _converted(value, where, convert)
        finally:
            seen.pop()

    return _mapping(metadata, "", convert)


def _converted(value: Any, where: str, convert: Convert) -> Any:
    import numpy as np

    if isinstance(value, Enum):
        return convert(value.value, where)
    if isinstance(value, Tensor):
        return convert(_listed(value, where), where)
    if isinstance(value, np.ndarray):
        return convert(value.tolist(), where)
    if isinstance(value, np.datetime64 | np.timedelta64):
        return str(value)
    if isinstance(value, np.generic) and not isinstance(value, str | bytes | float):
        return convert(value.item(), where)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, str | os.PathLike | UUID | torch.device | torch.dtype):
        return _text(value, where)
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _mapping({f.name: getattr(value, f.name) for f in dataclasses.fields(value)}, f"{where}.", convert)
    if isinstance(value, Mapping):
        return _mapping(value, f"{where}.", convert)
    if isinstance(value, Set):
        return sorted((convert(v, f"{where}[...]") for v in value), key=lambda v: (str(type(v)), str(v)))
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [convert(v, f"{where}[{i}]") for i, v in enumerate(value)]
    raise ValueError(
        f"metadata {where} is a {type(value).__module__}.{type(value).__qualname__}, which JSON cannot say: "
        f"{value!r:.80}. Give a number, a text, a list or a dict, or leave it out"
    )


def _mapping(value: Mapping[Any, Any], prefix: str, convert: Convert) -> dict[str, Any]:
    """JSON's keys are texts; two that become the same one would lose a value."""
    said: dict[str, Any] = {}
    for key, part in value.items():
        where = f"{prefix}{key}"
        name = convert(key, f"{where} (its key)")
        if not isinstance(name, str | int | float):
            raise ValueError(f"metadata {where} has the key {key!r}, and JSON's keys are texts. Give it another")
        if str(name) in said:
            raise ValueError(f"metadata {where} is there twice: {key!r} and a key that is written the same")
        said[str(name)] = convert(part, where)
    return said


def _listed(value: Tensor, where: str) -> Any:
    if value.is_meta or value.is_complex():
        raise ValueError(f"metadata {where} is a {value.dtype} tensor on {value.device}, which JSON cannot say")
    return value.detach().cpu().tolist()


def _text(value: Any, where: str) -> str:
    text = str(os.fspath(value)) if isinstance(value, os.PathLike) else str(value)
    text = text.removeprefix("torch.") if isinstance(value, torch.dtype) else text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"metadata {where} is no text that UTF-8 can write: {text!r:.80}") from error
    return text
