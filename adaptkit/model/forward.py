"""One forward: an image through a frozen backbone with its adapters, and through their head."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.adapters.base import Aux, BlockAdapter
from adaptkit.adapters.wrapped import wrapped
from adaptkit.core.view import Features, View
from adaptkit.model.parts import AdapterSet

__all__ = ["answered", "run"]


def run(vit: View, acting: AdapterSet, image: Tensor) -> Features:
    """Run a backbone with these adapters and their head: image (B, C, H, W) -> features."""
    features, must_repeat = _run_once(vit, acting, image)
    while must_repeat:
        features, must_repeat = _run_once(vit, acting, image)
    logits = vit.logits(features) if acting.head is None else answered(acting.head, features, vit.spec, acting.pad)
    if acting.leaves_unread and acting.training and torch.is_grad_enabled():
        logits = _with_all(logits, features)
    return features._replace(logits=logits)


def _run_once(vit: View, acting: AdapterSet, image: Tensor) -> tuple[Features, bool]:
    """Run everything but the head; also return whether an adapter asks for another run (AdaViT's packing)."""
    aux: Aux = {}
    view: Any = wrapped(vit, acting, aux)
    reads = {"reads": acting.head_reads} if acting.head_reads else {}  # which a backbone with stages does not have
    features = view.features(image, **reads) if acting.side is None else acting.side(view, image, aux)
    repeats = [adapter.must_repeat(aux) for adapter in acting if isinstance(adapter, BlockAdapter)]
    return features._replace(aux={**features.aux, **aux}), any(repeats)


def answered(head: nn.Module, features: Features, spec: Any, pad: str) -> Any:
    """Return what a head says of features.

    Of an image that was padded on all sides (``pad="centre"``) it sees all that the maps cover, and what it says of
    pixels is cut to the image.
    """
    if pad == "corner":
        return head(features)
    (height, width), (whole, across) = features.size, (n * spec.patch_size for n in features.grid)
    logits = head(features._replace(size=(whole, across)))
    if not isinstance(logits, Tensor) or logits.shape[-2:] != (whole, across):
        return logits
    top, left = (whole - height) // 2, (across - width) // 2
    return logits[..., top : top + height, left : left + width]


def _with_all(logits: Any, features: Features) -> Any:
    """Add zero times every feature to the logits, so that parameters whose features the head ignores get gradient 0.

    DDP waits for a gradient of every trained parameter.
    """
    if isinstance(logits, dict):
        first, changed = next(iter(logits)), copy.copy(logits)  # keeps the class: outputs of transformers are dicts
        changed[first] = _with_all(logits[first], features)
        return changed
    if isinstance(logits, list | tuple):
        made = [_with_all(logits[0], features), *logits[1:]]
        return type(logits)(*made) if hasattr(logits, "_fields") else type(logits)(made)
    return logits + sum(x[..., :0].sum() for x in (features.tokens, features.prefix, *features.maps)).to(logits.dtype)
