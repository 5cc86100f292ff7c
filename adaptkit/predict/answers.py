"""What a model says of one picture, in numbers; ``draw.py`` draws it and ``write.py`` writes it to files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from adaptkit.predict.palette import Colour

__all__ = ["Answer", "Classification", "Depth", "Detection", "Panoptic", "Segmentation", "name_of"]


def name_of(names: Sequence[str], label: int) -> str:
    """Return the name of a class, or its number."""
    return names[label] if 0 <= label < len(names) else str(label)


@dataclass
class Answer:
    """What all answers have: the size of the picture, and the names and colours of the classes."""

    size: tuple[int, int]  #: (H, W) of the picture
    names: list[str] = field(default_factory=list, repr=False)
    palette: list[Colour] = field(default_factory=list, repr=False)

    def json(self) -> dict[str, Any]:
        """Return what is said in words and numbers, as JSON has them."""
        return {"height": self.size[0], "width": self.size[1]}


@dataclass(repr=False)
class Segmentation(Answer):
    """A class for each pixel; ``np.asarray(answer)`` is the mask."""

    mask: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.uint8))  #: (H, W) class ids, uint8 or uint16
    confidence: np.ndarray | None = None  #: (H, W) float32, the probability of that class, where asked for
    probabilities: np.ndarray | None = None  #: (K, H, W) float32, where asked for

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.mask.astype(self.mask.dtype if dtype is None else dtype, copy=bool(copy))

    def __repr__(self) -> str:
        shares = ", ".join(f"{c['name']} {c['share']:.0%}" for c in self.json()["classes"][:5])
        return f"Segmentation({self.size[0]} x {self.size[1]} pixels: {shares})"

    def json(self) -> dict[str, Any]:
        """Return the classes that are there, the largest first, each with its share of the pixels."""
        labels, counts = np.unique(self.mask, return_counts=True)
        found = sorted(zip(counts.tolist(), labels.tolist()), reverse=True)
        said = [
            {"id": label, "name": name_of(self.names, label), "pixels": count, "share": count / self.mask.size}
            for count, label in found
        ]
        return {**super().json(), "classes": said}


@dataclass(repr=False)
class Classification(Answer):
    """The class of the picture."""

    probabilities: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))  #: (K,) float32

    @property
    def label(self) -> int:
        """The most probable class."""
        return int(self.probabilities.argmax())

    @property
    def name(self) -> str:
        """Its name."""
        return name_of(self.names, self.label)

    @property
    def score(self) -> float:
        """Its probability."""
        return float(self.probabilities[self.label])

    def top(self, most: int = 5) -> list[tuple[str, float]]:
        """Return the most probable classes: name and probability."""
        order = np.argsort(-self.probabilities, kind="stable")[:most].tolist()
        return [(name_of(self.names, i), float(self.probabilities[i])) for i in order]

    def __repr__(self) -> str:
        return f"Classification({', '.join(f'{name} {p:.1%}' for name, p in self.top(3))})"

    def json(self) -> dict[str, Any]:
        """Return the class, and the five most probable ones."""
        top = [{"name": name, "score": score} for name, score in self.top()]
        return {**super().json(), "label": self.label, "name": self.name, "score": self.score, "top": top}


@dataclass(repr=False)
class Depth(Answer):
    """A depth for each pixel; ``np.asarray(answer)`` is the map."""

    depth: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))  #: (H, W) float32, metres
    #: metres that are drawn darkest and lightest; None: the map's own 1st and 99th percentile
    between: tuple[float, float] | None = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.depth.astype(np.float32 if dtype is None else dtype, copy=bool(copy))

    def __repr__(self) -> str:
        said = self.json()
        return (
            f"Depth({self.size[0]} x {self.size[1]} pixels, {said['min']:.3g}..{said['max']:.3g} m, median "
            f"{said['median']:.3g} m)"
        )

    def json(self) -> dict[str, Any]:
        """Return the least, the median and the greatest depth."""
        low, middle, high = (float(f(self.depth)) for f in (np.min, np.median, np.max))
        return {**super().json(), "min": low, "median": middle, "max": high}


@dataclass(repr=False)
class Detection(Answer):
    """Objects, the surest first."""

    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.float32))  #: (n, 4) x1, y1, x2, y2 in pixels
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))  #: (n,)
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  #: (n,) into ``names``, from 0
    categories: list[int] = field(default_factory=list)  #: COCO's id of each class
    masks: np.ndarray | None = None  #: (n, H, W) bool, where the model makes masks

    def __len__(self) -> int:
        return len(self.boxes)

    def __repr__(self) -> str:
        first = ", ".join(f"{name_of(self.names, int(k))} {s:.2f}" for k, s in zip(self.labels[:5], self.scores[:5]))
        return f"Detection({len(self)} objects: {first})"

    def json(self) -> dict[str, Any]:
        """Return the objects: name, score and box."""
        rows = zip(self.labels.tolist(), self.scores.tolist(), self.boxes.tolist())
        objects = [{"name": name_of(self.names, k), "score": s, "box": b} for k, s, b in rows]
        return {**super().json(), "objects": objects}

    def coco(self, image_id: int) -> list[dict[str, Any]]:
        """Return the entries of COCO's result format; masks as run-length codes.

        Raises ``ImportError`` where there are masks and nothing encodes them.
        """
        entries = []
        for i, (label, score, (x1, y1, x2, y2)) in enumerate(
            zip(self.labels.tolist(), self.scores.tolist(), self.boxes.tolist())
        ):
            entry = {"image_id": image_id, "category_id": self.categories[label], "bbox": [x1, y1, x2 - x1, y2 - y1],
                     "score": score}  # fmt: skip
            if self.masks is not None:
                entry["segmentation"] = _encoded(self.masks[i])
            entries.append(entry)
        return entries


def _encoded(mask: np.ndarray) -> dict[str, Any]:
    try:
        from faster_coco_eval import mask as coder
    except ImportError as error:
        from adaptkit.version import DISTRIBUTION

        raise ImportError(f"masks are written as COCO has them: pip install '{DISTRIBUTION}[recipes]'") from error
    code = coder.encode(np.asfortranarray(mask.astype(np.uint8)))
    counts = code["counts"]
    return {"size": list(code["size"]), "counts": counts.decode() if isinstance(counts, bytes) else counts}


@dataclass(repr=False)
class Panoptic(Answer):
    """Segments that share out the picture: each thing one, each kind of stuff one."""

    segments: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int32))  #: (H, W) ids; 0: nothing found
    found: list[dict[str, Any]] = field(default_factory=list)  #: id, label, category_id, name, isthing, area

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.segments.astype(np.int32 if dtype is None else dtype, copy=bool(copy))

    def __repr__(self) -> str:
        return f"Panoptic({len(self.found)} segments: {', '.join(s['name'] for s in self.found[:5])})"

    def json(self) -> dict[str, Any]:
        """Return the segments."""
        return {**super().json(), "segments": self.found}
