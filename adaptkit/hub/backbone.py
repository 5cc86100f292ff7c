"""What a file says of the backbone that it was trained on: structure, origin, weights, normalisation of images."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from adaptkit.core.view import View
from adaptkit.hub.digest import block_sums, digest
from adaptkit.hub.packages import origin_of

__all__ = ["EXPANSION", "describe_backbone", "digest_of", "expansion", "fingerprint", "normalisation_of", "sums_of"]

EXPANSION = "_adaptkit_expansion"  #: where a backbone says how :func:`adaptkit.expand_channels` made it


def describe_backbone(vit: View, metadata: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """Return what the header says of the backbone.

    The normalisation is that of the images that were trained on: ``mean`` and ``std`` of the metadata, where they are
    given, go before what the backbone says of itself.
    """
    source = vit.source()
    mean, std = normalisation_of(metadata, vit.spec.channels) or (list(source.mean), list(source.std))
    return {
        **origin_of(type(vit)),
        "spec": vit.spec._asdict(),
        "class": f"{type(vit.backbone).__module__}.{type(vit.backbone).__qualname__}",
        "positions": vit.positions,
        "source": source.id,
        "revision": source.revision,
        "mean": mean,
        "std": std,
        "classes": source.classes,
        "fingerprint": fingerprint(vit),
        "digest": digest_of(vit),
        "sums": sums_of(vit),
        **({"expanded": expanded} if (expanded := getattr(vit.backbone, EXPANSION, None)) else {}),
    }


def normalisation_of(metadata: Mapping[str, Any], channels: int) -> tuple[list[float], list[float]] | None:
    """Return ``mean`` and ``std`` from metadata, a number per channel; None where one is missing or malformed."""
    said = metadata.get("mean"), metadata.get("std")
    whole = all(isinstance(v, list) and len(v) == channels and all(type(n) in (int, float) for n in v) for v in said)
    return (said[0], said[1]) if whole else None  # type: ignore[return-value]


def fingerprint(vit: View) -> dict[str, list[float]]:
    """Return eight values each of a few frozen tensors: the same in timm, transformers and half precision."""
    if vit.fingerprint is not None:
        return vit.fingerprint
    marks = {}
    for name, tensor in vit.fingerprint_tensors().items():
        if tensor.is_meta:  # no values yet
            continue
        flat = tensor.detach().flatten()
        index = torch.linspace(0, flat.numel() - 1, 8, dtype=torch.float32, device="cpu").long()
        index = index.clamp(max=flat.numel() - 1).to(flat.device)  # float32 rounds up beyond 2^24
        marks[name] = [float(f"{v:.6g}") for v in flat[index].float().tolist()]
    return marks


def digest_of(vit: View) -> dict[str, str]:
    """Return the exact checksum of every layer; see :func:`adaptkit.hub.digest.digest`."""
    return digest(vit.backbone) if vit.digest is None else vit.digest


def sums_of(vit: View) -> dict[str, list[float]]:
    """Return the sums over each block, which rounding hardly moves; see :func:`adaptkit.hub.digest.block_sums`."""
    return block_sums(vit.backbone, len(vit.spec.widths)) if vit.sums is None else vit.sums


def expansion(saved: Mapping[str, Any], rgb: str) -> str:
    """Return the call that expands a backbone of three channels as that was which a file was trained on."""
    said = saved["expanded"]
    more = f", wavelengths={said['wavelengths']}" if said["wavelengths"] is not None else ""
    return f"adaptkit.expand_channels({rgb}, {saved['spec']['channels']}, how={said['how']!r}{more})"
