"""The header of an adapter file: its schema, and how one of an older format is read.

The schema says what each field is. Configs of adapters and heads are checked against their own classes where they are
built, for a file may be read, and inspected, where a plug-in that it needs is not installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict

from adaptkit.core.hierarchical import HierarchicalSpec
from adaptkit.core.schema import check_fields, read_json
from adaptkit.core.view import Spec
from adaptkit.version import __version__

__all__ = ["FORMAT", "check_keys", "read_header", "say_spec", "spec_of"]

FORMAT = 2  #: what is written; 1 is read too, whose spec has other names and which holds no parts of the backbone
SINCE_FORMAT_1 = {
    "dim": "embed_dim", "dims": "embed_dims", "heads": "num_heads", "patch": "patch_size",
    "prefix": "num_prefix_tokens",
}  # fmt: skip
MOST_PARTS = 1000  #: adapters, trained parts of the backbone


class Method(TypedDict):
    """An adapter or a head, and its config."""

    name: str
    config: dict[str, Any]
    package: NotRequired[str]  #: to install, of the plug-in that brings it
    module: NotRequired[str]  #: top-level name, where no package holds it


#: A head that is the user's own module, or a network around the adapter.
OwnHead = TypedDict("OwnHead", {"name": None, "class": str, "around": NotRequired[bool]})


class Expansion(TypedDict):
    """How the rows of further channels began, :func:`adaptkit.expand_channels`."""

    how: str
    wavelengths: list[float] | None


#: What :func:`adaptkit.hub.backbone.describe_backbone` says; older files know less.
Backbone = TypedDict(
    "Backbone",
    {
        "spec": dict[str, Any],
        "class": str,
        "positions": NotRequired[str],
        "source": str,
        "revision": NotRequired[str | None],
        "mean": list[float],
        "std": list[float],
        "classes": NotRequired[int],
        "fingerprint": dict[str, list[float]],
        "digest": NotRequired[dict[str, str]],
        "sums": NotRequired[dict[str, tuple[float, float, float, float]]],
        "expanded": NotRequired[Expansion],
        "package": NotRequired[str],  # of the plug-in whose family sees it, as of a method
        "module": NotRequired[str],
    },
)


class Header(TypedDict):
    """All that a file says."""

    format: int
    adaptkit: NotRequired[str]
    adapters: list[Method]
    head: dict[str, Any] | None
    backbone: Backbone
    train_backbone: NotRequired[list[str]]
    metadata: NotRequired[dict[str, Any] | None]


def read_header(text: str, file: str) -> dict[str, Any]:
    """Return the header in ``text`` with the names of today. ``ValueError`` names file, field, found and expected."""
    header = read_json(text, f"{file}, the adaptkit header")
    version = header.get("format")
    if type(version) is not int or version < 1:
        raise ValueError(
            f"{file}, the adaptkit header is damaged: format is {version!r:.80}, expected an integer from 1 to "
            f"{FORMAT}. Copy or download it again"
        )
    if version > FORMAT:
        raise ValueError(
            f"{file} has format {version}, written by adaptkit {header.get('adaptkit')!s:.80}; this is adaptkit "
            f"{__version__}, which reads up to format {FORMAT}: upgrade adaptkit"
        )
    where = f"{file}, header"
    check_fields(header, Header, where)
    if header["head"] is not None:
        own = header["head"].get("name", "") is None
        check_fields(header["head"], OwnHead if own else Method, f"{where}.head")
    for field in ("adapters", "train_backbone"):
        if len(header.get(field, ())) > MOST_PARTS:
            raise ValueError(f"{where}.{field}: found {len(header[field])} of them, expected at most {MOST_PARTS}")
    backbone = header["backbone"]
    backbone["spec"] = {SINCE_FORMAT_1.get(name, name): value for name, value in backbone["spec"].items()}
    _check_spec(backbone["spec"], f"{where}.backbone.spec")
    return header


def _check_spec(said: dict[str, Any], where: str) -> None:
    kind = HierarchicalSpec if "depths" in said else Spec
    check_fields(said, kind, where)
    for name, value in said.items():
        numbers = value if isinstance(value, list) else [value]
        if name != "family" and not all(0 <= n <= 1 << 20 for n in numbers):
            raise ValueError(f"{where}.{name}: found {value!r:.80}, expected from 0 to {1 << 20}")
    stages = {len(value) for value in said.values() if isinstance(value, list)}
    if kind is HierarchicalSpec and (len(stages) > 1 or 0 in stages):
        raise ValueError(f"{where}: found {sorted(stages)} stages, expected one number of them, at least 1")


def spec_of(said: dict[str, Any]) -> Spec | HierarchicalSpec:
    """Return the spec that a header holds."""
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in said.items()}
    return HierarchicalSpec(**fields) if "depths" in fields else Spec(**fields)


def check_keys(names: Sequence[str], header: dict[str, Any], file: str) -> None:
    """Raise ``ValueError`` for a tensor that belongs to nothing the header names."""
    parts = [a["name"] for a in header["adapters"]]
    parts += ["head"] * (header["head"] is not None) + ["backbone"] * bool(header.get("train_backbone"))
    known = tuple(f"{part}." for part in parts)
    strange = [name for name in names if not name.startswith(known)]
    if strange:
        raise ValueError(
            f"{file}: found the tensor {strange[0]!r:.200}, expected names that begin with {', '.join(known) or 'none'}"
        )


def say_spec(spec: Spec | HierarchicalSpec) -> str:
    """Return the numbers that a backbone must share with a file."""
    return ", ".join(f"{name}={getattr(spec, name)}" for name in spec._fields[1:])
