"""A picture of any kind -> its pixels, (C, H, W) float32 in 0..1; of bands that are no picture, as they are stored."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from adaptkit.bands import PICTURES
from adaptkit.pictures import CHANNELS, colours, read

__all__ = ["listed", "pixels", "shown"]

BYTES = bytes | bytearray | memoryview
ROUNDING = 1e-3  #: by which resizing may leave 0..1


def listed(images: Any) -> tuple[list[Any], bool]:
    """Return single pictures, and whether several were asked for: a list, a tuple, or an array with a batch dimension.

    Raises ``ValueError`` for an array of no image's dimensions.
    """
    if isinstance(images, Tensor | np.ndarray):
        if images.ndim == 4:
            return list(images), True
        if images.ndim not in (2, 3):
            raise ValueError(
                f"an image of shape {tuple(images.shape)}: expected (H, W), (C, H, W) or (H, W, C), or a batch of them "
                "with one dimension more in front"
            )
        return [images], False
    if isinstance(images, str | BYTES | os.PathLike | Image.Image):
        return [images], False
    if isinstance(images, Sequence):
        return list(images), True
    raise TypeError(
        f"an image is a path, a PIL image, an array or a tensor, or a list of them; this is a {type(images).__name__}"
    )


def pixels(image: Any, channels: int = CHANNELS) -> Tensor:
    """Picture -> (channels, H, W) float32 in 0..1, upright.

    Args:
        image: a path, the bytes of a file or a PIL image; or an array or tensor, grey (H, W), (C, H, W) or (H, W, C),
            whole numbers of 8 or 16 bits, or floats in 0..1, or in 0..255.
        channels: of the backbone. Grey becomes three of the same, and alpha is dropped. Of other numbers than one and
            three, floats and signed integers stay as they are, as :mod:`adaptkit.bands` reads them from a file.

    Raises ``ValueError`` for a file that cannot be read (it is named), another number of channels, and floats that are
    no pixels, such as an image that has been normalised already.
    """
    if isinstance(image, Tensor | np.ndarray):
        return _channels(_scaled(_tensor(image, channels), channels), channels)
    said = {"bytes": bytes(image), "path": None} if isinstance(image, BYTES) else image
    name = "the image" if isinstance(image, BYTES | Image.Image) else ""
    picture = read(Path(said).expanduser() if isinstance(said, str) else said, name, channels=channels)
    return _scaled(colours(picture).as_subclass(Tensor), channels)


def shown(image: Tensor) -> np.ndarray:
    """(C, H, W) of :func:`pixels` -> (H, W, 3) uint8 to look at.

    One channel is grey. Of others than one and three the first three are shown, which an expanded backbone takes for
    red, green and blue, each from its 2nd percentile (black) to its 98th (white).
    """
    count, image = image.shape[0], image[:CHANNELS].float().cpu()
    if count not in PICTURES:
        low, high = np.percentile(image.flatten(1).numpy(), (2, 98), axis=1)[..., None, None]
        image = ((image - torch.from_numpy(low)) / torch.from_numpy(np.maximum(high - low, 1e-12))).clamp(0, 1)
    image = image if image.shape[0] == CHANNELS else image[:1].expand(CHANNELS, -1, -1)
    return (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def _tensor(image: Tensor | np.ndarray, channels: int) -> Tensor:
    """(H, W), (C, H, W) or (H, W, C) -> (C, H, W).

    Channels are the side that can be their number. Where both can, they are last in an array and first in a tensor, as
    NumPy's and torch's own functions have them.
    """
    last = isinstance(image, np.ndarray)
    if isinstance(image, np.ndarray):
        sixteen = image.dtype.kind == "u" and image.dtype.itemsize == 2  # in either byte order
        image = torch.from_numpy(np.array(image, np.int32 if sixteen else image.dtype.newbyteorder("="), order="C"))
    else:
        sixteen = image.dtype == torch.uint16
        image = image.detach().to(torch.int32) if sixteen else image.detach()
    if image.ndim == 2:
        image = image[None]
    else:
        possible = {channels, 1, 2, 3, 4} if channels == CHANNELS else {channels}
        first = image.shape[0] in possible
        if image.shape[-1] in possible and (last or not first):
            image = image.permute(2, 0, 1)
    return image.float() / 65535 if sixteen else image


def _scaled(image: Tensor, channels: int) -> Tensor:
    if image.dtype == torch.uint8:
        from torchvision.transforms.v2 import functional as F  # here, for it takes a second to import

        return F.to_dtype(image, torch.float32, scale=True)  # what training does, to the bit
    if image.dtype == torch.bool:
        return image.float()
    if channels not in PICTURES:
        if not bool(image.isfinite().all()):
            raise ValueError("an image with values that are NaN or infinite: fill them")
        return image.float()
    if not image.is_floating_point():
        raise ValueError(f"an image of {image.dtype}: give 8 or 16 bits without a sign, or floats in 0..1")
    image = image.float()
    low, high = (float(v) for v in torch.aminmax(image)) if image.numel() else (0.0, 0.0)
    if not (low >= -ROUNDING and high <= 255 + 255 * ROUNDING):  # NaN is neither
        raise ValueError(
            f"an image with values {low:g}..{high:g}: pixels are in 0..1 or 0..255. If it is normalised already, call "
            "the model itself: model(image)"
        )
    if high >= 2:
        return image.clamp(0, 255) / 255
    if high > 1 + ROUNDING:
        raise ValueError(
            f"an image with values {low:g}..{high:g}: more than 0..1, and too dark for 0..255. Where resizing "
            "overshot, give image.clamp(0, 1)"
        )
    return image.clamp(0, 1)


def _channels(image: Tensor, channels: int) -> Tensor:
    if min(image.shape) == 0:
        raise ValueError(f"an image of shape {tuple(image.shape)} has no pixel")
    if channels == CHANNELS:
        if image.shape[0] in (1, 2):  # grey, maybe with alpha
            image = image[:1].expand(CHANNELS, -1, -1)
        image = image[:CHANNELS] if image.shape[0] == 4 else image
    if image.shape[0] != channels:
        raise ValueError(f"an image of {image.shape[0]} channels, and this backbone takes {channels}")
    return image
