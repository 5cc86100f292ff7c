"""transformers' CLIP: CLIPVisionModel, alone or inside CLIPModel and CLIPVisionModelWithProjection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from adaptkit.backbones._hf import HfViT, clip_block, hf_spec, is_native, tower
from adaptkit.backbones._timm import block_list
from adaptkit.core.registry import register_family
from adaptkit.core.tree import unwrapped
from adaptkit.core.view import Block, ViT


@register_family("transformers.models.clip.modeling_clip.CLIPVisionModel")
class HfCLIP(HfViT):
    """Blocks ``x + attn(norm(x))`` after a first norm; absolute positions, resampled bicubic without antialias.

    transformers leaves ``last_hidden_state`` un-normed and norms the class token when it pools. The view norms all
    tokens, as timm's copy of the same weights does, so that an adapter finds the same tokens in both.
    """

    positions = "bicubic"

    def __init__(self, host: Any) -> None:
        kernel = host.embeddings.patch_embedding.weight
        super().__init__(host, hf_spec("hf-clip", host.config, host.encoder.layers, 1, kernel))

    def embed(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """``host.embeddings`` and the norm before the first block."""
        host: Any = self.host
        interpolate = not is_native(image, host.embeddings.image_size)
        return host.pre_layrnorm(host.embeddings(image, interpolate_pos_encoding=interpolate))

    def layers(self) -> Any:
        """``host.encoder.layers``."""
        return self.host.encoder.layers

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
        """The host's layers."""
        return [clip_block(layer) for layer in block_list(self.layers())]

    def norm(self, x: Tensor) -> Tensor:
        """``host.post_layernorm``, over all tokens."""
        return self.host.post_layernorm(x)

    def reference(self, image: Tensor) -> Tensor:
        """``last_hidden_state``, normed."""
        return self.norm(self._say(image, **self.interpolating(image)))

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        """Patch kernel, first and last norms."""
        host: Any = self.host
        layers = host.encoder.layers
        patch = host.embeddings.patch_embedding.weight
        return {
            "patch": patch,
            "first": unwrapped(layers[0]).layer_norm1.weight,
            "last": unwrapped(layers[-1]).layer_norm2.weight,
        }


@register_family(  # type: ignore[type-var]
    "transformers.models.clip.modeling_clip.CLIPModel",
    "transformers.models.clip.modeling_clip.CLIPVisionModelWithProjection",
)
def clip_vision_tower(model: Any) -> ViT:
    """See the vision model inside; text model and projection stay beside it, unused."""
    return tower(HfCLIP(model.vision_model), model)
