"""Modules that have moved: their old import paths still work, with a ``DeprecationWarning``."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

__all__ = ["MOVED", "install"]

MOVED = {
    "adaptkit.accounting": "adaptkit.analysis.accounting",
    "adaptkit.cache": "adaptkit.features.cache",
    "adaptkit.card": "adaptkit.hub.card",
    "adaptkit.checkpointing": "adaptkit.core.checkpointing",
    "adaptkit.digest": "adaptkit.hub.digest",
    "adaptkit.facts": "adaptkit.model.facts",
    "adaptkit.file": "adaptkit.hub.file",
    "adaptkit.hosts": "adaptkit.create",
    "adaptkit.hub.printable": "adaptkit.core.printable",
    "adaptkit.hub_errors": "adaptkit.hub.errors",
    "adaptkit.inspect": "adaptkit.analysis",
    "adaptkit.inspect.draw": "adaptkit.analysis.draw",
    "adaptkit.inspect.kept": "adaptkit.analysis.kept",
    "adaptkit.inspect.points": "adaptkit.analysis.points",
    "adaptkit.layers": "adaptkit.core.layers",
    "adaptkit.many": "adaptkit.model.many",
    "adaptkit.metadata": "adaptkit.hub.metadata",
    "adaptkit.owner": "adaptkit.model.owner",
    "adaptkit.parts": "adaptkit.model.parts",
    "adaptkit.peft_folder": "adaptkit.adapters.lora.peft_folder",
    "adaptkit.proof": "adaptkit.model.proof",
    "adaptkit.pyramid": "adaptkit.model.pyramid",
    "adaptkit.recorded": "adaptkit.features.cached",
    "adaptkit.registry": "adaptkit.core.registry",
    "adaptkit.replay": "adaptkit.features.replay",
    "adaptkit.saved_head": "adaptkit.model.saved_head",
    "adaptkit.sets": "adaptkit.model.sets",
    "adaptkit.sharding": "adaptkit.model.sharding",
    "adaptkit.staged": "adaptkit.core.hierarchical",
    "adaptkit.trainable": "adaptkit.model.trainable",
    "adaptkit.trained": "adaptkit.model.trained",
    "adaptkit.tree": "adaptkit.core.tree",
    "adaptkit.vit": "adaptkit.core.view",
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module by its old name."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        old, new = module.__name__, MOVED[module.__name__]
        warnings.warn(f"{old} has moved to {new}; the old path will go", DeprecationWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(new)  # the very module, so that patching one is patching both


def install() -> None:
    """Let the old paths be imported."""
    sys.meta_path.insert(0, _Finder())  # first: a moved package would be looked into
