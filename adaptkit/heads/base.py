"""Heads that answer in queries: what they return, and how it is read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from adaptkit.core.view import Features

__all__ = ["QueryHead", "QueryLogits"]


class QueryLogits(NamedTuple):
    """Classes and masks of queries, named as in transformers' Mask2Former and EoMT: their image processors read it."""

    class_queries_logits: Tensor  #: (B, Q, K + 1), the last class is "nothing"
    masks_queries_logits: Tensor  #: (B, Q, h, w), over the image padded to whole patches
    auxiliary_logits: tuple[QueryLogits, ...] = ()  #: in training, the predictions before each block, in order


class QueryHead(nn.Module, ABC):
    """A head whose logits are :class:`QueryLogits`, and which reads masks, segments or objects from them."""

    answers: str  #: what ``model.predict`` makes of it: "segmentation", "detection" or "panoptic"
    things: frozenset[int]  #: of panoptic segmentation, the labels of which each query is a segment by itself
    num_classes: int

    @abstractmethod
    def scores(self, features: Features) -> Tensor:
        """Features with their logits -> (B, K, H, W), the sum over queries of p(class) * p(mask)."""

    @abstractmethod
    def segments(
        self, features: Features, sizes: Sequence[tuple[int, int]], thresholds: tuple[float, float] = (0.8, 0.8)
    ) -> list[Tensor]:
        """Features with their logits -> for each image, label and segment id (H, W, 2) of each pixel of this size."""

    @abstractmethod
    def objects(self, features: Features, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """Features with their logits -> for each image, what torchvision's detectors return, at this size."""

    @abstractmethod
    def loss(self, features: Features, targets: Sequence[tuple[Tensor, Tensor]], points: int = 12544) -> Tensor:
        """Return the loss of a batch; of each image masks (n, H, W) in 0..1 and labels (n,) are given."""

    @abstractmethod
    def anneal(self, progress: float) -> None:
        """Set the schedule of mask annealing: ``progress``, in 0..1, is the share of the training that is over."""
