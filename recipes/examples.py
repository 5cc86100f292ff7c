"""Images of a validation set with their truth, as answers: what `adaptkit.predict` draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adaptkit.pictures import colours, pair
from adaptkit.predict.answers import Answer, Classification, Depth, Detection, Panoptic, Segmentation, name_of

from .coco import picture_of, rle, size_of
from .normalisation import floats


class Truth(NamedTuple):
    """What is right of one image."""

    drawn: Answer | None  #: None where words say it
    words: Mapping[str, str] = MappingProxyType({})  #: what is said beside the pictures
    answer: Answer | None = None  #: to draw in place of the prediction, where it must be drawn as the truth is


#: rows and an index -> image (3, H, W) in 0..1, and the truth as an answer like the one that is given
Example = tuple[Tensor, Callable[[Any], Truth]]


def segmentation(rows: Any, i: int) -> Example:
    """Of ``native.NativeSegmentation``."""
    image, mask = rows[i]
    return image, lambda said: Truth(Segmentation(said.size, said.names, said.palette, mask=mask.numpy()))


def classification(rows: Any, i: int) -> Example:
    """Of ``labelled.LabelledData``."""
    row = rows.read(rows.data[i], i)

    def truth(said: Classification) -> Truth:
        return Truth(None, {"true": name_of(said.names, int(row["label"])), "said": f"{said.name} {said.score:.0%}"})

    return floats(colours(row["image"])), truth


def depth(rows: Any, i: int) -> Example:
    """Of ``depth.DepthData``; both are drawn from the least to the greatest true depth."""
    row = rows.read(rows.data[i], i)
    image, metres = pair(row["image"], row["mask"], rows.metres(row["mask"]), "a depth map")

    def truth(said: Depth) -> Truth:
        true = metres.numpy()
        known = true[true > 0]
        low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
        words = {"range": f"{low:.3g} m (dark) to {high:.3g} m (light)"}
        seen = Depth(said.size, depth=np.where(true > 0, true, low).astype(np.float32), between=(low, high))
        return Truth(seen, words, replace(said, between=(low, high)))

    return floats(image), truth


def detection(rows: Any, i: int) -> Example:
    """Of ``detection_data.Detection`` and ``instances.InstanceData``; true boxes have the score 1."""
    row = rows.data[i]
    size, found = size_of(row), row["instances"]

    def truth(said: Detection) -> Truth:
        from faster_coco_eval import mask

        drawn = [mask.decode(rle(one["shape"], row)) for one in found] if said.masks is not None else []
        return Truth(Detection(said.size, said.names, said.palette,
                               boxes=np.array([one["box"] for one in found], np.float32).reshape(-1, 4),
                               masks=np.array(drawn, bool).reshape(-1, *size) if said.masks is not None else None,
                               scores=np.ones(len(found), np.float32),
                               labels=np.array([one["label"] - 1 for one in found], np.int64)))  # fmt: skip

    return floats(picture_of(row)), truth


def panoptic(rows: Any, i: int) -> Example:
    """Of ``panoptic_data.PanopticData``."""
    row = rows.data[i]

    def truth(said: Panoptic) -> Truth:
        labels, ids = rows.truth(row).unbind(-1)
        segments = torch.zeros(labels.shape, dtype=torch.int32)
        found = []
        for key, (label, crowd) in row["segments"].items():
            inside = (ids == key) & (labels >= 0)
            if not crowd and bool(inside.any()):
                segments[inside] = len(found) + 1
                found.append({"id": len(found) + 1, "label": label, "name": name_of(said.names, label),
                              "isthing": True, "area": int(inside.sum())})  # fmt: skip
        return Truth(Panoptic(said.size, said.names, said.palette, segments=segments.numpy(), found=found))

    return floats(picture_of(row)), truth


EXAMPLES: dict[str, Callable[[Any, int], Example]] = {
    "segmentation": segmentation,
    "classification": classification,
    "depth": depth,
    "detection": detection,
    "panoptic": panoptic,
}
