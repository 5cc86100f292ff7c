"""Every deformable attention of a model, as it ran on one image: where it read, and with which weights.

The model runs once, as its text says (:func:`adaptkit.reference`): a fast path computes several layers in one and
would hide what is between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from adaptkit.adapters.dat import DATKV, DATBlock
from adaptkit.adapters.vit_adapter import Injector
from adaptkit.adapters.vit_adapter.config import STRIDES
from adaptkit.analysis.watch import Watched, block_strides, run_watched
from adaptkit.core.block import Block
from adaptkit.core.hierarchical import HierarchicalSpec
from adaptkit.core.tree import evaluating
from adaptkit.mixers.base import Layout
from adaptkit.mixers.dat import Convention, DeformableAttention, reference_points, to_cells
from adaptkit.mixers.deformed import DeformableCrossAttention
from adaptkit.mixers.msda import MSDeformAttn
from adaptkit.model.adapted import AdaptedModel
from adaptkit.seam import reference

__all__ = ["Seen", "cell_of", "look", "moved"]

READERS = (DeformableAttention, DeformableCrossAttention, MSDeformAttn)
Grid = tuple[int, int]


class Seen(NamedTuple):
    """One deformable attention of one grid of queries, on one image."""

    #: (Q or 1, G, L, K, 2) as (y, x) in pixels: where the heads of group g read level l for query q; 1: all queries
    #: share the points
    points: Tensor
    weights: Tensor  #: (Q, heads, L, K): attention on each; what is missing to 1 is on prefix tokens
    grid: Grid  #: (h, w) of the queries, Q = h * w row by row
    stride: int  #: side of a query's cell in pixels
    #: where they would be read had nothing moved them, broadcast to ``points``; None where nothing could move
    reference: Tensor | None = None


def look(model: nn.Module, image: Tensor) -> dict[str, Seen]:
    """Run the model on an image (1, C, H, W); return what its deformable attentions did, by their names."""
    with evaluating(model), reference():
        seen = _by_modules(model, image)
        if isinstance(model, AdaptedModel):
            seen |= _by_adapter(model, image)
    return seen


def check_query(query: Any, size: Sequence[int], what: str = "query") -> tuple[float, float]:
    """Return a place (y, x) in pixels of an image of ``size`` (H, W). ``ValueError`` for what is none in it."""
    height, width = size
    try:
        y, x = map(float, query)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}={query!r} is no place in the image; give (y, x) in pixels") from error
    if not (0 <= y < height and 0 <= x < width):
        raise ValueError(f"{what} {query} is outside of an image of {height}x{width} pixels; give (y, x) inside")
    return y, x


def cell_of(query: tuple[float, float], seen: Seen) -> int:
    """Return the index of the cell that holds a pixel (y, x), the nearest one for a pixel outside of the grid."""
    y, x = (min(max(int(v // seen.stride), 0), n - 1) for v, n in zip(query, seen.grid))
    return y * seen.grid[1] + x


# ---- attention that is a module: DAT's, msda and dat as mixers, injectors and extractors


def _by_modules(model: nn.Module, image: Tensor) -> dict[str, Seen]:
    """Look at every such module, wherever it sits, by what it is given."""
    inputs: dict[str, tuple[Any, ...]] = {}
    modules = dict(model.named_modules())
    readers = {name: m for name, m in modules.items() if isinstance(m, READERS)}
    if not readers:
        return {}

    def keep(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs[name] = args

    hooks = [m.register_forward_pre_hook(partial(keep, name)) for name, m in readers.items()]
    try:
        model(image)
    finally:
        for hook in hooks:
            hook.remove()
    seen: dict[str, Seen] = {}
    for name, args in inputs.items():
        reader, short = readers[name], _short(name)
        if isinstance(reader, DeformableAttention):
            seen[short] = _self_form(reader, args[0], _stride(model, name, args[0].shape[2], image))
            continue
        query, feat, layout = args
        first = STRIDES[1] if isinstance(modules.get(name.rpartition(".")[0]), Injector) else 0
        first = first or _stride(model, name, layout.values[0][0], image)
        parts = _cross_form(reader, query, feat, layout, first)
        many = len(parts) > 1
        seen |= {f"{short}, stride {one.stride}" if many else short: one for one in parts}
    return seen


def _short(name: str) -> str:
    """``sets.default.adapters.vit-adapter.interactions.0`` -> ``vit-adapter.interactions.0``."""
    return name.split(".", 3)[3] if name.startswith("sets.") and name.split(".")[2:3] == ["adapters"] else name


def _self_form(mixer: DeformableAttention, x: Tensor, stride: int) -> Seen:
    """Map (1, C, h, w) -> the points that its cells share, group by group."""
    got, grid = mixer.read(x, weights=True), (x.shape[2], x.shape[3])
    points = _pixels(got.points, grid, mixer.convention, stride)  # (g, n, 2)
    reference = _pixels(got.reference, grid, mixer.convention, stride)
    weights = cast(Tensor, got.weights)[0].transpose(0, 1)  # (Q, heads, n)
    return Seen(points[None, :, None], weights[:, :, None], grid, stride, reference[None, :, None])


def _cross_form(reader: Any, query: Tensor, feat: Tensor, layout: Layout, first: int) -> list[Seen]:
    """Queries (1, Q, D) that read levels whose first has cells of ``first`` pixels -> what each of their grids does."""
    extent = layout.points.new_tensor([layout.values[0][1] * first, layout.values[0][0] * first])  # pixels, as (x, y)
    sizes = [h * w for h, w in layout.queries]
    if isinstance(reader, MSDeformAttn):
        places, weights = reader.places(query, layout)  # (1, Q, H, L, K, 2), (1, Q, H, L, K)
        found = list(zip(places[0].split(sizes), weights[0].split(sizes)))
    else:
        levels = len(layout.values)
        found = [
            (points[:, None, None].expand(-1, -1, levels, -1, -1), w[0].transpose(0, 1))
            for points, w in reader.places(query, feat, layout)
        ]
    seen = []
    for (points, weights), centres, grid in zip(found, layout.points.split(sizes), layout.queries):
        stride = round(float(2 * centres[0, 1] * extent[1]))  # the first query is half a cell from the edge
        if isinstance(reader, MSDeformAttn):
            reference = centres[:, None, None, None]  # the query's own place
        else:
            reference = reader.reference(centres, grid)[:, None, None]
        seen.append(Seen((points * extent).flip(-1), weights, grid, stride, (reference * extent).flip(-1)))
    return seen


def _stride(model: nn.Module, name: str, rows: int, image: Tensor) -> int:
    """Pixels from cell to cell of a map of so many rows; a guess for a model of which nothing is known."""
    from adaptkit.models.dat import DAT

    if isinstance(model, AdaptedModel) and name.startswith("backbone."):
        return _stride(model.backbone, name.removeprefix("backbone."), rows, image)
    if isinstance(model, AdaptedModel):
        spec, parts = model.spec, name.split(".")
        if isinstance(spec, HierarchicalSpec) and "blocks" in parts:
            block = int(parts[parts.index("blocks") + 1])
            return block_strides(spec)[block]
        return spec.patch_size
    if isinstance(model, DAT):
        return model.feature_info[int(name.split(".")[1])]["reduction"]
    return -(-image.shape[-2] // rows)


# ---- attention of the frozen blocks, as DAT-KV moves its keys


def moved(deformed: DATBlock, block: Block, x: Tensor, patch: int) -> Seen:
    """Return where a block of DAT-KV, given x (1, P+N, D), reads its patches, and with which weights."""
    weights, points = deformed.weights(block, x)
    grid = cast(Grid, block.grid)
    prefix = x.shape[1] - grid[0] * grid[1]
    at = _pixels(points, grid, "exact", patch)  # (g, n, 2)
    own = weights[0, :, prefix:, prefix:].transpose(0, 1)  # (Q, heads, n)
    reference = reference_points((points.shape[2], points.shape[3]), "exact", points).expand_as(points)
    stood = _pixels(reference, grid, "exact", patch)
    return Seen(at[None, :, None], own[:, :, None], grid, patch, stood[None, :, None])


def _by_adapter(model: AdaptedModel, image: Tensor) -> dict[str, Seen]:
    """Look at every block in which DAT-KV moves the keys; nothing where it does not act."""
    seen: dict[str, Seen] = {}
    dat = next((a for a in Watched.of(model).acting if isinstance(a, DATKV)), None)
    if dat is None:
        return seen

    def visit(block: Block, index: int, x: Tensor, y: Tensor) -> None:
        if index in dat.config.blocks:
            deformed = cast(DATBlock, dat.blocks[str(index)])
            seen[f"block {index}"] = moved(deformed, block, x, model.spec.patch_size)

    run_watched(model, image, visit)
    return seen


def _pixels(points: Tensor, grid: Grid, convention: Convention, stride: int) -> Tensor:
    """(1, g, Hk, Wk, 2) in -1..1 -> (g, n, 2) in pixels: the place that is read, whatever the convention."""
    return (to_cells(points[0].flatten(1, 2), grid, convention) + 0.5) * stride
