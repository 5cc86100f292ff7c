"""timm models inside transformers: TimmWrapperModel and TimmBackbone hold one, and that one is seen."""

from __future__ import annotations

from typing import Any

from adaptkit.registry import register_family, view
from adaptkit.vit import ViT

_WRAPPERS = "transformers.models.timm_wrapper.modeling_timm_wrapper"


@register_family(  # type: ignore[type-var]
    f"{_WRAPPERS}.TimmWrapperModel",
    f"{_WRAPPERS}.TimmWrapperForImageClassification",
)
def timm_wrapper(model: Any) -> ViT:
    """See the timm model inside; its ``host`` is that model."""
    return view(model.timm_model)


@register_family("transformers.models.timm_backbone.modeling_timm_backbone.TimmBackbone")  # type: ignore[type-var]
def timm_backbone(model: Any) -> ViT:
    """See the timm model inside; timm wraps it once more to return features, and drops its final norm."""
    inner = model._backbone
    return view(inner.model if type(inner).__name__ == "FeatureGetterNet" else inner)
