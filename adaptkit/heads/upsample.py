"""ViT-Split's segmentation head (Li et al., ICCV 2025): two transposed convolutions, then one linear layer.

The authors call it linear. It reads one map, at the stride of the patch: ``"vit-split"`` with ``strides=None`` makes
that alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from adaptkit.core.hierarchical import HierarchicalSpec
from adaptkit.core.layers import (
    Norm,
    check_choice,
    check_numbers,
    check_positive,
    doubled,
    norm2d,
    parameter_dtype,
)
from adaptkit.core.registry import register_head
from adaptkit.core.view import Features, Spec
from adaptkit.ops.grid import resample_map, tokens_to_map

__all__ = ["UpsampleHead", "UpsampleHeadConfig"]

STAGES_STRIDE = 16  #: of the map that is read where a backbone has stages and no patch


@dataclass(frozen=True)
class UpsampleHeadConfig:
    """``num_classes`` of the task, and the authors' choices."""

    num_classes: int
    dropout: float = 0.1  #: of whole channels; the authors' 0 for ADE20K
    norm: Norm = "batch"  #: before the last layer; "sync" over GPUs
    resize: bool = True  #: logits at the image's own size; False: as they are made, four times as fine as the map

    def __post_init__(self) -> None:
        check_numbers(self)
        check_choice("norm", self.norm, ("batch", "sync", "group", "layer"))
        check_positive(self, "num_classes")


@register_head("upsample", UpsampleHeadConfig)
class UpsampleHead(nn.Module):
    """Two transposed convolutions and one linear layer on the map at the stride of the patch, or on the tokens.

    Of a pyramid it reads the coarsest map that is no coarser than the patch.
    """

    answers = "segmentation"  #: what its logits are, for ``model.predict``

    def __init__(self, spec: Spec | HierarchicalSpec, config: UpsampleHeadConfig, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.config, self.pyramid = config, bool(strides)
        patch = STAGES_STRIDE if isinstance(spec, HierarchicalSpec) else spec.patch_size
        self.level = max((i for i, stride in enumerate(strides) if stride <= patch), default=0)
        self.stride = strides[self.level] if strides else patch
        dim = spec.embed_dims[self.level] if isinstance(spec, HierarchicalSpec) else spec.embed_dim
        self.up = doubled(dim, 2)
        self.bn = norm2d(config.norm, dim)
        self.dropout = nn.Dropout2d(config.dropout)
        self.conv_seg = nn.Conv2d(dim, config.num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def forward(self, features: Features) -> Tensor:
        """Features -> logits (B, classes, H, W) at the image's own size; without ``resize`` (B, classes, 4h, 4w)."""
        x = features.maps[self.level] if self.pyramid else tokens_to_map(features.tokens, features.grid)
        logits = self.conv_seg(self.dropout(self.bn(self.up(x.to(parameter_dtype(self))))))
        return resample_map(logits, self.stride / 4, 1, features.size) if self.config.resize else logits
