"""Networks of other libraries as :mod:`adaptkit.export` writes them, and how a file is compared with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.core.warned import warn
from adaptkit.export.detectors import Detections
from adaptkit.export.trace import Graph

__all__ = ["DetectorGraph", "SegmenterGraph", "unmatched"]

#: The share of detections that may differ. Rounding may swap two candidates of nearly the same score, and where these
#: overlap, the one that is kept is another.
MAY_DIFFER = 0.02


class SegmenterGraph(Graph):
    """UperNet's logits at the size of the image; Mask2Former's queries, at a quarter of it."""

    samplers = True  # transformers' deformable attention has them; the file is compared as it is

    def named(self, image: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> the outputs that the network names."""
        found = self.model(image)
        names = ("logits",) if hasattr(found, "logits") else ("class_queries_logits", "masks_queries_logits")
        return {name: found[name] for name in names}


class DetectorGraph(Graph):
    """A detector's boxes, scores, labels and masks: of one image, padded with zeros."""

    images = 1
    sized = True

    def __init__(self, model: Any, size: tuple[int, int], outputs: Sequence[str] | None = None) -> None:
        super().__init__(model, outputs)
        with torch.no_grad():
            self.detections = Detections(model.network, size)
        self.compared = 0  #: detections of the model that a file was compared with

    def named(self, image: Tensor) -> dict[str, Tensor]:
        """(1, 3, H, W) -> what the detector finds."""
        return self.detections(image)

    def statistics(self) -> tuple[Any, Any]:
        """The network normalises by itself."""
        return [0.0] * 3, [1.0] * 3

    def seen(self, shape: Sequence[int], seed: int) -> list[Tensor]:
        """Noise of single pixels, and of ever larger cells, in which detectors see more."""
        generator, found = torch.Generator("cpu").manual_seed(seed), []
        for cell in (1, 4, 16, 32):
            small = [max(2, n // cell) for n in shape[-2:]]
            noise = torch.rand(*shape[:2], *small, generator=generator, device="cpu")
            found.append(F.interpolate(noise, size=list(shape[-2:]), mode="bicubic").clamp(0, 1))
        return found

    def compare(self, said: Sequence[Tensor], image: Tensor, tolerance: float) -> None:
        """Demand the detections of torchvision's own code, in any order; ``RuntimeError`` where they differ."""
        wanted, found = self.model([image[0]])[0], dict(zip(self.names, said, strict=True))
        self.compared += len(wanted["scores"])
        if "scores" not in found:
            raise ValueError(f"outputs={self.names}: a detector's rows are known by their scores; name them as well")
        real = found["scores"] > 0
        cut = self._cut(wanted["scores"])
        off = unmatched({k: x[real] for k, x in found.items()}, wanted, cut, tolerance)
        if not off <= MAY_DIFFER * max(len(wanted["scores"]), int(real.sum())):
            raise RuntimeError(
                f"{off} of {len(wanted['scores'])} detections in the file differ from the model by more than "
                f"{tolerance:.1e}, on an image {tuple(image.shape[-2:])}: nothing was written. Report the backbone and "
                "the adapters"
            )

    def _cut(self, scores: Tensor) -> float:
        """Return the least score of what is found: the threshold, or that of the last that there was room for."""
        network = self.model.network
        most = getattr(network, "detections_per_img", None) or network.roi_heads.detections_per_img
        return float(scores.min()) if len(scores) == most else self.detections.threshold

    def finish(self) -> None:
        """Warn where the file was compared on images in which there is nothing to find."""
        if self.compared == 0:
            warn(
                "the detector finds nothing in the images that the file was compared on, and neither does the file: "
                "compare them on a picture of yours",
            )


def unmatched(said: dict[str, Tensor], wanted: dict[str, Tensor], cut: float, tolerance: float) -> int:
    """Return how many detections have no partner of the same label, score, box and mask on the other side.

    Boxes may be off by ``tolerance`` of the largest coordinate, scores by ``tolerance``. Masks are put on whole pixels,
    so that rounding of a box may move a row and a column. What lies within ``tolerance`` of the least score needs no
    partner, for rounding decides on which side of it that is.
    """
    scale = max(1.0, float(wanted["boxes"].abs().max())) if len(wanted["boxes"]) else 1.0
    near = (said["scores"][:, None] - wanted["scores"]).abs() <= tolerance
    if "labels" in said:
        near &= said["labels"][:, None] == wanted["labels"]
    if "boxes" in said:
        near &= (said["boxes"][:, None] - wanted["boxes"]).abs().amax(-1) <= tolerance * scale
    taken: set[int] = set()
    for i in range(near.shape[0]):
        for j in near[i].nonzero()[:, 0].tolist():
            if j not in taken and ("masks" not in said or _same(said["masks"][i], wanted["masks"][j], tolerance)):
                taken.add(j)
                break
        else:
            taken.add(-1 - i)  # which has no partner
    left = [said["scores"][-1 - j] for j in taken if j < 0]
    left += [wanted["scores"][j] for j in range(near.shape[1]) if j not in taken]
    return sum(float(score) > cut + tolerance for score in left)


def _same(one: Tensor, other: Tensor, tolerance: float) -> bool:
    height, width = one.shape[-2:]
    return float(((one - other).abs() > 10 * tolerance).sum()) <= 2 * (height + width)
