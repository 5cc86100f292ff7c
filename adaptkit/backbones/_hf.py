"""What views of transformers models share: patch side, provenance, and the three ways their blocks are written."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from adaptkit.backbones._processor import framing, normalisation
from adaptkit.backbones._timm import (
    block_list,
    class_name,
    is_bare,
    joined,
    merge_heads,
    pair,
    resampled,
    square_side,
    two_layers,
)
from adaptkit.core.block import Block, MLPLayers, Projections, identity
from adaptkit.core.tree import unwrapped
from adaptkit.core.view import Source, Spec, View, ViT
from adaptkit.ops.grid import map_to_tokens

#: Attribute of a model whose files lie in a cache of the Hub that is not the default one: the folder.
HUB_CACHE = "_adaptkit_hub_cache"

Seen = TypeVar("Seen", bound="HfView")


class HfView(View):
    """A transformers base model, alone or in the class that adds a classifier; its config knows its Hub id.

    A family reads the base model as ``body``. A pooler is no classifier.
    """

    inside: str = ""  #: attribute of the backbone that holds the base model; "": it is one
    head: Callable[[Any, Tensor], Tensor] | None = None  #: backbone, its tokens (B, P+N, D) -> logits (B, classes)

    @property
    def body(self) -> Any:
        """The base model."""
        return getattr(self.backbone, self.inside) if self.inside else self.backbone

    def source(self) -> Source:
        """From the config, and the normalisation from the image processor beside the weights, read once."""
        return self.origin or Source()

    def _forget_hooks(self) -> None:
        """Let a copy, which comes without hooks, make those anew that record hidden states."""
        if not any(module._forward_hooks for module in self.backbone.modules()):
            for module in self.backbone.modules():
                vars(module).pop("_output_capturing_hooks_installed", None)


class HfViT(HfView, ViT):
    """A plain ViT of transformers. A family says by what attributes its base model holds its parts."""

    family: str  #: for ``Spec.family``
    layers_at: str = "encoder.layer"  #: path of the list of layers in the base model
    kernel_at: str = "embeddings.patch_embeddings.projection.weight"  #: path of the kernel (D, C, p, p)
    layer_norms: tuple[str, str] = ("layernorm_before", "layernorm_after")  #: names in a layer
    last_norm: str = "layernorm"  #: name in the base model
    interpolates_when_told: bool = False  #: whether another size than its own takes ``interpolate_pos_encoding=True``

    def __init__(self, backbone: Any, prefix: int = 1) -> None:
        self.backbone = backbone  # `layers` and `kernel` read it
        config, kernel = backbone.config, self.kernel()
        sizes = (config.hidden_size, len(self.layers()), config.num_attention_heads, square_side(config.patch_size))
        super().__init__(backbone, Spec(self.family, *sizes, prefix, kernel.shape[1]))
        self.origin = hf_source(backbone, self.spec.channels)

    def layers(self) -> Any:
        """Return the backbone's list of layers."""
        return attrgetter(self.layers_at)(self.body)

    def kernel(self) -> Tensor:
        """Return the kernel (D, C, p, p) that reads the image."""
        return attrgetter(self.kernel_at)(self.body)

    def embed(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """``backbone.embeddings``, with its own interpolation at another size."""
        return self.embeddings()(image, **self.interpolating(image))

    def norm(self, x: Tensor) -> Tensor:
        """The backbone's last norm; the identity of one that norms after pooling."""
        return getattr(self.body, self.last_norm)(x)

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        """Patch kernel, first and last norms."""
        layers, (first, last) = self.layers(), self.layer_norms
        norms = getattr(unwrapped(layers[0]), first), getattr(unwrapped(layers[-1]), last)
        return {"patch": self.kernel(), "first": norms[0].weight, "last": norms[1].weight}

    def is_checkpointing(self) -> bool:
        """As ``gradient_checkpointing_enable`` left it, layer by layer; the layers heed it in training mode alone."""
        return any(getattr(layer, "gradient_checkpointing", False) for layer in self.layers())

    def embeddings(self) -> Any:
        """``body.embeddings``; where another rule is followed a copy that shares its weights and resamples by it."""
        own: Any = self.body.embeddings
        if self.positions == type(self).positions:
            return own
        following = copy.copy(own)
        antialias = self.positions == "bicubic antialias"
        following.interpolate_pos_encoding = partial(_resampled_table, own, antialias, self.spec.patch_size)
        return following

    def classify(self, x: Tensor) -> Tensor | None:
        """As the class with a classifier does it; None for a base model."""
        return None if self.head is None else self.head(self.backbone, x)

    def sizes(self) -> Sequence[tuple[int, int]]:
        """The backbone's own, and another."""
        return pair(self.body.config.image_size), (3 * self.spec.patch_size, 5 * self.spec.patch_size)

    def reference(self, image: Tensor) -> Tensor:
        """``last_hidden_state``."""
        return self._forward(image, **self.interpolating(image))

    def answers(self, tokens: Tensor) -> Sequence[Tensor]:
        """The logits, at the size that a backbone takes without being told of another; nothing of a base model."""
        cells = math.prod(side // self.spec.patch_size for side in pair(self.body.config.image_size))
        logits = self.classify(tokens) if tokens.shape[1] == self.spec.num_prefix_tokens + cells else None
        return () if logits is None else (logits,)

    def _forward(self, image: Tensor, **options: Any) -> Tensor:
        """Run the base model and return the tokens that it gives; of a Backbone class its last map."""
        self._forget_hooks()
        said = self.body(image, **options)
        tokens = getattr(said, "last_hidden_state", None)
        if tokens is not None:
            return tokens
        if getattr(said, "feature_maps", None):
            last = said.feature_maps[-1]  # a map (B, D, h, w), or tokens where the config reshapes none
            return map_to_tokens(last) if last.ndim == 4 else last
        remedy = ": set its config.return_dict = True" if isinstance(said, tuple) else ""
        raise TypeError(f"its forward returns {type(said).__name__}, which has no last_hidden_state{remedy}")

    def interpolating(self, image: Tensor) -> dict[str, bool]:
        """Return the option by which a backbone is told that its positions must be resampled."""
        told = self.interpolates_when_told and not is_native(image, self.body.config.image_size)
        return {"interpolate_pos_encoding": True} if told else {}


class HfClipNames(HfViT):
    """A ViT of transformers whose parts are called as in CLIP."""

    layers_at = "encoder.layers"
    kernel_at = "embeddings.patch_embedding.weight"
    layer_norms = ("layer_norm1", "layer_norm2")
    last_norm = "post_layernorm"

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
        """The backbone's layers."""
        return [clip_block(layer) for layer in block_list(self.layers())]


def hf_source(model: Any, channels: int) -> Source:
    """Read where a model that transformers loaded comes from, and what its image processor says.

    Raises ``ValueError`` where the image processor's file is damaged.
    """
    name, commit = model.config._name_or_path or "", getattr(model.config, "_commit_hash", None) or ""
    mean, std = normalisation(name, commit, channels, getattr(model, HUB_CACHE, None))
    said = framing(name, commit, getattr(model, HUB_CACHE, None))
    side = getattr(model.config, "image_size", 0)
    side = side if isinstance(side, int) else min(side or [0])
    said = said or {"resize": side, "crop": side, "squash": False, "interpolation": "bilinear"}
    return Source(id=name, revision=commit, mean=mean, std=std, **said)


def headed(seen: Seen, model: Any, inside: str, head: Callable[[Any, Tensor], Tensor]) -> Seen:
    """Return the view of the base model in ``model.<inside>`` as that of ``model``, which classifies by ``head``."""
    seen.backbone, seen.inside, seen.head = model, inside, head
    seen.origin = hf_source(model, seen.spec.channels)._replace(classes=model.config.num_labels)
    return seen


def tower(seen: Seen, model: Any) -> Seen:
    """Return the view of a part of ``model``, with what the whole knows of its origin where the part knows nothing."""
    if not seen.source().id:
        seen.origin = hf_source(model, seen.spec.channels)
    return seen


def is_native(image: Tensor, size: Any) -> bool:
    """Whether the image (B, C, H, W) has the size of the position table: an int, or (H, W)."""
    return tuple(image.shape[-2:]) == pair(size)


def _resampled_table(embeddings: Any, antialias: bool, patch: int, x: Tensor, height: int, width: int) -> Tensor:
    """Return the table of positions for an image of this size, in pixels; the table itself at its own grid."""
    table = getattr(embeddings, "position_embeddings", None)
    table = embeddings.position_embedding.weight[None] if table is None else table
    side = math.isqrt(table.shape[1])
    prefix, grid = table.shape[1] - side * side, (height // patch, width // patch)
    if grid == (side, side):
        return table
    return torch.cat([table[:, :prefix], resampled(table[:, prefix:], grid, antialias)], dim=1)


def vit_block(outer: Any) -> Block:
    """A layer as in ViT, DeiT, MSN, MAE and I-JEPA, maybe compiled or wrapped."""
    layer: Any = unwrapped(outer)
    return Block(
        run=outer,
        norm1=layer.layernorm_before,
        scale1=layer.dropout,
        norm2=layer.layernorm_after,
        mlp=layer.mlp,
        mlp_layers=partial(mlp_layers, layer.mlp),
        scale2=layer.dropout,
        **attention_parts(layer.attention, "o_proj", "scaling"),
    )


def dino_block(outer: Any, proj: str = "o_proj", scale: str = "scaling", **given: Any) -> Block:
    """A layer as in DINOv2 and DINOv3, maybe compiled or wrapped, called with these keywords.

    ``proj``, ``scale``: how its attention calls these.
    """
    layer: Any = unwrapped(outer)
    return Block(
        run=partial(outer, **given),
        norm1=layer.norm1,
        scale1=joined(layer.layer_scale1, layer.drop_path),
        norm2=layer.norm2,
        mlp=layer.mlp,
        mlp_layers=partial(mlp_layers, layer.mlp),
        scale2=joined(layer.layer_scale2, layer.drop_path),
        **attention_parts(layer.attention, proj, scale, **given),
    )


def clip_block(outer: Any) -> Block:
    """A layer as in CLIP and SigLIP, maybe compiled or wrapped, whose mask is no optional argument."""
    layer: Any = unwrapped(outer)
    return Block(
        run=partial(outer, attention_mask=None),
        norm1=layer.layer_norm1,
        scale1=identity,
        norm2=layer.layer_norm2,
        mlp=layer.mlp,
        mlp_layers=partial(mlp_layers, layer.mlp),
        scale2=identity,
        **attention_parts(layer.self_attn, "out_proj", "scale"),
    )


def attention_parts(outer: Any, proj: str, scale: str, **given: Any) -> dict[str, Any]:
    """``attn``, ``qkv``, ``out`` and ``scale`` of a Block; ``given`` are the keywords the attention is called with.

    ``outer``: the attention as it runs, maybe compiled or wrapped. ``proj``, ``scale``: how it calls these.
    """
    attn: Any = unwrapped(outer)
    return {
        "attn": partial(attend, outer, given),
        "qkv": partial(project_qkv, attn),
        "out": partial(merge_heads, getattr(attn, proj)),
        "scale": getattr(attn, scale),
        "projections": partial(_projections, outer, getattr(attn, proj)),
    }


def _projections(attn: Any, proj: Any) -> Projections | None:
    """Return the weights by head; None where something else acts, or a layer is no plain linear one (LoRA)."""
    if not is_bare(attn, type(unwrapped(attn))):
        return None
    return three_by_head((attn.q_proj, attn.k_proj, attn.v_proj), proj, attn.head_dim)


def three_by_head(layers: tuple[Any, ...], proj: Any, dim: int) -> Projections | None:
    """See layers for q, k and v, and ``proj``, head by head, each of ``dim``; None where one is no plain linear one."""
    if not all(is_bare(layer, nn.Linear) for layer in (*layers, proj)):
        return None
    weights = tuple(layer.weight.view(1, -1, dim, layer.in_features) for layer in layers)
    biases = tuple(None if layer.bias is None else layer.bias.view(1, -1, dim) for layer in layers)
    return Projections(weights, biases, (identity, identity), proj.weight.unflatten(1, (-1, dim)), proj.bias)


def mlp_layers(mlp: Any) -> MLPLayers | None:
    """See an MLP of transformers layer by layer; None for one with a gate, or layers that are replaced (LoRA)."""
    if not class_name(mlp).endswith("MLP") or not all(hasattr(mlp, name) for name in ("fc1", "activation_fn", "fc2")):
        return None
    return two_layers(mlp.fc1, mlp.activation_fn, mlp.fc2) if is_bare(mlp, type(unwrapped(mlp))) else None


def project_qkv(attn: Any, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, P+N, D) -> three of (B, heads, P+N, E)."""
    projections = (attn.q_proj, attn.k_proj, attn.v_proj)
    q, k, v = (p(h).unflatten(2, (-1, attn.head_dim)).transpose(1, 2) for p in projections)
    return q, k, v


def attend(attn: Any, given: dict[str, Any], h: Tensor) -> Tensor:
    """Run an attention; transformers returns the weights beside the output."""
    return attn(h, **given)[0]
