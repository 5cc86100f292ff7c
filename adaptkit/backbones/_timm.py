"""What timm's plain transformers share: patches, prefix tokens, positions, provenance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.core.block import Fn, MLPLayers, Projections, identity
from adaptkit.core.registry import OWN_FAMILY
from adaptkit.core.tree import unwrapped
from adaptkit.core.view import Source, View
from adaptkit.ops.grid import map_to_tokens

REMEDY = f"use a backbone without it, or register a family of its own: {OWN_FAMILY}"


def class_name(module: nn.Module) -> str:
    """Return the name of a module's class; of a sharded one (FSDP2 derives a class) of what it was."""
    return next(c.__name__ for c in type(unwrapped(module)).__mro__ if not c.__name__.startswith("FSDP"))


def is_named(module: Any, *names: str) -> bool:
    """Whether a module's class, or one above it, has one of these names."""
    return any(cls.__name__ in names for cls in type(module).__mro__)


def is_bare(module: Any, cls: type[nn.Module]) -> bool:
    """Whether a module is of exactly this class and nothing else acts when it runs: no wrapper, hook or own forward.

    Only then may its weights be read in place of running it, and only if they are plain numbers (torchao's are not).
    """
    acts = (module._forward_hooks, module._forward_pre_hooks, module._compiled_call_impl, vars(module).get("forward"))
    plain = all(type(p) in (Tensor, nn.Parameter) for p in module.parameters(recurse=False))
    return type(module) is cls and plain and not any(acts)


def pair(sides: int | Sequence[int]) -> tuple[int, int]:
    """Return (height, width) of a square's side, or of both."""
    height, width = (sides, sides) if isinstance(sides, int) else sides
    return int(height), int(width)


def square_side(patch: int | Sequence[int]) -> int:
    """Return the side of the square patch; ``TypeError`` for an oblong one."""
    height, width = pair(patch)
    if height != width:
        raise TypeError(f"patches of {height}x{width} pixels are not square; an adapter needs one patch side")
    return height


def patch_sides(embed: Any) -> tuple[int, int]:
    """Return (height, width) of what one token covers, in pixels."""
    if is_named(embed, "HybridEmbed") and not is_named(embed, "HybridEmbedWithSize"):
        return embed.feat_ratio(as_scalar=False)
    if not is_named(embed, "PatchEmbed", "PatchEmbedWithSize"):
        raise TypeError(
            f"patch embedding {type(embed).__name__} is neither a strided convolution (PatchEmbed) nor a network "
            f"before one (HybridEmbed), which the adapters' grid and the resizing of positions rest on; {REMEDY}"
        )
    return embed.patch_size


def patch_kernel(backbone: Any) -> Tensor:
    """Return the kernel (D, C, p, p) that reads the image; before a hybrid's tokens, that of its stem (E, C, k, k)."""
    embed = backbone.patch_embed
    if not hasattr(embed, "backbone"):
        return embed.proj.weight
    return reading_layer(embed.backbone).weight


def reading_layer(stem: nn.Module) -> Any:
    """Return the first convolution of a stem, which reads the image; one of more channels is no ``nn.Conv2d``."""
    return next(m for m in stem.modules() if hasattr(m, "in_channels") and getattr(m, "weight", None) is not None)


def channels(backbone: Any) -> int:
    """Return how many channels the image has, by the kernel that reads it."""
    return int(patch_kernel(backbone).shape[1])


def patchify(backbone: Any, image: Tensor) -> Tensor:
    """(B, C, h*p, w*p) -> (B, h*w, D): timm's PatchEmbed without its fixed sizes; a hybrid's network first."""
    embed = backbone.patch_embed
    if hasattr(embed, "backbone"):
        image = embed.backbone(image)
        image = image[-1] if isinstance(image, list | tuple) else image
        return map_to_tokens(embed.proj(image))
    return embed.norm(map_to_tokens(embed.proj(image)))


def resampled(table: Tensor, grid: tuple[int, int], antialias: bool = False, corners: bool = False) -> Tensor:
    """Positions (1, n*n, D) of a square grid on another one, bicubic; ``corners``: with the corners aligned."""
    side = math.isqrt(table.shape[1])
    square = table.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    square = F.interpolate(square, size=grid, mode="bicubic", align_corners=corners, antialias=antialias)
    return map_to_tokens(square)


def resampled_positions(backbone: Any, grid: tuple[int, int], prefix: int, antialias: bool = True) -> Tensor:
    """Return the position table (1, prefix + h*w, D) on another grid, bicubic; the table itself on its own.

    timm's own rule has antialias. It only shortcuts on the table's own grid; an export keeps that grid's shortcut as a
    constant shape.
    """
    from timm.layers import resample_abs_pos_embed

    native = tuple(backbone.patch_embed.grid_size)
    if grid == native:
        return backbone.pos_embed
    return resample_abs_pos_embed(
        backbone.pos_embed,
        new_size=list(grid),
        old_size=list(native),
        num_prefix_tokens=prefix,
        antialias=antialias,
    )


def prefix_tokens(backbone: Any) -> list[Tensor]:
    """Return class, distillation and register tokens in timm's order, each (1, n, D)."""
    tokens = [backbone.cls_token, getattr(backbone, "dist_token", None), getattr(backbone, "reg_token", None)]
    return [t for t in tokens if t is not None]


def add_prefix_and_positions(backbone: Any, x: Tensor, grid: tuple[int, int], antialias: bool = True) -> Tensor:
    """(B, h*w, D) -> (B, P + h*w, D), positions added before or after the prefix joins, as the backbone does."""
    prefix = [t.expand(x.shape[0], -1, -1) for t in prefix_tokens(backbone)]
    no_embed_class = getattr(backbone, "no_embed_class", False)
    if backbone.pos_embed is not None and no_embed_class:
        x = x + resampled_positions(backbone, grid, 0, antialias)
    if prefix:  # with none, a copy would lie otherwise in memory than the backbone's tokens, and sums round otherwise
        x = torch.cat([*prefix, x], dim=1)
    if backbone.pos_embed is not None and not no_embed_class:
        x = x + resampled_positions(backbone, grid, backbone.num_prefix_tokens, antialias)
    return x


def split_qkv(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, 3*heads*E) -> three of (B, heads, N, E)."""
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def fused_qkv(attn: Any, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v from one layer; EVA and BEiT keep a bias for q and v beside it, and none for k."""
    if getattr(attn, "q_bias", None) is None:
        return split_qkv(attn.qkv(h), attn.num_heads)
    bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    return split_qkv(F.linear(h, attn.qkv.weight, bias), attn.num_heads)


def merge_heads(proj: nn.Module, x: Tensor) -> Tensor:
    """(B, heads, P+N, E) -> (B, P+N, D)."""
    return proj(x.transpose(1, 2).flatten(2))


def by_head(qkv: Any, proj: Any, heads: int, norms: tuple[Fn, Fn] = (identity, identity)) -> Projections | None:
    """See a fused ``qkv`` and its ``proj`` head by head, without a copy; None where one is no plain linear layer."""
    if not (is_bare(qkv, nn.Linear) and is_bare(proj, nn.Linear)):
        return None
    dim, inner = qkv.in_features, proj.in_features
    weight = qkv.weight.view(3, heads, inner // heads, dim)
    bias = None if qkv.bias is None else qkv.bias.view(3, heads, inner // heads)
    return Projections((weight,), (bias,), norms, proj.weight.view(-1, heads, inner // heads), proj.bias)


def mlp_layers(mlp: Any) -> MLPLayers | None:
    """See timm's Mlp layer by layer; None for another class, a norm inside, or layers that are replaced (LoRA)."""
    from timm.layers import Mlp

    if not (is_bare(mlp, Mlp) and type(mlp.norm) is nn.Identity):
        return None
    return two_layers(mlp.fc1, mlp.act, mlp.fc2)


def two_layers(first: Any, activation: Any, second: Any) -> MLPLayers | None:
    """Return an MLP of two linear layers; None where one of them is replaced (LoRA)."""
    bare = is_bare(first, nn.Linear) and is_bare(second, nn.Linear)
    return MLPLayers(first, activation, second) if bare else None


def layer_scale(gamma: Tensor | None) -> Fn:
    """LayerScale as EVA and BEiT hold it: a bare parameter, or None."""
    return identity if gamma is None else partial(torch.mul, gamma)


def joined(*parts: Fn) -> Fn:
    """Return these parts one after the other; those that do nothing are left out."""
    kept = [p for p in parts if p is not identity and not isinstance(p, nn.Identity)]
    if not kept:
        return identity
    return kept[0] if len(kept) == 1 else partial(_chain, kept)


def _chain(parts: list[Fn], x: Tensor) -> Tensor:
    for part in parts:
        x = part(x)
    return x


def block_list(blocks: Any) -> Sequence[Any]:
    """Return the blocks of a backbone one by one; ``TypeError`` where they were compiled or wrapped all in one."""
    if unwrapped(blocks) is not blocks:
        raise TypeError(
            f"the blocks are inside one {type(blocks).__name__}, and adapters run them one by one: compile or wrap "
            "each (`for i, block in enumerate(blocks): blocks[i] = torch.compile(block)`), or the adapted model"
        )
    return blocks


def output_of(part: Any, backbone: Any, image: Tensor) -> Tensor:
    """Return what a part of the backbone gives while the backbone runs on an image."""
    kept: list[Tensor] = []
    hook = part.register_forward_hook(lambda module, args, out: kept.append(out))
    backbone(image)
    hook.remove()
    return kept[0]


def is_checkpointing(backbone: Any) -> bool:
    """Whether ``set_grad_checkpointing`` was called on a backbone whose blocks are one list."""
    return bool(getattr(backbone, "grad_checkpointing", False))


def timm_source(view: View) -> Source:
    """Read where the backbone of a view comes from."""
    backbone: Any = view.backbone
    return view.origin or cfg_source(
        getattr(backbone, "pretrained_cfg", None), backbone.num_classes, view.spec.channels
    )


def cfg_source(cfg: dict[str, Any] | None, classes: int, channels: int) -> Source:
    """Read timm's ``pretrained_cfg``; the revision stands behind the Hub id where one was asked for.

    A backbone built for another number of ``channels`` keeps the normalisation of the first ones: it says nothing.
    """
    cfg = cfg or {}
    name, tag = cfg.get("architecture", ""), cfg.get("tag", "")
    hub_id, _, revision = (cfg.get("hf_hub_id") or "").partition("@")
    mean, std = tuple(cfg.get("mean") or ()), tuple(cfg.get("std") or ())
    known = len(mean) == len(std) == channels
    return Source(
        id=hub_id or (f"{name}.{tag}" if name and tag else name),
        revision=revision,
        mean=mean if known else (),
        std=std if known else (),
        classes=classes,
        **_framing(cfg),
    )


def _framing(cfg: dict[str, Any]) -> dict[str, Any]:
    """How images are framed in evaluation, as ``timm.data.create_transform`` reads the same record."""
    side = int((cfg.get("input_size") or (0, 0, 0))[-1])
    squash = cfg.get("crop_mode") == "squash"
    return {
        "resize": 0 if squash else math.floor(side / (cfg.get("crop_pct") or 0.875)),
        "crop": side,
        "squash": squash,
        "interpolation": cfg.get("interpolation") or "bicubic",
    }
