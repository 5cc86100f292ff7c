"""How numbers are called and written."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["METRICS", "SCORE", "SPACE", "TASK_OF", "Metric", "amount", "duration", "metric", "number", "size"]

#: What a file predicts -> the number that is its score, as in ``adaptkit eval``.
SCORE = {"segmentation": "miou", "classification": "top1", "depth": "delta1", "detection": "box_ap", "panoptic": "pq"}
#: Recipe -> what its file predicts.
TASK_OF = {"segment": "segmentation", "classify": "classification", "depth": "depth", "detect": "detection",
           "panoptic": "panoptic"}  # fmt: skip


SPACE = "\u00a0"  #: one at which no line ends


class Metric(NamedTuple):
    """A number that an evaluation finds."""

    label: str
    percent: bool = True  #: whether it lies in 0..1 and is read as per cent
    lower: bool = False  #: whether less is better
    unit: str = ""


METRICS = {
    "miou": Metric("mIoU"),
    "macc": Metric("mean accuracy"),
    "aacc": Metric("pixel accuracy"),
    "boundary_iou": Metric("boundary IoU"),
    "top1": Metric("top-1 accuracy"),
    "top5": Metric("top-5 accuracy"),
    "delta1": Metric("δ < 1.25"),
    "delta2": Metric("δ < 1.25²"),
    "delta3": Metric("δ < 1.25³"),
    "abs_rel": Metric("AbsRel", False, True),
    "rmse": Metric("RMSE", False, True, " m"),
    "silog": Metric("SILog", False, True),
    "box_ap": Metric("box AP"),
    "box_ap50": Metric("box AP50"),
    "box_ap75": Metric("box AP75"),
    "box_ap_small": Metric("box AP, small objects"),
    "box_ap_medium": Metric("box AP, medium objects"),
    "box_ap_large": Metric("box AP, large objects"),
    "mask_ap": Metric("mask AP"),
    "mask_ap50": Metric("mask AP50"),
    "mask_ap75": Metric("mask AP75"),
    "mask_ap_small": Metric("mask AP, small objects"),
    "mask_ap_medium": Metric("mask AP, medium objects"),
    "mask_ap_large": Metric("mask AP, large objects"),
    "pq": Metric("PQ"),
    "sq": Metric("SQ"),
    "rq": Metric("RQ"),
    "pq_things": Metric("PQ of things"),
    "pq_stuff": Metric("PQ of stuff"),
    "ece": Metric("calibration error (ECE)", True, True),
}


def metric(name: str) -> Metric:
    """Return how a metric is written; one that is not known is written as it is called."""
    return METRICS.get(name, Metric(name, False))


def number(name: str, value: float | None, unit: bool = True) -> str:
    """Write the value of a metric; a dash for none."""
    if value is None or value != value:
        return "–"
    known = metric(name)
    if known.percent:
        return f"{100 * value:.1f}" + (f"{SPACE}%" if unit else "")
    return f"{value:.3f}" + (known.unit if unit else "")


def amount(value: float | None) -> str:
    """Write a large count: 12,345, 2.29 M, 0.47 G."""
    if value is None:
        return "–"
    for power, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= power:
            return f"{value / power:.3g} {letter}"
    return f"{value:,.0f}"


def size(value: float | None) -> str:
    """Write bytes: 14.7 kB, 9.2 MB."""
    if value is None:
        return "–"
    for power, letter in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= power:
            return f"{value / power:.1f} {letter}"
    return f"{value:.0f} B"


def duration(seconds: float | None) -> str:
    """Write seconds: 42 s, 4 min 12 s, 3 h 05 min."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
