"""Which frequencies a feature map holds (ViT-Adapter, Chen et al. 2023, figure 5; after Park and Kim 2022).

    a(f) = mean over images and channels of log |FFT2(x)|(f, f),       shown is a(f) - a(0), f from 0 to pi

Along the diagonal of the spectrum, which on a map of h x w cells runs from (0, 0) to (h/2, w/2); where that passes
between entries, the spectrum is read bilinearly. A less negative end is more detail.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.analysis.pca import features_of
from adaptkit.analysis.style import COLOURS, MAP, WIDTH, Drawn, colour_bar
from adaptkit.analysis.watch import batch, map_strides, named_models
from adaptkit.ops.grid import tokens_to_map

__all__ = ["Curve", "Spectrum", "diagonal", "maps_of", "spectrum"]

LEAST = 1e-6  # under the logarithm, as Park and Kim have it


@dataclass(frozen=True, eq=False)
class Curve:
    """Spectrum of the maps of one stride."""

    frequency: Tensor  #: (n,) from 0 to pi (less on an odd number of cells)
    amplitude: Tensor  #: (n,) mean log amplitude less that of the lowest frequency
    plane: Tensor  #: (h, w) mean log amplitude, the lowest frequency in the middle, which is 0


@dataclass(frozen=True, eq=False)
class Spectrum(Drawn):
    """Spectra by model and stride."""

    curves: dict[str, dict[int, Curve]]
    images: int

    def draw(self, figure: Any) -> None:
        """A panel for each stride with a curve for each model; a plain ViT, of one stride, is in each of them."""
        everywhere = {n: next(iter(c.items())) for n, c in self.curves.items() if len(c) == 1}
        strides = sorted({s for c in self.curves.values() if len(c) > 1 for s in c})
        strides = strides or [next(iter(everywhere.values()))[0]]
        figure.set_size_inches(min(WIDTH, 1.1 + 1.8 * len(strides)), 2.4)
        axes = figure.subplots(1, len(strides), sharey=True, squeeze=False)[0]
        for one, stride in zip(axes, strides):
            for i, (name, curves) in enumerate(self.curves.items()):
                at = everywhere[name][0] if name in everywhere else stride
                style = "--" if name in everywhere and len(everywhere) < len(self.curves) else "-"
                if at not in curves:
                    continue
                label = f"{name} (stride {at})" if name in everywhere else name
                one.plot(
                    curves[at].frequency / math.pi,
                    curves[at].amplitude,
                    style,
                    color=COLOURS[i % len(COLOURS)],
                    label=label,
                )
            one.set_xticks([0, 0.5, 1], ["0", r"$\pi/2$", r"$\pi$"])
            one.set_xlabel("frequency")
            if any(len(c) > 1 for c in self.curves.values()):
                one.set_title(f"stride {stride}")
        axes[0].set_ylabel(r"$\Delta$ log amplitude")
        handles = {label: h for one in axes for h, label in zip(*one.get_legend_handles_labels())}
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=max(1, len(handles)))

    def planes(self, stride: int | None = None) -> Planes:
        """Return the spectra as pictures, of the maps at this stride or what is nearest to it (default 8)."""
        nearest = {n: min(c, key=lambda s: (abs(math.log2(s / (stride or 8))), s)) for n, c in self.curves.items()}
        return Planes({f"{n}, stride {s}": self.curves[n][s].plane for n, s in nearest.items()})


@dataclass(frozen=True, eq=False)
class Planes(Drawn):
    """Spectra in two dimensions (figure 5a, left)."""

    planes: dict[str, Tensor]

    def draw(self, figure: Any) -> None:
        """A tile for each, on one scale."""
        figure.set_size_inches(min(WIDTH, 0.8 + 1.6 * len(self.planes)), 1.8)
        least = min(float(p.quantile(0.02)) for p in self.planes.values())
        axes, shown = figure.subplots(1, len(self.planes), squeeze=False)[0], None
        for one, (name, plane) in zip(axes, self.planes.items()):
            shown = one.imshow(plane.numpy(), cmap=MAP, vmin=least, vmax=0, extent=(-1, 1, 1, -1))
            one.set_title(name)
            one.set_xticks([-1, 0, 1], [r"$-\pi$", "0", r"$\pi$"])
            one.set_yticks([-1, 0, 1], [r"$-\pi$", "0", r"$\pi$"] if one is axes[0] else ["", "", ""])
        colour_bar(figure, shown, axes, r"$\Delta$ log amplitude")


@torch.no_grad()
def spectrum(
    models: nn.Module | Mapping[str, nn.Module], images: Tensor | Sequence[Tensor], strides: Sequence[int] | None = None
) -> Spectrum:
    """Measure the frequencies in the maps of a model, or of several by name, over some images (the paper: 100).

    Args:
        models: as :func:`attention_distance`; a dict compares, e.g. ``{"ViT": vit, "ViT-Adapter": adapted}``.
        images: (B, C, H, W), or a list of images of one size.
        strides: of the maps; None: all. A plain ViT without a pyramid has one, its patch.

    Raises ``ValueError`` for images of several sizes, or a stride that no model has.
    """
    named = named_models(models, "model")
    given = batch(images)
    sizes = {tuple(image.shape[-2:]) for image in given}
    if len(sizes) > 1:
        raise ValueError(f"images of {len(sizes)} sizes have spectra that cannot be averaged; bring them to one size")
    curves, there = {}, set()
    for name, model in named.items():
        planes: dict[int, Tensor] = {}
        for image in given:
            features = features_of(model, image)
            for stride, x in maps_of(model, features).items():
                there.add(stride)
                if strides is None or stride in strides or not features.maps:  # a plain ViT has one map to compare with
                    planes[stride] = planes.get(stride, 0) + _log_amplitude(x)
        curves[name] = {s: _curve(plane / len(given)) for s, plane in planes.items()}
    missing = sorted({*(strides or ())} - there)
    if missing or (strides is not None and not len(strides)):
        raise ValueError(f"strides={list(strides or ())}: the maps have strides {', '.join(map(str, sorted(there)))}")
    return Spectrum({n: c for n, c in curves.items() if c}, len(given))


def maps_of(model: nn.Module, features: Any) -> dict[int, Tensor]:
    """Return the maps (B, D, h, w) of features by stride; where none is made, the patch tokens as one."""
    maps = features.maps or (tokens_to_map(features.tokens, features.grid),)
    return dict(zip(map_strides(model, features), maps))


def _log_amplitude(x: Tensor) -> Tensor:
    """(1, D, h, w) -> (h, w), the mean over channels; the lowest frequency is the first entry."""
    return (torch.fft.fft2(x[0].double()).abs() + LEAST).log().mean(0).cpu()


def _curve(plane: Tensor) -> Curve:
    frequency, amplitude = diagonal(plane)
    h, w = plane.shape
    return Curve(frequency, amplitude - amplitude[0], (plane - plane[0, 0]).roll((h // 2, w // 2), (0, 1)).float())


def diagonal(plane: Tensor) -> tuple[Tensor, Tensor]:
    """Spectrum (h, w), the lowest frequency first -> frequencies (n,) up to pi, and the values there (n,).

    On a square map they are the entries of the diagonal.
    """
    side = min(plane.shape)
    steps = torch.arange(side // 2 + 1, dtype=torch.float64) / side  # in cycles per cell
    (y, v), (x, u) = (_between(steps * n, n) for n in plane.shape)
    (y0, y1), (x0, x1) = y, x
    above = plane[y0, x0] * (1 - u) + plane[y0, x1] * u
    below = plane[y1, x0] * (1 - u) + plane[y1, x1] * u
    return 2 * math.pi * steps, above * (1 - v) + below * v


def _between(place: Tensor, n: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Places on an axis of n entries that goes round -> the entries before and after, and how far between them."""
    low = (place + 1e-9).floor()  # 1e-9: n * (k / n) may fall short of k by a rounding
    return (low.long() % n, (low.long() + 1) % n), (place - low).clamp_min(0)
