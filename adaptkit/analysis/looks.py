"""All figures that apply to a model, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from adaptkit.analysis.attention import attentions
from adaptkit.analysis.cam import grad_cam
from adaptkit.analysis.difficulty import easy_and_hard
from adaptkit.analysis.distance import attention_distance
from adaptkit.analysis.kept import kept_patches
from adaptkit.analysis.keys import query_keys
from adaptkit.analysis.maps import attention_maps
from adaptkit.analysis.patches import position_similarity, rgb_filters
from adaptkit.analysis.pca import feature_pca
from adaptkit.analysis.points import attended_keys, deformed_points
from adaptkit.analysis.pyramids import feature_maps, gamma_by_depth
from adaptkit.analysis.rollouts import rollout
from adaptkit.analysis.seen import check_query
from adaptkit.analysis.spectra import spectrum
from adaptkit.analysis.style import Drawn, styled
from adaptkit.analysis.watch import BackboneAlone, Watched, chosen, single
from adaptkit.model.adapted import AdaptedModel

__all__ = ["FIGURES", "Looked", "looks"]

ROLLOUTS, COLOURED = 3, 6  #: images in these figures, at most
Query = tuple[float, float]


class Looked(NamedTuple):
    """One figure."""

    name: str
    files: tuple[Path, ...]  #: none where it does not apply
    why: str = ""  #: why it does not


class _Asked(NamedTuple):
    """What every figure may use."""

    model: nn.Module
    images: list[Tensor]  #: each (C, H, W)
    blocks: Any
    query: Query | None

    @property
    def middle(self) -> Query:
        """The query, or the middle of the image."""
        height, width = self.images[0].shape[-2:]
        return self.query or (height / 2, width / 2)

    @property
    def models(self) -> dict[str, nn.Module]:
        """The model, and beside an adapted one its backbone without what acts in it."""
        if not isinstance(self.model, AdaptedModel):
            return {"backbone": self.model}
        return {"backbone": BackboneAlone(self.model), " + ".join(self.model.adapters): self.model}

    @property
    def depths(self) -> Any:
        """The blocks, or four of them from the first to the last."""
        depth = Watched.of(self.model).vit.spec.depth
        return self.blocks if self.blocks is not None else sorted({round(i * (depth - 1) / 3) for i in range(4)})


def _attention_maps(a: _Asked) -> Drawn:
    try:
        return attention_maps(a.model, a.images[0], a.query, a.depths)
    except TypeError:
        if a.blocks is not None:
            raise
        shown: list[int] = []  # where some blocks have no attention (CAFormer), or keys off the grid (DAT)
        attentions(a.model, single(a.images[0]), lambda found: shown.append(found.block))
        return attention_maps(a.model, a.images[0], a.query, shown[-1:])


#: By name: what makes the figure.
FIGURES: dict[str, Callable[[_Asked], Drawn]] = {
    "attended_keys": lambda a: attended_keys(a.model, a.images[0], a.middle),
    "attention_distance": lambda a: attention_distance(a.model, a.images, a.blocks),
    "attention_maps": _attention_maps,
    "deformed_points": lambda a: deformed_points(a.model, a.images[0]),
    "easy_and_hard": lambda a: easy_and_hard(a.model, a.images),
    "feature_maps": lambda a: feature_maps(a.models, a.images[0]),
    "feature_pca": lambda a: feature_pca(a.model, a.images[:COLOURED]),
    "gamma": lambda a: gamma_by_depth(a.model),  # type: ignore[arg-type]
    "grad_cam": lambda a: grad_cam(a.model, a.images[0]),
    "kept_patches": lambda a: kept_patches(a.model, a.images[0]),  # type: ignore[arg-type]
    "position_similarity": lambda a: position_similarity(a.model, None),
    "query_keys": lambda a: query_keys(a.model, a.images[0], a.middle, a.blocks),
    "rgb_filters": lambda a: rgb_filters(a.model),
    "rollout": lambda a: rollout(a.model, a.images[:ROLLOUTS], a.blocks),
    "spectrum": lambda a: spectrum(a.models, a.images),
    "usage_by_depth": lambda a: kept_patches(a.model, a.images[0]).usage,  # type: ignore[arg-type]
    "spectrum_planes": lambda a: spectrum(a.models, a.images).planes(),
}


def looks(
    model: nn.Module,
    images: Sequence[Tensor],
    out: Path,
    blocks: int | Sequence[int] | None = None,
    query: Query | None = None,
    formats: Sequence[str] = ("png", "pdf"),
    only: Sequence[str] = (),
) -> Iterator[Looked]:
    """Make every figure in a folder that is there, one after another.

    Args:
        model: what ``attach`` returned, or a bare backbone.
        images: of one size, each (C, H, W), normalised as the backbone wants them.
        out: where to write ``NAME.png``, ``NAME.pdf``, ...
        blocks, query: as the figures take them. Without a query attention_maps show that of the class token, and
            attended_keys and query_keys that of the middle of the image.
        formats: of ``png``, ``pdf`` and ``svg``.
        only: names of figures; all where it is empty.

    Raises, before anything is run, ``ImportError`` where matplotlib is missing, and ``ValueError`` for blocks that are
    not there and a query outside of the images.
    """
    with styled():
        pass
    chosen(blocks, Watched.of(model).vit.spec.depth)
    if query is not None:
        check_query(query, images[0].shape[-2:])
    asked = _Asked(model, list(images), blocks, query)
    for name in only or FIGURES:
        try:
            made = FIGURES[name](asked)
        except (TypeError, ValueError) as error:
            yield Looked(name, (), str(error))
            continue
        yield Looked(name, tuple(made.save(out / f"{name}.{suffix}") for suffix in formats))
