"""Feature maps side by side (ViT-Adapter, Chen et al. 2023, figure 5), and how far the injectors' gates have opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.adapters.dat import DATBlock
from adaptkit.adapters.vit_adapter import Injector, ViTAdapter
from adaptkit.analysis.pca import features_of
from adaptkit.analysis.principal import principal
from adaptkit.analysis.spectra import maps_of
from adaptkit.analysis.style import COLOURS, WIDTH, Drawn, pictured, show
from adaptkit.analysis.watch import named_models, single, source_of
from adaptkit.model.adapted import AdaptedModel

__all__ = ["FeatureMaps", "GammaByStep", "Gammas", "feature_maps", "gamma_by_depth"]


@dataclass(frozen=True, eq=False)
class FeatureMaps(Drawn):
    """The first three principal components of each map, as colours."""

    colours: dict[str, dict[int, Tensor]]  #: by model and stride: (h, w, 3) in 0..1
    explained: dict[str, dict[int, Tensor]]  #: (3,) share of the map's variance in each
    picture: np.ndarray

    def draw(self, figure: Any) -> None:
        """The image and the models of one map, then a row for each other model: its strides, finest first."""
        single = {f"{n}, stride {next(iter(m))}": m for n, m in self.colours.items() if len(m) == 1}
        rows = [(name, maps) for name, maps in self.colours.items() if len(maps) > 1]
        left, columns = 1 + len(single), max((len(maps) for _, maps in rows), default=0)
        side, ratio = min(WIDTH / (left + columns), 1.6), self.picture.shape[0] / self.picture.shape[1]
        figure.set_size_inches(side * (left + columns) + 0.15, max(1, len(rows)) * (side * ratio + 0.22))
        grid = figure.add_gridspec(max(1, len(rows)), left + columns)
        shown = [("image", None, 1), *((n, next(iter(m.values())), next(iter(m))) for n, m in single.items())]
        for column, (title, colours, stride) in enumerate(shown):
            axes = figure.add_subplot(grid[:, column])
            axes.set_axis_off()
            axes.set_title(title)
            show(axes, self.picture, None if colours is None else colours.numpy(), stride, 1.0)
        for row, (name, maps) in enumerate(rows):
            for column, (stride, colours) in enumerate(sorted(maps.items())):
                axes = figure.add_subplot(grid[row, left + column], xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
                axes.set_title(f"stride {stride}")
                show(axes, self.picture, colours.numpy(), stride, 1.0)
                if column == 0:
                    axes.set_ylabel(name)


@torch.no_grad()
def feature_maps(models: nn.Module | Mapping[str, nn.Module], image: Tensor) -> FeatureMaps:
    """Return the maps of a model, or of several by name, on one image (C, H, W), as colours.

    Each map has a basis of its own, whose signs are fixed, and its colours are stretched from the first to the 99th
    percentile: what can be compared is where there is detail, not which colour it has.
    """
    named = named_models(models, "model")
    one = single(image)
    colours: dict[str, dict[int, Tensor]] = {}
    explained: dict[str, dict[int, Tensor]] = {}
    for name, model in named.items():
        colours[name], explained[name] = {}, {}
        for stride, x in maps_of(model, features_of(model, one)).items():
            rows = x[0].flatten(1).T.float()
            basis = principal(rows, 3)
            values = F.pad(basis(rows.cpu()), (0, 3 - len(basis.explained)))  # of one or two cells there are fewer
            low, high = (values.quantile(q, dim=0) for q in (0.01, 0.99))
            values = ((values - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
            colours[name][stride] = values.float().unflatten(0, x.shape[-2:])
            explained[name][stride] = F.pad(basis.explained, (0, 3 - len(basis.explained)))
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
