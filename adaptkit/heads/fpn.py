"""A light segmentation head: the semantic branch of Panoptic FPN (Kirillov et al. 2019) on an adapter's pyramid."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from adaptkit.core.hierarchical import HierarchicalSpec
from adaptkit.core.layers import (
    Norm,
    check_choice,
    check_numbers,
    check_positive,
    init_weights,
    norm2d,
    parameter_dtype,
)
from adaptkit.core.registry import register_head
from adaptkit.core.view import Features, Spec
from adaptkit.ops.grid import resample_map, tokens_to_map

__all__ = ["FPN", "FPNHead", "FPNHeadConfig"]


@dataclass(frozen=True)
class FPNHeadConfig:
    """``num_classes`` of the task, and the width of the head."""

    num_classes: int
    channels: int = 128
    dropout: float = 0.1
    norm: Norm = "group"

    def __post_init__(self) -> None:
        check_numbers(self)
        check_choice("norm", self.norm, ("batch", "sync", "group", "layer"))
        check_positive(self, "num_classes", "channels")


class _FPN(nn.Module):
    """Panoptic FPN's semantic branch up to its finest stride.

    Top-down sums over the pyramid, a 3x3 convolution per level, all summed at the finest stride and classified.
    Without a pyramid (no side adapter) the patch tokens are its only level.
    """

    def __init__(self, spec: Spec | HierarchicalSpec, config: FPNHeadConfig, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.config = config
        self.pyramid = bool(strides)
        self.strides = strides or (spec.patch_size,)
        width = config.channels
        dims = spec.embed_dims if isinstance(spec, HierarchicalSpec) else (spec.embed_dim,) * len(self.strides)
        self.lateral = nn.ModuleList(nn.Conv2d(dim, width, 1) for dim in dims)
        self.smooth = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), norm2d(config.norm, width), nn.GELU())
            for _ in self.strides
        )
        self.dropout = nn.Dropout2d(config.dropout)
        self.classifier = nn.Conv2d(width, config.num_classes, 1)
        self.apply(init_weights)
        nn.init.normal_(self.classifier.weight, std=0.01)

    def finest(self, features: Features) -> Tensor:
        """Features -> logits (B, classes, h, w) at the finest stride."""
        maps = features.maps if self.pyramid else (tokens_to_map(features.tokens, features.grid),)
        maps = tuple(m.to(parameter_dtype(self)) for m in maps)
        finest, size = self.strides[0], (maps[0].shape[-2], maps[0].shape[-1])
        top, total = None, None
        for level in reversed(range(len(maps))):
            x = self.lateral[level](maps[level])
            if top is not None:
                x = x + resample_map(top, self.strides[level + 1], self.strides[level], (x.shape[-2], x.shape[-1]))
            top = x
            fine = resample_map(self.smooth[level](x), self.strides[level], finest, size)
            total = fine if total is None else total + fine
        return self.classifier(self.dropout(total))


class FPN(_FPN):
    """The branch as a part of other heads."""

    def forward(self, features: Features) -> Tensor:
        """Features -> logits (B, classes, h, w) at the finest stride."""
        return self.finest(features)


@register_head("fpn", FPNHeadConfig)
class FPNHead(_FPN):
    """Panoptic FPN's semantic branch on the pyramid, or on the tokens where there is none."""

    answers = "segmentation"  #: what its logits are, for ``model.predict``

    def forward(self, features: Features) -> Tensor:
        """Features -> logits (B, classes, H, W) at the image's own size."""
        return resample_map(self.finest(features), self.strides[0], 1, features.size)
