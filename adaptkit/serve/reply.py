"""An answer as JSON or PNG, by what the client accepts."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from adaptkit.predict.answers import Answer, Classification, Depth, Panoptic, Segmentation
from adaptkit.predict.draw import overlay
from adaptkit.predict.pixels import shown
from adaptkit.serve.limits import Refused

__all__ = ["JSON", "PNG", "chosen", "picture", "png", "said"]

JSON, PNG = "application/json", "image/png"
FARTHEST = 65535  #: millimetres that 16 bits hold


def chosen(accept: str | None) -> str:
    """``Accept`` -> the media type to answer in: what is wanted most (RFC 9110, 12.5.1), JSON where both are the same.

    Raises :class:`Refused` (406) where neither is wanted.
    """
    wanted = {JSON: (-1, 0.0), PNG: (-1, 0.0)}  # how exactly it was named, and its weight
    for part in (accept or "*/*").split(","):
        name, *parameters = (p.strip().lower() for p in part.split(";"))
        weight = next((_number(p[2:]) for p in parameters if p.startswith("q=")), 1.0)
        for kind in wanted:
            ranges = ["*/*", f"{kind.partition('/')[0]}/*", kind]
            if name in ranges and ranges.index(name) > wanted[kind][0]:
                wanted[kind] = (ranges.index(name), weight)
    best = max(wanted, key=lambda kind: wanted[kind][1])
    if wanted[best][1] <= 0:
        raise Refused(406, f"Accept: {accept}: answers are {JSON} or {PNG}")
    return best


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def said(answer: Answer, with_png: bool, image: Tensor) -> dict[str, Any]:
    """Return the answer as JSON has it; ``with_png`` adds :func:`picture` in base64, where there is one."""
    words = {"answers": type(answer).__name__.lower(), **answer.json()}
    if with_png and not isinstance(answer, Classification):
        words["png"] = base64.b64encode(png(picture(answer, image))).decode()
    return words


def picture(answer: Answer, image: Tensor, drawn: bool = False) -> Image.Image:
    """Return the answer as a picture.

    Of the image's own size: segmentation as class ids, mode L (16 bits from 257 classes on); depth as millimetres in 16
    bits, 65535 from 65.535 m on; panoptic as COCO's R + 256 G + 65536 B. Detection, and everything if ``drawn``: the
    overlay that ``adaptkit predict`` writes.

    Raises :class:`Refused` (406) for a class that is not to be drawn: it is no picture.
    """
    if drawn:
        return overlay(shown(image), answer)
    if isinstance(answer, Classification):
        raise Refused(406, f"a classification is no picture: Accept: {JSON}, or draw=true")
    if isinstance(answer, Segmentation):
        return Image.fromarray(answer.mask)
    if isinstance(answer, Depth):
        millimetres = np.nan_to_num(answer.depth * 1000.0, nan=0.0).round().clip(0, FARTHEST)
        return Image.fromarray(millimetres.astype(np.uint16))
    if isinstance(answer, Panoptic):
        ids = answer.segments
        return Image.fromarray(np.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], -1).astype(np.uint8))
    return overlay(shown(image), answer)


def png(image: Image.Image) -> bytes:
    """Return the file."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
