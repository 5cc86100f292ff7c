"""Names and colours of classes: from the command line, or found with the data; kept in the file for prediction."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HELP = """names of the classes, in the order of their ids; or a file with one name a line, or a JSON list of names or of
{"name": ..., "color": [r, g, b]}. Default: classes.txt or classes.json in the folder of the data, or Cityscapes'"""
FOUND = ("classes.json", "classes.txt")
CITYSCAPES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
LABELS = ("ignore_index", "label_map", "reduce_zero_label")  #: how the masks of the training were read


def options(p: argparse.ArgumentParser) -> None:
    """Add ``--classes``."""
    p.add_argument("--classes", nargs="+", default=[], metavar="NAME", help=HELP)


def named(args: argparse.Namespace, found: list[str] | None = None) -> dict[str, Any]:
    """Return ``classes`` and perhaps ``palette`` for the file; {} where nobody says them.

    Args:
        args: with ``classes``, ``num_classes`` and ``train``.
        found: names that the data set itself has.

    Raises ``ValueError`` for another number of names than of classes, and for a file that holds none.
    """
    given, count, folder = args.classes, args.num_classes, Path(args.train)
    beside = next((folder / name for name in FOUND if (folder / name).is_file()), None)
    if len(given) == 1 and Path(given[0]).suffix in (".txt", ".json"):
        said, where = _read(Path(given[0])), f"--classes {given[0]}"
    elif given:
        said, where = {"classes": list(given)}, "--classes"
    elif beside is not None:
        said, where = _read(beside), str(beside)
    elif count == len(CITYSCAPES) and (folder / "leftImg8bit").is_dir():
        return {"classes": list(CITYSCAPES)}
    else:
        return {"classes": list(found)} if found and any(not n.isdecimal() for n in found) else {}
    if len(said["classes"]) != count:
        raise ValueError(f"{where} names {len(said['classes'])} classes, and there are {count}: give a name for each")
    return said


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    if path.suffix == ".txt":
        return {"classes": [line.strip() for line in path.read_text().splitlines() if line.strip()]}
    try:
        entries = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} holds no list of names, or of objects with a name")
    if all(isinstance(e, dict) and isinstance(e.get("name"), str) for e in entries):
        colours = [e.get("color", e.get("colour")) for e in entries]
        names = [e["name"] for e in entries]
        return {"classes": names, "palette": colours} if all(colours) else {"classes": names}
    if not all(isinstance(e, str) for e in entries):
        raise ValueError(f"{path} holds no list of names, or of objects with a name")
    return {"classes": entries}


def to_record(args: argparse.Namespace) -> dict[str, Any]:
    """Return what a file must say for prediction and evaluation: names, and how the labels of the data were read."""
    said = dict(getattr(args, "named", {}))
    labels = {k: getattr(args, k) for k in LABELS if getattr(args, k, None) not in (None, {}, False)}
    if labels:
        said["labels"] = labels
    if isinstance(args.size, int):  # of classification: how an image became a square
        said["framing"] = "squash" if getattr(args, "augment", "") == "none" else "crop"
    return said
