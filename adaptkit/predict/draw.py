"""Answers as pictures: what was found, laid over what was seen, with a legend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from adaptkit.predict.answers import Answer, Classification, Depth, Detection, Panoptic, Segmentation, name_of
from adaptkit.predict.palette import Colour, palette, ramp

__all__ = ["LARGEST", "coloured", "drawn_between", "laid", "legend", "outlined", "overlay"]

LARGEST = 2048  #: longer side of what is drawn, in pixels
OPACITY = 0.55  #: of a class over the picture
INK, PAPER = (32, 32, 32), (255, 255, 255)


def overlay(image: np.ndarray, answer: Answer) -> Image.Image:
    """Draw an answer over its picture.

    Args:
        image: (H, W, 3) uint8.
        answer: to that picture.

    Returns an image of at most ``LARGEST`` pixels a side, and a legend beside it where classes are shown.
    """
    drawn, shown = DRAWN[type(answer)](sized(image), answer)
    return drawn if shown is None else legend(drawn, shown)


def laid(image: np.ndarray, answer: Answer, largest: int = LARGEST) -> Image.Image:
    """Draw as :func:`overlay` does, without the legend; pixels of no class (a mask of the truth) stay uncovered."""
    return DRAWN[type(answer)](sized(image, largest), answer)[0]


def sized(image: np.ndarray, largest: int = LARGEST) -> Image.Image:
    """(H, W, 3) uint8 -> a picture of at most ``largest`` pixels a side."""
    height, width = image.shape[:2]
    ratio = min(1.0, largest / max(height, width))
    size = max(1, round(width * ratio)), max(1, round(height * ratio))
    seen = Image.fromarray(image)
    if ratio == 1:
        return seen
    return seen.resize(size, Image.Resampling.BILINEAR if ratio > 0.5 else Image.Resampling.BOX)


#: What is drawn, and the names and colours of its legend, None where it needs none.
Drawn = tuple[Image.Image, list[tuple[str, Any]] | None]


def _segmentation(seen: Image.Image, answer: Segmentation) -> Drawn:
    mask, classes = _nearest(answer.mask, seen.size), len(answer.palette)
    known = (mask >= 0) & (mask < classes)  # what is ignored has any other number: 255, -1, -100
    there = [c["id"] for c in answer.json()["classes"] if 0 <= c["id"] < classes]
    colours = coloured(np.clip(mask, 0, classes - 1), answer.palette)
    shown = [(name_of(answer.names, k), answer.palette[k]) for k in there]
    return blended(seen, colours, outlined(mask), known), shown


def _panoptic(seen: Image.Image, answer: Panoptic) -> Drawn:
    ids = _nearest(answer.segments, seen.size)
    colours = [PAPER, *(_varied(answer.palette[s["label"]], s["id"], s["isthing"]) for s in answer.found)]
    shown = {s["name"]: answer.palette[s["label"]] for s in sorted(answer.found, key=lambda s: -s["area"])}
    return blended(seen, coloured(ids, colours), outlined(ids), ids > 0), list(shown.items())


def _depth(seen: Image.Image, answer: Depth) -> Drawn:
    depth = np.asarray(Image.fromarray(answer.depth).resize(seen.size, Image.Resampling.BILINEAR))
    low, high = drawn_between(answer)
    drawn = Image.fromarray(ramp(np.clip((depth - low) / max(high - low, 1e-6), 0, 1)))
    steps = np.linspace(0, 1, 5)
    shown = [(f"{low + s * (high - low):.3g} m", tuple(ramp(np.array([[s]]))[0, 0].tolist())) for s in steps]
    return drawn, shown


def drawn_between(answer: Depth) -> tuple[float, float]:
    """Return the metres that are drawn darkest and lightest."""
    if answer.between is not None:
        return answer.between
    low, high = (float(np.percentile(answer.depth, q)) for q in (1, 99))
    return low, high


def _detection(seen: Image.Image, answer: Detection) -> Drawn:
    ratio = seen.width / answer.size[1]
    if answer.masks is not None and len(answer):
        pixels = np.asarray(seen).copy()
        for mask, label in zip(answer.masks, answer.labels.tolist()):
            inside = np.asarray(Image.fromarray(mask).resize(seen.size, Image.Resampling.NEAREST))
            colour = np.array(answer.palette[label])
            pixels[inside] = (pixels[inside] * (1 - OPACITY) + colour * OPACITY).astype(np.uint8)
        seen = Image.fromarray(pixels)
    pen, font = ImageDraw.Draw(seen), _font(seen)
    for box, score, label in zip(answer.boxes, answer.scores.tolist(), answer.labels.tolist()):
        colour, place = answer.palette[label], [float(v) * ratio for v in box]
        pen.rectangle(place, outline=colour, width=max(2, seen.width // 300))
        _tag(pen, (place[0], place[1]), f"{name_of(answer.names, label)} {score:.2f}", colour, font)
    return seen, None


def _classification(seen: Image.Image, answer: Classification) -> Drawn:
    return seen, [(f"{name}  {score:.1%}", c) for (name, score), c in zip(answer.top(), palette(5))]


DRAWN: dict[type[Answer], Callable[[Image.Image, Any], Drawn]] = {
    Segmentation: _segmentation,
    Panoptic: _panoptic,
    Depth: _depth,
    Detection: _detection,
    Classification: _classification,
}

# ------------------------------------------------------------------------------------------------------- pieces


def coloured(ids: np.ndarray, colours: Sequence[Colour]) -> np.ndarray:
    """(H, W) ids -> (H, W, 3) uint8."""
    return np.array(colours, np.uint8)[ids]


def outlined(ids: np.ndarray) -> np.ndarray:
    """(H, W) ids -> (H, W) bool, where the pixel to the right or below is of another."""
    edge = np.zeros(ids.shape, bool)
    edge[:, :-1] |= ids[:, :-1] != ids[:, 1:]
    edge[:-1] |= ids[:-1] != ids[1:]
    return edge


def blended(seen: Image.Image, colours: np.ndarray, edge: np.ndarray, where: np.ndarray | None = None) -> Image.Image:
    """Lay colours (H, W, 3) over a greyed picture, with thin light borders between them."""
    grey = np.asarray(seen.convert("L"), np.float32)[..., None]
    base = 0.35 * np.asarray(seen, np.float32) + 0.65 * grey
    mixed = base * (1 - OPACITY) + colours * OPACITY
    mixed = mixed if where is None else np.where(where[..., None], mixed, base)
    mixed[edge] = 0.25 * mixed[edge] + 0.75 * 255
    return Image.fromarray(mixed.round().astype(np.uint8))


def legend(picture: Image.Image, shown: Sequence[tuple[str, Any]], most: int = 24) -> Image.Image:
    """Put a strip of names and colours to the right of a picture."""
    font = _font(picture)
    line = round(1.7 * font.size)
    room = max(1, (picture.height - line // 2) // line)
    rows = [(f"{text[:38]}...", c) if len(text) > 40 else (text, c) for text, c in shown[: min(most, room)]]
    width = round(max((font.getlength(text) for text, _ in rows), default=0)) + 3 * line
    drawn = Image.new("RGB", (picture.width + width, picture.height), PAPER)
    drawn.paste(picture)
    pen = ImageDraw.Draw(drawn)
    for i, (text, colour) in enumerate(rows):
        top, left = line // 2 + i * line, picture.width + line // 2
        pen.rounded_rectangle([left, top, left + line - 4, top + line - 6], 3, fill=tuple(colour))
        pen.text((left + line + line // 4, top + (line - 6) // 2), text, fill=INK, font=font, anchor="lm")
    return drawn


def _font(picture: Image.Image) -> Any:
    return ImageFont.load_default(max(11, min(picture.size) // 32))


def _tag(pen: Any, place: tuple[float, float], text: str, colour: Colour, font: Any) -> None:
    """Write on a patch of the colour, in black or white, whichever reads better (luminance of Rec. 601)."""
    left, top, right, bottom = pen.textbbox(place, text, font=font)
    up = min(bottom - top + 6, place[1])  # above the box where there is room
    pen.rectangle([left - 2, top - up, right + 4, bottom - up + 4], fill=colour)
    bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
    pen.text((place[0] + 1, place[1] - up), text, fill=INK if bright else PAPER, font=font)


def _varied(colour: Colour, number: int, thing: bool) -> Colour:
    """Things of one class in shades of its colour, so that neighbours can be told apart."""
    shade = (1.0, 0.8, 1.2, 0.65, 1.35)[number % 5] if thing else 1.0
    red, green, blue = (min(255, round(v * shade)) for v in colour)
    return red, green, blue


def _nearest(ids: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if ids.shape == size[::-1]:
        return ids
    return np.asarray(Image.fromarray(ids.astype(np.int32)).resize(size, Image.Resampling.NEAREST))
