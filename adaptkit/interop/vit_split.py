"""The authors' ViT-Split checkpoints: copied blocks, prior and fusion, and the head of their segmentors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from adaptkit.adapters.vit_split import ViTSplitConfig
from adaptkit.core import registry
from adaptkit.core.registry import view
from adaptkit.core.view import Spec
from adaptkit.interop.loading import REMEDY, Checkpoint, filled, timm_vit
from adaptkit.interop.vit_adapter import resampled_positions
from adaptkit.model.adapted import AdaptedModel
from adaptkit.model.saved import check_tensors

# `backbone.bn_norm` is built and saved by the authors, and never used.
_OWN = re.compile(r"(split_head|frozen_conv|fusion_conv|up[1-4]|norm[1-4])\.")
_HEAD = re.compile(r"decode_head\.(up|bn|conv_seg)\.")
# What the authors' configs say beside ours, and is only compared.
_SAID = ("registers", "grid", "pad")


def vit_split(
    state_dict: dict[str, Tensor], backbone: nn.Module, load_backbone: bool, options: dict[str, Any]
) -> AdaptedModel:
    """Attach the authors' ViT-Split; see :func:`adaptkit.interop.from_official`."""
    head = Checkpoint({k.removeprefix("decode_head."): v for k, v in state_dict.items() if _HEAD.match(k)})
    if any(k.startswith("backbone.split_head.") for k in state_dict):
        state_dict = {k[len("backbone.") :]: v for k, v in state_dict.items() if k.startswith("backbone.")}
    official = Checkpoint({_our_key(k): v for k, v in state_dict.items()})
    own = Checkpoint({k: v for k, v in official.items() if _OWN.match(k)})
    spec = view(backbone).spec
    _check_known(own, official, spec)
    asked = registry.adapters()["vit-split"].configure({k: v for k, v in options.items() if k not in _SAID})
    config = _config(own, spec, asked, options)
    load = None
    if load_backbone:
        frozen = Checkpoint({k[len("backbone.") :]: v for k, v in official.items() if k.startswith("backbone.")})
        load = partial(_load_dinov2, frozen, backbone)
    if not head:
        return filled(backbone, config, own, load=load)
    upsample = ("upsample", {"num_classes": head.shape("conv_seg.bias", 1)[0], "dropout": 0.0, "resize": False})
    return filled(backbone, config, own, upsample, head, load=load)


def _our_key(key: str) -> str:
    """The gated FFN of the largest DINOv2 by timm's names; the fusion by that of the segmentors."""
    key = key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
    return re.sub(r"^fusion_net\.", "fusion_conv.", key)


def _check_known(own: Checkpoint, official: Checkpoint, spec: Spec) -> None:
    if "frozen_conv.0.weight" not in own or not any(k.startswith("split_head.") for k in own):
        raise ValueError(
            "the state dict has no 'split_head.*' and 'frozen_conv.0.weight', so it is no ViT-Split checkpoint"
        )
    if "learnable_gate.scores" in official:
        raise ValueError(
            "the checkpoint mixes all layers by a learnable gate ('learnable_gate.scores'); the variant with chosen "
            "layers (out_indices) is known here"
        )
    if "frozen_conv.2.weight" in own:
        raise ValueError(
            "the checkpoint has plain convolutions in the place of deformable ones (the authors' LLaVA variant); their "
            "dense models are known here"
        )
    dim = own.shape("frozen_conv.0.weight", 4)[0]
    if dim != spec.embed_dim:
        raise ValueError(f"the checkpoint has dim={dim}, the backbone dim={spec.embed_dim}; give a ViT of that width")
    depth = Checkpoint({k.removeprefix("backbone."): v for k, v in official.items()}).count("blocks")
    if depth not in (0, spec.depth):
        raise ValueError(
            f"the checkpoint's own ViT has {depth} blocks, the backbone {spec.depth}; give the ViT that it was trained "
            "on"
        )


def _config(own: Checkpoint, spec: Spec, asked: ViTSplitConfig, options: dict[str, Any]) -> ViTSplitConfig:
    """Read the config off the tensors' shapes; ``options`` adds the rest and must not contradict them."""
    copies = own.count("split_head")
    taps = own["frozen_conv.0.weight"].shape[1] // spec.embed_dim
    if asked.out_indices is None:
        raise ValueError(
            f"out_indices is not in the tensors: pass the {taps} blocks whose outputs the prior reads, e.g. "
            "out_indices=[2, 5, 8, 11]"
        )
    layers = tuple(range(spec.depth - copies, spec.depth)) if asked.select_layers is None else asked.select_layers
    for name, given, found in (("out_indices", asked.out_indices, taps), ("select_layers", layers, copies)):
        if len(given) != found:
            raise ValueError(f"{name}={list(given)} are {len(given)}, the checkpoint's tensors say {found}")
    registers = options.get("registers")
    if registers is not None and 1 + registers != spec.num_prefix_tokens:
        raise ValueError(
            f"registers={registers} and a class token are {1 + registers} prefix tokens, the backbone has "
            f"{spec.num_prefix_tokens}; give the ViT that the checkpoint was trained on"
        )
    detects = any(k.startswith("up1.") for k in own)
    if not detects and options.get("strides") is not None:
        raise ValueError(
            f"strides={options['strides']!r}: this is a segmentor's checkpoint, of one map at the stride of the patch; "
            "leave the option out"
        )
    return ViTSplitConfig(
        select_layers=layers,
        out_indices=asked.out_indices,
        strides=asked.strides if detects else None,
        norm=asked.norm,
        pad="corner" if detects else _pad(options.get("pad", "centre")),
        checkpoint=asked.checkpoint,
    )


def _pad(said: Any) -> Any:
    """How images are padded: a name, or what the authors' rule gave for one size, (left, right, top, bottom)."""
    if isinstance(said, str):
        return said
    if not isinstance(said, Sequence) or len(said) != 4:
        raise ValueError(f"pad={said!r}: give 'centre', 'corner', or what is padded (left, right, top, bottom)")
    left, right, top, bottom = said
    if (left, top) != ((left + right) // 2, (top + bottom) // 2):
        raise ValueError(f"pad={list(said)}: left and top are half of the padding, rounded down, in the authors' code")
    return "centre"


def _load_dinov2(official: dict[str, Tensor], backbone: nn.Module) -> None:
    """Load the authors' DINOv2, by the names of its hub, into a timm VisionTransformer."""
    vit = timm_vit(backbone)
    target = vit.state_dict()
    own = {k: v for k, v in official.items() if k in target}
    if "register_tokens" in official:
        own["reg_token"] = official["register_tokens"]
    positions = official["pos_embed"]
    if vit.no_embed_class:  # timm then keeps the position of the class token in the token
        own["cls_token"] = official["cls_token"] + positions[:, :1]
    grid = vit.patch_embed.grid_size
    if positions.shape[1] == 1 + grid[0] * grid[1]:
        own["pos_embed"] = positions[:, 1:] if vit.no_embed_class else positions
    else:
        own["pos_embed"] = resampled_positions(positions, vit)
    needed = {k: v for k, v in target.items() if not k.startswith(("head.", "fc_norm."))}
    known = (*needed, "mask_token", "register_tokens", "head.weight", "head.bias")
    given = {k: v for k, v in own.items() if k in needed} | {k: v for k, v in official.items() if k not in known}
    check_tensors(needed, given, "the DINOv2 part of the official checkpoint", REMEDY)
    vit.load_state_dict(own, strict=False)
