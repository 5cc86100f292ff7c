"""What ``model(image)`` takes, said clearly where something else came: pictures are for ``model.predict(...)``.

Types and shapes are always looked at: that costs nothing. Values are looked at on the CPU alone, one pass over the
image. On a GPU reading one would make the host wait for everything before it, so there is no such check there, nor
under ``torch.compile`` and ``torch.export``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adaptkit.core.view import View

__all__ = ["check_image"]

#: Values of 0..1, normalised by what a backbone declares, stay within (1 - mean) / std, some 3 for every known one.
MARGIN = 4.0
CONVERTS = "model.predict(...) takes pictures, paths, arrays and such tensors and converts them"


def check_image(vit: View, image: Any) -> None:
    """Raise ``TypeError`` or ``ValueError`` for what is no batch (B, C, H, W) of normalised floating-point images."""
    channels = vit.spec.channels
    wanted = f"forward takes floating-point tensors (batch, {channels}, height, width), normalised"
    if not isinstance(image, Tensor):
        raise TypeError(f"the image is a {type(image).__module__}.{type(image).__qualname__}; {wanted}. {CONVERTS}")
    if image.ndim != 4:
        raise ValueError(
            f"image has shape {tuple(image.shape)}; expected (batch, channels, height, width){_remedy(image, channels)}"
            f". {CONVERTS}"
        )
    if image.shape[1] != channels and (image.shape[3] == channels or image.shape[1] == 1):
        what = (
            "its channels are last: image.permute(0, 3, 1, 2)"
            if image.shape[3] == channels
            else f"it is grey: image.expand(-1, {channels}, -1, -1)"
        )
        raise ValueError(
            f"image has shape {tuple(image.shape)}, so {image.shape[1]} channels; {type(vit.backbone).__name__} takes "
            f"{channels}: {what}. {CONVERTS}"
        )
    if not image.is_floating_point():
        raise TypeError(f"the image holds {image.dtype}; {wanted}: (image / 255 - mean) / std. {CONVERTS}")
    if type(image) is Tensor and image.device.type == "cpu" and image.numel() and not _traced():
        _check_values(vit, image)


def _remedy(image: Tensor, channels: int) -> str:
    if image.ndim == 3 and image.shape[0] == channels:
        return ": one image without a batch axis: image[None]"
    if image.ndim == 3 and image.shape[2] == channels:
        return ": one image, its channels last: image.permute(2, 0, 1)[None]"
    return f": one grey image: image.expand(1, {channels}, -1, -1)" if image.ndim == 2 else ""


def _traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


@torch.no_grad()
def _check_values(vit: View, image: Tensor) -> None:
    """Refuse values of 0..255 where the backbone says how it wants images normalised."""
    source = vit.source()
    if len(source.mean) != vit.spec.channels or not source.std:
        return
    most = max((1 - m) / s for m, s in zip(source.mean, source.std))
    try:
        least, largest = (float(v) for v in torch.aminmax(image))
    except RuntimeError:  # under torch.func an image may have no values of its own
        return
    if least >= 0 and largest > MARGIN * most:
        raise ValueError(
            f"the image has values from {least:.4g} to {largest:.4g}, as a picture in 0..255 has; normalised as "
            f"{type(vit.backbone).__name__} declares (mean {list(source.mean)}, std {list(source.std)}) none exceeds "
            f"{most:.3g}: (image / 255 - mean) / std. {CONVERTS}"
        )
