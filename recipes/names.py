"""Names and colours of classes: from the command line, or found with the data; kept in the file for prediction."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .labels import Reading, colour_of, palette_of, reading
from .scores.recorded import LABELS, WAYS

HELP = """names of the classes, in the order of their ids; or a file with one name a line, or a JSON list of names or of
{"name": ..., "color": [r, g, b]}. Default: classes.json, classes.txt, class_dict.csv (name,r,g,b) or CVAT's
labelmap.txt in the folder of the data, or Cityscapes'"""
FOUND = ("classes.json", "classes.txt", "class_dict.csv", "labelmap.txt")
MAP_HELP = """of labels in files, or of colours, to classes: '{"7": 0, "8": 1}', '{"#804080": 0, "0,0,0": 255}';
what is not listed is ignored, of colours an error"""
PALETTE_HELP = """for masks of colours: the colour of each class, in their order, '#804080' or 128,64,128, or a file
of them. Default: the colours of --classes, or of classes.json in the folder of the data"""
SUFFIX_HELP = "how the name of a mask ends that lies beside its image: a.jpg and a_END.png. Default: _mask, _gt, ..."
CITYSCAPES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
TABLES = ("class_dict.csv", "labelmap.txt")


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
    if beside is not None and beside.name in TABLES and len(_read(beside)["classes"]) != count:
        beside = None  # CamVid's has 32 classes, and most train on 11 of them
    if len(given) == 1 and Path(given[0]).suffix in (".txt", ".json"):
        said, where = _read(Path(given[0])), f"--classes {given[0]}"
    elif given:
        said, where = {"classes": list(given)}, "--classes"
    elif beside is not None:
        said, where = _read(beside), str(beside)
    elif count == len(CITYSCAPES) and (folder / "leftImg8bit").is_dir():
        return {"classes": list(CITYSCAPES)}
    else:
        return {"classes": list(found)} if found and not are_numbers(found) else {}
    if len(said["classes"]) != count:
        raise ValueError(f"{where} names {len(said['classes'])} classes, and there are {count}: give a name for each")
    return said


def are_numbers(classes: list[str]) -> bool:
    """Whether these are the numbers that classes without names have, 0, 1, ...: folders "1", "10", "2" are names."""
    return classes == [str(i) for i in range(len(classes))]


def reading_of(args: argparse.Namespace) -> Reading:
    """Return how the masks of a training are read; ``args.palette`` becomes the list of colours that it names."""
    args.palette = palette_of(args.palette)
    found = args.named.get("palette")
    return reading(args.label_map, args.reduce_zero_label, args.ignore_index, args.num_classes, args.palette, found)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    if path.name in TABLES:
        return _read_table(path)
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


def _read_table(path: Path) -> dict[str, Any]:
    """``name,r,g,b`` a line after a line of titles, or ``name:r,g,b:...`` as CVAT writes it."""
    cvat, lines = path.suffix == ".txt", path.read_text().splitlines()
    rows = [line.split(":")[:2] if cvat else line.split(",", 1) for line in lines if line.strip() and line[0] != "#"]
    rows = rows if cvat else rows[1:]
    names, colours = [row[0].strip() for row in rows], [colour_of(row[-1]) for row in rows]
    if not rows or None in colours:
        wrong = "no class" if not rows else f"{rows[colours.index(None)][-1]!r}, which is no colour"
        raise ValueError(f"{path} holds {wrong}; its lines are {'name:r,g,b::' if cvat else 'name,r,g,b'}")
    return {"classes": names, "palette": [[c >> 16, c >> 8 & 255, c & 255] for c in colours if c is not None]}


def to_record(args: argparse.Namespace) -> dict[str, Any]:
    """Return what a file must say for prediction and evaluation: names, how labels were read, and images looked at."""
    said = dict(getattr(args, "named", {}))
    labels = {
        k: v for k in LABELS if (v := getattr(args, k, None)) is not None and v is not False and v not in ({}, [])
    }
    if labels:
        said["labels"] = labels
    looked = {k: v for k in WAYS if (v := getattr(args, k, None)) is not None and v is not False and v != [1.0]}
    if looked:
        said["evaluation"] = looked
    if len(labels.get("palette", ())) == getattr(args, "num_classes", None):
        said.setdefault("palette", [[int(one[i : i + 2], 16) for i in (1, 3, 5)] for one in labels["palette"]])
    if isinstance(args.size, int):  # of classification: how an image became a square
        said["framing"] = "squash" if getattr(args, "augment", "") == "none" else "crop"
    return said
