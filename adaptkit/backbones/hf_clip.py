"""transformers' CLIP, MetaCLIP 2, Chinese-CLIP, AltCLIP and CLIPSeg: their vision models, alone or inside the whole."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adaptkit.backbones._hf import HfClipNames, tower
from adaptkit.core.registry import register_family
from adaptkit.core.view import ViT


@register_family(
    "transformers.models.clip.modeling_clip.CLIPVisionModel",
    "transformers.models.metaclip_2.modeling_metaclip_2.MetaClip2VisionModel",
    "transformers.models.chinese_clip.modeling_chinese_clip.ChineseCLIPVisionModel",
    "transformers.models.altclip.modeling_altclip.AltCLIPVisionModel",
    "transformers.models.clipseg.modeling_clipseg.CLIPSegVisionModel",
)
class HfCLIP(HfClipNames):
    """Blocks ``x + attn(norm(x))`` after a first norm; absolute positions, resampled bicubic without antialias.

    transformers leaves ``last_hidden_state`` un-normed and norms the class token when it pools. The view norms all
    tokens, as timm's copy of the same weights does, so that an adapter finds the same tokens in both.
    """

    family = "hf-clip"
    interpolates_when_told = True
    positions = "bicubic"
    position_rules = ("bicubic", "bicubic antialias")
    first_norm = "pre_layrnorm"  #: transformers' spelling

    def embed(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """``backbone.embeddings`` and the norm before the first block."""
        return getattr(self.body, self.first_norm)(super().embed(image, grid))

    def reference(self, image: Tensor) -> Tensor:
        """``last_hidden_state``, normed."""
        return self.norm(self._forward(image, **self.interpolating(image)))


@register_family(  # type: ignore[type-var]
    "transformers.models.clip.modeling_clip.CLIPModel",
    "transformers.models.clip.modeling_clip.CLIPVisionModelWithProjection",
    "transformers.models.metaclip_2.modeling_metaclip_2.MetaClip2Model",
    "transformers.models.metaclip_2.modeling_metaclip_2.MetaClip2VisionModelWithProjection",
    "transformers.models.chinese_clip.modeling_chinese_clip.ChineseCLIPModel",
    "transformers.models.altclip.modeling_altclip.AltCLIPModel",
    "transformers.models.clipseg.modeling_clipseg.CLIPSegModel",
)
def clip_vision_tower(model: Any) -> ViT:
    """See the vision model inside; text model and projection stay beside it, unused."""
    return tower(HfCLIP(model.vision_model), model)
