"""transformers' SiglipVisionModel, alone or inside SiglipModel: patch tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from adaptkit.backbones._hf import HfViT, clip_block, hf_spec, is_native, tower
from adaptkit.backbones._timm import block_list
from adaptkit.core.registry import register_family
from adaptkit.core.tree import unwrapped
from adaptkit.core.view import Block, ViT


@register_family("transformers.models.siglip.modeling_siglip.SiglipVisionModel")
class HfSiglip(HfViT):
    """Blocks ``x + attn(norm(x))``; absolute positions, resampled bicubic without antialias."""

    positions = "bicubic"
    position_rules = ("bicubic", "bicubic antialias")

    def __init__(self, backbone: Any) -> None:
        kernel = backbone.embeddings.patch_embedding.weight
        super().__init__(backbone, hf_spec("hf-siglip", backbone.config, backbone.encoder.layers, 0, kernel))

    def embed(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """``backbone.embeddings``, with its own interpolation at another size."""
        embeddings: Any = self.embeddings()
        return embeddings(image, interpolate_pos_encoding=not is_native(image, embeddings.image_size))

    def layers(self) -> Any:
        """``backbone.encoder.layers``."""
        return self.body.encoder.layers

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
        """The backbone's layers."""
        return [clip_block(layer) for layer in block_list(self.layers())]

    def norm(self, x: Tensor) -> Tensor:
        """``backbone.post_layernorm``."""
        return self.body.post_layernorm(x)

    def reference(self, image: Tensor) -> Tensor:
        """``last_hidden_state``."""
        return self._say(image, **self.interpolating(image))

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


@register_family("transformers.models.siglip.modeling_siglip.SiglipModel")  # type: ignore[type-var]
def siglip_vision_tower(model: Any) -> ViT:
    """See the vision model inside; the text model stays beside it, unused."""
    return tower(HfSiglip(model.vision_model), model)
