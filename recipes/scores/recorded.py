"""What a file says of its own evaluation: how labels were read, and how pictures were looked at."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from adaptkit.predict.ways import Ways

LABELS = ("ignore_index", "label_map", "reduce_zero_label", "palette")
WAYS = ("slide", "stride", "resize", "scales", "flip")


def labels_of(said: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``ignore_index``, ``label_map``, ``reduce_zero_label``, ``palette``; ``ValueError`` for other things."""
    default = {"ignore_index": 255, "label_map": {}, "reduce_zero_label": False, "palette": []}
    found = {**default, **_mapping(said, "labels", LABELS)}
    table, palette = found["label_map"], found["palette"]
    ids = [found["ignore_index"], *table.values()] if isinstance(table, Mapping) else [None]
    known = all(isinstance(v, int) and not isinstance(v, bool) for v in ids)
    known &= isinstance(found["reduce_zero_label"], bool)
    if not known or not isinstance(palette, list) or not all(isinstance(c, str) for c in palette):
        raise ValueError(
            f"the file's labels are {found!r:.200}: ids are whole numbers, colours texts. Give --label-map, --palette, "
            "--ignore-index"
        )
    return found


def ways_of(said: Mapping[str, Any], asked: Ways) -> Ways:
    """Return how the run looked at its validation images, unless something else is ``asked`` for."""
    if asked != Ways(batch_size=asked.batch_size):
        return asked
    found = _mapping(said, "evaluation", WAYS)
    try:
        pairs = {k: tuple(int(v) for v in found[k]) for k in ("slide", "stride") if k in found}
        scales = tuple(float(x) for x in found.get("scales", (1.0,)))
        more = {k: found[k] for k in ("resize", "flip") if k in found}
        return dataclasses.replace(asked, **pairs, scales=scales, **more)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the file's evaluation is {found!r:.200}: {error}. Give --resize native or --slide"
        ) from error


def written(ways: Ways) -> dict[str, Any]:
    """Return what decides a score: all but how many images run at once."""
    return {k: v for k, v in dataclasses.asdict(ways).items() if k != "batch_size"}


def _mapping(said: Mapping[str, Any], name: str, keys: tuple[str, ...]) -> Mapping[str, Any]:
    found = said.get(name) or {}
    if not isinstance(found, Mapping) or not set(found) <= set(keys):
        raise ValueError(f"the file's {name} are {found!r:.200}: expected a mapping with {', '.join(keys)}")
    return found
