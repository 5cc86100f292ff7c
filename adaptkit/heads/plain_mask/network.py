"""PMT's plain mask decoder (arXiv 2603.25398): queries and frozen tokens through plain transformer blocks.

F_l are the tokens after frozen block l and the ViT's own final norm, prefix tokens included, and q the queries, which
are learned; i goes over the blocks of the decoder::

    G_l = BN_l(F_l)
    x   = [q, sum_l a_l * (G_l + MLP_l(G_l))]              Q queries, P prefix tokens, N patches
    x   = x + s_i * attn_i(LN(x))
    x   = x + t_i * mlp_i(LN(x))

    z       = LN(x)
    classes = W z_q                                        K classes, and "nothing"
    masks   = MLP(z_q) . up(z_patches)

Only patches have a position: two-dimensional rotary angles turn their queries and keys. In training every x, before the
first block too, is asked for classes and masks, and block i lets a query read the patches of the mask before it alone,
by a probability that falls to 0 (mask annealing), so that what is deployed has no masks. The keys have the authors' own
names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.core.hierarchical import HierarchicalSpec
from adaptkit.core.layers import LayerNorm2d, norm2d, parameter_dtype
from adaptkit.core.registry import register_head
from adaptkit.core.view import Features, Spec
from adaptkit.heads.base import QueryHead, QueryLogits
from adaptkit.heads.plain_mask.config import PlainMaskHeadConfig
from adaptkit.heads.plain_mask.loss import set_loss
from adaptkit.ops.grid import map_to_tokens, resample_map, tokens_to_map
from adaptkit.ops.queries import class_scores, instances, merge, stretched

__all__ = ["Block", "PlainMaskHead", "annealed", "rotary_table"]

Grid = tuple[int, int]
Table = tuple[Tensor, Tensor]  #: cos and sin (N, E) of the patches' angles

#: Where in training block 1 and the last begin to let go of masks, how long each takes, and block 0: the published
#: schedules, in shares of the steps (COCO: from step 23651 and 59128, for 14782 of 88692, block 0 until 3000).
FIRST, LAST, WINDOW, BLOCK_0, POWER = 4 / 15, 2 / 3, 1 / 6, 1 / 30, 0.9
ANSWERS = {"semantic": "segmentation", "instance": "detection", "panoptic": "panoptic"}


def rotary_table(grid: Grid, width: int, like: Tensor) -> Table:
    """Angles of a grid (h, w): cos and sin (N, width), of ``2 pi (y, x) * 100^(-4j / width)``, j < width / 4.

    y and x are the centres of the patches, from -1 to 1 over the grid. In training too: the authors stretch the places
    by a random factor there where they compute the table themselves (DINOv2), not where it is a frozen DINOv3's.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    frequency = 100.0 ** (-4.0 * torch.arange(width // 4, device=like.device, dtype=dtype) / width)
    y, x = (2.0 * (torch.arange(n, device=like.device, dtype=dtype) + 0.5) / n - 1.0 for n in grid)
    place = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)  # (N, 2)
    angle = (2.0 * math.pi * place[..., None] * frequency).flatten(1).tile(2)  # (N, width)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotated(x: Tensor, table: Table) -> Tensor:
    """Turn the last N of the tokens x (B, heads, S, E) by their angles: channel j with j + E/2."""
    cos, sin = table
    before, patches = x.tensor_split([x.shape[2] - cos.shape[0]], dim=2)
    a, b = patches.chunk(2, dim=-1)
    return torch.cat([before, patches * cos + torch.cat([-b, a], dim=-1) * sin], dim=2)


def annealed(blocks: int, progress: float) -> list[float]:
    """Return for each block by which probability a query is held to its mask, at this share of the training.

    It is 1 until the block's turn, falls as ``(1 - t)^0.9``, and is 0 after; block after block, the first one at once.
    """

    def probability(start: float, stop: float) -> float:
        return (1.0 - min(1.0, max(0.0, (progress - start) / (stop - start)))) ** POWER

    step = (LAST - FIRST) / max(1, blocks - 2)
    starts = [FIRST + i * step for i in range(blocks - 1)]
    return [probability(0.0, BLOCK_0), *(probability(start, start + WINDOW) for start in starts)]


class Attention(nn.Module):
    """Softmax attention; keys have no bias."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=name != "k") for name in "qkv")
        self.o_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, table: Table, visible: Tensor | None = None) -> Tensor:
        """x (B, S, D) -> (B, S, D); ``visible`` (B, Q, N) bool: the patches that each of the first Q tokens reads."""
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotated(q, table), rotated(k, table)
        if visible is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            free = visible.new_ones(1, 1, 1).expand(*visible.shape[:2], x.shape[1] - visible.shape[2])
            mask = torch.cat([free, visible], dim=2)[:, None]  # (B, 1, Q, S)
            held, others = q.tensor_split([visible.shape[1]], dim=2)
            read = [
                F.scaled_dot_product_attention(held, k, v, attn_mask=mask),
                F.scaled_dot_product_attention(others, k, v),
            ]
            out = torch.cat(read, dim=2)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        return self.down_proj(F.gelu(self.up_proj(x)))


class LayerScale(nn.Module):
    """A factor for each channel, 1 at the start."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        return x * self.lambda1


class Block(nn.Module):
    """``x + s attn(LN(x))``, then ``x + t mlp(LN(x))``."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attention, self.layer_scale1 = nn.LayerNorm(dim), Attention(dim, heads), LayerScale(dim)
        self.norm2, self.mlp, self.layer_scale2 = nn.LayerNorm(dim), MLP(dim, hidden), LayerScale(dim)

    def forward(self, x: Tensor, table: Table, visible: Tensor | None = None) -> Tensor:
        """(B, S, D) -> (B, S, D); see :class:`Attention`."""
        x = x + self.layer_scale1(self.attention(self.norm1(x), table, visible))
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class ScaleBlock(nn.Module):
    """Twice as fine: transposed convolution, GELU, depthwise convolution, LayerNorm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(dim, dim, 2, 2)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.norm = LayerNorm2d(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, D, 2h, 2w)."""
        return self.norm(self.conv2(F.gelu(self.conv1(x))))


class Scalers(nn.Module):
    """``sum_l a_l * y_l``, a factor for each channel of each level, 1 at the start."""

    def __init__(self, dim: int, levels: int) -> None:
        super().__init__()
        for i in range(levels):
            self.register_parameter(str(i), nn.Parameter(torch.ones(dim)))

    def forward(self, *levels: Tensor) -> Tensor:
        """(B, S, D) of each level -> (B, S, D)."""
        first, *others = (y * scale for y, scale in zip(levels, self.parameters()))
        for term in others:
            first = first + term
        return first


def projection(kind: str, dim: int) -> nn.Module:
    """What a level goes through."""
    if kind == "mlp":
        return nn.Sequential(nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim))
    return nn.Linear(dim, dim) if kind == "linear" else nn.Identity()


@register_head("plain-mask", PlainMaskHeadConfig)
class PlainMaskHead(QueryHead):
    """Plain mask decoder: masks and classes of queries, for semantic, instance and panoptic segmentation."""

    attn_mask_probs: Tensor

    def __init__(self, spec: Spec | HierarchicalSpec, config: PlainMaskHeadConfig, strides: tuple[int, ...]) -> None:
        super().__init__()
        if isinstance(spec, HierarchicalSpec):
            raise TypeError(
                "plain-mask reads tokens of one width and one grid from several layers: give it a plain ViT"
            )
        config = config.resolve(spec)
        self.config, self.patch_size = config, spec.patch_size
        self.answers, self.things, self.num_classes = ANSWERS[config.task], frozenset(config.things), config.num_classes
        dim, levels = spec.embed_dim, config.interaction_indices or ()
        heads, hidden = config.num_heads or 1, config.hidden_dim or dim
        self.bn = nn.ModuleList(norm2d(config.norm, dim) for _ in levels if config.lateral_bn)
        self.lateral_projections = nn.ModuleList(projection(config.lateral_projection, dim) for _ in levels)
        self.scalers = Scalers(dim, len(levels))
        self.q = nn.Embedding(config.num_q, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, hidden) for _ in range(config.num_blocks))
        self.decoder_norm = nn.LayerNorm(dim)
        self.upscale = nn.Sequential(*(ScaleBlock(dim) for _ in range(config.upscale or 0)))
        self.mask_head = nn.Sequential(
            nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim)
        )
        self.class_head = nn.Linear(dim, config.num_classes + 1)
        # The authors keep it in their files, at the end all 0: whoever trains on from there trains without masks.
        self.register_buffer("attn_mask_probs", torch.ones(config.num_blocks), persistent=False)

    def reads(self) -> tuple[int, ...]:
        """The blocks whose outputs it wants in ``Features.intermediates``."""
        return self.config.interaction_indices or ()

    # ------------------------------------------------------------------------------------------------------ the paper

    def forward(self, features: Features) -> QueryLogits:
        """Features with ``intermediates`` -> what queries say; in training, what they said before each block too."""
        masked = self.training and self.config.masked_attention
        *earlier, last = self.predictions(features.intermediates, features.grid, masked)
        return last._replace(auxiliary_logits=tuple(earlier))

    def predictions(self, levels: Sequence[Tensor], grid: Grid, masked: bool) -> list[QueryLogits]:
        """Run the decoder.

        Args:
            levels: tokens (B, P+N, D) after the blocks of ``interaction_indices``, after the final norm.
            grid: (h, w) of the patches.
            masked: whether queries are held to their masks, each in block i by ``attn_mask_probs[i]``.

        Returns what was said before each block and after the last; without masks the last alone.
        """
        if len(levels) != len(self.reads()):
            raise ValueError(
                f"plain-mask reads the tokens after the blocks {list(self.reads())}, and the features have "
                f"{len(levels)} intermediates: give what the model it is attached to computes"
            )
        x = self.fuse(levels)
        queries = self.q(torch.arange(self.config.num_q, device=x.device))
        x = torch.cat([queries.expand(x.shape[0], -1, -1), x], dim=1)  # (B, Q+P+N, D)
        table = rotary_table(grid, x.shape[2] // (self.config.num_heads or 1), x)
        found: list[QueryLogits] = []
        for i, block in enumerate(self.blocks):
            visible = None
            if masked:
                found.append(self.predict(x, grid))
                visible = self.visible(found[-1].masks_queries_logits, grid, self.attn_mask_probs[i])
            x = block(x, table, visible)
        return [*found, self.predict(x, grid)]

    def fuse(self, levels: Sequence[Tensor]) -> Tensor:
        """Levels (B, P+N, D) -> their sum, each normed, projected and scaled."""
        projected = []
        for i, project in enumerate(self.lateral_projections):
            x = levels[i].to(parameter_dtype(self))
            if self.config.lateral_bn:  # over all tokens of the batch, prefix tokens too
                x = map_to_tokens(self.bn[i](tokens_to_map(x, (1, x.shape[1]))))
            projected.append(x + project(x) if self.config.residual_projection else project(x))
        return self.scalers(*projected)

    def predict(self, x: Tensor, grid: Grid) -> QueryLogits:
        """x (B, Q+P+N, D) -> classes (B, Q, K + 1) and masks (B, Q, H, W) of the queries, H = h * 2^upscale."""
        z = self.decoder_norm(x)
        queries, patches = z[:, : self.config.num_q], z[:, z.shape[1] - grid[0] * grid[1] :]
        fine = self.upscale(tokens_to_map(patches, grid))
        masks = torch.einsum("bqd,bdhw->bqhw", self.mask_head(queries), fine)
        return QueryLogits(self.class_head(queries), masks)

    def visible(self, masks: Tensor, grid: Grid, probability: Tensor) -> Tensor:
        """Mask logits (B, Q, H, W) -> the patches (B, Q, N) that each query reads, all where it is not held."""
        inside = stretched(masks.detach(), grid).flatten(2) > 0
        free = torch.rand(*masks.shape[:2], 1, device=masks.device) > probability
        return inside | free

    # ------------------------------------------------------------------------------------------------- what they say

    def resize(self, features: Features, masks: Tensor, size: Grid) -> Tensor:
        """Mask logits (B, Q, h, w) -> (B, Q, H, W): the image's own part of the padded grid, brought to this size."""
        whole = resample_map(masks, self.patch_size / 2 ** (self.config.upscale or 0), 1, features.size)
        return whole if size == features.size else stretched(whole, size)

    def scores(self, features: Features) -> Tensor:
        """Features with their logits -> (B, K, H, W), the sum over queries of p(class) * p(mask)."""
        found = self.found(features)
        sizes = found.class_queries_logits, found.masks_queries_logits, features.size
        return class_scores(*sizes, lambda masks, size: self.resize(features, masks, size))

    def segments(
        self, features: Features, sizes: Sequence[Grid], thresholds: tuple[float, float] = (0.8, 0.8)
    ) -> list[Tensor]:
        """Features with their logits -> for each image, label and segment id (H, W, 2) of each pixel of this size."""
        found = self.found(features)
        each = zip(found.class_queries_logits, found.masks_queries_logits, sizes)
        return [
            merge(classes, masks, size, set(self.things), thresholds, lambda m, s: self.resize(features, m, s))
            for classes, masks, size in each
        ]

    def objects(self, features: Features, sizes: Sequence[Grid]) -> list[dict[str, Tensor]]:
        """Features with their logits -> for each image, what torchvision's detectors return, at this size."""
        found = self.found(features)
        each = zip(found.class_queries_logits, found.masks_queries_logits, sizes)
        return [
            instances(classes, masks, size, resize=lambda m, s: self.resize(features, m, s))
            for classes, masks, size in each
        ]

    def found(self, features: Features) -> QueryLogits:
        """The logits of features; ``TypeError`` for those of another head."""
        if not isinstance(features.logits, QueryLogits):
            raise TypeError(f"features with logits of {type(features.logits).__name__}, and not of plain-mask")
        return features.logits

    # ------------------------------------------------------------------------------------------------------ training

    def loss(self, features: Features, targets: Sequence[tuple[Tensor, Tensor]], points: int = 12544) -> Tensor:
        """Return :func:`~adaptkit.heads.plain_mask.loss.set_loss` of all predictions.

        Args:
            features: of a batch, with their logits, in training mode.
            targets: for each image masks (n, H, W) in 0..1, of the image's size, and labels (n,).
            points: of each mask that are looked at.
        """
        last = self.found(features)
        side, (h, w) = self.patch_size, features.grid
        extent = features.size[0] / (h * side), features.size[1] / (w * side)
        return set_loss([*last.auxiliary_logits, last], targets, points, extent)

    def anneal(self, progress: float) -> None:
        """Hold queries to their masks as far as training is, ``progress`` in 0..1; see :func:`annealed`."""
        for i, probability in enumerate(annealed(self.config.num_blocks, progress)):
            self.attn_mask_probs[i].fill_(probability)
