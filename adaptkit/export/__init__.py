"""One file that runs without adaptkit: ONNX, or a program of ``torch.export``, with the adapter inside the backbone.

What is exported is ``model.eval()(image)``, in float32, with its outputs by name: ``map_4`` ... ``map_32`` (as far as
there is a pyramid), ``tokens``, ``prefix``, ``logits``. AdaViT's gates decide as they do in evaluation, but every token
is computed and masked: a graph cannot skip what depends on the image.

Networks of other libraries have their own outputs: ``logits`` (UperNet), ``class_queries_logits`` and
``masks_queries_logits`` (Mask2Former); of a detector ``boxes`` (n, 4) in pixels of the image, ``scores`` (n,),
``labels`` (n,) and ``masks`` (n, 1, H, W), n being the most that it finds, with score 0 behind the last detection. A
detector takes one image at a time, of values in 0..1, which it normalises and resizes itself.

No file is put in place before it has been loaded again and compared with the model, on another batch and, where the
size is left open, on another size.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adaptkit.export.check import compare, in_place, need, onnx_run, target_path
from adaptkit.export.trace import Graph, axis_names, graph_of, refuse_antialias, traced

__all__ = ["graph_of", "output_names", "to_aot_package", "to_exported_program", "to_onnx"]


def to_onnx(
    model: Any,
    path: str | os.PathLike[str],
    size: tuple[int, int],
    *,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    outputs: Sequence[str] | None = None,
    tolerance: float = 1e-4,
) -> Path:
    """Write an ONNX file; returns its path.

    The graph holds no ``GridSample``: points are read by gathering. The file's metadata says what to feed it:
    ``input``, ``size``, ``mean``, ``std``, and ``adaptkit``, the header of the adapter file. Open axes are named
    ``batch``, ``height`` and ``width``.

    Args:
        model: what ``attach`` or ``from_pretrained`` returned: an ``AdaptedModel``, or a ``Network`` around one.
        path: ends in ``.onnx``; weights beyond the 2 GB that ONNX allows go to ``<path>.data``.
        size: (H, W) of the images, in pixels.
        dynamic_batch: leave the number of images open; of a detector it is one.
        dynamic_size: leave (H, W) open, in multiples of 32 and of the patch. Positions that the backbone resamples
            with antialias are resampled in the graph by matrix products (:mod:`adaptkit.export.resampled`).
        outputs: which outputs to compute, by name; ``"maps"`` stands for all maps. None: all.
        tolerance: how far an output may be off, as a share of its largest value (at least 1).

    Raises ``ValueError`` for what cannot be exported, ``RuntimeError`` where the file does not agree with the model,
    and ``ImportError`` without ``adaptkit-vit[export]``.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        need(package)
    target = target_path(path, ".onnx")
    with traced(model, size, dynamic_batch, dynamic_size, True, outputs) as (program, graph, image):
        refuse_antialias(program, graph)
        names: dict[str, Any] = {"input_names": ["image"], "output_names": graph.names}
        try:
            done: Any = torch.onnx.export(program, (image,), **names, dynamo=True, verbose=False)
        except torch.onnx.OnnxExporterError as error:
            backbone = type(model.vit.backbone).__name__
            raise ValueError(
                f"{backbone} has what torch cannot say in ONNX: {_reason(error)}. "
                + ("Leave out dynamic_size=True, or export a .pt2" if dynamic_size else "Export a .pt2")
            ) from error
        if not graph.samplers and any(node.op_type == "GridSample" for node in done.model.graph):
            raise ValueError(
                "a GridSample is in the graph, which runtimes compute differently: adapters here have none, so it is "
                "of your own head; read points with adaptkit.ops.sample.sample"
            )
        _name_axes(done.model, axis_names(program, graph))
        done.model.metadata_props.update(_metadata(graph, size, dynamic_batch, dynamic_size))
        with in_place(target) as written:
            done.save(str(written))
            compare(onnx_run(written), graph, image, dynamic_batch, dynamic_size, tolerance)
    return target


def to_exported_program(
    model: Any,
    path: str | os.PathLike[str],
    size: tuple[int, int],
    *,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    outputs: Sequence[str] | None = None,
    tolerance: float = 1e-4,
) -> Path:
    """Write a program for ``torch.export.load``, whose ``.module()(image)`` is a tuple of tensors; returns its path.

    Arguments as for :func:`to_onnx`; ``path`` ends in ``.pt2``. The file ``adaptkit.json`` in it holds the metadata and
    the names of the outputs.
    """
    target = target_path(path, ".pt2")
    with traced(model, size, dynamic_batch, dynamic_size, outputs=outputs) as (program, graph, image):
        said = {**_metadata(graph, size, dynamic_batch, dynamic_size), "outputs": ",".join(graph.names)}
        with in_place(target) as written:
            torch.export.save(program, written, extra_files={"adaptkit.json": json.dumps(said)})
            again = torch.export.load(written).module()
            compare(again, graph, image, dynamic_batch, dynamic_size, tolerance)
    return target


def to_aot_package(
    model: Any,
    path: str | os.PathLike[str],
    size: tuple[int, int],
    *,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    outputs: Sequence[str] | None = None,
    tolerance: float = 1e-4,
) -> Path:
    """Compile to machine code for this kind of computer (AOTInductor), for ``torch._inductor.aoti_load_package``.

    Arguments as for :func:`to_onnx`; ``path`` ends in ``.pt2``. Raises ``RuntimeError`` where there is no C++ compiler.
    """
    target = target_path(path, ".pt2")
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        raise RuntimeError(
            f"AOTInductor compiles C++ and there is no {compiler} on this computer: install one, name it in CXX, or "
            "export a .pt2 that is not compiled"
        )
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    with (
        traced(model, size, dynamic_batch, dynamic_size, outputs=outputs) as (program, graph, image),
        in_place(target) as written,
    ):
        aoti_compile_and_package(program, package_path=str(written))
        compare(aoti_load_package(str(written)), graph, image, dynamic_batch, dynamic_size, tolerance)
    return target


@torch.no_grad()
def output_names(model: Any, size: tuple[int, int], outputs: Sequence[str] | None = None) -> list[str]:
    """Return the names of the outputs, in the order of the files, for images of (H, W) pixels."""
    graph = graph_of(model, size, outputs)
    graph(torch.zeros(1, graph.adapted.spec.channels, *size, device=next(model.parameters()).device))
    return graph.names


def _name_axes(model: Any, axes: Mapping[str, list[str | int]]) -> None:
    """Write the names of the open axes into an ONNX model, as :func:`adaptkit.export.trace.axis_names` has them."""
    from onnxscript import ir

    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape(axes[value.name])


def _reason(error: BaseException) -> str:
    """Return the innermost cause: the exporter wraps it in advice for its own developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line for line in str(error).splitlines() if line.strip()), repr(error))


def _metadata(graph: Graph, size: tuple[int, int], dynamic_batch: bool, dynamic_size: bool) -> dict[str, str]:
    spec = graph.adapted.spec
    sides = [f"any multiple of {math.lcm(32, spec.patch_size)}"] * 2 if dynamic_size else list(map(str, size))
    mean, std = graph.statistics()
    return {
        "adaptkit": json.dumps(graph.adapted.header(), sort_keys=True),
        "input": "image",
        "size": ",".join([str(graph.images or ("any" if dynamic_batch else "2")), str(spec.channels), *sides]),
        "mean": json.dumps(mean),
        "std": json.dumps(std),
    }
