"""The linear head: one linear layer on each patch token, upsampled. What frozen features are worth by themselves."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from adaptkit.core.layers import check_numbers, check_positive, parameter_dtype
from adaptkit.core.registry import register_head
from adaptkit.core.view import Features, Spec
from adaptkit.ops.grid import resample_map, tokens_to_map

__all__ = ["LinearHead", "LinearHeadConfig"]


@dataclass(frozen=True)
class LinearHeadConfig:
    """``num_classes`` of the task."""

    num_classes: int

    def __post_init__(self) -> None:
        check_numbers(self)
        check_positive(self, "num_classes")


@register_head("linear", LinearHeadConfig)
class LinearHead(nn.Module):
    """BatchNorm and one linear layer on each patch token, upsampled."""

    answers = "segmentation"  #: what its logits are, for ``model.predict``

    def __init__(self, spec: Spec, config: LinearHeadConfig, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.config, self.patch = config, spec.patch_size
        self.norm = nn.BatchNorm2d(spec.embed_dim)
        self.classifier = nn.Conv2d(spec.embed_dim, config.num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, features: Features) -> Tensor:
        """Features -> logits (B, classes, H, W) at the image's own size."""
        x = tokens_to_map(features.tokens, features.grid).to(parameter_dtype(self))
        return resample_map(self.classifier(self.norm(x)), self.patch, 1, features.size)
