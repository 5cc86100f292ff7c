"""timm models inside transformers: TimmWrapperModel and TimmBackbone hold one, and that one is seen."""

from __future__ import annotations

from typing import Any

from adaptkit.backbones._timm import cfg_source
from adaptkit.core.registry import register_family, view
from adaptkit.core.view import ViT

_WRAPPERS = "transformers.models.timm_wrapper.modeling_timm_wrapper"


@register_family(  # type: ignore[type-var]
    f"{_WRAPPERS}.TimmWrapperModel",
    f"{_WRAPPERS}.TimmWrapperForImageClassification",
)
def timm_wrapper(model: Any) -> ViT:
    """See the timm model inside; its ``backbone`` is that model.

    transformers builds it by its architecture alone, so its own ``pretrained_cfg`` is that of other weights; the one of
    the weights is in the wrapper's config, where there is one.
    """
    seen: ViT = view(model.timm_model)
    classes: int = model.timm_model.num_classes
    known = cfg_source(getattr(model.config, "pretrained_cfg", None), classes, seen.spec.channels)
    seen.origin = known if known.id else known._replace(id=model.config._name_or_path or "")
    return seen


@register_family("transformers.models.timm_backbone.modeling_timm_backbone.TimmBackbone")  # type: ignore[type-var]
def timm_backbone(model: Any) -> ViT:
    """See the timm model inside; timm wraps it once more to return features, and drops its final norm."""
    inner = model._backbone
    return view(inner.model if type(inner).__name__ == "FeatureGetterNet" else inner)
