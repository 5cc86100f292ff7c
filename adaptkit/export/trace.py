"""From an adapted model to one graph of ``torch.export``: an image in, named tensors out."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.adapters.adavit import AdaViT
from adaptkit.adapters.base import SideAdapter, WeightAdapter
from adaptkit.core.hierarchical import HierarchicalSpec
from adaptkit.core.near import hint
from adaptkit.core.tree import evaluating
from adaptkit.core.view import Features
from adaptkit.export.resampled import AntialiasByMatrices
from adaptkit.heads.base import QueryLogits
from adaptkit.model.adapted import AdaptedModel

__all__ = ["Graph", "axis_names", "graph_of", "inside", "others", "refuse_antialias", "traced"]


class Graph(nn.Module):
    """The model as a function from an image to a tuple of tensors, and their names.

    Args:
        model: whose features they are.
        outputs: which of them, by name; ``"maps"`` stands for every ``map_<stride>``. None: all.
    """

    def __init__(self, model: Any, outputs: Sequence[str] | None = None) -> None:
        super().__init__()
        self.model = model
        self.outputs = None if outputs is None else tuple(outputs)
        self.by_matrices = False  #: whether antialiased resampling is written as matrix products
        self.names: list[str] = []

    images: int | None = None  #: how many at a time, where that is not for the caller to say
    sized = False  #: whether it holds for the one size that it was made for
    samplers = False  #: whether a ``GridSample`` may be in it

    @property
    def adapted(self) -> AdaptedModel:
        """The model that has the adapters."""
        return inside(self.model)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """(B, C, H, W) -> the outputs that there are."""
        with AntialiasByMatrices() if self.by_matrices else nullcontext():
            named = self.named(image)
        named = self._chosen(named)
        self.names = list(named)
        return tuple(named.values())

    def named(self, image: Tensor) -> dict[str, Tensor]:
        """(B, C, H, W) -> every output, by name."""
        return self._named(self.model(image))

    def seen(self, shape: Sequence[int], seed: int) -> list[Tensor]:
        """Return images of a shape, as the model wants them: first those to trace with, then, by seed, to compare."""
        return [_random(*shape, seed=seed)]

    def statistics(self) -> tuple[Any, Any]:
        """Mean and standard deviation by which an image is normalised before it goes in."""
        backbone = self.adapted.header()["backbone"]
        return backbone["mean"], backbone["std"]

    def compare(self, said: Sequence[Tensor], image: Tensor, tolerance: float) -> None:
        """Demand of the outputs of a file what the model gives on this image; ``RuntimeError`` where they differ."""
        for name, x, wanted in zip(self.names, said, self(image), strict=True):
            if x.shape != wanted.shape:
                raise RuntimeError(
                    f"{name} has shape {tuple(x.shape)} in the file and {tuple(wanted.shape)} in the model"
                )
            off = float((x - wanted).abs().max() / wanted.abs().max().clamp_min(1.0))
            if not off <= tolerance:
                raise RuntimeError(
                    f"{name} in the file differs from the model by {off:.1e}, more than {tolerance:.1e}, on images "
                    f"{tuple(image.shape)}: nothing was written. Report the backbone and the adapters"
                )

    def finish(self) -> None:
        """Called when a file was compared on all images."""

    def _named(self, features: Features) -> dict[str, Tensor]:
        spec = self.model.spec
        sides = [a.strides for a in self.model.adapters.values() if isinstance(a, SideAdapter)]
        strides = spec.strides if isinstance(spec, HierarchicalSpec) else (*sides, ())[0]
        named = {f"map_{stride}": x for stride, x in zip(strides, features.maps)}
        named["tokens"] = features.tokens
        if features.prefix.shape[1] > 0:
            named["prefix"] = features.prefix
        if isinstance(features.logits, QueryLogits):
            named.update({k: x for k, x in features.logits._asdict().items() if isinstance(x, Tensor)})
        elif features.logits is not None:
            named["logits"] = features.logits
        return named

    def _chosen(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leave those that are asked for, in the order of the file; ``ValueError`` for what there is not."""
        if self.outputs is None:
            return named
        maps = [name for name in named if name.startswith("map_")]
        groups = {"maps": maps, **{name: [name] for name in named}} if maps else {name: [name] for name in named}
        for name in self.outputs:
            if name not in groups:
                raise ValueError(
                    f"outputs: this model has no {name!r}{hint(name, groups)}; its outputs are {', '.join(groups)}"
                )
        asked = {one for name in self.outputs for one in groups[name]}
        if not asked:
            raise ValueError(f"outputs=() leaves nothing to compute; choose of {', '.join(groups)}, or leave it out")
        return {name: value for name, value in named.items() if name in asked}


def inside(model: Any) -> AdaptedModel:
    """Return the adapted model in a network around its pyramid, or the model itself."""
    return model if isinstance(model, AdaptedModel) else model.pyramid.model


def graph_of(model: Any, size: tuple[int, int], outputs: Sequence[str] | None = None) -> Graph:
    """Return the graph of an adapted model, or of a network that makes its own by ``graph(size, outputs)``.

    Raises ``TypeError`` for anything else.
    """
    if isinstance(model, AdaptedModel):
        return Graph(model, outputs)
    if not hasattr(model, "graph") or not hasattr(model, "pyramid"):
        raise TypeError(f"{type(model).__name__} has no adapters; export what adaptkit.attach returned")
    return model.graph(size, outputs)


def _ready(model: Any) -> Any:
    """Return the model as a graph can hold it: float32 on the CPU, LoRA in the weights; a copy where it is not that.

    LoRA in the weights leaves nothing of itself in the graph.
    """
    plain = all(x.device.type == "cpu" and x.dtype in (torch.float32, torch.int64, torch.bool) for x in _tensors(model))
    within = any(isinstance(a, WeightAdapter) and not a.merged for a in inside(model).adapters.values())
    if plain and not within:
        return model
    ready = copy.deepcopy(model).to("cpu", torch.float32).eval()
    if within:
        inside(ready).merge_adapter()
    return ready


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


@contextmanager
def traced(
    model: Any,
    size: tuple[int, int],
    dynamic_batch: bool,
    dynamic_size: bool,
    for_onnx: bool = False,
    outputs: Sequence[str] | None = None,
) -> Iterator[tuple[torch.export.ExportedProgram, Graph, Tensor]]:
    """Give the program, the graph it was traced from, and the image; the model is in eval mode for as long."""
    if not isinstance(model, AdaptedModel) and not hasattr(model, "graph"):
        raise TypeError(f"{type(model).__name__} has no adapters; export what adaptkit.attach returned")
    adapted = inside(model)
    if min(size) < 1:
        raise ValueError(f"size={tuple(size)}: give height and width in pixels, at least 1")
    unit = math.lcm(32, adapted.spec.patch_size)
    if dynamic_size and any(n % unit or n < 2 * unit for n in size):
        raise ValueError(
            f"size={tuple(size)} with dynamic_size=True: height and width are left open in multiples of {unit} pixels; "
            f"give an example of at least {2 * unit} that is one"
        )
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(evaluating(model))
        ready = _ready(model).eval()
        graph = graph_of(ready, size, outputs)
        if dynamic_size and graph.sized:
            raise ValueError(
                "dynamic_size=True: a detector's anchors are of one image size in a graph; leave it out and export one "
                "file for each size"
            )
        dynamic_batch = dynamic_batch and graph.images is None
        image = graph.seen((graph.images or 2, adapted.spec.channels, *size), seed=0)[0]
        for gates in (a for a in inside(ready).adapters.values() if isinstance(a, AdaViT)):
            stack.enter_context(gates.executing("masked"))
        # Errors of the model itself and the names come before any tracing. The image is not the one that is traced: a
        # backbone that keeps the angles of the last grid would put them into the graph.
        graph(others(graph, image, dynamic_batch, dynamic_size)[0])
        shapes = _open(unit, dynamic_batch, dynamic_size)
        try:
            graph.by_matrices = for_onnx and dynamic_size
            program = torch.export.export(graph, (image,), dynamic_shapes=shapes, strict=False)
            graph.by_matrices = False  # the file is compared with the model as it is
            if for_onnx:
                program = _with_constant_positions(program, image, shapes)
        except Exception as error:
            what = f"{type(model.vit.backbone).__name__} with {', '.join(adapted.adapters) or 'no adapter'}"
            remedy = "Report the backbone"
            if dynamic_size:
                remedy = "Export one file for each size (dynamic_size=False)"
            elif dynamic_batch:
                remedy = "Export it for one batch size (dynamic_batch=False, --fixed-batch)"
            raise ValueError(f"torch.export cannot trace {what} at {tuple(size)}: {_brief(error)}. {remedy}") from error
        yield program, graph, image


def others(graph: Graph, image: Tensor, dynamic_batch: bool, dynamic_size: bool) -> list[Tensor]:
    """Return images that differ from the traced one in whatever is left open."""
    batch, channels, height, width = image.shape
    unit = math.lcm(32, graph.adapted.spec.patch_size)
    batch += 1 if dynamic_batch and graph.images is None else 0
    height, width = (height + unit, width + 2 * unit) if dynamic_size else (height, width)
    return graph.seen((batch, channels, height, width), seed=1)


def _random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _open(unit: int, batch: bool, size: bool) -> dict[str, dict[int, Any]]:
    """Return which axes of the image are left open."""
    from torch.export import Dim

    axes: dict[int, Any] = {0: Dim("batch", min=1)} if batch else {}
    if size:
        axes |= {2: unit * Dim("rows", min=2, max=256), 3: unit * Dim("columns", min=2, max=256)}
    return {"image": axes}


def _brief(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else repr(error)


def _with_constant_positions(
    program: torch.export.ExportedProgram, image: Tensor, shapes: dict[str, dict[int, Any]]
) -> torch.export.ExportedProgram:
    """Compute what resamples weights alone, a position table say, once and for all.

    ONNX has no antialiased resampling, but on a grid that is fixed its result is one more weight.
    """
    if not any("upsample" in str(node.target) for node in program.graph.nodes):
        return program
    module: Any = program.run_decompositions({}).module()
    constants: dict[torch.fx.Node, Any] = {}
    folded = 0
    for node in list(module.graph.nodes):
        if node.op == "get_attr":
            value = module
            for name in node.target.split("."):
                value = getattr(value, name)
            if isinstance(value, Tensor):
                constants[node] = value
        elif node.op == "call_function" and node.all_input_nodes and constants.keys() >= set(node.all_input_nodes):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), constants.__getitem__)
            constants[node] = node.target(*args, **kwargs)
            if "upsample" in str(node.target):
                module.register_buffer(f"resampled_{folded}", constants[node].clone())
                with module.graph.inserting_before(node):
                    node.replace_all_uses_with(module.graph.get_attr(f"resampled_{folded}"))
                folded += 1
    if not folded:
        return program
    module.graph.eliminate_dead_code()
    module.recompile()
    return torch.export.export(module, (image,), dynamic_shapes=shapes, strict=False)


def refuse_antialias(program: torch.export.ExportedProgram, graph: Graph) -> None:
    """Raise ``ValueError`` where something is still resampled with antialias, as no other runtime does it."""
    if any("_aa" in str(node.target) and "upsample" in str(node.target) for node in program.graph.nodes):
        backbone = type(graph.adapted.vit.backbone).__name__
        raise ValueError(
            f"{backbone} resamples with antialias for each image size in a way that is not written as matrix products, "
            "and ONNX has no operator for it: leave out dynamic_size=True and export one file for each size"
        )


def axis_names(program: torch.export.ExportedProgram, graph: Graph) -> dict[str, list[str | int]]:
    """Return the axes of ``image`` and of each output: numbers, and ``batch``, ``height`` and ``width``, or what
    follows from them, e.g. ``height/4``, where they are left open.

    Raises ``ValueError`` where tracing has closed an axis that should be open.
    """
    import sympy

    nodes = list(program.graph.nodes)
    image = next(n for n in nodes if n.op == "placeholder" and n.name == "image")
    opened: dict[Any, Any] = {}
    for side, name in zip(image.meta["val"].shape, ("batch", "", "height", "width")):
        if not isinstance(side, torch.SymInt):
            continue
        expression = side.node.expr  # a symbol, or a multiple of one
        if not expression.free_symbols:
            raise ValueError(
                f"{type(graph.adapted.vit.backbone).__name__} turns the {name} of the image into a plain number while "
                f"it is traced, so that the graph would hold for {name} {expression} alone: leave out "
                "dynamic_size=True and export one file for each size"
            )
        symbol = next(iter(expression.free_symbols))
        opened[symbol] = sympy.Symbol(name, positive=True, integer=True) * symbol / expression

    def said(side: Any) -> str | int:
        if not isinstance(side, torch.SymInt):
            return int(side)
        return str(sympy.simplify(side.node.expr.subs(opened))).replace(" ", "")

    outputs = next(n for n in nodes if n.op == "output").args[0]
    shapes = {"image": image.meta["val"].shape}
    shapes |= {name: node.meta["val"].shape for name, node in zip(graph.names, outputs)}
    return {name: [said(side) for side in shape] for name, shape in shapes.items()}
