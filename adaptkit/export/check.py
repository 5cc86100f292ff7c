"""A file is compared with the model before it is put in place."""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptkit.export.trace import Graph, others
from adaptkit.version import DISTRIBUTION

__all__ = ["compare", "in_place", "need", "onnx_run", "target_path"]

Run = Callable[[Tensor], Sequence[Tensor]]


def compare(run: Run, graph: Graph, image: Tensor, dynamic_batch: bool, dynamic_size: bool, tolerance: float) -> None:
    """Run the file on images it was not traced with, and demand what the model gives."""
    for other in others(graph, image, dynamic_batch, dynamic_size):
        try:
            outputs = run(other)
        except Exception as error:  # of whichever runtime it is
            raise RuntimeError(
                f"the file does not run on images {tuple(other.shape)}: {error}. Nothing was written"
                + ("; export one file for each size (dynamic_size=False)" if dynamic_size else "")
            ) from error
        graph.compare(outputs, other, tolerance)
    graph.finish()


def onnx_run(path: Path) -> Run:
    """Return the ONNX file as a function: (B, C, H, W) -> its outputs, computed by onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda image: [torch.from_numpy(x) for x in session.run(None, {"image": image.numpy()})]


def need(package: str) -> Any:
    """Import an optional package; ``ImportError`` says how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"to write ONNX, {package} is needed: pip install '{DISTRIBUTION}[export]'") from error


def target_path(path: str | os.PathLike[str], suffix: str) -> Path:
    """Return the path, checked before minutes of work depend on it."""
    target = Path(path)
    if target.suffix != suffix:
        raise ValueError(f"{target} does not end in {suffix}, by which other programs know this format")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent} to write {target.name} to; make it first")
    return target


@contextmanager
def in_place(target: Path) -> Iterator[Path]:
    """Give a path of the same name to write to; what was written is moved to ``target`` where no error came."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        yield Path(folder) / target.name
        # Weights that ONNX keeps beside the graph come first: whoever sees the graph sees them.
        for written in sorted(Path(folder).iterdir(), key=lambda file: file.name == target.name):
            os.replace(written, target.parent / written.name)
