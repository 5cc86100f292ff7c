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
    position_rules = ("bicubic", "bicubic antialias")

    def __init__(self, backbone: Any) -> None:
        embeddings = backbone.embeddings
        prefix = embeddings.position_embeddings.shape[1] - embeddings.patch_embeddings.num_patches
        kernel = embeddings.patch_embeddings.projection.weight
        super().__init__(backbone, hf_spec("hf-vit", backbone.config, backbone.layers, prefix, kernel))

    def embed(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """``backbone.embeddings``, with its own interpolation at another size."""
        embeddings: Any = self.embeddings()
        return embeddings(image, interpolate_pos_encoding=not is_native(image, embeddings.image_size))

    def layers(self) -> Any:
        """``backbone.layers``."""
        return self.body.layers

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
        """The backbone's layers."""
        return [vit_block(layer) for layer in block_list(self.layers())]

    def norm(self, x: Tensor) -> Tensor:
        """``backbone.layernorm``."""
        return self.body.layernorm(x)

    def reference(self, image: Tensor) -> Tensor:
        """``last_hidden_state``."""
        return self._say(image, **self.interpolating(image))

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        """Patch kernel, first and last norms."""
        backbone: Any = self.body
        patch = backbone.embeddings.patch_embeddings.projection.weight
        return {
            "patch": patch,
            "first": unwrapped(backbone.layers[0]).layernorm_before.weight,
            "last": unwrapped(backbone.layers[-1]).layernorm_after.weight,
        }
