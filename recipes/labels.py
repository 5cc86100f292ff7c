"""What the values of a mask mean: which label of a file, or which colour, is which class; and a look at them all.

A mask of one channel (modes L, P, 1, 16 and 32 bits) holds class numbers. One of colours is read by a list of them:
``--palette``, ``--label-map '{"#804080": 0, ...}'``, or the colours in ``classes.json`` of the data set. A colour
that is not listed is an error, never a class. A mask that is stored in three equal channels is read as one.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adaptkit.pictures import Picture, class_ids

LABELS = 65536  # that a mask can hold, in 16 bits
BLACK_AND_WHITE = '{"0": 0, "255": 1}'
HEX, DECIMAL = re.compile(r"#([0-9a-fA-F]{6})"), re.compile(r"(\d{1,3})[ ,]+(\d{1,3})[ ,]+(\d{1,3})")
RGB = ("RGB", "RGBA", "RGBX")
NEITHER = "save masks losslessly (PNG), with one class id per pixel (mode L or P)"


class Colours(NamedTuple):
    """Which colour is which class."""

    classes: dict[int, int]  #: 65536 red + 256 green + blue -> class
    always: bool = True  #: masks of one channel, too, are read by the colours they show
    said_by: str = "--palette"  #: for errors

    def ids(self, mask: Picture) -> np.ndarray:
        """Mask -> class ids (H, W) int64; ``ValueError`` for a colour that is not listed."""
        codes = coded(mask)
        known = np.array(sorted(self.classes))
        place = np.searchsorted(known, codes).clip(max=len(known) - 1)
        unknown = known[place] != codes
        if unknown.any():
            values, counts = np.unique(codes[unknown], return_counts=True)
            worst = written(int(values[counts.argmax()]))
            raise ValueError(
                f"{mask.name}: the mask holds the colour {worst} in {counts.max()} pixels, which {self.said_by} does "
                f"not list ({len(values)} such colours); add it, or map all colours with --label-map "
                f"'{{\"{worst}\": CLASS, ...}}', where the ignore index is not counted"
            )
        found: np.ndarray = np.array([self.classes[int(code)] for code in known])[place]
        return found


class Reading(NamedTuple):
    """How masks become class ids."""

    table: Tensor | None = None  #: what each label becomes (:func:`label_table`)
    colours: Colours | None = None

    def digest(self) -> str:
        """Return 16 hexadecimal digits: of another meaning of the values, others."""
        table = [] if self.table is None else self.table.tolist()
        listed = None if self.colours is None else (sorted(self.colours.classes.items()), self.colours.always)
        return hashlib.blake2b(repr((table, listed)).encode(), digest_size=8).hexdigest()

    def ids(self, mask: Picture) -> np.ndarray:
        """Mask -> class ids (H, W)."""
        ids = self.stored(mask)
        if self.table is None:
            return ids
        if ids.min() < 0 or ids.max() >= len(self.table):
            raise ValueError(f"{mask.name}: the mask holds labels {ids.min()}..{ids.max()}; give 0..{LABELS - 1}")
        return self.table.numpy()[ids]

    def stored(self, mask: Picture) -> np.ndarray:
        """Mask -> what it holds before the table, (H, W) int64: labels, or the classes of its colours."""
        if mask.image.format in ("JPEG", "MPO"):
            raise ValueError(f"{mask.name}: JPEG changes the labels that it stores; {NEITHER}")
        if self.colours is not None and (self.colours.always or mask.image.mode in RGB):
            return self.colours.ids(mask)
        if mask.image.mode in RGB and mask.wide is None:
            return _grey(mask)
        ids = class_ids(mask)
        if self.colours is not None and mask.image.mode == "P":
            _check_indices(mask, ids, self.colours)
        return ids


def _grey(mask: Picture) -> np.ndarray:
    """Three equal channels -> one; ``ValueError`` for colours, which lists them as ``--palette`` takes them."""
    codes = coded(mask)
    values, counts = np.unique(codes, return_counts=True)
    if ((values >> 8 & 255) == (values & 255)).all() and (values >> 16 == (values & 255)).all():
        return codes & 255
    often = values[np.argsort(-counts)][:20].tolist()
    raise ValueError(
        f"{mask.name}: the mask is colour-coded (mode {mask.image.mode}), and nothing says which colour is which "
        f"class. Name them in their order, or store one class id per pixel (mode L or P). It holds {len(values)} "
        f"colours, the most frequent first: --palette {' '.join(repr(written(v)) for v in often)}; or one by one: "
        f"--label-map '{{\"{written(often[0])}\": 0, ...}}'"
    )


def _check_indices(mask: Picture, ids: np.ndarray, colours: Colours) -> None:
    """``ValueError`` where a palette's index says one class, and its listed colour another."""
    table = np.array(mask.image.getpalette("RGB"), np.int64).reshape(-1, 3) @ np.array([65536, 256, 1])
    used = [int(v) for v in np.unique(ids) if v < len(table)]
    listed = {v: colours.classes.get(int(table[v])) for v in used}
    if None in listed.values():
        return  # its colours are for the eye
    other = next((v for v, found in listed.items() if found != v), None)
    if other is not None:
        raise ValueError(
            f"{mask.name}: entry {other} of the mask's palette has the colour {written(int(table[other]))}, which "
            f"{colours.said_by} gives to class {listed[other]}: pass --palette to read the colours, or take them out "
            f"of {colours.said_by} to read the numbers"
        )


def coded(mask: Picture) -> np.ndarray:
    """Mask -> the colour of each pixel, (H, W) int64: 65536 red + 256 green + blue."""
    image = mask.image
    if mask.bands is not None:
        raise ValueError(f"{mask.name}: a mask of the shape {mask.bands.shape}; {NEITHER}")
    if mask.wide is not None or image.mode not in (*RGB, "P", "L", "1"):
        raise ValueError(
            f"{mask.name}: a mask of colours has 8 bits a channel, this one the mode {image.mode}; {NEITHER}"
        )
    if image.mode == "RGBA" and image.getextrema()[3] != (255, 255):  # type: ignore[index]
        raise ValueError(f"{mask.name}: a mask of colours has transparent pixels (mode RGBA); {NEITHER}")
    return np.asarray(image.convert("RGB")).astype(np.int64) @ np.array([65536, 256, 1])


def written(code: int) -> str:
    """65536 red + 256 green + blue -> ``#rrggbb``."""
    return f"#{code:06x}"


def colour_of(text: Any) -> int | None:
    """``#804080``, ``128,64,128`` or ``[128, 64, 128]`` -> its code; None for anything else."""
    if isinstance(text, list | tuple):
        text = ",".join(map(str, text))
    if found := HEX.fullmatch(str(text).strip()):
        return int(found.group(1), 16)
    if found := DECIMAL.fullmatch(str(text).strip()):
        red, green, blue = map(int, found.groups())
        return red * 65536 + green * 256 + blue if max(red, green, blue) < 256 else None
    return None


# ------------------------------------------------------------------------------------------------ from the options


def reading(
    label_map: dict[str, int],
    reduce_zero: bool,
    ignore: int,
    classes: int,
    palette: Sequence[Any] = (),
    found: Sequence[Any] | None = None,
) -> Reading:
    """Return how masks are read.

    Args:
        label_map: of labels or of colours to classes.
        reduce_zero: label 0 is ignored and the others come down by one.
        ignore: what an ignored label becomes.
        classes: how many there are.
        palette: a colour for each, in their order.
        found: the same, from the data set; masks of one channel are not read by it.

    Raises ``ValueError`` for what is no colour and no label, two classes of one colour, and another number of colours.
    """
    colours = {k: colour_of(k) for k in label_map if not str(k).isdigit()}
    wrong = next((k for k, code in colours.items() if code is None), None)
    if wrong is not None:
        raise ValueError(
            f"--label-map: {wrong!r} is no label of a mask; give 0..{LABELS - 1}, or colours '#804080' or '128,64,128'"
        )
    if colours and (palette or len(colours) < len(label_map)):
        raise ValueError("--label-map maps labels or colours, not both, and colours are mapped by it or by --palette")
    if colours:
        by_colour = {code: label_map[k] for k, code in colours.items() if code is not None}
        return Reading(label_table({}, reduce_zero, ignore), Colours(by_colour, said_by="--label-map"))
    table = label_table(label_map, reduce_zero, ignore)
    given, said_by = (palette, "--palette") if palette else (found or (), "the list of classes")
    if not given:
        return Reading(table)
    codes = [colour_of(one) for one in given]
    if None in codes:
        raise ValueError(f"{said_by}: {given[codes.index(None)]!r} is no colour; give '#804080' or '128,64,128'")
    if len(set(codes)) < len(codes):
        if not palette:
            return Reading(table)  # colours for the eye
        raise ValueError(f"{said_by} gives the colour {written(max(codes, key=codes.count))} to two classes")  # type: ignore[arg-type]
    if palette and len(codes) not in (classes, classes + reduce_zero):
        raise ValueError(
            f"{said_by} has {len(codes)} colours, and there are {classes} classes: give one for each, in their order; "
            "with --label-map also those that are not counted"
        )
    return Reading(
        table, Colours({code: i for i, code in enumerate(codes) if code is not None}, bool(palette), said_by)
    )


def palette_of(given: Sequence[str]) -> list[str]:
    """Read ``--palette``: colours, or a file of them (one a line, or a JSON list of colours or of objects with one)."""
    colours = list(given) if len(given) != 1 or colour_of(given[0]) is not None else _of_file(given)
    codes = [colour_of(one) for one in colours]
    if None in codes:
        raise ValueError(f"--palette: {colours[codes.index(None)]!r} is no colour; give '#804080' or '128,64,128'")
    return [written(code) for code in codes if code is not None]


def _of_file(given: Sequence[str]) -> list[Any]:
    path = Path(given[0])
    if not path.is_file():
        raise ValueError(f"--palette {given[0]}: give colours, '#804080' or '128,64,128', or a file of them")
    if path.suffix != ".json":
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    try:
        entries = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    return [one.get("color", one.get("colour")) if isinstance(one, dict) else one for one in entries]


def label_table(mapping: dict[str, int], reduce_zero: bool, ignore_index: int) -> Tensor | None:
    """Return what each label of a file becomes, (65536,), or None where it stays.

    Args:
        mapping: ``{"7": 0, "8": 1}``; labels that are not in it are ignored.
        reduce_zero: label 0 is ignored and the others come down by one, as ADE20K's 150 classes are meant.
        ignore_index: what an ignored label becomes.

    Raises ``ValueError`` for a label that no mask can hold.
    """
    if not mapping and not reduce_zero:
        return None
    table = torch.full((LABELS,), ignore_index) if mapping else torch.arange(LABELS)
    for label, target in mapping.items():
        if not str(label).isdigit() or int(label) >= LABELS:
            raise ValueError(f"--label-map: {label!r} is no label of a mask; give 0..{LABELS - 1}")
        table[int(label)] = target
    if reduce_zero:
        moved = torch.where((table == 0) | (table == ignore_index), ignore_index, table - 1)
        table = moved
    return table


# ---------------------------------------------------------------------------------------------------------- checks


def check_range(
    ids: np.ndarray, num_classes: int, ignore_index: int, name: str, file: str = "", of_model: bool = False
) -> None:
    """``ValueError`` where a mask holds labels that are neither classes nor ignored.

    ``of_model``: the classes are those of a trained model, so that no other number of them is advised.
    """
    outside = np.unique(ids[((ids < 0) | (ids >= num_classes)) & (ids != ignore_index)])
    if len(outside) == 0:
        return
    wrong = outside.tolist()
    black_and_white = f", or --label-map '{BLACK_AND_WHITE}' if white is a class" if wrong == [255] else ""
    more = f"--num-classes {max(wrong) + 1} or " if max(wrong) >= num_classes else ""
    more = "--label-map for the classes of the model, or " if of_model else more
    if wrong == [num_classes] and not (ids == 0).any():
        more = f"--reduce-zero-label if labels count from 1, {more}"
    raise ValueError(
        f"{name}: the mask holds labels {wrong[:5]}, outside 0..{num_classes - 1} and not the ignore index "
        f"{ignore_index}{f', in {file}' if file else ''}; pass {more}--ignore-index {wrong[-1]}{black_and_white}"
    )


def some(data: Any, most: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number, row) of ``most`` rows, evenly chosen; of a stream of the first, a tenth as many."""
    if hasattr(data, "__len__"):
        for index in np.linspace(0, len(data) - 1, min(len(data), most)).round().astype(int).tolist():
            yield index, data[index]
    else:
        yield from enumerate(data.take(most // 10))


def warn_unseen(unseen: list[str], classes: int, name: str, where: str, advice: str) -> None:
    """Warn of classes that never occur in what is trained on: nothing teaches them."""
    if unseen:
        shown = ", ".join(unseen[:10]) + (", ..." if len(unseen) > 10 else "")
        warnings.warn(
            f"{name}: {len(unseen)} of {classes} classes occur in none of the {where} that were looked at ({shown}), "
            f"and nothing teaches them; {advice}",
            stacklevel=3,
        )
