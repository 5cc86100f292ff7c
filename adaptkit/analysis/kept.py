"""What AdaViT keeps: the patches of each block on the image, and usage against depth (paper, figures 3 to 5)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptkit.adapters.adavit import AdaViT
from adaptkit.analysis.style import COLOURS, WIDTH, Drawn, panels, pictured, show
from adaptkit.analysis.watch import single
from adaptkit.core.tree import evaluating
from adaptkit.losses import KINDS
from adaptkit.model.adapted import AdaptedModel

__all__ = ["KeptPatches", "UsageByDepth", "check_deciding", "kept_patches", "usage_by_depth"]

COLUMNS = 6
FADED = 0.8  #: how far an off patch goes towards white
LINES = dict(zip(KINDS, ("-", "--", ":")))  #: for those who cannot tell the colours apart


@dataclass(frozen=True)
class UsageByDepth(Drawn):
    """The share that is kept in each block."""

    shares: dict[str, tuple[float, ...]]  #: by kind: of the gated blocks
    first: dict[str, int]  #: by kind: the first gated block

    def draw(self, figure: Any) -> None:
        """A line for each kind."""
        figure.set_size_inches(WIDTH / 2, 1.7)
        axes = figure.add_subplot()
        for k, (kind, shares) in enumerate(self.shares.items()):
            blocks = range(self.first[kind], self.first[kind] + len(shares))
            axes.plot(blocks, [100 * s for s in shares], LINES[kind], marker="o", color=COLOURS[k], label=kind)
        axes.set(ylim=(-4, 104), xlabel="block", ylabel="kept (%)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(loc="outside right upper")


@dataclass(frozen=True, eq=False)
class KeptPatches(Drawn):
    """What each gated block kept of one image."""

    kept: dict[int, dict[str, Tensor]]  #: by block and kind: patches (N,), heads (H,), sub-layers (2,), 1 where kept
    usage: UsageByDepth
    grid: tuple[int, int]  #: (h, w) of the patches
    stride: int  #: side of a patch in pixels
    picture: np.ndarray

    def draw(self, figure: Any) -> None:
        """The image, then once for each gated block, with the patches faded that the block left out."""
        axes = panels(figure, 1 + len(self.kept), COLUMNS, self.picture.shape[0] / self.picture.shape[1], 0.32)
        show(axes[0], self.picture)
        axes[0].set_title("image")
        for one, (block, kept) in zip(axes[1:], self.kept.items()):
            show(one, self.faded(block))
            one.set_title(_title(block, kept), fontsize=6)

    def faded(self, block: int) -> np.ndarray:
        """Return the picture (H, W, 3) as the block got it; the last row and column may reach over its edge."""
        keep = self.kept[block].get("patch")
        if keep is None:
            return self.picture
        off = 1.0 - keep.float().view(self.grid).numpy()
        mask = FADED * off.repeat(self.stride, 0).repeat(self.stride, 1)[..., None]
        mask = mask[: self.picture.shape[0], : self.picture.shape[1]]
        return (self.picture * (1 - mask) + 255 * mask).round().astype(np.uint8)


@torch.no_grad()
def kept_patches(model: AdaptedModel, image: Tensor, path: str | os.PathLike[str] | None = None) -> KeptPatches:
    """Return what each gated block keeps of an image.

    Args:
        model: with AdaViT gates; decided as in evaluation.
        image: (C, H, W) or (1, C, H, W), normalised as the backbone wants it.
        path: where to write the figure as well, as ``KeptPatches.save`` does.

    Raises ``TypeError`` for a model without gates, ``ValueError`` for a batch and where the gates are switched off.
    """
    gates = AdaViT.of(model)
    model.check_one_acts()
    image = single(image)
    with evaluating(model):
        features = model(image)
    check_deciding(features.aux)
    kept = {
        index: {k: features.aux[f"{k}_keep"][0, index - gates.first[k]].cpu() for k in KINDS if gates.gated(k, index)}
        for index in sorted(int(name) for name in gates.gates)
    }
    usage = usage_by_depth({k: v for k, v in features.aux.items() if k.endswith("_keep")}, gates.first)
    (picture,) = pictured([image[0]], model.vit.source())
    found = KeptPatches(kept, usage, features.grid, model.spec.patch_size, picture)
    if path is not None:
        found.save(path)
    return found


def check_deciding(aux: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return ``Features.aux``; ``ValueError`` where no gate decided."""
    if not any(name.endswith("_keep") for name in aux):
        raise ValueError("the gates are switched off, so that everything is kept; look outside disable_adapter()")
    return aux


def _title(index: int, kept: Mapping[str, Tensor]) -> str:
    """Which share of the patches, which heads and which sub-layers were kept."""
    words = [f"block {index}"]
    if "patch" in kept:
        words[0] += f": {float(kept['patch'].float().mean()):.0%}"
    if "head" in kept:
        words.append(f"{int(kept['head'].sum())}/{len(kept['head'])} heads")
    if "layer" in kept:
        words.append("+".join(n for n, on in zip(("MSA", "FFN"), kept["layer"].tolist()) if on) or "skipped")
    return words[0] + ("\n" + ", ".join(words[1:]) if words[1:] else "")


def usage_by_depth(aux: Mapping[str, Tensor], first: Mapping[str, int] | None = None) -> UsageByDepth:
    """Return the share that is kept in each block.

    Args:
        aux: ``Features.aux``, or the ``<kind>_keep`` of many images put together: (B, gated blocks, ...).
        first: the first gated block of each kind, ``AdaViT.first``; without it all start at 0.
    """
    shares = {k: tuple(aux[f"{k}_keep"].float().flatten(2).mean((0, 2)).tolist()) for k in KINDS if f"{k}_keep" in aux}
    return UsageByDepth(shares, {k: 0 if first is None else first[k] for k in shares})
