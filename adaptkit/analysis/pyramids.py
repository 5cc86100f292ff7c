"""Feature maps side by side: ViT, simple pyramid, ViT-Adapter (Chen et al. 2023, figure 5), and the injectors' gates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptkit.adapters.dat import DATBlock
from adaptkit.adapters.vit_adapter import Injector, ViTAdapter
from adaptkit.analysis.feature_pca import features_of
from adaptkit.analysis.principal import principal
from adaptkit.analysis.spectrum import maps_of
from adaptkit.analysis.style import COLOURS, Drawn, pictured, show
from adaptkit.analysis.watch import batch, source_of
from adaptkit.model.adapted import AdaptedModel

__all__ = ["FeatureMaps", "GammaByStep", "Gammas", "feature_maps", "gamma_by_depth"]


@dataclass(frozen=True, eq=False)
class FeatureMaps(Drawn):
    """The first three principal components of each map, as colours."""

    colours: dict[str, dict[int, Tensor]]  #: by model and stride: (h, w, 3) in 0..1
    explained: dict[str, dict[int, Tensor]]  #: (3,) share of the map's variance in each
    picture: np.ndarray

    def draw(self, figure: Any) -> None:
        """A row for each model after the image: a column for each of its strides, finest first."""
        rows, columns = list(self.colours.items()), max(len(m) for m in self.colours.values())
        side = min(6.4 / (columns + 1), 1.6)
        ratio = self.picture.shape[0] / self.picture.shape[1]
        figure.set_size_inches(side * (columns + 1) + 0.3, len(rows) * (side * ratio + 0.22))
        grid = figure.add_gridspec(len(rows), columns + 1)
        first = figure.add_subplot(grid[:, 0])
        first.set_axis_off()
        first.set_title("image")
        show(first, self.picture)
        for row, (name, maps) in enumerate(rows):
            for column, (stride, colours) in enumerate(sorted(maps.items()), 1):
                axes = figure.add_subplot(grid[row, column], xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
                axes.set_title(f"stride {stride}")
                show(axes, self.picture, colours.numpy(), stride, 1.0)
                if column == 1:
                    axes.set_ylabel(name)


@torch.no_grad()
def feature_maps(models: nn.Module | Mapping[str, nn.Module], image: Tensor) -> FeatureMaps:
    """Return the maps of a model, or of several by name, on one image (C, H, W), as colours.

    Each map has a basis of its own, whose signs are fixed, and its colours are stretched from the first to the 99th
    percentile: what can be compared is where there is detail, not which colour it has.
    """
    named = dict(models) if isinstance(models, Mapping) else {"model": models}
    (one,) = batch(image)
    colours: dict[str, dict[int, Tensor]] = {}
    explained: dict[str, dict[int, Tensor]] = {}
    for name, model in named.items():
        colours[name], explained[name] = {}, {}
        for stride, x in maps_of(features_of(model, one)).items():
            rows = x[0].flatten(1).T.float()
            basis = principal(rows, 3)
            values = basis(rows.cpu())
            low, high = (values.quantile(q, dim=0) for q in (0.01, 0.99))
            values = ((values - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
            colours[name][stride] = values.float().unflatten(0, x.shape[-2:])
            explained[name][stride] = basis.explained
    (picture,) = pictured([one[0]], source_of(next(iter(named.values())), one.shape[1]))
    return FeatureMaps(colours, explained, picture)


@dataclass(frozen=True, eq=False)
class Gammas(Drawn):
    """The gates gamma, which are zero when an adapter is attached: how far each has opened."""

    gammas: dict[int, Tensor]  #: by the block in front of which, or in which, it acts: (D,)

    def draw(self, figure: Any) -> None:
        """Mean size over the channels against depth, and from the 5th to the 95th percentile."""
        figure.set_size_inches(3.4, 2.3)
        axes = figure.add_subplot()
        blocks = list(self.gammas)
        sizes = [g.abs().float() for g in self.gammas.values()]
        low, high = ([float(s.quantile(q)) for s in sizes] for q in (0.05, 0.95))
        axes.fill_between(blocks, low, high, color=COLOURS[0], alpha=0.2, lw=0, label="5 to 95 % of channels")
        axes.plot(blocks, [float(s.mean()) for s in sizes], "o-", color=COLOURS[0], label="mean")
        axes.set_xlabel("block")
        axes.set_ylabel(r"$|\gamma|$")
        axes.set_xticks(blocks)
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside upper center", ncols=2)


@dataclass(eq=False)
class GammaByStep(Drawn):
    """Mean sizes of the gates while training: ``gammas.add(step, model)`` now and then."""

    steps: list[int]
    sizes: dict[int, list[float]]  #: by block: mean size at each step

    def __init__(self) -> None:
        self.steps, self.sizes = [], {}

    def add(self, step: int, model: AdaptedModel) -> None:
        """Look at a model now."""
        self.steps.append(step)
        for block, gamma in gamma_by_depth(model).gammas.items():
            self.sizes.setdefault(block, []).append(float(gamma.abs().mean()))

    def draw(self, figure: Any) -> None:
        """A curve for each gate."""
        figure.set_size_inches(3.4, 2.3)
        axes = figure.add_subplot()
        for i, (block, sizes) in enumerate(self.sizes.items()):
            axes.plot(self.steps, sizes, color=COLOURS[i % len(COLOURS)], label=f"block {block}")
        axes.set_xlabel("step")
        axes.set_ylabel(r"mean $|\gamma|$")
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside upper center", ncols=4)


def gamma_by_depth(model: AdaptedModel) -> Gammas:
    """Return the gates of ViT-Adapter's injectors, or of DAT-KV in mode ``add``.

    Raises ``TypeError`` for a model that has none.
    """
    found: dict[int, Tensor] = {}
    for adapter in model.adapters.values() if isinstance(model, AdaptedModel) else ():
        if isinstance(adapter, ViTAdapter):
            for part, (first, _) in zip(adapter.interactions, adapter.config.interaction_indexes):
                if isinstance(part.injector, Injector):
                    found[first] = part.injector.gamma
        for name, module in adapter.named_modules():
            if isinstance(module, DATBlock) and module.gamma is not None:
                found[int(name.rpartition(".")[2])] = module.gamma
    if not found:
        raise TypeError("this model has no gates gamma: attach 'vit-adapter' with injectors, or 'dat' with mode='add'")
    return Gammas({block: found[block].detach().cpu().clone() for block in sorted(found)})
