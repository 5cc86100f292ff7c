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

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adaptkit.core.hierarchical import HierarchicalSpec
from adaptkit.core.layers import norm2d, parameter_dtype
from adaptkit.core.registry import register_head
from adaptkit.core.view import Features, Spec
from adaptkit.heads.base import QueryHead, QueryLogits
from adaptkit.heads.plain_mask.blocks import Block, Grid, ScaleBlock, Scalers, projection, rotary_table
from adaptkit.heads.plain_mask.config import PlainMaskHeadConfig
from adaptkit.heads.plain_mask.loss import set_loss
from adaptkit.ops.grid import map_to_tokens, resample_map, tokens_to_map
from adaptkit.ops.queries import class_scores, instances, merge, stretched

__all__ = ["PlainMaskHead", "annealed"]

#: Where in training block 1 and the last begin to let go of masks, how long each takes, and block 0: the published
#: schedules, in shares of the steps (COCO: from step 23651 and 59128, for 14782 of 88692, block 0 until 3000).
FIRST, LAST, WINDOW, BLOCK_0, POWER = 4 / 15, 2 / 3, 1 / 6, 1 / 30, 0.9
ANSWERS = {"semantic": "segmentation", "instance": "detection", "panoptic": "panoptic"}


def annealed(blocks: int, progress: float) -> list[float]:
    """Return for each block by which probability a query is held to its mask, at this share of the training.

    It is 1 until the block's turn, falls as ``(1 - t)^0.9``, and is 0 after; block after block, the first one at once.
    """

    def probability(start: float, stop: float) -> float:
        return (1.0 - min(1.0, max(0.0, (progress - start) / (stop - start)))) ** POWER

    step = (LAST - FIRST) / max(1, blocks - 2)
    starts = [FIRST + i * step for i in range(blocks - 1)]
    return [probability(0.0, BLOCK_0), *(probability(start, start + WINDOW) for start in starts)]


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
