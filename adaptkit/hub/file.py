"""The adapter file: one safetensors file that is whole by itself.

Its header (one JSON string under the metadata key ``adaptkit``) holds the format version, the adapters and their
configs, the head, the backbone's spec, origin, fingerprint and digest, and the image normalisation. Tensor keys are
``<adapter>.<own key>`` and ``head.<own key>``: no module name of the backbone enters the file. Only safetensors is
read, never pickle, and the header is checked (:mod:`adaptkit.hub.header`) before a tensor is. Every write is
atomic, and what is saved is serialised before the first byte is written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from adaptkit.core.hierarchical import HierarchicalSpec
from adaptkit.core.near import beside
from adaptkit.core.registry import ForeignLayout, layouts
from adaptkit.core.schema import MOST_BYTES
from adaptkit.core.shown import Rows, Shown, listed
from adaptkit.core.view import Spec
from adaptkit.core.warned import warn
from adaptkit.hub.header import FORMAT, check_keys, read_header, say_spec, spec_of
from adaptkit.hub.write import check_writable, write_atomic, write_together
from adaptkit.version import __version__

__all__ = [
    "AdapterFile",
    "check_writable",
    "load",
    "load_into",
    "metadata_of",
    "serialised",
    "write_atomic",
    "write_folder",
    "write_together",
]

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  #: one is loaded into another
LFS = b"version https://git-lfs"  #: how a file begins that stands for another
WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"


@dataclass(frozen=True, eq=False, repr=False)
class AdapterFile(Shown):
    """A saved adapter, ready to be attached: ``adaptkit.attach(model, adaptkit.load("folder"))``."""

    path: Path
    header: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def spec(self) -> Spec | HierarchicalSpec:
        """Spec of the backbone that the file was trained on; a folder that peft saved has none (``ValueError``)."""
        if self.header["backbone"] is None:
            raise ValueError(f"{self.path} was saved by peft, which does not record the backbone's structure")
        return spec_of(self.header["backbone"]["spec"])

    def tensors_of(self, name: str) -> dict[str, Tensor]:
        """Tensors of one adapter (or ``"head"``), by its own keys."""
        return {k[len(name) + 1 :]: v for k, v in self.tensors.items() if k.startswith(name + ".")}

    def _shown(self) -> tuple[str, Rows]:
        header, backbone, head = self.header, self.header["backbone"], self.header["head"]
        values, size = sum(t.numel() for t in self.tensors.values()), sum(t.nbytes for t in self.tensors.values())
        rows = [("tensors", f"{len(self.tensors)}, {values:,} values, {size / 1e6:.2f} MB")]
        rows += [(f"adapter {a['name']}", json.dumps(a["config"])) for a in header["adapters"]]
        if head is not None:
            rows.append((f"head {head['name'] or head['class']}", json.dumps(head.get("config", {}))))
        if header.get("train_backbone"):
            rows.append(("of the backbone", ", ".join(header["train_backbone"])))
        if backbone is not None:
            rows.append(("trained on", f"{backbone['source'] or 'unnamed'} ({backbone['class']})"))
            rows.append(("fits", f"backbones of {say_spec(self.spec)}"))
        rows.append(("metadata", json.dumps(header.get("metadata") or {})))
        return f"AdapterFile {self.path}", rows


def _within(folder: Path) -> str:
    """Return a hint that names the subfolders of ``folder`` that hold an adapter; ``""`` where none does."""
    held = sorted(str(file.parent) for file in folder.glob(f"*/{WEIGHTS}")) if folder.is_dir() else []
    return f" (there is one in {', '.join(held[:3])})" if held else ""


def load(path: str | os.PathLike[str], allow_nonfinite: bool = False) -> AdapterFile:
    """Read a saved adapter: its folder, or the safetensors file in it. A folder that peft saved is a LoRA.

    Raises ``FileNotFoundError`` where there is none, ``ValueError`` where the file is truncated, not an adapter file,
    of a newer format, or holds NaN or infinity and ``allow_nonfinite`` is not given, ``PermissionError`` where it may
    not be read.
    """
    file = Path(path).expanduser()
    near = _within(file) if file.exists() else beside(file)
    file = file / WEIGHTS if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"no adapter at {path}{near}: expected a folder with {WEIGHTS}, or that file itself")
    with file.open("rb") as opened:  # safetensors says of one that may not be read that it is not there
        start = opened.read(len(LFS))
    try:
        with safe_open(file, "pt") as f:
            metadata = f.metadata() or {}
            names = list(f.keys())
            header = read_header(metadata["adaptkit"], str(file)) if "adaptkit" in metadata else None
            foreign = None if header is not None else _foreign(file.parent)
            wanted = header is not None or foreign is not None
            tensors = {k: f.get_tensor(k) for k in names} if wanted else {}
    except (SafetensorError, OSError) as error:
        remedy = "Copy or download it again"
        if start == LFS:
            remedy = "It stands for a file that git-lfs keeps: git lfs pull"
        elif file.name != WEIGHTS and (file.parent / WEIGHTS).is_file():
            remedy = f"Give the folder, or {WEIGHTS} in it"
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) is not a complete safetensors file: {error}. {remedy}"
        ) from error
    if not allow_nonfinite:
        _check_finite(tensors, file)
    if foreign is not None:
        layout, config = foreign
        try:
            return AdapterFile(file, *layout.read(config, tensors))
        except ValueError as error:
            raise ValueError(f"{file.parent}: {error}") from error
    if header is None:
        found = ", ".join(names[:3]) or "nothing"
        raise ValueError(
            f"{file} is a safetensors file of something else: no 'adaptkit' header; its tensors are {found}, ... "
            "Point to a file that AdaptedModel.save wrote"
        )
    check_keys(names, header, str(file))
    return AdapterFile(file, header, tensors)


def _check_finite(tensors: Mapping[str, Tensor], file: Path) -> None:
    for name, tensor in tensors.items():
        if _holds_nonfinite(tensor):
            raise ValueError(
                f"{file}: {name} holds {int((~tensor.isfinite()).sum())} values that are NaN or infinite of "
                f"{tensor.numel()}: the training diverged, or the file is damaged. Train again, or load it as it is by "
                "adaptkit.load(path, allow_nonfinite=True)"
            )


def _holds_nonfinite(tensor: Tensor) -> bool:
    """Look at the sum first: it is finite for almost every tensor. It may overflow; then each value is looked at."""
    return tensor.dtype in FLOATS and not bool(tensor.sum().isfinite()) and not bool(tensor.isfinite().all())


def _foreign(folder: Path) -> tuple[ForeignLayout, dict[str, Any]] | None:
    """Return the layout of another library that the folder has, and the config in it."""
    found = ((layout, layout.config_of(folder)) for layout in layouts().values())
    return next(((layout, config) for layout, config in found if config is not None), None)


def metadata_of(files: Sequence[AdapterFile]) -> dict[str, Any]:
    """Return what these files say beside tensors and configs, the later ones winning."""
    return {key: value for file in files for key, value in (file.header.get("metadata") or {}).items()}


def write_folder(
    folder: str | os.PathLike[str], header: dict[str, Any], tensors: Mapping[str, Tensor], card: str | None
) -> Path:
    """Write weights, config and card, all of them or nothing; returns the folder.

    Everything is serialised before the folder is touched. The weights come last: whoever sees them sees it all. Without
    a ``card`` the README.md that is there stays.

    Raises ``ValueError`` for what cannot be written, ``OSError`` where the folder cannot be, and leaves it as it was.
    """
    header = {"format": FORMAT, "adaptkit": __version__, **header}
    said = json.dumps(header, sort_keys=True, allow_nan=False)
    if len(said) > MOST_BYTES:
        raise ValueError(
            f"the header has {len(said)} characters, and is read with up to {MOST_BYTES}: give less metadata, which is "
            f"{len(json.dumps(header.get('metadata')))} of them"
        )
    data = {CONFIG: (json.dumps(header, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()}
    if card is not None:
        data[CARD] = card.encode()
    # One metadata key: with several, safetensors does not promise their order, and equal adapters are equal bytes.
    data[WEIGHTS] = serialised(tensors, {"adaptkit": said})
    return write_together(Path(folder).expanduser(), data)


def _warn_nonfinite(tensors: Mapping[str, Tensor]) -> None:
    """What diverged is written, for its owner may want to look at it; but reading it will be refused."""
    bad = [name for name, x in tensors.items() if _holds_nonfinite(x)]
    if bad:
        warn(
            f"{listed(bad, 3)}: NaN or infinite values are saved, the training "
            "has diverged; the file is read by adaptkit.load(path, allow_nonfinite=True) alone",
        )


def serialised(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Return a safetensors file of these tensors; those that share memory are written one by one.

    Raises ``ValueError`` for what is no plain tensor with values, by its key.
    """
    copies = {}
    for key, tensor in sorted(tensors.items()):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{key} is a {type(tensor).__name__}, and a safetensors file holds tensors only")
        own = tensor.detach()
        if type(own) is not Tensor or own.layout != torch.strided or own.is_quantized or own.is_meta:
            raise ValueError(
                f"{key} is a {type(own).__name__} of {own.dtype}, {own.layout}, on {own.device}, and a safetensors "
                "file holds plain tensors only: give the module plain ones before it is saved"
            )
        copies[key] = own.to("cpu", copy=True).contiguous()
    _warn_nonfinite(copies)
    try:
        return to_bytes(copies, metadata)
    except (KeyError, ValueError, RuntimeError, SafetensorError) as error:
        kinds = ", ".join(sorted({str(t.dtype) for t in copies.values()}))
        raise ValueError(f"safetensors cannot hold all of these tensors ({kinds}): {error}") from error


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], strict: bool = True) -> None:
    """Copy tensors into a module, as ``load_state_dict`` does, also where one of its own is an expanded view.

    Several elements of such a tensor lie in one place, which torch does not write to; it gets memory of its own.
    Tensors that are shared between modules stay shared.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.layout == torch.strided and any(
            stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape)
        ):
            tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    module.load_state_dict(tensors, strict=strict)
