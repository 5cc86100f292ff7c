"""COCO's average precision (AP) of boxes and masks."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ..coco import Instances, rle_area

#: COCO's numbers in the order of its own table: AP is the mean over IoU 0.5 to 0.95; of objects below 32 x 32 pixels of
#: the image as it lies on disk, below 96 x 96, and above.
STATS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


def as_results(found: dict[str, Tensor], image_id: int) -> list[dict[str, Any]]:
    """What torchvision found in one image -> entries of COCO's result format, with labels for category ids."""
    from faster_coco_eval import mask

    boxes, scores, labels = (found[k].cpu().tolist() for k in ("boxes", "scores", "labels"))
    results = []
    for i, ((x1, y1, x2, y2), score, label) in enumerate(zip(boxes, scores, labels)):
        entry = {"image_id": image_id, "label": label, "score": score, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        if "masks" in found:
            pixels = (found["masks"][i, 0] > 0.5).cpu().numpy().astype(np.uint8)
            entry["segmentation"] = mask.encode(np.asfortranarray(pixels))
        results.append(entry)
    return results


def average_precision(data: Instances, results: list[dict[str, Any]], masks: bool) -> dict[str, float]:
    """COCO's AP, AP50, AP75 and AP by size of boxes, ``box_ap``, ..., and of masks where there are any."""
    return average_precisions(data, results, masks)[0]


def average_precisions(
    data: Instances, results: list[dict[str, Any]], masks: bool
) -> tuple[dict[str, float], dict[str, list[float | None]]]:
    """Return :func:`average_precision`, and the AP of each category, None for one without objects: ``{"box": [...]}``.

    A size that no object has is left out. An object's size is its ``area`` in the file, which is that of its mask; what
    is found has the area of its box or mask, as each is scored.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    sizes, entries = {row["id"]: row for row in data.rows}, []
    for n, entry in enumerate(data.truth["annotations"], 1):
        area = entry.get("area")
        if area is None and masks:
            area = rle_area(entry["segmentation"], sizes[entry["image_id"]])
        elif area is None:
            area = entry["bbox"][2] * entry["bbox"][3]
        entries.append({"iscrowd": 0, **entry, "id": n, "area": area})
    truth = COCO({**data.truth, "annotations": entries})
    named = [{**r, "category_id": data.categories[r["label"] - 1]["id"]} for r in results]
    scores: dict[str, float] = {}
    by_class: dict[str, list[float | None]] = {}
    for kind, name in (("bbox", "box"), ("segm", "mask"))[: 1 + masks]:
        # Beside a box the area of what is found would be the box's.
        own = named if kind == "bbox" else [{k: v for k, v in r.items() if k != "bbox"} for r in named]
        evaluation = COCOeval_faster(truth, truth.loadRes(own), iouType=kind, print_function=lambda *_: None)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        stats = dict(zip(STATS, map(float, evaluation.stats)))
        scores.update({f"{name}_{k}": v for k, v in stats.items() if v > -1 or k in STATS[:3]})
        # (IoU, recall, category, area, detections): all areas, the most detections; -1 where there is no object
        precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]
        rows = (precision[:, :, k] for k in range(precision.shape[2]))
        by_class[name] = [float(row[row > -1].mean()) if (row > -1).any() else None for row in rows]
    return scores, by_class
