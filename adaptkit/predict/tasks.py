"""One task each: from images to answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptkit.predict.answers import Answer, Classification, Depth, Detection, Panoptic, Segmentation
from adaptkit.predict.palette import checked_palette
from adaptkit.predict.rows import rebanded, resized_rows, slid_rows
from adaptkit.predict.transform import Transform
from adaptkit.predict.ways import Ways

__all__ = ["TASKS", "Asked", "Described", "Task", "shares", "softmax"]

BAND = 64  #: rows that several looks are averaged in


@dataclass(frozen=True)
class Asked:
    """What ``predict`` was asked for."""

    ways: Ways = field(default_factory=Ways)
    probabilities: bool = False
    confidence: bool = False
    threshold: float = 0.5


def softmax(scores: Tensor) -> Tensor:
    """Logits (K, ...) of one image -> probabilities of its classes."""
    return scores.float().softmax(0)


def shares(scores: Tensor) -> Tensor:
    """Sums over queries (K, ...) -> what each class has of them."""
    return scores / scores.sum(0).clamp(min=1e-12)


@dataclass(frozen=True)
class Described:
    """What a model predicts, and how."""

    answers: str  #: one of ``TASKS``
    said: Mapping[str, Any]  #: what its file says of images and classes: ``size``, ``mean``, ``classes``, ``palette``
    #: images (B, C, h, w), normalised -> logits (B, K) or (B, K, h, w), or depths (B, 1, h, w)
    scores: Callable[[Tensor], Any]
    shares: Callable[[Tensor], Tensor] = softmax  #: scores (K, ...) of one image -> probabilities
    #: of panoptic segmentation: images (1, C, h, w) and a size -> label and number of each pixel, (H, W) each
    segments: Callable[[Tensor, tuple[int, int]], tuple[Tensor, Tensor]] | None = None
    #: of detection by a head: images (1, C, h, w) and a size -> what torchvision returns for one image, of that size
    objects: Callable[[Tensor, tuple[int, int]], dict[str, Tensor]] | None = None


class Task(ABC):
    """A kind of answer, of one model."""

    slides: bool = False  #: whether a window can move over the picture

    def __init__(self, model: Any, described: Described, transform: Transform, asked: Asked) -> None:
        self.model, self.described, self.transform, self.asked = model, described, transform, asked
        ways = asked.ways
        if ways.slide is not None and not self.slides:
            raise ValueError(f"slide={ways.slide} is for maps; this model predicts {type(self).__name__.lower()}")
        if ways.resize is not None or ways.slide is not None:
            native = ways.resize == "native" or ways.resize is None
            self.transform = transform.resized(None if native else int(ways.resize or 0))
        said = described.said
        self.names, self.categories = _classes(said)
        self.colours = said.get("palette")

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) of a picture -> (h, w) that it is brought to at most."""
        return self.transform.framed(height, width, max(self.asked.ways.scales))

    def together(self, one: Tensor, other: Tensor) -> bool:
        """Whether two images (C, H, W) can run in one batch."""
        return self.transform.framed(*one.shape[-2:]) == self.transform.framed(*other.shape[-2:])

    @abstractmethod
    def answer(self, images: list[Tensor]) -> Iterable[Answer]:
        """Images (C, H, W) in 0..1 that go together -> their answers."""

    def forward(self, batch: Tensor) -> Tensor:
        """Run the model on (B, C, h, w), normalised, on its device and in its precision."""
        return self.described.scores(self.placed(batch))

    def placed(self, batch: Tensor) -> Tensor:
        """(B, C, h, w) on the device and in the precision of the model."""
        parameter = next((p for p in self.model.vit.backbone.parameters() if p.is_floating_point()), None)
        return batch if parameter is None else batch.to(parameter.device, parameter.dtype)

    def looks(self, image: Tensor) -> Iterator[tuple[Tensor, bool]]:
        """Image (C, H, W) in 0..1 -> every look at it, normalised, and whether it is mirrored."""
        for scale, mirrored in self.asked.ways.looks:
            seen = self.transform.normalise(self.transform.frame(image, scale))
            yield (seen.flip(-1) if mirrored else seen), mirrored

    def palette(self, classes: int) -> dict[str, Any]:
        """Return names and colours for so many classes."""
        names = [*self.names[:classes], *(str(i) for i in range(len(self.names), classes))]
        return {"names": names, "palette": checked_palette(self.colours, classes)}


def _classes(said: Any) -> tuple[list[str], list[int]]:
    """Return names and COCO's ids of the classes that a file records."""
    categories = said.get("categories") or []
    if categories and all(isinstance(c, dict) for c in categories):
        return [str(c.get("name") or c.get("id")) for c in categories], [int(c.get("id") or 0) for c in categories]
    names = said.get("classes")
    names = list(names.values()) if isinstance(names, dict) else names
    return [str(n) for n in names] if isinstance(names, list | tuple) else [], []


# ----------------------------------------------------------------------------------------------------------- maps


class Maps(Task):
    """Answers with a value for each pixel, at the picture's own size."""

    slides = True
    averaged: Callable[[Tensor], Tensor]  #: what several looks are averaged in

    def streams(self, images: list[Tensor]) -> list[list[Iterator[Tensor]]]:
        """Images that go together -> for each, a stream of bands (K, n, W) for each look."""
        found: list[list[Iterator[Tensor]]] = [[] for _ in images]
        for looks in zip(*(self.looks(image) for image in images)):
            seen, mirrored = [x for x, _ in looks], looks[0][1]
            for i, bands in enumerate(self._bands(seen)):
                height, width = images[i].shape[-2:]
                rows = resized_rows(bands, (seen[i].shape[-2], seen[i].shape[-1]), (height, width))
                found[i].append((band.flip(-1) for band in rows) if mirrored else rows)
        return found

    def _bands(self, seen: list[Tensor]) -> Sequence[Iterable[Tensor]]:
        ways = self.asked.ways
        if ways.slide is not None:
            return [slid_rows(self._maps, x, ways.slide, ways.step, ways.batch_size, ways.blend) for x in seen]
        return [[one] for one in self._maps(torch.stack(seen))]

    def _maps(self, batch: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, K, h, w): float32, at the size of the images."""
        scores = self.forward(batch)
        if not isinstance(scores, Tensor) or scores.ndim != 4:
            shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise TypeError(f"the head returns {shape}, and a map is (batch, classes, height, width)")
        if scores.shape[-2:] != batch.shape[-2:]:
            scores = torch.nn.functional.interpolate(scores, batch.shape[-2:], mode="bilinear", align_corners=False)
        return scores.float()

    def merged(self, streams: list[Iterator[Tensor]], height: int) -> Iterator[Tensor]:
        """Yield the bands of one look as they are, those of several averaged."""
        if len(streams) == 1:
            yield from streams[0]
            return
        heights = [min(BAND, height - top) for top in range(0, height, BAND)]
        for parts in zip(*(rebanded(s, heights) for s in streams)):
            yield torch.stack([self.averaged(part) for part in parts]).mean(0)


class Segments(Maps):
    """Semantic segmentation."""

    def __init__(self, model: Any, described: Described, transform: Transform, asked: Asked) -> None:
        super().__init__(model, described, transform, asked)
        self.averaged = described.shares
        self.is_averaged = len(asked.ways.looks) > 1

    def answer(self, images: list[Tensor]) -> Iterator[Segmentation]:
        for image, streams in zip(images, self.streams(images)):
            mask, confidence, shares = self.labelled(streams, image.shape[-2])
            classes = self.classes
            kept = np.uint8 if classes <= 256 else np.uint16
            yield Segmentation(
                (image.shape[-2], image.shape[-1]),
                **self.palette(classes),
                mask=mask.cpu().numpy().astype(kept),
                confidence=None if confidence is None else confidence.cpu().numpy(),
                probabilities=None if shares is None else shares.cpu().numpy(),
            )

    def labelled(self, streams: list[Iterator[Tensor]], height: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Bands of one image -> class ids (H, W), and what was asked for: confidence (H, W), shares (K, H, W)."""
        masks, tops, kept = [], [], []
        for band in self.merged(streams, height):
            self.classes = band.shape[0]
            best = band.max(0).indices  # as argmax(0), which takes five times as long on a CPU
            masks.append(best.to(torch.uint8 if self.classes <= 256 else torch.int32))
            if self.asked.confidence or self.asked.probabilities:
                shares = band if self.is_averaged else self.averaged(band)
                tops.append(shares.amax(0))
                kept += [shares] if self.asked.probabilities else []
        return torch.cat(masks), torch.cat(tops) if tops else None, torch.cat(kept, 1) if kept else None


class Depths(Maps):
    """Monocular depth; several looks are averaged in metres."""

    def __init__(self, model: Any, described: Described, transform: Transform, asked: Asked) -> None:
        super().__init__(model, described, transform, asked)
        self.averaged = lambda band: band

    def answer(self, images: list[Tensor]) -> Iterator[Depth]:
        for image, streams in zip(images, self.streams(images)):
            depth = torch.cat([band[0] for band in self.merged(streams, image.shape[-2])])
            yield Depth((image.shape[-2], image.shape[-1]), depth=depth.cpu().numpy())


# -------------------------------------------------------------------------------------------------------- the rest


class Classes(Task):
    """One class for the picture; several looks are averaged in probabilities."""

    def together(self, one: Tensor, other: Tensor) -> bool:
        return self.transform.crop is not None or super().together(one, other)

    def answer(self, images: list[Tensor]) -> Iterator[Classification]:
        shares: list[Tensor] = []
        for looks in zip(*(self.looks(image) for image in images)):
            shares.append(self.forward(torch.stack([x for x, _ in looks])).float().softmax(-1))
        for image, row in zip(images, torch.stack(shares).mean(0).cpu().numpy()):
            yield Classification((image.shape[-2], image.shape[-1]), **self.palette(len(row)), probabilities=row)

    def looks(self, image: Tensor) -> Iterator[tuple[Tensor, bool]]:
        for scale, mirrored in self.asked.ways.looks:
            larger = self.transform
            if scale != 1 and larger.crop is not None:
                crop = max(1, round(larger.crop * scale))
                larger = Transform(larger.size, crop, larger.mean, larger.std, larger.interpolation)
            seen = larger.normalise(larger.frame(image, scale))
            yield (seen.flip(-1) if mirrored else seen), mirrored


class Detections(Task):
    """Boxes, and masks where the model makes them. torchvision's networks frame and normalise by themselves."""

    def __init__(self, model: Any, described: Described, transform: Transform, asked: Asked) -> None:
        super().__init__(model, described, transform, asked)
        if len(asked.ways.looks) > 1 or asked.ways.resize is not None:
            raise ValueError("scales, flip and resize are for maps and classes; a detector looks at a picture once")

    def together(self, one: Tensor, other: Tensor) -> bool:
        return True

    def answer(self, images: list[Tensor]) -> Iterator[Detection]:
        for image, found in zip(images, self._found(images)):
            keep = found["scores"] >= self.asked.threshold
            said = {k: v[keep].cpu() for k, v in found.items()}
            masks = (said["masks"][:, 0] > 0.5).numpy() if "masks" in said else None
            yield Detection(
                (image.shape[-2], image.shape[-1]),
                **self.palette(len(self.names)),
                boxes=said["boxes"].numpy(),
                scores=said["scores"].numpy(),
                labels=said["labels"].numpy() - 1,  # torchvision's 0 is the background
                categories=self.categories,
                masks=masks,
            )

    def sides(self, height: int, width: int) -> tuple[int, int]:
        return (height, width) if self.described.objects is None else super().sides(height, width)

    def _found(self, images: list[Tensor]) -> Iterable[dict[str, Tensor]]:
        objects = self.described.objects
        if objects is None:
            device = next(self.model.vit.backbone.parameters()).device
            return self.model([image.to(device) for image in images])
        seen = ((self.placed(next(self.looks(image))[0][None]), image.shape[-2:]) for image in images)
        return (objects(one, (size[0], size[1])) for one, size in seen)


class Panoptics(Task):
    """Things and stuff, by queries."""

    def __init__(self, model: Any, described: Described, transform: Transform, asked: Asked) -> None:
        super().__init__(model, described, transform, asked)
        if len(asked.ways.looks) > 1:
            raise ValueError("scales and flip are for maps and classes; segments are not averaged")
        if described.segments is None:
            raise TypeError("this model does not say how it makes segments")
        self.split = described.segments

    def answer(self, images: list[Tensor]) -> Iterator[Panoptic]:
        for image in images:
            seen = next(self.looks(image))[0]
            labels, segments = self.split(self.placed(seen[None]), (image.shape[-2], image.shape[-1]))
            yield self._numbered(labels.cpu().numpy(), segments.cpu().numpy())

    def _numbered(self, labels: np.ndarray, segments: np.ndarray) -> Panoptic:
        """(H, W) label and number of each pixel -> segments numbered from 1."""
        said = self.described.said["categories"]
        pairs, where, areas = np.unique(
            np.stack([labels, segments], -1).reshape(-1, 2), axis=0, return_inverse=True, return_counts=True
        )
        found: list[dict[str, Any]] = []
        numbers: np.ndarray = np.zeros(len(pairs), np.int32)
        number = 0
        for i, (label, _) in enumerate(pairs.tolist()):
            if label < 0:
                continue
            number += 1
            numbers[i] = number
            found.append({
                "id": number, "label": label, "category_id": self.categories[label], "name": self.names[label],
                "isthing": bool(said[label].get("isthing")), "area": int(areas[i]),
            })  # fmt: skip
        size = labels.shape
        return Panoptic(
            (size[0], size[1]), **self.palette(len(self.names)), segments=numbers[where.reshape(size)], found=found
        )


TASKS: dict[str, type[Task]] = {
    "segmentation": Segments,
    "depth": Depths,
    "classification": Classes,
    "detection": Detections,
    "panoptic": Panoptics,
}
