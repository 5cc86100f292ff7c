"""``from_pretrained``: a saved adapter and the backbone that its header records, in one call."""

from __future__ import annotations

import importlib
import os
from typing import Any

from torch import nn

from adaptkit.core import registry
from adaptkit.create import create_backbone
from adaptkit.hub.repository import load
from adaptkit.model.adapted import AdaptedModel, attach

__all__ = ["from_pretrained"]


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    backbone: nn.Module | str | None = None,
    head: Any = None,
    strict: bool = False,
    revision: str | None = None,
    subfolder: str = "",
    **download: Any,
) -> AdaptedModel:
    """Build the backbone that an adapter was trained on and attach the adapter; returns the model in eval mode.

    Args:
        source: a saved folder, or ``"org/name"`` on the Hub.
        backbone: in place of the one that the file records: a module, or a name for
            :func:`adaptkit.create.create_backbone`.
        head: where the saved one is a module of your own.
        strict: make other backbone weights than those it was trained on an error instead of a warning.
        revision: of the adapter's repository. The backbone is built at the revision that the file records.
        subfolder: of the folder or repository.
        download: ``token``, ``cache_dir`` and ``local_files_only``, for the adapter and, as far as its library takes
            them, for the backbone; ``force_download``, for the adapter.

    Raises what :func:`adaptkit.load` and :func:`adaptkit.attach` raise, and ``ValueError`` where the recorded backbone
    has no name or cannot be built.
    """
    file = load(source, revision=revision, subfolder=subfolder, **download)
    if isinstance(backbone, nn.Module):
        model = backbone
    elif backbone is not None:
        model = create_backbone(backbone)
    else:
        model = _recorded(str(source), file.header, {k: v for k, v in download.items() if k != "force_download"})
    return attach(model, file, head=head, strict=strict).eval()


def _recorded(source: str, header: dict[str, Any], download: dict[str, Any]) -> nn.Module:
    """Build the backbone that the header names."""
    saved = header["backbone"]
    if saved is None:  # a folder of peft
        return _named_by_peft(header)
    own = "build it yourself: adaptkit.attach(model, adaptkit.load(...)), or give backbone="
    if not saved["source"]:
        raise ValueError(
            f"{source} was trained on a {saved['class']} that did not know where its weights came from: the file "
            f"cannot name it; {own}"
        )
    needs_classifier = header["head"] is None and saved.get("classes", 0) > 0
    name, cls = _name(saved)
    try:
        model: Any = create_backbone(
            name, classifier=needs_classifier, cls=cls, revision=saved["revision"] or None, **download
        )
    except Exception as error:  # of any of the libraries that build it
        at = f" at revision {saved['revision']}" if saved["revision"] else ""
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
    return model


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


def _named_by_peft(header: dict[str, Any]) -> nn.Module:
    name = header["metadata"].get("base_model")
    if not name:
        raise ValueError(
            "peft saved this LoRA without the name of its backbone: build that yourself and attach(model, folder), or "
            "give backbone="
        )
    return create_backbone(name)
