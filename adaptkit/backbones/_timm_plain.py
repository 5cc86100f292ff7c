"""The view of timm's plain transformers, as far as their classes are alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from adaptkit.backbones import _parallel as parallel
from adaptkit.backbones._timm import (
    REMEDY,
    block_list,
    class_name,
    is_checkpointing,
    patch_kernel,
    patch_sides,
    square_side,
    timm_source,
)
from adaptkit.core.tree import unwrapped
from adaptkit.core.view import Source, Spec, ViT

__all__ = ["TimmPlain"]


class TimmPlain(ViT):
    """A class of timm with ``blocks`` in one list, ``forward_features`` and ``forward_head``."""

    family: str  #: for ``Spec.family``

    def __init__(self, backbone: Any) -> None:
        self.backbone = backbone  # `kernel` and `patch_sides` read it
        prefix = getattr(backbone, "num_prefix_tokens", 0)
        sizes = (backbone.embed_dim, len(backbone.blocks), _head_count(backbone), square_side(self.patch_sides()))
        super().__init__(backbone, Spec(self.family, *sizes, prefix, int(self.kernel().shape[1])))
        self.splits = self.splits and all(_splits(unwrapped(blk)) for blk in backbone.blocks)

    @property
    def has_class_token(self) -> bool:
        """Not where there are registers alone, as in ``vit_*_reg4_gap_*``."""
        holder: Any = getattr(self.backbone, "embeds", self.backbone)  # of NaFlexVit
        return super().has_class_token and getattr(holder, "cls_token", None) is not None

    def patch_sides(self) -> tuple[int, int]:
        """Return (height, width) of what one token covers, in pixels."""
        return patch_sides(self.backbone.patch_embed)

    def kernel(self) -> Tensor:
        """Return the kernel (D, C, p, p) that reads the image."""
        return patch_kernel(self.backbone)

    def norm(self, x: Tensor) -> Tensor:
        """``backbone.norm``; the identity where timm norms after pooling (``fc_norm``)."""
        return self.backbone.norm(x)

    def classify(self, x: Tensor) -> Tensor | None:
        """``backbone.forward_head``; None for a backbone built with ``num_classes=0``."""
        backbone: Any = self.backbone
        return backbone.forward_head(x) if backbone.num_classes > 0 else None

    def is_checkpointing(self) -> bool:
        """As ``set_grad_checkpointing`` left it."""
        return is_checkpointing(self.backbone)

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        """Patch kernel, first and last norms."""
        first, last = (unwrapped(self.backbone.blocks[i]) for i in (0, -1))
        if parallel.is_parallel(first):
            norms = parallel.first_norm(first), parallel.first_norm(last)
        else:
            norms = first.norm1, last.norm2
        return {"patch": self.kernel(), "first": norms[0].weight, "last": norms[1].weight}

    def source(self) -> Source:
        """From ``pretrained_cfg``."""
        return timm_source(self)

    def sizes(self) -> Sequence[tuple[int, int]]:
        """The size that the backbone was built for, and another where it takes any."""
        embed: Any = self.backbone.patch_embed
        size, (height, width) = embed.img_size, self.patch_sides()
        if getattr(embed, "strict_img_size", True):
            return [] if size is None else [(size[0], size[1])]
        native = [] if size is None else [(size[0] // height * height, size[1] // width * width)]
        return [*native, (3 * height, 5 * width)]

    def reference(self, image: Tensor) -> Tensor:
        """``backbone.forward_features``."""
        return self.backbone.forward_features(image)

    def answers(self, tokens: Tensor) -> Sequence[Tensor]:
        """``backbone.forward_head`` of them, logits or pooled features, or the tokens."""
        return self.backbone.forward_head(tokens), tokens


def _head_count(backbone: Any) -> int:
    """Return the heads of each block; ``TypeError`` where blocks have no attention, or different counts."""
    attentions: list[Any] = []
    for block in map(unwrapped, block_list(backbone.blocks)):
        attentions += parallel.attentions(block) if parallel.is_parallel(block) else [getattr(block, "attn", None)]
    if not attentions or any(attn is None for attn in attentions):
        kinds = ", ".join(sorted({class_name(block) for block in backbone.blocks})) or "no block"
        raise TypeError(f"{kinds} is not of the form x + attn(norm(x)), x + mlp(norm(x)); {REMEDY}")
    counts = {unwrapped(attn).num_heads for attn in attentions}
    if len(counts) != 1:
        raise TypeError(f"blocks with different head counts {sorted(counts)} have no single Spec.num_heads; {REMEDY}")
    return counts.pop()


def _splits(blk: Any) -> bool:
    """Whether the attention comes apart into q, k, v and heads: not side by side, and not gated by the input."""
    return not parallel.is_parallel(blk) and getattr(unwrapped(blk.attn), "gate", None) is None
