"""The adapter file: one safetensors file that is whole by itself.

Its header (one JSON string under the metadata key ``adaptkit``) holds the format version, the adapters and their
configs, the head, the backbone's spec, origin and fingerprint, and the image normalisation. Tensor keys are
``<adapter>.<own key>`` and ``head.<own key>``: no module name of the backbone enters the file. Only safetensors is
read, never pickle. Every write is atomic.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from adaptkit.peft_folder import from_peft_layout, peft_config_of
from adaptkit.staged import StagedSpec
from adaptkit.version import __version__
from adaptkit.vit import Spec, View

__all__ = ["AdapterFile", "check_fits", "check_writable", "describe_backbone", "load", "write_atomic", "write_folder"]

FORMAT = 2  #: the newest that is read; 2 may hold trained parts of the backbone, and is written where it does
WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """A saved adapter, ready to be attached: ``adaptkit.attach(model, adaptkit.load("folder"))``."""

    path: Path
    header: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def spec(self) -> Spec | StagedSpec:
        """Spec of the backbone that the file was trained on; a folder that peft saved has none (``ValueError``)."""
        if self.header["backbone"] is None:
            raise ValueError(f"{self.path} was saved by peft, which does not record the backbone's structure")
        saved = self.header["backbone"]["spec"]
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
        return StagedSpec(**fields) if "depths" in fields else Spec(**fields)

    def tensors_of(self, name: str) -> dict[str, Tensor]:
        """Tensors of one adapter (or ``"head"``), by its own keys."""
        return {k[len(name) + 1 :]: v for k, v in self.tensors.items() if k.startswith(name + ".")}


def load(path: str | os.PathLike[str]) -> AdapterFile:
    """Read a saved adapter: its folder, or the safetensors file in it. A folder that peft saved is a LoRA.

    Raises ``FileNotFoundError`` where there is none, ``ValueError`` where the file is truncated, not an adapter file
    or of a newer format.
    """
    file = Path(path)
    file = file / WEIGHTS if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"no adapter at {path}: expected a folder with {WEIGHTS}, or that file itself")
    try:
        with safe_open(file, "pt") as f:
            metadata = f.metadata() or {}
            names = list(f.keys())
            foreign = None if "adaptkit" in metadata else peft_config_of(file.parent)
            wanted = "adaptkit" in metadata or foreign is not None
            tensors = {k: f.get_tensor(k) for k in names} if wanted else {}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) is not a complete safetensors file: {error}. "
            "Copy or download it again"
        ) from error
    if foreign is not None:
        return AdapterFile(file, *from_peft_layout(foreign, tensors))
    if "adaptkit" not in metadata:
        found = ", ".join(names[:3]) or "nothing"
        raise ValueError(
            f"{file} is a safetensors file of something else: no 'adaptkit' header; its tensors are {found}, ... "
            "Point to a file that AdaptedModel.save wrote"
        )
    try:
        header = json.loads(metadata["adaptkit"])
        version = int(header["format"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} has a damaged adaptkit header: {error!r}. Copy or download it again") from error
    if version > FORMAT:
        raise ValueError(
            f"{file} has format {version}, written by adaptkit {header.get('adaptkit')}; this is adaptkit "
            f"{__version__}, which reads up to format {FORMAT}: upgrade adaptkit"
        )
    return AdapterFile(file, header, tensors)


def describe_backbone(vit: View) -> dict[str, Any]:
    """Return what the header says of the backbone."""
    source = vit.source()
    return {
        "spec": vit.spec._asdict(),
        "class": f"{type(vit.host).__module__}.{type(vit.host).__qualname__}",
        "positions": vit.positions,
        "source": source.id,
        "revision": source.revision,
        "mean": list(source.mean),
        "std": list(source.std),
        "classes": source.classes,
        "fingerprint": fingerprint(vit),
    }


def fingerprint(vit: View) -> dict[str, list[float]]:
    """Return eight values each of a few frozen tensors: the same in timm, transformers and half precision."""
    if vit.fingerprint is not None:
        return vit.fingerprint
    marks = {}
    for name, tensor in vit.fingerprint_tensors().items():
        flat = tensor.detach().flatten()
        index = torch.linspace(0, flat.numel() - 1, 8).long().to(flat.device)
        marks[name] = [float(f"{v:.6g}") for v in flat[index].float().tolist()]
    return marks


def check_fits(file: AdapterFile, vit: View, strict: bool = False) -> None:
    """Compare a file with a backbone.

    Another structure is a ``ValueError``. Other weights of the same structure are a warning, or with ``strict`` a
    ``ValueError`` too: the adapter runs, but was trained on other features.
    """
    if file.header["backbone"] is None:  # a folder of peft knows the names of layers and nothing else
        return
    then, now = file.spec, vit.spec
    if type(then) is not type(now):
        raise ValueError(
            f"{file.path} was trained on a {_kind(then)} ({say_spec(then)}), this backbone is a {_kind(now)} "
            f"({vit.source().id or type(vit.host).__name__}: {say_spec(now)}); attach it to a {_kind(then)}"
        )
    for name in then._fields[1:]:  # whichever library holds them: the family does not matter
        a, b = getattr(then, name), getattr(now, name)
        if a != b:
            saved = file.header["backbone"]
            here = vit.source().id or type(vit.host).__name__
            raise ValueError(
                f"{file.path} was trained on {name}={a} ({saved['source'] or saved['class']}: {say_spec(then)}), this "
                f"backbone has {name}={b} ({here}: {say_spec(now)}); attach it to "
                f"a {_kind(then)} with {name}={a}"
            )
    if not _same_marks(file.header["backbone"]["fingerprint"], fingerprint(vit)):
        message = (
            f"{file.path} was trained on other weights of this structure (file: "
            f"{file.header['backbone']['source'] or 'unnamed'}, backbone: {vit.source().id or 'unnamed'}): its "
            "results will differ. Load the weights it was trained on"
        )
        if strict:
            raise ValueError(message)
        warnings.warn(message, UserWarning, stacklevel=3)
    mean, std = file.header["backbone"]["mean"], file.header["backbone"]["std"]
    source = vit.source()
    if mean and source.mean and (mean, std) != (list(source.mean), list(source.std)):
        warnings.warn(
            f"{file.path} was trained on images normalised by mean {mean}, std {std}; this backbone declares mean "
            f"{list(source.mean)}, std {list(source.std)}. Normalise as the file says",
            UserWarning,
            stacklevel=3,
        )


def say_spec(spec: Spec | StagedSpec) -> str:
    """Return the numbers that a backbone must share with a file."""
    return ", ".join(f"{name}={getattr(spec, name)}" for name in spec._fields[1:])


def _kind(spec: Spec | StagedSpec) -> str:
    return "ViT" if isinstance(spec, Spec) else "hierarchical host"


def _same_marks(then: dict[str, list[float]], now: dict[str, list[float]]) -> bool:
    """Equal up to the rounding of bf16 (8 bits), on every tensor that both sides name."""
    shared = then.keys() & now.keys()
    return bool(shared) and all(
        len(then[k]) == len(now[k])
        and torch.allclose(torch.tensor(then[k]), torch.tensor(now[k]), rtol=2e-2, atol=1e-4)
        for k in shared
    )


def write_folder(folder: str | os.PathLike[str], header: dict[str, Any], tensors: dict[str, Tensor], card: str) -> Path:
    """Write weights, config and card; returns the folder. The weights come last: whoever sees them sees it all."""
    path = check_writable(folder)
    header = {"format": 1, "adaptkit": __version__, **header}
    text = json.dumps(header, indent=2, sort_keys=True)
    contiguous = {k: v.detach().cpu().contiguous() for k, v in sorted(tensors.items())}
    write_atomic(path / CONFIG, (text + "\n").encode())
    write_atomic(path / CARD, card.encode())
    # One metadata key: with several, safetensors does not promise their order, and equal adapters are equal bytes.
    write_atomic(path / WEIGHTS, to_bytes(contiguous, {"adaptkit": json.dumps(header, sort_keys=True)}))
    return path


def check_writable(folder: str | os.PathLike[str]) -> Path:
    """Make the folder and prove that a file can be written in it, before hours of work depend on it."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {path}: {error}. Choose a folder that you may write to") from error
    return path


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, never half of one."""
    target = Path(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes it private; a shared folder wants the usual mode
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
