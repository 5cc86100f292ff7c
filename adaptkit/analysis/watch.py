"""Run a model and watch its blocks, whatever is attached to it.

The model runs as its text says (:func:`adaptkit.reference`) and in eval mode: a fast path computes several layers in
one and would hide what is between them.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from adaptkit.adapters.base import Adapter, Aux, BlockAdapter, SideAdapter
from adaptkit.core import registry
from adaptkit.core.block import Block, Fn
from adaptkit.core.hierarchical import HierarchicalSpec
from adaptkit.core.layers import indices
from adaptkit.core.tree import evaluating
from adaptkit.core.view import Features, Source, View
from adaptkit.model.adapted import AdaptedModel
from adaptkit.model.forward import answered, run
from adaptkit.seam import reference

__all__ = [
    "BackboneAlone",
    "Watched",
    "batch",
    "block_strides",
    "chosen",
    "map_strides",
    "named_models",
    "run_watched",
    "single",
    "source_of",
]

#: What is called for each block: the block, its index, its input and its output (B, P+N, D). What it returns, if not
#: None, goes on in place of the output.
Visit = Callable[[Block, int, Tensor, Tensor], Tensor | None]


class BackboneAlone(nn.Module):
    """The backbone of an adapted model without what acts in its layers, to be compared with that model."""

    def __init__(self, adapted: AdaptedModel) -> None:
        super().__init__()
        self.adapted = adapted

    def forward(self, image: Tensor) -> Features:
        """(B, C, H, W) -> features of the frozen backbone."""
        with self.adapted.disable_adapter():
            return self.adapted(image)


class Watched(NamedTuple):
    """A model as its figures need it."""

    vit: Any  #: the view of its backbone
    acting: tuple[Adapter, ...]  #: the adapters that act now
    head: nn.Module | None
    head_reads: tuple[int, ...] = ()  #: after which blocks the head reads the tokens

    @staticmethod
    def of(model: nn.Module) -> Watched:
        """See a model that ``attach`` made, or a bare backbone.

        Raises ``TypeError`` for one that nothing sees, and for the mean of several sets, which has no one inside.
        """
        if isinstance(model, BackboneAlone):
            return Watched(model.adapted.vit, (), None)
        if not isinstance(model, AdaptedModel):
            return Watched(registry.view(model), (), None)
        model.check_one_acts()
        if model._disabled or model._active is None:
            return Watched(model.vit, (), None)
        return Watched(model.vit, tuple(model._acting), model.head, model._acting.head_reads)

    def logits(self, features: Features) -> Any:
        """Return what the head says of features, or the backbone's own classifier; None without either."""
        if self.head is None:
            return self.vit.logits(features)
        side = next((a for a in self.acting if isinstance(a, SideAdapter)), None)
        return answered(self.head, features, self.vit.spec, "corner" if side is None else side.pad)


class _Acting(NamedTuple):
    """What ``run`` asks of a set of adapters."""

    adapters: tuple[Adapter, ...]
    head: Any
    head_reads: tuple[int, ...] = ()
    leaves_unread: bool = False
    training: bool = False
    pad: str = "corner"  # no head reads what is made

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return iter(self.adapters)

    @property
    def side(self) -> SideAdapter | None:
        """The one that owns the loop over the blocks, if any."""
        return next((a for a in self.adapters if isinstance(a, SideAdapter)), None)


class _Watch(BlockAdapter):
    """Sees what enters and leaves every block, around all adapters of blocks."""

    def __init__(self, spec: Any, visit: Visit) -> None:
        super().__init__(spec, None)
        self.visit = visit

    def wrap(self, block: Block, index: int, aux: Aux) -> Fn:
        """(B, P+N, D) -> (B, P+N, D)."""
        return partial(self._run, block, index)

    def _run(self, block: Block, index: int, x: Tensor) -> Tensor:
        y = block(x)
        other = self.visit(block, index, x, y)
        return y if other is None else other


def run_watched(model: nn.Module, image: Tensor, visit: Visit) -> Features:
    """Run a model on (B, C, H, W), a visit after every block; returns features, without the logits of a head."""
    watched = Watched.of(model)
    acting = _Acting((*watched.acting, _Watch(watched.vit.spec, visit)), _nothing, watched.head_reads)
    with evaluating(model), reference():
        return run(watched.vit, acting, image)  # type: ignore[arg-type]


def _nothing(features: Features) -> None:
    """Stand for a head."""


def batch(images: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Images (B, C, H, W), one (C, H, W), or a list of such -> a list of (1, C, H, W), of any sizes."""
    wanted = "give tensors (C, H, W) or (B, C, H, W), normalised, or a list of them"
    if isinstance(images, Tensor):
        if images.ndim not in (3, 4) or 0 in images.shape[-3:]:
            raise ValueError(f"images have shape {tuple(images.shape)}: {wanted}")
        found = list((images[None] if images.ndim == 3 else images).split(1)) if len(images) else []
    elif isinstance(images, list | tuple):
        found = [one for image in images for one in batch(image)]
    else:
        raise TypeError(f"images are a {type(images).__name__}: {wanted}")
    if not found:
        raise ValueError("no image was given")
    if not all(bool(one.isfinite().all()) for one in found):
        raise ValueError("an image holds NaN or infinite values")
    return found


def single(image: Tensor | Sequence[Tensor]) -> Tensor:
    """One image, (C, H, W) or (1, C, H, W) -> (1, C, H, W). Raises ``ValueError`` for several."""
    given = batch(image)
    if len(given) > 1:
        raise ValueError(f"the image is a batch of {len(given)}; give one image, (C, H, W)")
    return given[0]


def chosen(blocks: int | Sequence[int] | None, depth: int) -> tuple[int, ...]:
    """Indices of blocks, the last so many, or None for all -> indices. Raises ``ValueError`` for what is no block."""
    if blocks is None:
        return tuple(range(depth))
    if isinstance(blocks, numbers.Integral):
        count = int(blocks)
        if count < 1:
            raise ValueError(f"blocks={count} asks for the last {count} blocks; give at least 1, or a list of indices")
        return tuple(range(max(0, depth - count), depth))
    given = indices("blocks", blocks)
    taken = tuple(sorted({b + depth if b < 0 else b for b in given}))
    if not taken or taken[0] < 0 or taken[-1] >= depth:
        raise ValueError(
            f"blocks={list(given)} are not among the {depth} blocks of this model; give indices below {depth}"
        )
    return taken


def named_models(models: nn.Module | Mapping[str, nn.Module], alone: str) -> dict[str, nn.Module]:
    """One model, or several by name -> by name; one has the name ``alone``. Raises ``ValueError`` for none."""
    if not isinstance(models, Mapping):
        return {alone: models}
    if not models:
        raise ValueError("no model was given: give one, or several by name")
    return dict(models)


def block_strides(spec: Any) -> list[int]:
    """Return the stride in pixels of each block's tokens."""
    if isinstance(spec, HierarchicalSpec):
        return [stride for stride, depth in zip(spec.strides, spec.depths) for _ in range(depth)]
    return [spec.patch_size] * spec.depth


def map_strides(model: nn.Module, features: Features) -> tuple[int, ...]:
    """Return the strides of the maps of features, in pixels; of the patch tokens where there is no map."""
    watched = Watched.of(model)
    if not features.maps:
        return (watched.vit.spec.patch_size,)
    side = next((a for a in watched.acting if isinstance(a, SideAdapter)), None)
    return tuple(watched.vit.spec.strides if side is None else side.strides)


def source_of(model: nn.Module, channels: int) -> Source:
    """Return how the images of a model are normalised; of one that nothing sees, what timm's record says."""
    model = model.adapted if isinstance(model, BackboneAlone) else model
    if isinstance(model, AdaptedModel):
        return model.vit.source()
    try:
        view: View = registry.view(model)
    except TypeError:
        from adaptkit.backbones._timm import cfg_source

        return cfg_source(getattr(model, "pretrained_cfg", None), 0, channels)
    return view.source()
