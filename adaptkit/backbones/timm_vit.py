"""timm's plain VisionTransformer: ViT, DeiT (1 to 3, distilled), MAE, DINO, DINOv2 (registers too), CLIP, SigLIP."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from adaptkit.backbones._timm import (
    add_prefix_and_positions,
    by_head,
    channels,
    class_name,
    classifier_logits,
    is_checkpointing,
    joined,
    patch_side,
    patchify,
    perceptron,
    split_qkv,
    timm_source,
)
from adaptkit.registry import register_family
from adaptkit.vit import Block, Projections, Source, Spec, ViT, identity


@register_family(
    "timm.models.vision_transformer.VisionTransformer",
    "timm.models.deit.VisionTransformerDistilled",
)
class TimmViT(ViT):
    """Blocks ``x + ls(attn(norm(x)))``; absolute positions, resampled bicubic with antialias as timm does."""

    positions = "bicubic antialias"

    def __init__(self, host: Any) -> None:
        heads = {blk.attn.num_heads for blk in host.blocks}
        if len(heads) != 1:
            raise TypeError(f"blocks with different head counts {sorted(heads)} have no single Spec.heads")
        sizes = (host.embed_dim, len(host.blocks), heads.pop(), patch_side(host), host.num_prefix_tokens)
        spec = Spec("timm-vit", *sizes, channels(host))
        super().__init__(host, spec)

    def embed(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patches, prefix, positions, CLIP's ``norm_pre``."""
        host: Any = self.host
        return host.norm_pre(add_prefix_and_positions(host, patchify(host, image), grid))

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
        """timm's own blocks."""
        return [_block(blk) for blk in self.host.blocks]

    def norm(self, x: Tensor) -> Tensor:
        """``host.norm``; the identity where timm norms after pooling (``fc_norm``)."""
        return self.host.norm(x)

    def classify(self, x: Tensor) -> Tensor | None:
        """``host.forward_head`` where it has classes."""
        return classifier_logits(self.host, x)

    def is_checkpointing(self) -> bool:
        """As ``set_grad_checkpointing`` left it."""
        return is_checkpointing(self.host)

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        """Patch kernel, first and last norms."""
        host: Any = self.host
        first, last = host.blocks[0], host.blocks[-1]
        return {"patch": host.patch_embed.proj.weight, "first": first.norm1.weight, "last": last.norm2.weight}

    def source(self) -> Source:
        """From ``pretrained_cfg``."""
        return timm_source(self)


def _block(blk: Any) -> Block:
    kind = class_name(blk)
    parts = {
        "attn": blk.attn,
        "mlp": blk.mlp,
        "qkv": partial(_qkv, blk.attn),
        "out": partial(_out, blk.attn),
        "projections": partial(_projections, blk.attn),
        "perceptron": partial(perceptron, blk.mlp),
    }
    if kind == "Block":
        scale1, scale2 = joined(blk.ls1, blk.drop_path1), joined(blk.ls2, blk.drop_path2)
        return Block(run=blk, norm1=blk.norm1, scale1=scale1, norm2=blk.norm2, scale2=scale2, **parts)
    if kind == "ResPostBlock":  # x + norm(attn(x)): the norm stands where LayerScale does
        return Block(run=blk, norm1=identity, scale1=blk.norm1, norm2=identity, scale2=blk.norm2, **parts)
    raise TypeError(
        f"timm's {kind} is not of the form x + attn(norm(x)), x + mlp(norm(x)), so it cannot be seen as one"
    )


def _projections(attn: Any) -> Projections | None:
    """Return the weights by head; None where a layer is no plain linear one (LoRA) or a norm spans the heads."""
    plain = type(attn.qkv) is nn.Linear and type(attn.proj) is nn.Linear and isinstance(attn.norm, nn.Identity)
    return by_head(attn.qkv, attn.proj, attn.num_heads, (attn.q_norm, attn.k_norm)) if plain else None


def _qkv(attn: nn.Module, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a: Any = attn
    q, k, v = split_qkv(a.qkv(h), a.num_heads)
    return a.q_norm(q), a.k_norm(k), v


def _out(attn: nn.Module, x: Tensor) -> Tensor:
    a: Any = attn
    return a.proj(a.norm(x.transpose(1, 2).flatten(2)))
