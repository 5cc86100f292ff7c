"""What a set of adapters predicts: said by its head, by its metadata, or by the backbone's own classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from adaptkit.core.view import Features, View
from adaptkit.heads.base import QueryHead
from adaptkit.model.queries import described_by
from adaptkit.predict.tasks import TASKS, Described

__all__ = ["describe"]

#: Task, as users and the Hub name it -> what the head predicts, a key of ``TASKS``.
HUB_TASKS = {
    "semantic-segmentation": "segmentation", "segmentation": "segmentation", "image-segmentation": "segmentation",
    "image-classification": "classification", "classification": "classification", "depth-estimation": "depth",
}  # fmt: skip


def describe(
    vit: View, said: Mapping[str, Any], head: nn.Module | None, run_it: Callable[[Tensor], Features]
) -> Described:
    """Return what a set of adapters predicts: ``said`` is its metadata, ``run_it`` gives the features of an image.

    Raises ``TypeError`` as ``described()``.
    """
    if head is None:
        if vit.source().classes < 1:
            raise TypeError(
                "neither this model nor its backbone has a head, so there is nothing to predict: attach with "
                "head=, e.g. head=('fpn', {'num_classes': 19})"
            )
        return Described("classification", {}, lambda image: run_it(image).logits)
    answers: Any = getattr(head, "answers", None) or HUB_TASKS.get(str(said.get("task")))
    if answers not in TASKS:
        raise TypeError(
            f"nobody says what the head {type(head).__name__} predicts: give it the attribute answers, one of "
            f"{', '.join(TASKS)}, or save with task=, one of {', '.join(HUB_TASKS)}"
        )
    if isinstance(head, QueryHead):
        return described_by(head, said, run_it)
    return Described(answers, said, lambda image: run_it(image).logits)
