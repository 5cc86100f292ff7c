"""The authors' DAT checkpoints: a whole classifier or backbone, or one deformable attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from adaptkit.interop.loading import REMEDY
from adaptkit.mixers.dat import DeformableAttention
from adaptkit.model.saved import check_tensors

KERNELS = (9, 7, 5, 3)  # of the offset network, by the authors' stage_idx


def dat(state_dict: dict[str, Tensor], backbone: nn.Module | None, load_backbone: bool, options: Any) -> nn.Module:
    """Load a DAT; see :func:`adaptkit.interop.from_official`."""
    from adaptkit.models.dat import DAT

    state_dict = {k.removeprefix("module.").removeprefix("backbone."): v for k, v in state_dict.items()}
    if any(".local_perception_units." in k for k in state_dict):
        raise ValueError("the checkpoint is of DAT++ (it has local perception units); DAT of CVPR 2022 is known here")
    if "proj_q.weight" in state_dict:
        model: nn.Module = _attention(options) if backbone is None else backbone
    elif backbone is not None and not isinstance(backbone, DAT):
        raise ValueError(
            f"a DAT checkpoint goes into a DAT, this is {type(backbone).__name__}; leave it out to build one"
        )
    else:
        model = DAT(**options) if backbone is None else backbone
        state_dict = _fitting_head(state_dict, model)
    check_tensors(model.state_dict(), state_dict, "the official checkpoint", REMEDY)
    model.load_state_dict(state_dict)
    return model.eval()


def _attention(config: dict[str, Any]) -> DeformableAttention:
    """Build one attention from the authors' arguments: heads, head_dim, groups, hw, stride, offset_range_factor."""
    config = dict(config)
    needed = ("heads", "head_dim", "groups", "hw", "stage_idx" if config.get("kernel") is None else "kernel")
    missing = [name for name in needed if name not in config]
    if missing:
        raise ValueError(f"{', '.join(missing)}: not in the tensors of a single attention; pass them as options")
    kernel = config.pop("kernel", None) or KERNELS[config.pop("stage_idx")]
    size = config.pop("hw")
    return DeformableAttention(
        config["heads"] * config["head_dim"],
        heads=config["heads"],
        groups=config["groups"],
        size=size if isinstance(size, int) else tuple(size),
        kernel=kernel,
        stride=config.get("stride", 1),
        offset_range_factor=config.get("offset_range_factor", 2),
        bias="table" if config.get("use_pe", True) else None,
    )


def _fitting_head(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Leave the classifier out where the model has none; ``ValueError`` where it has another number of classes."""
    if model.num_classes == 0:
        return {k: v for k, v in state_dict.items() if not k.startswith("cls_head.")}
    classes = len(state_dict["cls_head.bias"]) if "cls_head.bias" in state_dict else None
    if classes not in (None, model.num_classes):
        raise ValueError(
            f"the checkpoint has {classes} classes, the model {model.num_classes}; build it with num_classes={classes} "
            "and call reset_classifier afterwards, or with num_classes=0"
        )
    return state_dict
