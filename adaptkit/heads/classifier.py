"""The classification head: pooled tokens, a norm, one linear layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from adaptkit.core.layers import check_choice, check_numbers, check_positive, parameter_dtype
from adaptkit.core.registry import register_head
from adaptkit.core.view import Features, Spec

__all__ = ["ClassifierHead", "ClassifierHeadConfig"]


@dataclass(frozen=True)
class ClassifierHeadConfig:
    """``num_classes`` of the task, and what is pooled."""

    num_classes: int
    #: "token": the first prefix token, the class token where there is one; "avg": the mean of the patch tokens; "both":
    #: the two side by side
    pool: Literal["token", "avg", "both"] = "avg"

    def __post_init__(self) -> None:
        check_numbers(self)
        check_choice("pool", self.pool, ("token", "avg", "both"))
        check_positive(self, "num_classes")


@register_head("classifier", ClassifierHeadConfig)
class ClassifierHead(nn.Module):
    """``linear(norm(pool(tokens)))``, as linear evaluation of frozen features has it."""

    answers = "classification"  #: what its logits are, for ``model.predict``

    def __init__(self, spec: Spec, config: ClassifierHeadConfig, strides: tuple[int, ...]) -> None:
        super().__init__()
        if config.pool != "avg" and spec.num_prefix_tokens == 0:
            raise ValueError(f"pool={config.pool!r} needs a class token and this backbone has none; use 'avg'")
        self.config = config
        width = spec.embed_dim * (2 if config.pool == "both" else 1)
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, config.num_classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def pool(self, features: Features) -> Tensor:
        """Features -> (B, D), or (B, 2 D) for both."""
        if self.config.pool == "avg":
            return features.tokens.mean(1)
        if features.prefix.shape[1] == 0:
            raise ValueError(f"pool={self.config.pool!r} reads the class token, but an adapter dropped it; use 'avg'")
        if self.config.pool == "token":
            return features.prefix[:, 0]
        return torch.cat([features.prefix[:, 0], features.tokens.mean(1)], dim=1)

    def forward(self, features: Features) -> Tensor:
        """Features -> logits (B, classes)."""
        return self.classifier(self.norm(self.pool(features).to(parameter_dtype(self))))
