"""``config.yaml``: what a run was made of, so that it can be repeated. ``--config OUT/config.yaml`` reads its options.

options:            every option with its value, but those that say what to do with the folder
run:                recipe, command, seed, device, number of processes
versions:           of Python, adaptkit and the libraries that compute
data:               of --train and --val: the Hub's revision, or name, size and digest of the files
backbone:           where it is from, its revision, and a digest of its weights
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import platform
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from adaptkit.hub.backbone import digest_of
from adaptkit.hub.file import WEIGHTS
from adaptkit.hub.write import write_atomic
from adaptkit.version import __version__

__all__ = ["WEIGHTS", "digest", "identity", "write"]

CONFIG = "config.yaml"
#: What to do with a folder, not what to train; whoever reads the file says it anew.
ACTIONS = ("config", "resume", "overwrite", "change")
LIBRARIES = ("torch", "torchvision", "timm", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy",
             "torchmetrics", "huggingface_hub")  # fmt: skip
#: Bytes of a set whose contents are read for its digest; of a larger one, and of a folder, names and sizes are.
MOST = 2**30


def write(
    out: Path, recipe: str, args: argparse.Namespace, accelerator: Accelerator, model: Any, data: tuple[Any, Any]
) -> None:
    """Write ``config.yaml``; ``data`` are the rows of training and validation."""
    import yaml

    train = getattr(args, "train", None) or args.data  # what holds both may have one name
    said = {
        "options": options(args),
        "run": {
            "recipe": recipe,
            "command": shlex.join(sys.argv),
            "seed": args.seed,
            "device": device(accelerator),
            "processes": accelerator.num_processes,
        },
        "versions": versions(),
        "data": {
            "train": identity(train, data[0], getattr(args, "train_images", None)),
            "val": identity(args.val or train, data[1], getattr(args, "val_images", None)),
        },
        "backbone": backbone(model),
    }
    again = f" Run it again: --config {CONFIG} --out ANOTHER" if hasattr(args, "config") else ""
    head = f"# What this run was made of.{again}\n"
    text = yaml.safe_dump(json.loads(json.dumps(said, default=str)), sort_keys=False, width=110)
    write_atomic(out / CONFIG, (head + text).encode())


def options(args: argparse.Namespace) -> dict[str, Any]:
    """Return every option of the command line with its value."""
    names = getattr(args, "names", None) or vars(args)
    return {name: vars(args)[name] for name in names if name not in ACTIONS and name in vars(args)}


def versions() -> dict[str, str]:
    """Return the versions of what is installed of these libraries."""
    found = {"python": platform.python_version(), "adaptkit": __version__}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device(accelerator: Accelerator) -> str:
    """Name the device: of a GPU the model, else its kind and the processor."""
    kind = accelerator.device.type
    return torch.cuda.get_device_name(accelerator.device) if kind == "cuda" else f"{kind} ({platform.machine()})"


def backbone(model: Any) -> dict[str, Any]:
    """Return where the frozen backbone is from, and one digest of all its weights."""
    vit = model.vit
    source = vit.source()
    layers = json.dumps(digest_of(vit), sort_keys=True).encode()
    return {
        "class": type(vit.backbone).__name__,
        "source": source.id or None,
        "revision": source.revision or None,
        "sha256_of_layers": hashlib.sha256(layers).hexdigest(),
    }


def identity(name: str, rows: Any, images: str | None = None) -> dict[str, Any]:
    """Say which data were read: a revision of the Hub, or the files with their sizes and a digest."""
    path, data = Path(name.removeprefix("crops:").removeprefix("placed:")), getattr(rows, "data", None)
    if "*" in name:
        files = sorted(path.parent.glob(path.name))
    elif path.is_dir():
        files = sorted(p for p in path.rglob("[!.]*") if p.is_file())
    else:
        files = [path] if path.is_file() else []
    said: dict[str, Any] = {"name": name}
    if hasattr(data, "__len__"):
        said["samples"] = len(data)
    if files:
        return {
            **said,
            **of_files(files, path if path.is_dir() else path.parent),
            **({"images": images} if images else {}),
        }
    revision = hub_revision(data)
    return {**said, **({"revision": revision} if revision else {})}


def of_files(files: list[Path], root: Path) -> dict[str, Any]:
    """Return number, bytes and a digest of files: of what they hold, or where that is much, of names and sizes."""
    sizes = [p.stat().st_size for p in files]
    listing = "".join(f"{p.relative_to(root)} {size}\n" for p, size in zip(files, sizes))
    found: dict[str, Any] = {"files": len(files), "bytes": sum(sizes)}
    if sum(sizes) > MOST:
        return {**found, "sha256_of_names_and_sizes": hashlib.sha256(listing.encode()).hexdigest()}
    if len(files) == 1:
        return {**found, "sha256": digest(files[0])}
    contents = "".join(f"{p.relative_to(root)} {digest(p)}\n" for p in files)
    return {**found, "sha256_of_files": hashlib.sha256(contents.encode()).hexdigest()}


def hub_revision(data: Any) -> str | None:
    """Return the commit that ``datasets`` read a set from: it stands in the addresses of its files."""
    info = getattr(data, "info", None)
    for address in getattr(info, "download_checksums", None) or {}:
        found = re.search(r"@([0-9a-f]{40})/", str(address))
        if found:
            return found.group(1)
    return None


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
