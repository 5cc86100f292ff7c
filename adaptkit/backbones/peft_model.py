"""peft's PeftModel around a ViT: the model inside is seen. Its LoRA is taken over by ``attach``."""

from __future__ import annotations

from typing import Any

from adaptkit.core.registry import register_family, view
from adaptkit.core.view import ViT


@register_family("peft.peft_model.PeftModel")  # type: ignore[type-var]
def peft_model(model: Any) -> ViT:
    """See the base model; its ``backbone`` is that model."""
    return view(model.get_base_model())
