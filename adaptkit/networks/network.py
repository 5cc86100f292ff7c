"""A network of another library around an adapter's pyramid, and the file that holds both."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor, nn

from adaptkit.core.schema import check, check_fields
from adaptkit.export.trace import Graph
from adaptkit.hub.file import AdapterFile, load_into
from adaptkit.hub.repository import load as load_file
from adaptkit.model.adapted import AdaptedModel, attach
from adaptkit.model.pyramid import Pyramid
from adaptkit.model.saved import Bounded, check_tensors
from adaptkit.networks.detectors import dense, rcnn
from adaptkit.networks.graphs import DetectorGraph, SegmenterGraph
from adaptkit.networks.segmenters import mask2former, upernet
from adaptkit.ops.queries import class_scores, merge
from adaptkit.predict.predicts import Predicts
from adaptkit.predict.tasks import Described, shares

__all__ = ["BUILDERS", "Network", "build", "load", "recipe_of", "restore", "save"]


class Network(Predicts, nn.Module):
    """A network of another library around a pyramid, and how to build it again. Called like that network."""

    def __init__(self, network: nn.Module, recipe: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.recipe = network, recipe

    @property
    def pyramid(self) -> Pyramid:
        """Where the adapter is."""
        return next(m for m in self.network.modules() if isinstance(m, Pyramid))

    @property
    def vit(self) -> Any:
        """The view of the frozen backbone."""
        return self.pyramid.model.vit

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network."""
        return self.network(*args, **kwargs)

    def save(self, folder: str | os.PathLike[str], **metadata: Any) -> Path:
        """Write the adapter, the network beside it, and how to build it."""
        return self.pyramid.save(folder, self.network, recipe=self.recipe, **metadata)

    def described(self) -> Described:
        """A detector, panoptic where its categories say which are things, else a segmenter."""
        name = self.recipe["network"]
        said = {**self.pyramid.model.metadata, **self.recipe}
        if name in DETECTORS:
            return Described("detection", said, self)
        if name == "upernet":
            return Described("segmentation", said, lambda image: self(image).logits)
        if _has_things(self.recipe):
            return Described("panoptic", said, self, segments=self._segments)
        return Described("segmentation", said, self._scores, shares)

    def graph(self, size: tuple[int, int], outputs: Sequence[str] | None = None) -> Graph:
        """Return it as :mod:`adaptkit.export` writes it, for images of (H, W) pixels."""
        if self.recipe["network"] in DETECTORS:
            return DetectorGraph(self, size, outputs)
        return SegmenterGraph(self, outputs)

    def _scores(self, image: Tensor) -> Tensor:
        found = self(image)
        return class_scores(found.class_queries_logits, found.masks_queries_logits, (image.shape[-2], image.shape[-1]))

    def _segments(self, image: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Image (1, 3, h, w) -> label and number of each pixel of (H, W)."""
        found, thresholds = self(image), self.recipe.get("thresholds") or (0.8, 0.8)
        things = {i for i, c in enumerate(self.recipe["categories"]) if c.get("isthing")}
        queries = found.class_queries_logits[0], found.masks_queries_logits[0]
        return merge(*queries, size, things, (thresholds[0], thresholds[1])).unbind(-1)


def _has_things(recipe: Mapping[str, Any]) -> bool:
    return any(isinstance(c, dict) and "isthing" in c for c in recipe["categories"])


# ------------------------------------------------------------------------------------------------------- recipes


class Category(TypedDict):
    """A class of a detector or of panoptic segmentation."""

    id: int
    name: NotRequired[str | None]
    isthing: NotRequired[int | bool]


@dataclass(frozen=True)
class DetectorRecipe:
    """What :func:`adaptkit.networks.detectors.rcnn` and ``dense`` are told."""

    size: tuple[int, int]
    width: int
    anchor: float
    mean: list[float] | None = None
    std: list[float] | None = None


@dataclass(frozen=True)
class UperNetRecipe:
    """What :func:`adaptkit.networks.segmenters.upernet` is told."""

    width: int
    ignore: int = 255


@dataclass(frozen=True)
class Mask2FormerRecipe:
    """What :func:`adaptkit.networks.segmenters.mask2former` is told; ``thresholds`` are for whoever reads it."""

    width: int
    queries: int
    layers: list[int]
    points: int
    thresholds: list[float] | None = None


DETECTORS = ("mask-rcnn", "faster-rcnn", "retinanet", "fcos")
BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "mask-rcnn": lambda model, **options: rcnn(model, masks=True, **options),
    "faster-rcnn": lambda model, **options: rcnn(model, masks=False, **options),
    "retinanet": lambda model, **options: dense(model, name="retinanet", **options),
    "fcos": lambda model, **options: dense(model, name="fcos", **options),
    "upernet": upernet,
    "mask2former": mask2former,
}
SCHEMAS: dict[str, type[Any]] = {
    **dict.fromkeys(DETECTORS, DetectorRecipe), "upernet": UperNetRecipe, "mask2former": Mask2FormerRecipe,
}  # fmt: skip
#: No size that a recipe names is larger: pixels, channels, queries, points, layers.
LARGEST = 1 << 16


def recipe_of(file: AdapterFile) -> dict[str, Any] | None:
    """Return how to build the network that a file holds, checked; None where it holds an adapter alone.

    Raises ``ValueError`` that names the file and the field.
    """
    recipe, head = (file.header.get("metadata") or {}).get("recipe"), file.header["head"] or {}
    if recipe is None or not head.get("around"):
        return None
    where = f"{file.path}, header.metadata.recipe"
    if not isinstance(recipe, dict) or recipe.get("network") not in BUILDERS:
        name = recipe.get("network") if isinstance(recipe, dict) else recipe
        raise ValueError(f"{where}.network: found {name!r:.80}, expected one of {', '.join(BUILDERS)}")
    options = {k: v for k, v in recipe.items() if k not in ("network", "categories")}
    check(recipe.get("categories"), list[int | Category], f"{where}.categories")
    check_fields(options, SCHEMAS[recipe["network"]], where)
    numbers = [v for value in options.values() for v in (value if isinstance(value, list) else [value])]
    if any(v is not None and not 0 <= abs(v) <= LARGEST for v in numbers) or not recipe["categories"]:
        raise ValueError(f"{where}: found {options!r:.200}, expected categories, and numbers up to {LARGEST}")
    return recipe


# --------------------------------------------------------------------------------------------------------- build


def build(model: AdaptedModel, recipe: dict[str, Any]) -> Network:
    """Put the network that ``recipe`` names around an adapted model.

    ``recipe``: ``network``, one of ``BUILDERS``; ``categories``, a list with an entry for each; ``thresholds`` of
    whoever reads the output; the rest are options of the builder.
    """
    options = {k: v for k, v in recipe.items() if k not in ("network", "categories", "thresholds")}
    return Network(BUILDERS[recipe["network"]](model, labels=len(recipe["categories"]), **options), recipe)


def save(model: Network, folder: str | os.PathLike[str], **metadata: Any) -> Path:
    """Write the adapter, the network beside it, and how to build it."""
    return model.save(folder, **metadata)


def restore(model: Network, folder: str | os.PathLike[str]) -> None:
    """Read back what :func:`save` wrote, into the same network."""
    model.pyramid.load(folder, model.network)


def load(
    source: str | os.PathLike[str] | AdapterFile,
    backbone: nn.Module,
    strict: bool = False,
    positions: str | None = None,
) -> Network:
    """Build the network that was saved around a fresh backbone; in eval mode, ready to be asked.

    Args:
        source: a saved folder, ``"org/name"`` on the Hub, or what ``adaptkit.load`` returns.
        backbone: to put it around.
        strict: make other backbone weights than the file's an error instead of a warning.
        positions: the rule by which positions go to another grid, as :func:`adaptkit.attach` takes it.

    Raises ``ValueError`` for a file without such a network, or of another backbone, and where the network that the
    header describes has other tensors than the file: before anything large is allocated.
    """
    file = source if isinstance(source, AdapterFile) else load_file(source)
    recipe = recipe_of(file)
    if recipe is None:
        raise ValueError(f"{file.path} holds no network of {', '.join(BUILDERS)}; attach it with adaptkit.attach")
    inside = {k: v for k, v in file.tensors.items() if not k.startswith("head.")}
    adapter = replace(file, header={**file.header, "head": None}, tensors=inside)
    model = attach(backbone, adapter, strict=strict, positions=positions)
    try:
        network = _within_bounds(file, model, recipe)
    except BaseException:
        model.detach()
        raise
    load_into(network.network, file.tensors_of("head"), strict=False)  # the pyramid's own keys are the ones left out
    return network.eval()


def _within_bounds(file: AdapterFile, model: AdaptedModel, recipe: dict[str, Any]) -> Network:
    """Build it as shapes alone, compare these with the file's, then build it."""
    tensors, where = file.tensors_of("head"), f"{file.path}, the network around the adapter"
    own = model.vit.backbone  # as wide as what transformers builds before the pyramid takes its place
    try:
        with torch.device("meta"), Bounded(tensors, own):
            plan = build(model, recipe)
        check_tensors(plan.pyramid.beside(plan.network), tensors, where)
        with Bounded(tensors, own):
            return build(model, recipe)
    except ImportError:
        raise
    except Exception as error:  # of other libraries, told sizes that they never expected
        said = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(said if said.startswith(where) else f"{where}: {said:.500}") from error
