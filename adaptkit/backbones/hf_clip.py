"""transformers' CLIP, MetaCLIP 2, Chinese-CLIP, AltCLIP and CLIPSeg: their vision models, alone or inside the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from adaptkit.backbones._hf import HfViT, clip_block, hf_spec, is_native, tower
from adaptkit.backbones._timm import block_list
from adaptkit.core.registry import register_family
from adaptkit.core.tree import unwrapped
from adaptkit.core.view import Block, ViT


@register_family(
    "transformers.models.clip.modeling_clip.CLIPVisionModel",
    "transformers.models.metaclip_2.modeling_metaclip_2.MetaClip2VisionModel",
    "transformers.models.chinese_clip.modeling_chinese_clip.ChineseCLIPVisionModel",
    "transformers.models.altclip.modeling_altclip.AltCLIPVisionModel",
    "transformers.models.clipseg.modeling_clipseg.CLIPSegVisionModel",
)
class HfCLIP(HfViT):
    """Blocks ``x + attn(norm(x))`` after a first norm; absolute positions, resampled bicubic without antialias.

    transformers leaves ``last_hidden_state`` un-normed and norms the class token when it pools. The view norms all
    tokens, as timm's copy of the same weights does, so that an adapter finds the same tokens in both.
    """

    positions = "bicubic"
    position_rules = ("bicubic", "bicubic antialias")
    first_norm = "pre_layrnorm"  #: transformers' spelling

    def __init__(self, backbone: Any) -> None:
        kernel = backbone.embeddings.patch_embedding.weight
        super().__init__(backbone, hf_spec("hf-clip", backbone.config, backbone.encoder.layers, 1, kernel))

    def embed(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """``backbone.embeddings`` and the norm before the first block."""
        backbone: Any = self.body
        interpolate = not is_native(image, backbone.config.image_size)
        return getattr(backbone, self.first_norm)(self.embeddings()(image, interpolate_pos_encoding=interpolate))

    def layers(self) -> Any:
        """``backbone.encoder.layers``."""
        return self.body.encoder.layers

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
        """The backbone's layers."""
        return [clip_block(layer) for layer in block_list(self.layers())]

    def norm(self, x: Tensor) -> Tensor:
        """``backbone.post_layernorm``, over all tokens."""
        return self.body.post_layernorm(x)

    def reference(self, image: Tensor) -> Tensor:
        """``last_hidden_state``, normed."""
        return self.norm(self._say(image, **self.interpolating(image)))

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        """Patch kernel, first and last norms."""
        backbone: Any = self.body
        layers = backbone.encoder.layers
        patch = backbone.embeddings.patch_embedding.weight
        return {
            "patch": patch,
            "first": unwrapped(layers[0]).layer_norm1.weight,
            "last": unwrapped(layers[-1]).layer_norm2.weight,
        }


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
