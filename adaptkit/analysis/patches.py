"""What the first layer looks for, and how positions resemble each other (ViT, figure 7, left and middle)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from adaptkit.analysis.principal import principal
from adaptkit.analysis.style import MAP, Drawn, colour_bar, panels
from adaptkit.analysis.watch import Watched
from adaptkit.core.tree import evaluating
from adaptkit.core.view import ViT
from adaptkit.ops.grid import cells, map_to_tokens
from adaptkit.seam import reference

__all__ = ["PositionSimilarity", "RGBFilters", "position_similarity", "rgb_filters"]

SHOWN = 7  #: positions in a row and a column of the figure, as the paper has it


@dataclass(frozen=True, eq=False)
class RGBFilters(Drawn):
    """Principal components of the filters that make a token of a patch."""

    filters: Tensor  #: (n, C, p, p), each of length one
    explained: Tensor  #: (n,) share of the variance over the D filters

    def draw(self, figure: Any) -> None:
        """Each component as a picture, its range stretched to that of the colours; grey where channels are not RGB."""
        for i, (axes, one) in enumerate(zip(panels(figure, len(self.filters), 7, title=0.02, width=4.4), self.filters)):
            values = (one if len(one) == 3 else one.mean(0, keepdim=True)).permute(1, 2, 0)
            values = (values / values.abs().amax().clamp_min(1e-12) + 1) / 2  # zero is grey
            axes.imshow(values.numpy().squeeze(), **({} if len(one) == 3 else {"cmap": "gray", "vmin": 0, "vmax": 1}))
            axes.set_label(f"component {i}")


@dataclass(frozen=True, eq=False)
class PositionSimilarity(Drawn):
    """Cosine of each position embedding with all others."""

    similarity: Tensor  #: (N, N), N = h * w row by row
    grid: tuple[int, int]

    def draw(self, figure: Any) -> None:
        """A map for each position, where that lies; of a large grid a lattice of them."""
        rows, columns = (np.unique(np.linspace(0, n - 1, min(n, SHOWN)).round().astype(int)) for n in self.grid)
        figure.set_size_inches(3.4, 3.4 * self.grid[0] / self.grid[1] * 0.9)
        spec = figure.add_gridspec(len(rows), len(columns), wspace=0.05, hspace=0.05)
        used, shown = [], None
        least = float(self.similarity.min())
        for i, y in enumerate(rows):
            for j, x in enumerate(columns):
                axes = figure.add_subplot(spec[i, j], xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
                values = self.similarity[y * self.grid[1] + x].unflatten(0, self.grid).numpy()
                shown = axes.imshow(values, cmap=MAP, vmin=least, vmax=1)
                used.append(axes)
                if j == 0:
                    axes.set_ylabel(str(y + 1))
                if i == len(rows) - 1:
                    axes.set_xlabel(str(x + 1))
        figure.supxlabel("column of the patch", fontsize=8)
        figure.supylabel("row of the patch", fontsize=8)
        colour_bar(figure, shown, used, "cosine similarity")


def rgb_filters(model: nn.Module, count: int = 28) -> RGBFilters:
    """Return the first principal components of the patch projection's filters, their mean taken away.

    The paper shows 28. Their sign is fixed: the largest weight is positive. Raises ``ValueError`` for a count below 1.
    """
    if count < 1:
        raise ValueError(f"count={count} components make no picture; give at least 1")
    kernel = _kernel(Watched.of(model).vit)  # (D, C, p, p)
    found = principal(kernel.detach().float().flatten(1), count)
    return RGBFilters(found.components.float().unflatten(1, kernel.shape[1:]), found.explained.float())


@torch.no_grad()
def position_similarity(model: nn.Module, size: Sequence[int] | None = None) -> PositionSimilarity:
    """Return the cosines of the position embeddings with each other.

    Args:
        model: what ``attach`` returned, or a bare backbone.
        size: (H, W) of the image whose grid is asked for; None: the backbone's own.

    The table is read off what the backbone does: tokens of a black image, less the bias of its projection, and that
    this is all that is added is checked on another image.

    Raises ``TypeError`` for a backbone whose positions are no table: rotary, relative, by convolution, or none.
    """
    vit = Watched.of(model).vit
    if not isinstance(vit, ViT):
        raise TypeError(
            f"{vit.spec.family} has stages, whose positions ({vit.positions}) are no table of patches; "
            "attention_distance says how far its blocks look"
        )
    height, width = size or next(iter(vit.sizes()), (224, 224))
    if min(height, width) < 1:
        raise ValueError(f"size={tuple(size or ())} is no image; give height and width in pixels")
    patch, parameter = vit.spec.patch_size, next(vit.backbone.parameters())
    grid = (cells(height, patch), cells(width, patch))
    black = torch.zeros(1, vit.spec.channels, grid[0] * patch, grid[1] * patch, device=parameter.device)
    noise = torch.randn(black.shape, generator=torch.Generator().manual_seed(0)).to(black)
    with evaluating(vit.backbone), reference():
        first, second = (_added(vit, image.to(parameter.dtype), grid) for image in (black, noise))
    if first is None or second is None:
        raise TypeError(f"no layer of {vit.spec.family} was seen to make its {grid[0]} x {grid[1]} tokens of the image")
    # A sum in bfloat16 is right to a step of its larger part, the projected noise.
    off = max(1e-3, torch.finfo(parameter.dtype).eps * float(second.patches.abs().max()))
    if not torch.allclose(first.added, second.added, rtol=1e-3, atol=off):
        raise TypeError(f"{vit.spec.family} does more to its tokens than to add a table of positions ({vit.positions})")
    added = first.added
    if len(added) > 1 and torch.allclose(added, added[:1].expand_as(added), atol=1e-5):
        raise TypeError(
            f"{vit.spec.family} adds no table of positions to its tokens (positions: {vit.positions})"
            + ("; attention_distance says how far its blocks look" if vit.splits else "")
        )
    table = torch.nn.functional.normalize(added.double(), dim=1).cpu()
    return PositionSimilarity((table @ table.T).float(), grid)


def _kernel(vit: Any) -> Tensor:
    """Return the filters (D, C, p, p) that read the image."""
    return vit.fingerprint_tensors()["patch"]


class _Sum(NamedTuple):
    """What becomes of the patches of an image before any norm over the tokens."""

    patches: Tensor  #: (N, D), projected
    added: Tensor  #: (N, D), what is added to them


def _added(vit: ViT, image: Tensor, grid: tuple[int, int]) -> _Sum | None:
    """Look at how tokens are made of an image; None where no layer gives as many.

    The layer is the last one that does: a convolution, of a hybrid the one behind its network, or a linear layer.
    """
    made: list[Tensor] = []
    normed: list[tuple[Tensor, Tensor]] = []  # of each norm, what came in and what went out
    layers = [m for m in vit.backbone.modules() if hasattr(m, "in_channels") or isinstance(m, nn.Linear)]
    hooks = [m.register_forward_hook(lambda module, args, out: made.append(out)) for m in layers]
    norms = [m for m in vit.backbone.modules() if isinstance(m, nn.LayerNorm)]
    hooks += [m.register_forward_hook(lambda module, args, out: normed.append((args[0], out))) for m in norms]
    try:
        x = vit.embed(image, grid)
    finally:
        for hook in hooks:
            hook.remove()
    before = next((given for given, out in normed if out is x), x)  # CLIP norms its tokens once they have places
    found = [y if y.ndim == 3 else map_to_tokens(y) for y in made if y.ndim in (3, 4)]
    found = [y for y in found if y.shape[1:] == (grid[0] * grid[1], vit.spec.embed_dim)]
    if not found:
        return None
    projected = found[-1][0].float()
    return _Sum(projected, before[0, before.shape[1] - len(projected) :].float() - projected)
