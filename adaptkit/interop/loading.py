"""What every import of the authors' tensors does: check all of them, then write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.core.registry import view
from adaptkit.model.adapted import AdaptedModel, attach
from adaptkit.model.saved import check_tensors

__all__ = ["REMEDY", "Checkpoint", "filled", "timm_vit"]

REMEDY = "give the whole checkpoint, and the options that it was trained with"


class Checkpoint(dict[str, Tensor]):
    """The authors' tensors by our keys; one that is needed and missing is a ``ValueError`` that names it."""

    def __missing__(self, key: str) -> Tensor:
        raise ValueError(f"the official checkpoint has no {key!r}: {REMEDY}")

    def shape(self, key: str, dims: int) -> torch.Size:
        """Return the shape of a tensor that must have so many dimensions; ``ValueError`` where it has others."""
        found = self[key].shape
        if len(found) != dims:
            raise ValueError(f"{key!r} of the official checkpoint has shape {tuple(found)}, not {dims} dimensions")
        return found

    def count(self, name: str) -> int:
        """Return how many ``name.0.*``, ``name.1.*``, ... there are; ``ValueError`` for ``name.x.*``."""
        found = [key.split(".")[1] for key in self if key.startswith(f"{name}.")]
        strange = next((index for index in found if not index.isdecimal()), None)
        if strange is not None:
            raise ValueError(f"the official checkpoint has {name}.{strange}, and {name} are numbered: {REMEDY}")
        return 1 + max(map(int, found), default=-1)


def timm_vit(backbone: nn.Module) -> Any:
    """Return the backbone for the authors' ViT; ``ValueError`` where it is no timm VisionTransformer."""
    if view(backbone).spec.family != "timm-vit":
        raise ValueError(
            f"load_backbone=True needs a timm VisionTransformer, this is {type(backbone).__name__}; load the ViT's "
            "weights yourself and leave load_backbone out"
        )
    return backbone


def filled(
    backbone: nn.Module,
    adapter: Any,
    own: dict[str, Tensor],
    head: Any = None,
    of_head: dict[str, Tensor] | None = None,
    *,
    only: str = "",
    load: Callable[[], None] | None = None,
) -> AdaptedModel:
    """Attach, and load what the authors trained; returns the model in eval mode.

    Args:
        backbone: to attach to. It is left as it was where a tensor is missing, unexpected or of another shape.
        adapter: its config; None: there is a head alone.
        own: tensors of the adapter, by our keys.
        head, of_head: a head as ``attach`` takes it, and its tensors.
        only: of the adapter's tensors the checkpoint holds those whose keys begin so.
        load: writes the checkpoint's ViT into the backbone; called when the tensors are known to fit.

    Raises ``ValueError`` that names the tensors, and what ``load`` raises.
    """
    adapters = () if adapter is None else (adapter,)
    model = attach(backbone, *adapters, head=head)
    try:
        _check(model, own, of_head, only)
    except ValueError:
        model.detach()
        raise
    if load is not None:
        model.detach()  # what is attached knows the weights that it was attached to
        load()
        model = attach(backbone, *adapters, head=head)
    for module, tensors in _parts(model, own, of_head):
        module.load_state_dict(tensors, strict=not only)
    return model.eval()


def _parts(
    model: AdaptedModel, own: dict[str, Tensor], of_head: dict[str, Tensor] | None
) -> list[tuple[nn.Module, dict[str, Tensor]]]:
    """Each module with its tensors, and the counters that inference does not need."""
    modules: list[tuple[Any, dict[str, Tensor]]] = [(one, own) for one in model.adapters.values()]
    modules += [] if of_head is None else [(model.head, of_head)]
    return [
        (module, {**{k: torch.zeros_like(x) for k, x in module.state_dict().items() if _counts(k)}, **tensors})
        for module, tensors in modules
    ]


def _counts(key: str) -> bool:
    return key.endswith("num_batches_tracked")


def _check(model: AdaptedModel, own: dict[str, Tensor], of_head: dict[str, Tensor] | None, only: str) -> None:
    for module, tensors in _parts(model, own, of_head):
        is_head = module is model.head
        needed = {k: x for k, x in module.state_dict().items() if is_head or k.startswith(only)}
        check_tensors(needed, tensors, f"the {'head of the ' * is_head}official checkpoint", REMEDY)
