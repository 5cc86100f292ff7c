"""An answer drawn over its picture."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from adaptkit.predict.answers import Answer, Classification, Depth, Detection, Panoptic, Segmentation, name_of
from adaptkit.predict.palette import Colour, ramp
from adaptkit.predict.pixels import shown

__all__ = ["can_draw", "overlay"]

OPACITY = 0.55  #: of the colours


def can_draw(answer: Answer) -> bool:
    """Whether there is anything to draw."""
    return not isinstance(answer, Classification)


def overlay(image: Tensor, answer: Answer) -> Image.Image:
    """Picture (C, H, W) and its answer -> the picture with the answer on it; a depth map stands alone."""
    seen = shown(image)
    if isinstance(answer, Segmentation):
        return Image.fromarray(_blended(seen, np.asarray(answer.palette, np.uint8)[answer.mask]))
    if isinstance(answer, Panoptic):
        return Image.fromarray(_panoptic(seen, answer))
    if isinstance(answer, Depth):
        low, high = float(answer.depth.min()), float(answer.depth.max())
        return Image.fromarray(ramp((high - answer.depth) / max(high - low, 1e-6)))  # near is bright
    if isinstance(answer, Detection):
        return _boxes(seen, answer)
    return Image.fromarray(seen)


def _blended(seen: np.ndarray, colours: np.ndarray) -> np.ndarray:
    return (seen * (1 - OPACITY) + colours * OPACITY).round().astype(np.uint8)


def _panoptic(seen: np.ndarray, answer: Panoptic) -> np.ndarray:
    """(H, W, 3) in the colours of the classes, with white lines between segments."""
    table: np.ndarray = np.zeros((1 + max((s["id"] for s in answer.found), default=0), 3), np.uint8)
    for segment in answer.found:
        table[segment["id"]] = answer.palette[segment["label"]]
    ids = answer.segments
    mixed = np.where((ids > 0)[..., None], _blended(seen, table[ids]), seen)
    mixed[:, 1:][ids[:, 1:] != ids[:, :-1]] = 255
    mixed[1:][ids[1:] != ids[:-1]] = 255
    return mixed


def _boxes(seen: np.ndarray, answer: Detection) -> Image.Image:
    for i, label in enumerate(answer.labels.tolist() if answer.masks is not None else ()):
        inside = answer.masks[i]  # type: ignore[index]
        seen[inside] = _blended(seen[inside], np.asarray(_colour(answer, label), np.uint8))
    picture = Image.fromarray(seen)
    draw, side = ImageDraw.Draw(picture), max(picture.size)
    font = ImageFont.load_default(max(10, side // 45))
    for label, score, box in zip(answer.labels.tolist(), answer.scores.tolist(), answer.boxes.tolist()):
        colour = _colour(answer, label)
        draw.rectangle(box, outline=colour, width=max(1, side // 250))
        said = f" {name_of(answer.names, label)} {score:.2f} "
        where = draw.textbbox((box[0], box[1]), said, font=font)
        draw.rectangle(where, fill=colour)
        draw.text((box[0], box[1]), said, font=font, fill="black" if sum(colour) > 380 else "white")
    return picture


def _colour(answer: Answer, label: int) -> Colour:
    return answer.palette[label % len(answer.palette)] if answer.palette else (230, 159, 0)
