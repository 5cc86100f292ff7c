"""The adapter file: one safetensors file that is whole by itself.

Its header (one JSON string under the metadata key ``adaptkit``) holds the format version, the adapters and their
configs, the head, the backbone's spec, origin, fingerprint and digest, and the image normalisation. Tensor keys are
``<adapter>.<own key>`` and ``head.<own key>``: no module name of the backbone enters the file. Only safetensors is
read, never pickle, and the header is checked (:mod:`adaptkit.hub.header`) before a tensor is. Every write is
atomic, and what is saved is serialised before the first byte is written.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
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
from adaptkit.core.tree import plain_name
from adaptkit.core.view import Spec, View
from adaptkit.hub.digest import block_sums, digest, layers_of, other_blocks, other_layers
from adaptkit.hub.header import FORMAT, check_keys, read_header, spec_of
from adaptkit.hub.packages import origin_of
from adaptkit.hub.write import check_writable, write_atomic, write_together
from adaptkit.version import __version__

__all__ = [
    "AdapterFile",
    "OtherNormalisation",
    "check_fits",
    "check_writable",
    "describe_backbone",
    "expansion",
    "load",
    "load_into",
    "metadata_of",
    "normalisation_of",
    "normalised_by_file",
    "other_parts",
    "serialised",
    "write_atomic",
    "write_folder",
    "write_together",
]

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  #: one is loaded into another
EXPANSION = "_adaptkit_expansion"  #: where a backbone says how :func:`adaptkit.expand_channels` made it
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
    of a newer format, or holds NaN or infinity and ``allow_nonfinite`` is not given.
    """
    file = Path(path).expanduser()
    near = _within(file) if file.exists() else beside(file)
    file = file / WEIGHTS if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"no adapter at {path}{near}: expected a folder with {WEIGHTS}, or that file itself")
    try:
        with safe_open(file, "pt") as f:
            metadata = f.metadata() or {}
            names = list(f.keys())
            header = read_header(metadata["adaptkit"], str(file)) if "adaptkit" in metadata else None
            foreign = None if header is not None else _foreign(file.parent)
            wanted = header is not None or foreign is not None
            tensors = {k: f.get_tensor(k) for k in names} if wanted else {}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) is not a complete safetensors file: {error}. "
            "Copy or download it again"
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
    if tensor.dtype not in FLOATS or tensor.is_meta or tensor.layout != torch.strided:
        return False
    tensor = tensor.detach()
    return not tensor.sum().isfinite() and not bool(tensor.isfinite().all())


def _foreign(folder: Path) -> tuple[ForeignLayout, dict[str, Any]] | None:
    """Return the layout of another library that the folder has, and the config in it."""
    found = ((layout, layout.config_of(folder)) for layout in layouts().values())
    return next(((layout, config) for layout, config in found if config is not None), None)


def metadata_of(files: Sequence[AdapterFile]) -> dict[str, Any]:
    """Return what these files say beside tensors and configs, the later ones winning."""
    return {key: value for file in files for key, value in (file.header.get("metadata") or {}).items()}


def normalisation_of(metadata: Mapping[str, Any], channels: int) -> tuple[list[float], list[float]] | None:
    """Return ``mean`` and ``std`` from metadata, a number per channel; None where one is missing or malformed."""
    said = metadata.get("mean"), metadata.get("std")
    whole = all(isinstance(v, list) and len(v) == channels and all(type(n) in (int, float) for n in v) for v in said)
    return (said[0], said[1]) if whole else None  # type: ignore[return-value]


def describe_backbone(vit: View, metadata: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """Return what the header says of the backbone.

    The normalisation is that of the images that were trained on: ``mean`` and ``std`` of the metadata, where they are
    given, go before what the backbone says of itself.
    """
    source = vit.source()
    mean, std = normalisation_of(metadata, vit.spec.channels) or (list(source.mean), list(source.std))
    return {
        **origin_of(type(vit)),
        "spec": vit.spec._asdict(),
        "class": f"{type(vit.backbone).__module__}.{type(vit.backbone).__qualname__}",
        "positions": vit.positions,
        "source": source.id,
        "revision": source.revision,
        "mean": mean,
        "std": std,
        "classes": source.classes,
        "fingerprint": fingerprint(vit),
        "digest": digest_of(vit),
        "sums": sums_of(vit),
        **({"expanded": expanded} if (expanded := getattr(vit.backbone, EXPANSION, None)) else {}),
    }


def fingerprint(vit: View) -> dict[str, list[float]]:
    """Return eight values each of a few frozen tensors: the same in timm, transformers and half precision."""
    if vit.fingerprint is not None:
        return vit.fingerprint
    marks = {}
    for name, tensor in vit.fingerprint_tensors().items():
        if tensor.is_meta:  # no values yet
            continue
        flat = tensor.detach().flatten()
        index = torch.linspace(0, flat.numel() - 1, 8, dtype=torch.float32, device="cpu").long()
        index = index.clamp(max=flat.numel() - 1).to(flat.device)  # float32 rounds up beyond 2^24
        marks[name] = [float(f"{v:.6g}") for v in flat[index].float().tolist()]
    return marks


def digest_of(vit: View) -> dict[str, str]:
    """Return the exact checksum of every layer; see :func:`adaptkit.hub.digest.digest`."""
    return digest(vit.backbone) if vit.digest is None else vit.digest


def sums_of(vit: View) -> dict[str, list[float]]:
    """Return the sums over each block, which rounding hardly moves; see :func:`adaptkit.hub.digest.block_sums`."""
    return block_sums(vit.backbone, len(vit.spec.widths)) if vit.sums is None else vit.sums


class OtherNormalisation(UserWarning):
    """Warns that a file was trained on images normalised otherwise than the backbone declares."""


@contextlib.contextmanager
def normalised_by_file() -> Iterator[None]:
    """Inside, silence :class:`OtherNormalisation`: the caller normalises images as the file says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OtherNormalisation)
        yield


def check_fits(file: AdapterFile, vit: View, strict: bool = False) -> None:
    """Compare a file with a backbone.

    Raises ``ValueError`` for a backbone of another structure. Other weights of the same structure are a warning, or
    with ``strict`` a ``ValueError``: the adapter runs, but was trained on other features. Layers are compared bit by
    bit where both sides hold the same tensors, else block by block up to rounding. A block that one side holds
    quantised is not compared; the patch embedding and the norms stand in for it. Another rule for resampling position
    embeddings and another normalisation (:class:`OtherNormalisation`) are warnings.
    """
    if file.header["backbone"] is None:  # a folder of peft knows the names of layers and nothing else
        return
    then, now = file.spec, vit.spec
    if type(then) is not type(now):
        raise ValueError(
            f"{file.path} was trained on a {_kind(then)} ({say_spec(then)}), this backbone is a {_kind(now)} "
            f"({vit.source().id or type(vit.backbone).__name__}: {say_spec(now)}); attach it to a {_kind(then)}"
        )
    for name in then._fields[1:]:  # whichever library holds them: the family does not matter
        a, b = getattr(then, name), getattr(now, name)
        if a != b:
            saved = file.header["backbone"]
            here = vit.source().id or type(vit.backbone).__name__
            remedy = f"attach it to a {_kind(then)} with {name}={a}"
            if name == "channels" and b == 3 and saved.get("expanded"):
                remedy = f"attach it to {expansion(saved, 'backbone')}"
            raise ValueError(
                f"{file.path} was trained on {name}={a} ({saved['source'] or saved['class']}: {say_spec(then)}), this "
                f"backbone has {name}={b} ({here}: {say_spec(now)}); {remedy}"
            )
    saved, source = file.header["backbone"], vit.source()
    other = _other_weights(file, vit)
    if other:
        message = (
            f"{file.path} was trained on other weights of this structure (file: {saved['source'] or 'unnamed'}, "
            f"backbone: {source.id or 'unnamed'}; they differ in {listed(other, 6)}): its results will differ. Load "
            "the weights it was trained on"
        )
        if strict:
            raise ValueError(message)
        warnings.warn(message, UserWarning, stacklevel=3)
    if saved.get("positions", vit.positions) != vit.positions:
        warnings.warn(
            f"{file.path} was trained with position embeddings resampled as {saved['positions']!r}, this backbone "
            f"({type(vit.backbone).__name__}) resamples them as {vit.positions!r}: results agree at the native size "
            f"only. For other sizes use {_other_rule(saved['positions'], vit)}",
            UserWarning,
            stacklevel=3,
        )
    mean, std = normalisation_of(file.header.get("metadata") or {}, now.channels) or (saved["mean"], saved["std"])
    known = len(mean) == len(source.mean) > 0  # an expanded backbone says it of its first three channels
    if known and (mean, std) != (list(source.mean), list(source.std)):
        warnings.warn(
            f"{file.path} was trained on images normalised by mean {mean}, std {std}; this backbone declares mean "
            f"{list(source.mean)}, std {list(source.std)}. Normalise as the file says",
            OtherNormalisation,
            stacklevel=3,
        )


def expansion(saved: Mapping[str, Any], rgb: str) -> str:
    """Return the call that expands a backbone of three channels as that was which a file was trained on."""
    said = saved["expanded"]
    more = f", wavelengths={said['wavelengths']}" if said["wavelengths"] is not None else ""
    return f"adaptkit.expand_channels({rgb}, {saved['spec']['channels']}, how={said['how']!r}{more})"


def _other_rule(rule: str, vit: View) -> str:
    known = rule in vit.position_rules
    if known:
        return f"attach(..., positions={rule!r}), in a command --positions {rule!r}"
    return "the library it was trained in"


def say_spec(spec: Spec | HierarchicalSpec) -> str:
    """Return the numbers that a backbone must share with a file."""
    return ", ".join(f"{name}={getattr(spec, name)}" for name in spec._fields[1:])


def _kind(spec: Spec | HierarchicalSpec) -> str:
    return "ViT" if isinstance(spec, Spec) else "hierarchical backbone"


def _other_weights(file: AdapterFile, vit: View) -> list[str]:
    """Return the parts of the backbone whose weights are not those of the file."""
    brought = file.tensors_of("backbone")  # whatever the backbone has there, it is replaced
    if not brought:
        return other_parts(file, digest_of(vit), partial(sums_of, vit), partial(fingerprint, vit))
    replaced = {id(p) for name, p in vit.backbone.named_parameters() if plain_name(name) in brought}
    marked = vit.fingerprint_tensors()
    marks = {k: v for k, v in fingerprint(vit).items() if k not in marked or id(marked[k]) not in replaced}
    return other_parts(
        file, digest_of(vit), partial(sums_of, vit), lambda: marks, _touched(layers_of(vit.backbone), brought)
    )


def _touched(layers: Mapping[str, str], brought: Mapping[str, Tensor]) -> dict[str, bool]:
    """Layers of which some tensors are brought -> whether all are."""
    rest = {layer for name, layer in layers.items() if name not in brought}
    return {layer: layer not in rest for name, layer in layers.items() if name in brought}


def other_parts(
    file: AdapterFile,
    now: Mapping[str, str],
    sums: Callable[[], Mapping[str, Sequence[float]]],
    marks: Callable[[], Mapping[str, Sequence[float]]],
    touched: Mapping[str, bool] = MappingProxyType({}),
) -> list[str]:
    """Return the parts of two backbones whose weights differ: of the one that a file records, and of another.

    Args:
        file: an adapter's.
        now: digest of the other backbone.
        sums: returns its sums over blocks, asked for where digests do not say it all: between libraries, precisions.
        marks: returns its fingerprint, likewise.
        touched: layers of which the file brings some tensors itself, and whether it brings all. They are left out of
            the digests.
    """
    saved = file.header["backbone"]
    then, now = ({k: v for k, v in (d or {}).items() if k not in touched} for d in (saved.get("digest"), now))
    # The backbone's own classifier speaks where the adapter has no head.
    other, complete = other_layers(then, now, classifier=file.header["head"] is None and saved.get("classes", 0) > 0)
    if complete and all(touched.values()):
        return other
    if saved.get("sums"):
        other += [f"block {i}" for i in other_blocks(saved["sums"], sums())]
    mine = marks()
    theirs = {name: mark for name, mark in saved["fingerprint"].items() if not touched or name in mine}
    if not other and (theirs or not touched) and not _same_marks(theirs, mine):
        other = [f"{name!r}" for name in theirs] or ["every layer"]
    return other


def _same_marks(then: Mapping[str, Sequence[float]], now: Mapping[str, Sequence[float]]) -> bool:
    """Equal up to the rounding of bf16 (8 bits), on every tensor that both sides name."""
    shared = then.keys() & now.keys()
    return bool(shared) and all(
        len(then[k]) == len(now[k]) and all(abs(a - b) <= 1e-4 + 2e-2 * abs(b) for a, b in zip(then[k], now[k]))
        for k in shared
    )


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
    _warn_nonfinite(tensors)
    data = {CONFIG: (json.dumps(header, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()}
    if card is not None:
        data[CARD] = card.encode()
    # One metadata key: with several, safetensors does not promise their order, and equal adapters are equal bytes.
    data[WEIGHTS] = serialised(tensors, {"adaptkit": said})
    return write_together(Path(folder).expanduser(), data)


def _warn_nonfinite(tensors: Mapping[str, Tensor]) -> None:
    """What diverged is written, for its owner may want to look at it; but reading it will be refused."""
    bad = [name for name, x in sorted(tensors.items()) if isinstance(x, Tensor) and _holds_nonfinite(x)]
    if bad:
        warnings.warn(
            f"{listed(bad, 3)}: NaN or infinite values are saved, the training "
            "has diverged; the file is read by adaptkit.load(path, allow_nonfinite=True) alone",
            UserWarning,
            stacklevel=4,
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
