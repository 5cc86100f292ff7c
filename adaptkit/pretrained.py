"""``from_pretrained``: a saved adapter and the backbone that its header records, in one call.

A file that was downloaded names what is downloaded next. So the name is one of the Hub or of timm, never a path or a
URL, it is printed, and nothing of what it leads to is run: no code of a repository, no pickle.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path
from typing import Any

from torch import nn

from adaptkit.core import registry
from adaptkit.create import create_backbone
from adaptkit.hub.fits import normalised_by_file
from adaptkit.hub.repository import load
from adaptkit.model.adapted import attach
from adaptkit.model.expand import expand_channels
from adaptkit.networks.network import load as network_of
from adaptkit.networks.network import recipe_of

__all__ = ["expanded_as", "from_pretrained", "recorded"]

MOST_CHANNELS = 1024  #: that are built because a file says so


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    backbone: nn.Module | str | None = None,
    head: Any = None,
    strict: bool = False,
    positions: str | None = None,
    revision: str | None = None,
    subfolder: str = "",
    allow_nonfinite: bool = False,
    **download: Any,
) -> Any:
    """Build the backbone that an adapter was trained on and attach the adapter; returns the model in eval mode:
    an ``AdaptedModel``, or a :class:`~adaptkit.networks.Network` where the file holds a detector or a mask decoder.

    Which backbone is downloaded is printed on stderr. The file may name one of the Hub or of timm; for one on this disk
    give ``backbone=``.

    Args:
        source: a saved folder, or ``"org/name"`` on the Hub.
        backbone: in place of the one that the file records: a module, or a name for
            :func:`adaptkit.create.create_backbone`. One of three channels is expanded if the file was trained on an
            expanded one: ``model.backbone`` is then a copy that shares its weights.
        head: where the saved one is a module of your own.
        strict: make other backbone weights than those it was trained on an error instead of a warning.
        positions: the rule by which positions go to another grid, as :func:`adaptkit.attach` takes it: that of the file
            where ``backbone=`` is of another library. None: as the backbone does it.
        revision: of the adapter's repository. The backbone is built at the revision that the file records.
        subfolder: of the folder or repository.
        allow_nonfinite: read weights that are NaN or infinite.
        download: ``token``, ``cache_dir`` and ``local_files_only``, for the adapter and, as far as its library takes
            them, for the backbone; ``force_download``, for the adapter.

    Raises what :func:`adaptkit.load` and :func:`adaptkit.attach` raise, and ``ValueError`` where the recorded backbone
    has no name or cannot be built.
    """
    file = load(source, revision=revision, subfolder=subfolder, allow_nonfinite=allow_nonfinite, **download)
    if backbone is not None:
        given = backbone if isinstance(backbone, nn.Module) else create_backbone(backbone)
        model = expanded_as(given, file.header)
    else:
        model = recorded(str(source), file.header, {k: v for k, v in download.items() if k != "force_download"})
    with normalised_by_file():
        if recipe_of(file) is not None and head is None:
            return network_of(file, model, strict, positions)
        return attach(model, file, head=head, strict=strict, positions=positions).eval()


def recorded(source: str, header: dict[str, Any], download: dict[str, Any]) -> nn.Module:
    """Build the backbone that the header of ``source`` names; errors as :func:`from_pretrained`."""
    saved = header["backbone"]
    if saved is None:  # a folder of peft
        return _named_by_peft(source, header, download)
    own = "build it yourself: adaptkit.attach(model, adaptkit.load(...)), or give backbone="
    if not saved["source"]:
        raise ValueError(
            f"{source} was trained on a {saved['class']} that did not know where its weights came from: the file "
            f"cannot name it; {own}"
        )
    name, cls = _name(saved)
    if name != "demo":  # which is in this package
        check_public(saved["source"], saved.get("revision"), source)
    needs_classifier = header["head"] is None and saved.get("classes", 0) > 0
    channels = _channels(saved)
    try:
        model: Any = create_backbone(
            name,
            classifier=needs_classifier,
            cls=cls,
            revision=saved.get("revision") or None,
            in_chans=channels,
            **download,
        )
    except Exception as error:  # of any of the libraries that build it
        at = f" at revision {saved['revision']}" if saved.get("revision") else ""
        raise ValueError(
            f"{source} was trained on {saved['source']}{at} ({saved['class']}), which cannot be built here: {error}. "
            f"If you have it, {own}"
        ) from error
    classes = registry.view(model).source().classes
    if needs_classifier and classes != saved["classes"]:
        raise ValueError(
            f"{source} was trained on {saved['source']} with a classifier of {saved['classes']} classes, which is not "
            f"in the file; {name} has {classes}: {own}"
        )
    return expanded_as(model, header)


def expanded_as(model: nn.Module, header: dict[str, Any]) -> nn.Module:
    """Return a backbone of three channels expanded as that was which a file was trained on; else the backbone itself.

    Raises ``ValueError`` for more channels than images have.
    """
    saved = header["backbone"] or {}
    said, channels = saved.get("expanded"), saved.get("spec", {}).get("channels", 3)
    if said is None or registry.view(model).spec.channels != 3:
        return model
    _check_channels(channels)
    return expand_channels(model, channels, said["how"], said["wavelengths"])


def _check_channels(channels: int) -> None:
    if channels > MOST_CHANNELS:
        raise ValueError(f"the file says {channels} channels of an image, and at most {MOST_CHANNELS} are built")


def _channels(saved: dict[str, Any]) -> int:
    """Return how many channels it shall be built for: other than 3 where timm did so before."""
    channels = saved.get("spec", {}).get("channels", 3)
    if not saved["class"].startswith("timm.") or saved.get("expanded") is not None:
        return 3
    _check_channels(channels)
    return int(channels)


def _name(saved: dict[str, Any]) -> tuple[str, Any]:
    """Return the name for ``create_backbone``, and the transformers class where it was one that a family knows."""
    from adaptkit.demo.backbone import DEMO

    path = saved["class"]
    if path.startswith("transformers."):
        module, _, name = path.rpartition(".")
        # Nothing but the classes of the families is imported: a downloaded header names no code to run.
        return saved["source"], getattr(importlib.import_module(module), name) if path in registry.families() else None
    if saved["source"] == DEMO:
        return "demo", None
    return (f"hf-hub:{saved['source']}" if "/" in saved["source"] else saved["source"]), None


def check_public(name: str, revision: str | None, source: str) -> None:
    """Print where the backbone that a file names comes from.

    Raises ``ValueError`` where that is no name that everybody sees alike: ``org/repo`` of the Hub or a model of timm,
    at a branch or commit.
    """
    public = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and ".." not in name and not Path(name).exists()
    if not public or (revision and not re.fullmatch(r"\w[\w./-]*", revision)):
        at = f" at revision {revision!r:.80}" if revision else ""
        raise ValueError(
            f"{source} names the backbone {name!r:.200}{at}, expected org/repo of the Hub or a name of timm, that no "
            "folder here has: no path or URL is taken from a file. If you know it and trust it, give it yourself: "
            "from_pretrained(..., backbone=...)"
        )
    from huggingface_hub import constants

    where = f"{constants.ENDPOINT}/{name}" if "/" in name else f"timm's {name}"
    print(f"adaptkit: {source} was trained on {where}{f' at {revision}' if revision else ''}", file=sys.stderr)


def _named_by_peft(source: str, header: dict[str, Any], download: dict[str, Any]) -> nn.Module:
    name = header["metadata"].get("base_model")
    if not name:
        raise ValueError(
            "peft saved this LoRA without the name of its backbone: build that yourself and attach(model, folder), or "
            "give backbone="
        )
    check_public(name, None, source)
    try:
        return create_backbone(name, **download)
    except Exception as error:  # of any of the libraries that build it
        raise ValueError(
            f"{source} was trained on {name}, which cannot be built here: {error}. If you have it, give backbone="
        ) from error
