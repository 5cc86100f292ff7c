"""Official checkpoints in: the authors' state dicts become attached models. And LoRA out, to peft."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from adaptkit.core.near import hint
from adaptkit.interop import adavit, dat, pmt, vit_adapter, vit_split
from adaptkit.interop.peft import to_peft

__all__ = ["from_official", "to_peft"]

_METHODS: dict[str, Callable[..., nn.Module]] = {
    "adavit": adavit.adavit,
    "dat": dat.dat,
    "pmt": pmt.pmt,
    "vit-adapter": vit_adapter.vit_adapter,
    "vit-split": vit_split.vit_split,
}


def from_official(
    method: str,
    state_dict: dict[str, Tensor],
    backbone: nn.Module | None = None,
    *,
    load_backbone: bool = False,
    **options: Any,
) -> Any:
    """Attach an official checkpoint to a backbone, or load one that is a backbone itself (DAT).

    Args:
        method: ``"vit-adapter"``, ``"vit-split"``, ``"adavit"``, ``"dat"`` or ``"pmt"``.
        state_dict: the authors' tensors, with or without the ``backbone.`` (PMT: ``network.``) prefix; tensors of
            necks, heads and optimisers are left aside. A whole checkpoint ``{"state_dict": ...}`` is opened.
        backbone: the model to attach to, with its own weights unless ``load_backbone``. The official ViT-Adapter has
            LayerScale and no class token: give a timm ViT built with ``class_token=False, global_pool="avg",
            fc_norm=False, init_values=1.0``. For AdaViT give timm's DeiT, whose classifier makes the logits, for
            ViT-Split a DINOv2 of timm or transformers. For ``"dat"`` give a :class:`~adaptkit.models.DAT` of any size,
            or None to build one from the options.
        load_backbone: also load the ViT part of the checkpoint into the backbone, where its keys fit.
        options: config fields that the tensors do not tell. For ``"vit-adapter"`` these are ``add_vit_feature``
            (``"last"`` for detection, ``"per-stage"`` for segmentation, or ``None``), ``interaction_indexes`` where
            the depth does not divide by their number, and ``deform_num_heads`` or ``n_points`` where a head does not
            have the four points of every official configuration. For ``"adavit"`` it is ``head_mode`` (``"full"``:
            ``--ada-head``, ``"partial"``: ``--ada-head-attn``) where the checkpoint has head gates; the authors'
            thresholds (0.6 for patches, 0.5) are the defaults. For ``"vit-split"`` they are ``out_indices``, and
            ``select_layers`` where these are not the last blocks; ``registers`` is compared, and ``pad`` is
            ``"centre"`` as in the authors' code or ``"corner"``. The one map of their segmentors is at the stride of
            the patch, their logits four times as fine. For ``"dat"`` they are the authors' constructor
            arguments, ``dims``, ``stage_spec`` and so on; for the tensors of a single attention ``heads``,
            ``head_dim``, ``groups``, ``hw``, ``stride``, ``offset_range_factor`` and ``kernel`` or ``stage_idx``.
            For ``"pmt"``, a decoder without its encoder, these are ``interaction_indices`` where they are not the last
            block of each quarter, ``heads`` where they are not the backbone's, ``residual_projection=False``, and
            ``task`` and ``things``; the grid comes with each image. ``model.head.predictions(levels, grid,
            masked=True)`` has the predictions before each block too, in either mode.

    Returns the attached model in eval mode; for ``"dat"`` the DAT, or the one attention. Raises ``ValueError`` where
    tensors are missing or do not fit the backbone, or where an option is needed, by name, ``TypeError`` for what is no
    state dict; the backbone is then as it was.
    """
    if method not in _METHODS:
        known = ", ".join(sorted(_METHODS))
        raise ValueError(f"no official checkpoints are known for {method!r}{hint(method, _METHODS)}; known: {known}")
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"the checkpoint is a {type(state_dict).__name__}; give the authors' tensors by name, a state dict"
        )
    if backbone is None and method != "dat":
        raise ValueError(f"{method!r} needs the backbone that the checkpoint is attached to; give a ViT")
    for whole in ("state_dict_ema", "state_dict", "model"):
        if isinstance(state_dict.get(whole), dict):
            state_dict = state_dict[whole]  # type: ignore[assignment]
            break
    strange = next((k for k, v in state_dict.items() if not (isinstance(k, str) and isinstance(v, Tensor))), None)
    if strange is not None:
        raise TypeError(
            f"the checkpoint has {strange!r}: {type(state_dict[strange]).__name__}; give the authors' tensors by name"
        )
    state_dict = {key.removeprefix("module."): tensor for key, tensor in state_dict.items()}  # as DDP saves it
    return _METHODS[method](state_dict, backbone, load_backbone, options)
