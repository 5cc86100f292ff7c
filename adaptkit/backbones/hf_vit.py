"""transformers' ViTModel and its siblings: DeiT (with its distillation token), ViT-MSN, I-JEPA (no class token)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from adaptkit.backbones._hf import HfViT, hf_spec, is_native, vit_block
from adaptkit.backbones._timm import block_list
from adaptkit.core.registry import register_family
from adaptkit.core.tree import unwrapped
from adaptkit.core.view import Block


@register_family(
    "transformers.models.vit.modeling_vit.ViTModel",
    "transformers.models.deit.modeling_deit.DeiTModel",
    "transformers.models.vit_msn.modeling_vit_msn.ViTMSNModel",
    "transformers.models.ijepa.modeling_ijepa.IJepaModel",
)
class HfPlainViT(HfViT):
    """Blocks ``x + attn(norm(x))``; absolute positions, resampled bicubic without antialias."""

    positions = "bicubic"

    def __init__(self, host: Any) -> None:
        embeddings = host.embeddings
        prefix = embeddings.position_embeddings.shape[1] - embeddings.patch_embeddings.num_patches
        kernel = embeddings.patch_embeddings.projection.weight
        super().__init__(host, hf_spec("hf-vit", host.config, host.layers, prefix, kernel))

    def embed(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """``host.embeddings``, with its own interpolation at another size."""
        embeddings: Any = self.host.embeddings
        return embeddings(image, interpolate_pos_encoding=not is_native(image, embeddings.image_size))

    def layers(self) -> Any:
        """``host.layers``."""
        return self.host.layers

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
        """The host's layers."""
        return [vit_block(layer) for layer in block_list(self.layers())]

    def norm(self, x: Tensor) -> Tensor:
        """``host.layernorm``."""
        return self.host.layernorm(x)

    def reference(self, image: Tensor) -> Tensor:
        """``last_hidden_state``."""
        return self._say(image, **self.interpolating(image))

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        """Patch kernel, first and last norms."""
        host: Any = self.host
        patch = host.embeddings.patch_embeddings.projection.weight
        return {
            "patch": patch,
            "first": unwrapped(host.layers[0]).layernorm_before.weight,
            "last": unwrapped(host.layers[-1]).layernorm_after.weight,
        }
