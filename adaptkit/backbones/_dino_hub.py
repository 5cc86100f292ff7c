"""What the original DINOv2 and DINOv3 classes share, by the names of their attributes.

Their code comes by ``torch.hub`` or as files beside a project and not as a package, so a class of any name that has
these attributes is taken for one; ``attach`` proves whether it computes as one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.backbones._timm import REMEDY, class_name, is_bare, joined, merge_heads, pair, square_side, two_layers
from adaptkit.core.block import MLPLayers, identity
from adaptkit.core.tree import unwrapped
from adaptkit.core.view import Source, Spec, ViT

#: Attributes of both classes.
COMMON = ("patch_embed", "cls_token", "blocks", "norm", "prepare_tokens_with_masks", "forward_features")
#: How ``forward_features`` calls the parts of its tokens, in their order; registers are storage tokens in DINOv3.
PARTS = (("x_norm_clstoken",), ("x_norm_regtokens", "x_storage_tokens"), ("x_norm_patchtokens",))


class DinoHub(ViT):
    """Blocks ``x + ls(attn(norm(x)))``; the backbone prepares its tokens for any size itself."""

    def __init__(self, backbone: Any, family: str, registers: int) -> None:
        self.chunked = isinstance(unwrapped(backbone.blocks[0]), nn.ModuleList)
        layers, kernel = _layers(backbone.blocks), backbone.patch_embed.proj.weight
        heads = unwrapped(unwrapped(layers[0]).attn).num_heads
        sizes = (kernel.shape[0], len(layers), heads, square_side(backbone.patch_embed.patch_size), 1 + registers)
        super().__init__(backbone, Spec(family, *sizes, kernel.shape[1]))

    @abstractmethod
    def prepared(self, image: Tensor) -> Tensor:
        """Image -> tokens (B, P+N, D) by ``backbone.prepare_tokens_with_masks``."""

    def embed(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """The backbone's own preparation."""
        return self.prepared(image)

    def layers(self) -> Sequence[Any]:
        """The blocks one by one, out of their chunks where they are in some."""
        return _layers(self.backbone.blocks)

    def norm(self, x: Tensor) -> Tensor:
        """``backbone.norm``; two norms where class and patch tokens have their own."""
        backbone: Any = self.backbone
        if not getattr(backbone, "untie_cls_and_patch_norms", False):
            return backbone.norm(x)
        prefix, patches = x.tensor_split([self.spec.num_prefix_tokens], dim=1)
        return torch.cat([backbone.cls_norm(prefix), backbone.norm(patches)], dim=1)

    def classify(self, x: Tensor) -> Tensor | None:
        """``backbone.head`` of the class token; None where it is the identity, as torch.hub gives it."""
        head = getattr(self.backbone, "head", None)
        return head(x[:, 0]) if isinstance(head, nn.Linear) else None

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        """Patch kernel, first and last norms."""
        layers, patch = self.layers(), self.backbone.patch_embed.proj.weight
        return {"patch": patch, "first": unwrapped(layers[0]).norm1.weight, "last": unwrapped(layers[-1]).norm2.weight}

    def source(self) -> Source:
        """Nothing is kept of where the weights come from."""
        head = getattr(self.backbone, "head", None)
        return (self.origin or Source())._replace(classes=head.out_features if isinstance(head, nn.Linear) else 0)

    def sizes(self) -> Sequence[tuple[int, int]]:
        """The backbone's own, and another."""
        p = self.spec.patch_size
        height, width = pair(getattr(self.backbone.patch_embed, "img_size", 4 * p))
        return (height // p * p, width // p * p), (3 * p, 5 * p)

    def reference(self, image: Tensor) -> Tensor:
        """What ``forward_features`` says, put together in the order of the tokens."""
        said = self.backbone.forward_features(image)
        if not isinstance(said, Mapping):
            raise TypeError(f"its forward_features returns {type(said).__name__}, not a dict of normed tokens")
        found = [next((said[name] for name in names if said.get(name) is not None), None) for names in PARTS]
        return torch.cat([x[:, None] if x.ndim == 2 else x for x in found if x is not None], dim=1)


def dino_hub_block(outer: Any, **given: Any) -> dict[str, Any]:
    """The parts of a Block that both classes write alike, called with these keywords."""
    blk: Any = unwrapped(outer)
    if not all(hasattr(blk, part) for part in ("norm1", "attn", "ls1", "norm2", "mlp", "ls2")):
        raise TypeError(f"{class_name(blk)} is not of the form x + attn(norm(x)), x + mlp(norm(x)); {REMEDY}")
    drops = (getattr(blk, "drop_path1", identity), getattr(blk, "drop_path2", identity))
    return {
        "run": partial(outer, **given),
        "norm1": blk.norm1,
        "attn": partial(blk.attn, **given),
        "scale1": joined(blk.ls1, drops[0]),
        "norm2": blk.norm2,
        "mlp": blk.mlp,
        "scale2": joined(blk.ls2, drops[1]),
        "out": partial(merge_heads, unwrapped(blk.attn).proj),
        "mlp_layers": partial(_mlp_layers, blk.mlp),
    }


def _layers(blocks: Any) -> list[Any]:
    chunks = [list(b) if isinstance(unwrapped(b), nn.ModuleList) else [b] for b in blocks]
    return [block for chunk in chunks for block in chunk if not isinstance(block, nn.Identity)]


def _mlp_layers(mlp: Any) -> MLPLayers | None:
    """See an Mlp layer by layer; None for a gated one, or layers that are replaced (LoRA)."""
    if not all(hasattr(mlp, name) for name in ("fc1", "act", "fc2")) or not is_bare(mlp, type(unwrapped(mlp))):
        return None
    return two_layers(mlp.fc1, mlp.act, mlp.fc2)
