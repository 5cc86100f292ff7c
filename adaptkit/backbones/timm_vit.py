"""timm's plain VisionTransformer: ViT, DeiT (1 to 3, distilled), MAE, DINO, DINOv2 (registers too), CLIP, hybrids."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from adaptkit.backbones._parallel import first_norm, is_parallel, parallel_block
from adaptkit.backbones._timm import (
    REMEDY,
    add_prefix_and_positions,
    block_list,
    by_head,
    channels,
    class_name,
    classifier_logits,
    head_count,
    is_bare,
    is_checkpointing,
    joined,
    patch_kernel,
    patch_side,
    patchify,
    perceptron,
    split_qkv,
    timm_answers,
    timm_sizes,
    timm_source,
)
from adaptkit.core.registry import register_family
from adaptkit.core.tree import unwrapped
from adaptkit.core.view import Block, Fn, Projections, Source, Spec, ViT, identity


@register_family(
    "timm.models.vision_transformer.VisionTransformer",
    "timm.models.deit.VisionTransformerDistilled",
)
class TimmViT(ViT):
    """Blocks ``x + ls(attn(norm(x)))``; absolute positions, resampled bicubic with antialias as timm does."""

    positions = "bicubic antialias"
    position_rules = ("bicubic antialias", "bicubic")

    def __init__(self, backbone: Any) -> None:
        sizes = (
            backbone.embed_dim,
            len(backbone.blocks),
            head_count(backbone),
            patch_side(backbone),
            backbone.num_prefix_tokens,
        )
        spec = Spec("timm-vit", *sizes, channels(backbone))
        super().__init__(backbone, spec)
        self.splits = all(_splits(unwrapped(blk)) for blk in backbone.blocks)

    def embed(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patches, prefix, positions, CLIP's ``norm_pre``."""
        backbone: Any = self.backbone
        antialias = self.positions == "bicubic antialias"
        return backbone.norm_pre(add_prefix_and_positions(backbone, patchify(backbone, image), grid, antialias))

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
        """timm's own blocks."""
        return [timm_block(blk) for blk in block_list(self.backbone.blocks)]

    def norm(self, x: Tensor) -> Tensor:
        """``backbone.norm``; the identity where timm norms after pooling (``fc_norm``)."""
        return self.backbone.norm(x)

    def classify(self, x: Tensor) -> Tensor | None:
        """``backbone.forward_head`` where it has classes."""
        return classifier_logits(self.backbone, x)

    def is_checkpointing(self) -> bool:
        """As ``set_grad_checkpointing`` left it."""
        return is_checkpointing(self.backbone)

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        """Patch kernel, first and last norms."""
        backbone: Any = self.backbone
        first, last = unwrapped(backbone.blocks[0]), unwrapped(backbone.blocks[-1])
        if is_parallel(first):
            return {"patch": patch_kernel(backbone), "first": first_norm(first).weight, "last": first_norm(last).weight}
        return {"patch": patch_kernel(backbone), "first": first.norm1.weight, "last": last.norm2.weight}

    def source(self) -> Source:
        """From ``pretrained_cfg``."""
        return timm_source(self)

    def sizes(self) -> Sequence[tuple[int, int]]:
        """The backbone's own, and another where it takes any."""
        return timm_sizes(self.backbone)

    def reference(self, image: Tensor) -> Tensor:
        """``backbone.forward_features``."""
        return self.backbone.forward_features(image)

    def answers(self, tokens: Tensor) -> Sequence[Tensor]:
        """``backbone.forward_head`` of them, or the tokens."""
        return timm_answers(self.backbone, tokens)


def timm_block(outer: Any) -> Block:
    """``outer``: the block as it runs, maybe compiled or wrapped; its parts are those of what is inside."""
    blk: Any = unwrapped(outer)
    if is_parallel(blk):
        return parallel_block(outer, blk)
    if not all(hasattr(blk, part) for part in ("norm1", "attn", "norm2", "mlp")):
        raise TypeError(f"timm's {class_name(blk)} is not of the form x + attn(norm(x)), x + mlp(norm(x)); {REMEDY}")
    attn = unwrapped(blk.attn)
    parts = {
        "attn": blk.attn,
        "mlp": blk.mlp,
        "qkv": partial(_qkv, attn),
        "out": partial(_out, attn),
        "projections": partial(_projections, blk.attn),
        "perceptron": partial(perceptron, blk.mlp),
    }
    scale1, scale2 = _scales(blk, "ls1", "drop_path1"), _scales(blk, "ls2", "drop_path2")
    if any(cls.__name__ == "ResPostBlock" for cls in type(blk).__mro__):  # x + norm(attn(x)): the norm as LayerScale
        return Block(run=outer, norm1=identity, scale1=blk.norm1, norm2=identity, scale2=blk.norm2, **parts)
    return Block(run=outer, norm1=blk.norm1, scale1=scale1, norm2=blk.norm2, scale2=scale2, **parts)


def _splits(blk: Any) -> bool:
    return not is_parallel(blk) and getattr(unwrapped(blk.attn), "gate", None) is None


def _scales(blk: Any, *names: str) -> Fn:
    return joined(*(getattr(blk, name, identity) for name in names))


def _projections(attn: Any) -> Projections | None:
    """Return the weights by head; None where a layer is no plain linear one (LoRA) or a norm spans the heads."""
    from timm.layers import Attention

    if not (is_bare(attn, Attention) and isinstance(attn.norm, nn.Identity)):
        return None
    bare = is_bare(attn.qkv, nn.Linear) and is_bare(attn.proj, nn.Linear)
    return by_head(attn.qkv, attn.proj, attn.num_heads, (attn.q_norm, attn.k_norm)) if bare else None


def _qkv(attn: nn.Module, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a: Any = attn
    q, k, v = split_qkv(a.qkv(h), a.num_heads)
    return a.q_norm(q), a.k_norm(k), v


def _out(attn: nn.Module, x: Tensor) -> Tensor:
    a: Any = attn
    return a.proj(a.norm(x.transpose(1, 2).flatten(2)))
