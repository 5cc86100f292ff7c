"""What ``repr(model)`` says: which backbone, what of it is frozen, what is trained, by which adapters and head.

The module tree is still there: ``torch.nn.Module.__repr__(model)``, or ``print(model.backbone)``.
"""

from __future__ import annotations

from typing import Any

from adaptkit.core.hierarchical import HierarchicalSpec
from adaptkit.core.shown import Rows, Shown, changed, counted

__all__ = ["ShownModel"]


class ShownModel(Shown):
    """``repr`` and the notebook's table of an ``AdaptedModel``."""

    def _shown(self) -> tuple[str, Rows]:
        model: Any = self
        if model.__dict__.get("_vit") is None:
            return f"{type(self).__name__} (detached)", [("sets", ", ".join(model.sets))]
        vit = model._vit
        trained, every = model.get_nb_trainable_parameters()
        rows = [
            ("backbone", f"{_source(vit)}, seen as {vit.spec.family}: {_structure(vit.spec)}"),
            ("frozen", counted(every - trained, "parameter")),
            ("trained", f"{counted(trained, 'parameter')} ({100 * trained / max(every, 1):.2f} % of all)"),
            *_set_rows(model),
            ("mode", _mode(model)),
        ]
        return f"{type(self).__name__} on {type(vit.backbone).__name__}", rows


def _source(vit: Any) -> str:
    return vit.source().id or f"an unnamed {type(vit.backbone).__name__}"


def _structure(spec: Any) -> str:
    if isinstance(spec, HierarchicalSpec):
        stages = " + ".join(map(str, spec.depths))
        return f"{stages} blocks of width {', '.join(map(str, spec.embed_dims))}, {counted(spec.channels, 'channel')}"
    return (
        f"{counted(spec.depth, 'block')} of width {spec.embed_dim}, {counted(spec.num_heads, 'head')}, patch "
        f"{spec.patch_size}, {counted(spec.num_prefix_tokens, 'prefix token')}, {counted(spec.channels, 'channel')}"
    )


def _set_rows(model: Any) -> Rows:
    """Adapters, head and strides of the active set, and the names of all where there are several."""
    if model._active is None:
        return [("adapters", "all were deleted")]
    acting = model._acting
    rows = [("adapter", f"{name}: {changed(a.config)}") for name, a in zip(acting.adapters, acting)]
    if acting.backbone is not None:
        rows.append(("trained too", f"of the backbone: {', '.join(acting.backbone.config)}"))
    rows.append(("head", _head(acting, model._vit.source().classes)))
    if acting.strides:
        rows.append(("strides", ", ".join(map(str, acting.strides))))
    if len(model.sets) > 1 or model._active != "default":
        acting = {n: f"{share:.3g} of the mean" for n, share in model._shares.items()} or {model._active: "active"}
        named = (f"{name} ({acting[name]})" if name in acting else name for name in model.sets)
        rows.append(("sets", ", ".join(named)))
    return rows or [("adapter", "none")]


def _head(acting: Any, classes: int) -> str:
    if acting.head is None:
        return f"the backbone's own, {classes} classes" if classes else "none"
    if acting.head_entry is None:
        return f"{type(acting.head).__name__}, a module of your own"
    return f"{acting.head_entry.name}: {changed(acting.head.config)}"


def _mode(model: Any) -> str:
    said = "training" if model.training else "evaluation"
    said += ", adapters disabled" if model._disabled else ""
    return said + (", merged into the weights" if model._merged else "")
