"""What a head that answers in queries predicts: how ``predict`` reads it, and what its file says of classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from adaptkit.core.view import Features
from adaptkit.heads.base import QueryHead
from adaptkit.predict.tasks import Described, shares

__all__ = ["described_by"]


def described_by(head: QueryHead, said: Mapping[str, Any], run_it: Callable[[Tensor], Features]) -> Described:
    """Return how the head is read: ``said`` is the metadata of its file, ``run_it`` gives the features of an image.

    Raises ``ValueError`` where the file says other categories than the head has, or thresholds that are none.
    """
    if head.answers != "segmentation":
        numbers = [{"id": i, "name": str(i), "isthing": i in head.things} for i in range(head.num_classes)]
        said = {**said, "categories": _said_categories(said, head) or numbers}
    low, overlap = _said_thresholds(said)

    def segments(image: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        label, number = head.segments(run_it(image), [size], (low, overlap))[0].unbind(-1)
        return label, number

    def objects(image: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        return head.objects(run_it(image), [size])[0]

    return Described(head.answers, said, lambda image: head.scores(run_it(image)), shares, segments, objects)


def _said_categories(said: Mapping[str, Any], head: QueryHead) -> list[dict[str, Any]] | None:
    """The categories of a file, ``{"id", "name", "isthing"}`` each; ``ValueError`` where these are not the head's."""
    found = said.get("categories")
    if found is None:
        return None
    sound = isinstance(found, list) and all(isinstance(c, dict) and isinstance(c.get("id"), int) for c in found)
    if not sound or len(found) != head.num_classes:
        raise ValueError(
            f"metadata.categories: found {found!r:.200}, and the head has {head.num_classes} classes: expected an "
            "object with an id for each"
        )
    return found


def _said_thresholds(said: Mapping[str, Any]) -> tuple[float, float]:
    """The thresholds of a file, or the authors'."""
    found = said.get("thresholds")
    if found is None:
        return 0.8, 0.8
    if not isinstance(found, list | tuple) or len(found) != 2 or not all(isinstance(v, int | float) for v in found):
        raise ValueError(
            f"metadata.thresholds: found {found!r:.80}, expected two numbers, of the score and the overlap"
        )
    return float(found[0]), float(found[1])
