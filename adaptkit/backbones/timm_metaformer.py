"""timm's MetaFormer: PoolFormer, PoolFormerV2, ConvFormer, CAFormer. Four stages of maps, attention on tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.backbones._maps import as_tokens, on_nchw
from adaptkit.backbones._timm import block_list, is_checkpointing, joined, split_qkv, timm_source
from adaptkit.core.block import Block, Fn
from adaptkit.core.hierarchical import HierarchicalSpec, HierarchicalViT
from adaptkit.core.registry import register_family
from adaptkit.core.tree import unwrapped
from adaptkit.core.view import Source
from adaptkit.ops.grid import map_to_tokens, tokens_to_map


@register_family("timm.models.metaformer.MetaFormer")
class TimmMetaFormer(HierarchicalViT):
    """Blocks ``x + scale(mixer(norm(x)))``; the last two stages of the newer models also scale ``x`` (ResScale).

    Convolutions take the place of positions, so any size is native. There is no norm before pooling. Maps become tokens
    and maps again without a copy, in the memory layout that they came in: another one would pick other kernels,
    which round differently.
    """

    def __init__(self, backbone: Any) -> None:
        strides = [backbone.stem.conv.stride[0]]
        for stage in list(backbone.stages)[1:]:
            same = isinstance(stage.downsample, nn.Identity)
            strides.append(strides[-1] * (1 if same else stage.downsample.conv.stride[0]))
        dims = tuple(info["num_chs"] for info in backbone.feature_info)
        depths = tuple(len(stage.blocks) for stage in backbone.stages)
        channels = backbone.stem.conv.weight.shape[1]
        super().__init__(backbone, HierarchicalSpec("timm-metaformer", dims, depths, tuple(strides), channels))

    def embed(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """``backbone.stem``."""
        return as_tokens(self.backbone.stem(image))

    def enter(self, stage: int, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Downsampling, a strided convolution, where the stage has one."""
        backbone: Any = self.backbone
        return as_tokens(backbone.stages[stage].downsample(tokens_to_map(x, grid)))

    def blocks(self, stage: int, grid: tuple[int, int]) -> Sequence[Block]:
        """timm's own blocks; those on maps are given maps."""
        backbone: Any = self.backbone
        on_map = backbone.stages[stage].use_nchw

        def given(f: Fn) -> Fn:
            return partial(on_nchw, f, grid) if on_map else f

        return [_block(blk, given) for blk in block_list(backbone.stages[stage].blocks)]

    def norm(self, x: Tensor) -> Tensor:
        """The identity: timm norms after pooling."""
        return x

    def classify(self, x: Tensor, grid: tuple[int, int]) -> Tensor | None:
        """``backbone.forward_head`` where it has classes."""
        return self.backbone.forward_head(tokens_to_map(x, grid)) if self.backbone.num_classes > 0 else None

    def is_checkpointing(self) -> bool:
        """As ``set_grad_checkpointing`` left it, stage by stage."""
        return any(is_checkpointing(stage) for stage in self.backbone.stages)

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        """Stem kernel, and an MLP's weights in the first and the last block."""
        backbone: Any = self.backbone
        first, last = unwrapped(backbone.stages[0].blocks[0]), unwrapped(backbone.stages[-1].blocks[-1])
        return {"patch": backbone.stem.conv.weight, "first": first.mlp.fc1.weight, "last": last.mlp.fc2.weight}

    def source(self) -> Source:
        """From ``pretrained_cfg``."""
        return timm_source(self)

    def sizes(self) -> Sequence[tuple[int, int]]:
        """Any."""
        return [(2 * self.spec.patch_size, 3 * self.spec.patch_size)]

    def reference(self, image: Tensor) -> Tensor:
        """``backbone.forward_features``, its map as tokens."""
        return map_to_tokens(self.backbone.forward_features(image))


def _block(outer: Any, given: Callable[[Fn], Fn]) -> Block:
    """``outer``: the block as it runs, maybe compiled or wrapped; its parts are those of what is inside.

    ``given`` gives a part what it takes: tokens, or the map that they are.
    """
    from timm.models.metaformer import Attention

    blk: Any = unwrapped(outer)
    parts: dict[str, Any] = {
        "norm1": blk.norm1,
        "attn": blk.token_mixer,
        "scale1": joined(blk.drop_path1, blk.layer_scale1),
        "norm2": blk.norm2,
        "mlp": blk.mlp,
        "scale2": joined(blk.drop_path2, blk.layer_scale2),
    }
    if not (isinstance(blk.res_scale1, nn.Identity) and isinstance(blk.res_scale2, nn.Identity)):
        parts = dict.fromkeys(parts, _no_equation)
    parts = {name: given(f) for name, f in parts.items()}
    block = Block(run=given(outer), qkv=_no_qkv, out=_no_qkv, **parts)
    if not isinstance(blk.token_mixer, Attention):
        return block
    # Its norm is told also where the block scales x itself: what is attended to does not depend on that.
    return replace(block, norm1=given(blk.norm1), attended=partial(_attended, blk.token_mixer))


def _attended(attn: Any, h: Tensor) -> tuple[Tensor, Tensor]:
    """Normed tokens (B, N, D) -> attention (B, heads, N, N), and all N cells for each (N, N)."""
    q, k, _ = split_qkv(attn.qkv(h), attn.num_heads)
    count = h.shape[1]
    return (q @ k.mT * attn.scale).softmax(-1), torch.arange(count, device=h.device).expand(count, -1)


def _no_equation(x: Tensor) -> Any:
    raise TypeError("this block also scales x itself (ResScale), so it is not x + attn(norm(x)); run it as a whole")


def _no_qkv(x: Tensor) -> Any:
    raise TypeError("a MetaFormer's token mixer does not come apart into q, k and v; use an adapter around the block")
