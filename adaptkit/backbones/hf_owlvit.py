"""transformers' OWL-ViT and OWLv2: the vision transformer of the detectors, CLIP's with its first norm spelt right."""

from __future__ import annotations

from typing import Any

from adaptkit.backbones._hf import tower
from adaptkit.backbones.hf_clip import HfCLIP
from adaptkit.core.registry import register_family
from adaptkit.core.view import ViT


@register_family(
    "transformers.models.owlvit.modeling_owlvit.OwlViTVisionTransformer",
    "transformers.models.owlv2.modeling_owlv2.Owlv2VisionTransformer",
)
class HfOwlViT(HfCLIP):
    """As CLIP: the backbone norms the class token alone, the view all tokens."""

    first_norm = "pre_layernorm"


@register_family(  # type: ignore[type-var]
    "transformers.models.owlvit.modeling_owlvit.OwlViTVisionModel",
    "transformers.models.owlv2.modeling_owlv2.Owlv2VisionModel",
)
def owlvit_vision_model(model: Any) -> ViT:
    """See the transformer inside."""
    return tower(HfOwlViT(model.vision_model), model)
