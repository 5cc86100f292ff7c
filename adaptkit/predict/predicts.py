"""``model.predict`` and ``model.transform``: of adapted models, and of networks around them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.core.tree import evaluating
from adaptkit.predict.answers import Answer
from adaptkit.predict.pixels import listed, pixels
from adaptkit.predict.tasks import TASKS, Asked, Described
from adaptkit.predict.transform import Transform, transform_of
from adaptkit.predict.ways import Ways

__all__ = ["Predicts"]


HELD = 1 << 24  #: values of the images that wait to run together


class Predicts:
    """What a model has that turns pictures into answers; the model itself says how, by ``described()``."""

    vit: Any  #: the view of its backbone

    def described(self) -> Described:
        """Return what it predicts, and how."""
        raise NotImplementedError  # not abstract: FSDP2 gives a module another class, which ABC's layout forbids

    @property
    def transform(self) -> Transform:
        """How it wants its images: ``model(model.transform(picture)[None])``.

        Size and normalisation are those of the training, where the file records them, else the backbone's own.
        """
        described = self.described()
        return transform_of(self.vit.source(), described.said, described.answers, self.vit.spec.channels)

    @torch.no_grad()
    def predict(
        self,
        images: Any,
        *,
        slide: tuple[int, int] | None = None,
        stride: tuple[int, int] | None = None,
        resize: int | str | None = None,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        blend: str = "mean",
        batch_size: int = 8,
        probabilities: bool = False,
        confidence: bool = False,
        threshold: float = 0.5,
    ) -> Any:
        """Return the answer for a picture, at the picture's own size; a list of answers for several.

        Args:
            images: a path, PIL image, array or tensor (8 or 16 bits, or floats in 0..1 or 0..255; grey, CHW or HWC;
                not normalised), or a list or batch of them.
            slide, stride, resize, scales, flip, blend, batch_size: see :class:`~adaptkit.predict.ways.Ways`.
            probabilities: of a segmenter, keep those of every class, (K, H, W).
            confidence: of a segmenter, keep that of the class that was chosen, (H, W).
            threshold: least score of an object of a detector.

        Returns :class:`~adaptkit.predict.answers.Segmentation`, ``Classification``, ``Depth``, ``Detection`` or
        ``Panoptic``. The model predicts in eval mode and is left in the mode that it was in.

        Raises ``ValueError`` for what is no picture (a file is named), for a way that the task does not have, and
        where nobody says how images are normalised; ``TypeError`` for a model without a head.
        """
        given, several = listed(images)
        ways = Ways(_pair(slide), _pair(stride), resize, tuple(scales), flip, blend, batch_size)
        asked = Asked(ways, probabilities, confidence, threshold)
        found = list(self.predict_each(given, asked))
        return found if several else found[0]

    def predict_each(self, images: Sequence[Any], asked: Asked) -> Iterator[Answer]:
        """Yield the answers one by one; pictures are read as they are needed."""
        described = self.described()
        task = TASKS[described.answers](self, described, self.transform, asked)
        with torch.no_grad(), evaluating(self) if isinstance(self, nn.Module) else nullcontext():
            held: list[Tensor] = []
            for image in images:
                # A picture that cannot be batched with those before it lets them go first.
                seen = pixels(image, self.vit.spec.channels)
                full = len(held) == asked.ways.batch_size or sum(x.numel() for x in held) > HELD
                if held and (full or not task.together(held[0], seen)):
                    yield from task.answer(held)
                    held = []
                held.append(seen)
            if held:
                yield from task.answer(held)


def _pair(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    sides = tuple(value) if isinstance(value, Iterable) else (value, value)
    if len(sides) != 2:
        raise ValueError(f"{value}: give height and width in pixels")
    return operator.index(sides[0]), operator.index(sides[1])
