"""transformers' SiglipVisionModel, alone or inside SiglipModel: patch tokens only."""

from __future__ import annotations

from typing import Any

from adaptkit.backbones._hf import HfClipNames, tower
from adaptkit.core.registry import register_family
from adaptkit.core.view import ViT


@register_family("transformers.models.siglip.modeling_siglip.SiglipVisionModel")
class HfSiglip(HfClipNames):
    """Blocks ``x + attn(norm(x))``; absolute positions, resampled bicubic without antialias."""

    family = "hf-siglip"
    interpolates_when_told = True
    positions = "bicubic"
    position_rules = ("bicubic", "bicubic antialias")

    def __init__(self, backbone: Any) -> None:
        super().__init__(backbone, prefix=0)


@register_family("transformers.models.siglip.modeling_siglip.SiglipModel")  # type: ignore[type-var]
def siglip_vision_tower(model: Any) -> ViT:
    """See the vision model inside; the text model stays beside it, unused."""
    return tower(HfSiglip(model.vision_model), model)
