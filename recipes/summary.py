"""What a run is about to be trained on, in one screen: classes, what is not counted, sizes; and what is wrong with it.

Each recipe looks at its data when it opens them, at a bounded number of images evenly chosen, and leaves a
:class:`Summary` with its rows; the loop prints both splits on the first process.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["Summary", "about", "as_json", "lines", "of_counts", "of_labels"]

ROWS = 16  # classes that are shown: those that never occur first, then the rarest, then the most frequent
UNSEEN = "occurs in no image"
LARGER = 4.0  # times the side of --size, from which images are said to be much larger
SIZES = 200  # images whose size is read where nothing else is looked at


@dataclass
class Summary:
    """What one split holds, as far as it was looked at."""

    name: str  #: how the user named it: --train
    unit: str  #: of what is counted: pixels, boxes, segments, images
    images: int | None  #: None of a stream
    looked: int = 0  #: images
    counts: Any = ()  #: of each class
    images_of: Any = ()  #: in how many images each class occurs
    rest: int = 0  #: pixels that are ignored
    sizes: list[tuple[int, int]] = field(default_factory=list)  #: (height, width) of images
    classes: list[str] = field(default_factory=list)  #: their names, where they have any
    uncounted: tuple[int, ...] = ()  #: classes that are ignored
    facts: list[str] = field(default_factory=list)  #: what else there is to say

    def see(self, counts: Any, rest: int, size: tuple[int, int]) -> None:
        """Count one image."""
        self.looked, self.counts, self.rest = self.looked + 1, self.counts + counts, self.rest + rest
        self.images_of = self.images_of + (counts > 0)
        self.sizes.append(size)

    @property
    def ignored(self) -> float:
        """Share of the pixels that are ignored."""
        return self.rest / max(1, self.rest + int(np.sum(self.counts)))

    def unseen(self) -> list[int]:
        """Classes that occur in nothing that was looked at."""
        return [k for k, n in enumerate(self.counts) if n == 0 and k not in self.uncounted]


def of_labels(name: str, rows: Any, labels: list[int], classes: int) -> Summary:
    """Return the summary of images with a class each; the sizes are those of a few of them."""
    from .labels import some

    counts = np.bincount(labels, minlength=classes)
    seen = Summary(name, "images", len(labels), len(labels), counts, counts)
    for index, row in some(rows.data, SIZES):
        seen.sizes.append(rows.read({"image": row["image"]}, index, pixels=False)["image"].upright)
    return seen


def of_counts(
    name: str, unit: str, images: list[list[int]], sizes: list[tuple[int, int]], classes: list[str]
) -> Summary:
    """Return the summary of images whose objects have these labels."""
    counts, images_of = np.zeros(len(classes), np.int64), np.zeros(len(classes), np.int64)
    for labels in images:
        found = np.bincount(labels, minlength=len(classes)) if labels else np.zeros(len(classes), np.int64)
        counts, images_of = counts + found, images_of + (found > 0)
    return Summary(name, unit, len(images), len(images), counts, images_of, sizes=sizes, classes=classes)


# --------------------------------------------------------------------------------------------------------- shown


def about(rows: tuple[Any, Any], args: Any) -> list[str]:
    """Return the lines of :func:`lines` for the rows of training and validation, as far as they were looked at."""
    found = [one.summary for one in rows if one.summary is not None]
    return lines(found, args.size, getattr(args, "named", {}).get("classes")) if found else []


def lines(found: list[Summary], size: Any, names: list[str] | None = None) -> list[str]:
    """Return the lines of both splits: sizes, a table of the classes, and what to do about what is wrong.

    Args:
        found: of --train and --val.
        size: ``--size``: a side, or two.
        names: of the classes.
    """
    said = []
    for one in found:
        said.append(f"data {one.name}: {_looked(one)}; {_sizes(one.sizes)}{_share(one)}")
        said += [f"     {fact}" for fact in one.facts]
    if len(found[0].counts):
        said += _table(found, names or found[0].classes)
    wrong = [(one, notes(one, size, names or one.classes)) for one in found]
    # Of what is trained on they were warned of when it was opened.
    return [
        *said,
        *(f"  ! {note}" for one, each in wrong for note in each if one.name != "--train" or UNSEEN not in note),
    ]


def _looked(one: Summary) -> str:
    if one.images is None:
        return f"a stream, of which the first {one.looked} images were looked at"
    return f"{one.images:,} images" + ("" if one.looked >= one.images else f", {one.looked:,} of them looked at")


def _sizes(sizes: list[tuple[int, int]]) -> str:
    if not sizes:
        return "sizes not read"
    ordered = sorted(sizes, key=lambda s: s[0] * s[1])
    low, mid, high = (f"{h} x {w}" for h, w in (ordered[0], ordered[len(ordered) // 2], ordered[-1]))
    return f"{mid} pixels (height x width)" if low == high else f"{low} to {high} pixels (height x width), median {mid}"


def _share(one: Summary) -> str:
    return f"; {one.ignored:.1%} of the pixels are ignored" if one.unit == "pixels" and len(one.counts) else ""


def _table(found: list[Summary], names: list[str]) -> list[str]:
    """One line for each class, as many as fit."""
    counts = np.asarray(found[0].counts)
    shown, cut = _chosen(found), len(counts) > ROWS
    called = [f"{k} {names[k]}" if k < len(names) and names[k] != str(k) else str(k) for k in range(len(counts))]
    width = max(12, *(min(28, len(called[k])) for k in shown))
    head = "".join(f"{one.unit + ' of ' + one.name:>20}{_beside(one, 'in images')}" for one in found)
    table = [f"     {'class':{width}}{head}"]
    for k in shown:
        cells = "".join(_cell(one, k) for one in found)
        table.append(f"     {called[k][:width]:{width}}{cells}")
    return [*table, f"     ({len(counts) - len(shown)} more classes between these)"] if cut else table


def _chosen(found: list[Summary]) -> list[int]:
    """The classes that are shown, in their order."""
    counts = np.asarray(found[0].counts)
    if len(counts) <= ROWS:
        return list(range(len(counts)))
    order = sorted(range(len(counts)), key=lambda k: (min(int(one.counts[k]) > 0 for one in found), int(counts[k])))
    return sorted([*order[: ROWS * 3 // 4], *order[-(ROWS - ROWS * 3 // 4) :]])


def _cell(one: Summary, k: int) -> str:
    if k >= len(one.counts):
        return f"{'':20}{_beside(one, '')}"
    n, total = int(one.counts[k]), max(1, int(np.sum(one.counts)))
    if n == 0:
        return f"{'ignored' if k in one.uncounted else 'never':>20}{_beside(one, '0')}"
    much = f"{n / total:.2%}" if one.unit == "pixels" else f"{n:,}"
    return f"{much:>20}{_beside(one, f'{int(one.images_of[k]):,}')}"


def _beside(one: Summary, text: str) -> str:
    """The second column, which images that are counted themselves do not need."""
    return "" if one.unit == "images" else f"{text:>11}"


def notes(one: Summary, size: Any, names: list[str]) -> list[str]:
    """Say what is wrong, each with its remedy."""
    said, unseen = [], one.unseen() if len(one.counts) else []
    if unseen:
        called = ", ".join(names[k] if k < len(names) else str(k) for k in unseen[:8]) + (", ..." * (len(unseen) > 8))
        where = "looked at" if one.images is None or one.looked < one.images else "there"
        why = "nothing teaches it: check --num-classes, --label-map and --classes, or add images of it"
        if one.name != "--train":
            why = "the score says nothing of it: add images of it, or read the mean as one of the other classes"
        said.append(f"{one.name}: {called} {UNSEEN} that is {where}; {why}")
    if one.unit == "pixels" and len(one.counts) and one.ignored > 0.5:
        said.append(
            f"{one.name}: {one.ignored:.0%} of the pixels are ignored; check --ignore-index, --label-map and "
            "--reduce-zero-label"
        )
    larger = _larger(one.sizes, size)
    if larger >= LARGER:
        said.append(
            f"{one.name}: images are {larger:.1f} times the side of --size {_written(size)}, and shrink to it: what is "
            f"thinner than {larger:.0f} pixels is lost; give a larger --size, or cut the images into tiles"
        )
    return said


def _larger(sizes: list[tuple[int, int]], size: Any) -> float:
    """How many times the side of ``size`` the median image has."""
    if not sizes:
        return 0.0
    height, width = (size, size) if isinstance(size, int) else size
    return float(np.sqrt(np.median([h * w for h, w in sizes]) / (height * width)))


def _written(size: Any) -> str:
    return str(size) if isinstance(size, int) else " ".join(map(str, size))


def as_json(one: Summary, size: Any, names: list[str]) -> dict[str, Any]:
    """Return the same for a program."""
    areas = sorted(one.sizes, key=lambda s: s[0] * s[1])
    return {
        "name": one.name,
        "images": one.images,
        "looked_at": one.looked,
        "unit": one.unit,
        "counts": [int(n) for n in one.counts],
        "images_of": [int(n) for n in one.images_of],
        "ignored": one.ignored if one.unit == "pixels" and len(one.counts) else None,
        "sizes": {k: list(areas[i]) for k, i in (("least", 0), ("median", len(areas) // 2), ("most", -1)) if areas},
        "facts": one.facts,
        "notes": notes(one, size, names),
    }
