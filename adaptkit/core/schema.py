"""What a file may say: JSON of bounded size and depth, whose values are of the types that a schema names.

A schema is a class with annotated fields: a ``TypedDict``, a ``NamedTuple`` or a frozen dataclass, so that the configs
are their own schemas. Every refusal is a ``ValueError`` that names file and field, what was found and what
was expected. An annotation that JSON has no value for is left to the ``__post_init__`` of its class.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import types
import typing
from typing import Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints

__all__ = ["MOST_BYTES", "check", "check_fields", "check_pattern", "fields_of", "read_json"]

MOST_BYTES = 4 << 20  #: of a header; that of a ViT-g with its checksums has 0.1 MB
MOST_DEPTH, MOST_NESTED = 64, 1 << 17  #: levels of values in values; lists and objects
MOST_ITEMS = 1 << 16  #: of a list or dict with a schema
MOST_TEXT = 4096  #: characters of a text with a schema
MOST_PATTERN = 1024  #: characters of a regular expression
LARGEST = 1 << 63

#: A text (to its end, where it is not closed) or a bracket. Nothing is tried twice.
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
#: Of a regular expression: one character, perhaps repeated; alternatives of such in a group that is not repeated.
ATOM = r"(?:[\w\-^$]|\\\.|\.[*+]?|(?:\\d|\[[\w-]+\])[*+]?)"
PATTERN = re.compile(rf"(?:{ATOM}|\||\((?:\?:)?(?:{ATOM}|\|)*\))*")
MOST_WILD = 3  #: ``.*`` in one expression: each multiplies the time by the length of a name


def read_json(text: str | bytes, where: str) -> dict[str, Any]:
    """Return the JSON object in ``text``; ``where`` names it in errors.

    Raises ``ValueError`` for what is no JSON object, too long or too deep, and for what JSON can be made to say but no
    program should rely on: a key that is there twice, NaN, infinity, half a surrogate pair, a number beyond 64 bits.
    """
    if len(text) > MOST_BYTES:
        raise ValueError(f"{where} has {len(text)} characters, expected at most {MOST_BYTES}")
    try:
        text = text.decode() if isinstance(text, bytes) else text
        _check_depth(text, where)
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
        _check_plain(value)
    except ValueError as error:  # of which JSONDecodeError and UnicodeError are kinds
        raise ValueError(f"{where} is damaged: {error}. Copy or download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} is damaged: found {_shown(value)}, expected an object")
    return value


def _check_depth(text: str, where: str) -> None:
    depth = opened = 0
    for token in TOKEN.finditer(text):
        step = {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        depth, opened = depth + step, opened + (step > 0)
        if depth > MOST_DEPTH:
            raise ValueError(f"its values are more than {MOST_DEPTH} levels deep")
        if opened > MOST_NESTED:
            raise ValueError(f"it has more than {MOST_NESTED} lists and objects")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {next(n for n in names if names.count(n) > 1)!r} is there twice")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _check_plain(value: Any) -> None:
    if isinstance(value, dict):
        for key, part in value.items():
            _check_plain(key)
            _check_plain(part)
    elif isinstance(value, list):
        for part in value:
            _check_plain(part)
    elif isinstance(value, str):
        value.encode()
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number is too large for 64 bits")
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError("an integer is too large for 64 bits")


def check(value: Any, kind: Any, where: str) -> None:
    """Raise ``ValueError`` where a value of JSON is not of this kind, an annotation."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        _check_any(value, args, where)
    elif origin is Literal:
        if not any(type(value) is type(a) and value == a for a in args):
            _refuse(value, " or ".join(map(repr, args)), where)
    elif args and origin in (list, tuple):
        _check_list(value, args, fixed=origin is tuple and args[-1] is not Ellipsis, where=where)
    elif args and origin is dict:
        if not isinstance(value, dict) or (len(value) > MOST_ITEMS and args[1] is not Any):
            _refuse(value, f"an object of at most {MOST_ITEMS} fields", where)
        for name, part in value.items():
            check(part, args[1], f"{where}.{name}")
    elif kind in (bool, int, str, type(None)):
        if type(value) is not kind or (kind is str and len(value) > MOST_TEXT):
            _refuse(value, {bool: "true or false", int: "an integer", str: "a text"}.get(kind, "null"), where)
    elif kind is float:
        if type(value) not in (int, float):
            _refuse(value, "a number", where)
    elif typing.is_typeddict(kind):
        check_fields(value, kind, where)


def _check_any(value: Any, kinds: tuple[Any, ...], where: str) -> None:
    errors: list[str] = []
    for kind in kinds:
        try:
            return check(value, kind, where)
        except ValueError as error:
            errors.append(str(error))
    inside = [error for error in errors if not error.startswith(f"{where}: ")]
    expected = " or ".join(error.partition(", expected ")[2] for error in errors)
    raise ValueError(inside[0] if inside else f"{where}: found {_shown(value)}, expected {expected}")


def _check_list(value: Any, args: tuple[Any, ...], fixed: bool, where: str) -> None:
    if not isinstance(value, list | tuple) or len(value) > MOST_ITEMS or (fixed and len(value) != len(args)):
        _refuse(value, f"a list of {len(args)}" if fixed else f"a list of at most {MOST_ITEMS}", where)
    for i, part in enumerate(value):
        check(part, args[i] if fixed else args[0], f"{where}[{i}]")


def check_fields(said: Any, kind: Any, where: str) -> None:
    """Raise ``ValueError`` unless ``said`` is an object with the fields of this class, each of its type."""
    if not isinstance(said, dict):
        _refuse(said, "an object", where)
    known, needed = fields_of(kind)
    unknown, missing = sorted(said.keys() - known.keys()), sorted(needed - said.keys())
    if unknown or missing:
        what = f"the unknown field {unknown[0]!r}" if unknown else f"no field {missing[0]!r}"
        raise ValueError(f"{where}: found {what:.200}, expected {', '.join(known) or 'no field'}")
    for name, value in said.items():
        check(value, known[name], f"{where}.{name}")


@functools.cache
def fields_of(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """Return the fields of a class with their annotations, and the names of those without a default."""
    try:
        hints = get_type_hints(kind)
    except NameError:  # a plug-in whose annotations name what is imported for type checkers alone
        hints = {}
    if typing.is_typeddict(kind):
        marked = get_type_hints(kind, include_extras=True)
        return hints, frozenset(name for name in hints if get_origin(marked[name]) is not NotRequired)
    if dataclasses.is_dataclass(kind):
        fields = [f for f in dataclasses.fields(kind) if f.init]
        absent = dataclasses.MISSING
        needed = frozenset(f.name for f in fields if f.default is absent and f.default_factory is absent)
        return {f.name: hints.get(f.name, Any) for f in fields}, needed
    return {name: hints.get(name, Any) for name in kind._fields}, frozenset(kind._fields) - kind._field_defaults.keys()


def _refuse(value: Any, expected: str, where: str) -> None:
    raise ValueError(f"{where}: found {_shown(value)}, expected {expected}")


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}... ({len(text)} characters)"


def check_pattern(pattern: str, where: str) -> None:
    """Raise ``ValueError`` for a regular expression that may take longer than a name is long, again and again."""
    wild = len(re.findall(r"(?<!\\)\.[*+]|\][*+]", pattern))
    if len(pattern) > MOST_PATTERN or wild > MOST_WILD or not PATTERN.fullmatch(pattern):
        raise ValueError(
            f"{where}: found the regular expression {_shown(pattern)}, expected one of letters, '.', '\\.', '\\d+', "
            f"at most {MOST_WILD} '.*', and groups (a|b) that are not repeated: no other is run from a file. Where you "
            "trust it, give the config yourself: model = adaptkit.attach(backbone, LoraConfig(target_modules=...)), "
            "then model.load_adapter_state_dict(adaptkit.load(path).tensors)"
        )
