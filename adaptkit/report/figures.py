"""Which pictures stand on the page: the same images by every setup, the worst and the best of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adaptkit.report.groups import Group
from adaptkit.report.run import Run

__all__ = ["ABOUT", "figures", "has_legend"]

WHY = {"even": "Images that nobody chose", "worst": "Worst images", "best": "Best images"}
PANELS = ("image", "truth", "prediction")
ABOUT = {
    "segmentation": "The mIoU of an image is that of this image alone, over the classes that are in it or predicted.",
    "panoptic": "The PQ of an image is that of this image alone, over the classes that are in it or predicted.",
    "detection": "Drawn are boxes with a score of 0.5 and more; F1 is of these, matched at an IoU of 0.5 and more.",
}
LEGEND = 40  #: classes of a legend
#: What an image by itself is scored by.
PER_IMAGE = {"segmentation": "mIoU", "depth": "δ < 1.25", "detection": "F1", "panoptic": "PQ"}


def figures(groups: Sequence[Group], top: Group | None) -> list[dict[str, Any]]:
    """Pictures: those that nobody chose with every setup's prediction, the worst and the best of the best setup."""
    lead, sections = (top or groups[0]).lead, []
    for why, title in WHY.items():
        shown = [p for p in lead.evaluation.get("pictures") or () if p.get("why") == why]
        mine = groups if why == "even" else [top or groups[0]]
        rows = [row for row in (_row(p, lead, mine) for p in shown) if row["panels"]]
        if rows:
            of = f" of {mine[0].label}" if len(mine) < len(groups) else ""
            alone = all(len(row["panels"]) == 1 for row in rows)  # words say the rest
            sections.append({"title": title + of, "rows": rows, "alone": alone})
    return sections


def _row(picture: dict[str, Any], lead: Run, groups: Sequence[Group]) -> dict[str, Any]:
    """One image: itself, the truth, and what each of the groups says."""
    panels = [_panel(lead, picture, panel, panel) for panel in PANELS[:2]]
    for group in groups:
        same = [p for p in group.lead.evaluation.get("pictures") or () if p.get("index") == picture.get("index")]
        label = group.label if len(groups) > 1 else "prediction"
        panels += [_panel(group.lead, same[0], "prediction", label)] if same else []
    score, said = picture.get("score"), [f"image {picture.get('index')}"]
    name = PER_IMAGE.get(str(lead.task))
    said += [f"{name} {100 * score:.1f} %"] if name and score is not None and len(groups) == 1 else []
    words = {"true": "true: {}", "said": "said: {}", "range": "depth from {}"}
    said += [form.format(picture[key]) for key, form in words.items() if picture.get(key)]
    return {"caption": " · ".join(said), "panels": [p for p in panels if p]}


def _panel(run: Run, picture: dict[str, Any], panel: str, label: str) -> dict[str, str] | None:
    url = run.picture(str(picture.get(panel))) if picture.get(panel) else None
    alt = {"image": "The image", "truth": "What is true", "prediction": f"What {label} says"}[panel]
    return url and {"url": url, "label": label, "alt": f"{alt}, image {picture.get('index')}"}  # type: ignore[return-value]


def has_legend(task: str | None, by_class: dict[str, Any] | None) -> bool:
    """Whether the colours over the pictures need one, and it would be read."""
    return task in ("segmentation", "panoptic") and by_class is not None and len(by_class["rows"]) <= LEGEND
