"""ViT-Adapter on a CPU: the same numbers with less fresh memory, of which a page is cleared when it is first touched.

What is wide is made some rows or one image at a time, where the result goes anyway, or again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit._cpu import batch_norm
from adaptkit._cpu.accumulate import add_resampled, add_upsampled
from adaptkit._cpu.linear import add_linear, branch_linear, linear, norm_linear, wide_linear
from adaptkit._cpu.norms import conv_norm, norm_map, norm_twice
from adaptkit._cpu.recompute import recomputed
from adaptkit._cpu.softmax import grouped_softmax
from adaptkit.adapters.vit_adapter.config import STRIDES
from adaptkit.adapters.vit_adapter.network import ConvFFN, Extractor, Grids, Injector, SpatialPrior, finest_map
from adaptkit.core.layers import SyncBatchNorm2d
from adaptkit.mixers import Layout
from adaptkit.mixers.msda import MSDeformAttn
from adaptkit.ops import ms_deform_attn
from adaptkit.ops.grid import map_to_tokens, tokens_to_map
from adaptkit.seam import fast_path

STRIP = 8192  # pixels of the stem's result that are made at a time

Norms = tuple[nn.Module, nn.Module]  # of the queries and of the values
NO_NORMS: Norms = (nn.Identity(), nn.Identity())


# ------------------------------------------------------------------------------------------- deformable attention


@fast_path(MSDeformAttn.forward)
def attention(self: MSDeformAttn, query: Tensor, feat: Tensor, layout: Layout) -> Tensor:
    """Deformable attention that does not hold what it has read."""
    return _attention(self, query, feat, layout, NO_NORMS)


def _attention(self: MSDeformAttn, query: Tensor, feat: Tensor, layout: Layout, norms: Norms) -> Tensor:
    """``self(norms[0](query), norms[1](feat), layout)``."""
    _, read = _reader(self, query, feat, layout, norms)
    sampled = read()
    with recomputed((sampled, read)):
        return linear(sampled, self.output_proj.weight, self.output_proj.bias)


def _plus_attention(self: MSDeformAttn, query: Tensor, feat: Tensor, layout: Layout, norms: Norms) -> Tensor:
    """``query + _attention(...)``, summed where the projection is made."""
    query, read = _reader(self, query, feat, layout, norms)
    sampled = read()
    with recomputed((sampled, read)):
        return add_linear(query, sampled, self.output_proj.weight, self.output_proj.bias)


def _reader(
    self: MSDeformAttn, query: Tensor, feat: Tensor, layout: Layout, norms: Norms
) -> tuple[Tensor, Callable[[], Tensor]]:
    """Place the points: the query as a residual takes it, and a function that reads there: (B, Q, width)."""
    shape, points = (self.heads, self.levels, self.points), layout.points
    value = norm_linear(feat, norms[1], self.value_proj.weight, self.value_proj.bias).unflatten(2, (self.heads, -1))
    query, offsets, weights = _places(self, query, norms[0], layout.cells())
    locations = points[:, None, None, None, :] + offsets.unflatten(2, (*shape, 2))
    weights = grouped_softmax(weights, self.heads).unflatten(2, shape)
    return query, partial(ms_deform_attn, value, list(layout.values), locations, weights)


def _places(self: MSDeformAttn, query: Tensor, norm: nn.Module, cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, Q, D) -> the same, offsets (B, Q, H * L * K * 2) over the extent of a level, logits (B, Q, H * L * K).

    Both layers read the query once, and cells become shares of the extent in the weights, which are few.
    """
    offsets, logits = self.sampling_offsets, self.attention_weights
    cells = cells[:, None].expand(self.heads, -1, self.points, -1).flatten().to(offsets.weight.dtype)
    weight = torch.cat([offsets.weight / cells[:, None], logits.weight])
    bias = torch.cat([offsets.bias / cells, logits.bias])
    query, places = branch_linear(query, norm, weight, bias)
    return query, *places.split([offsets.out_features, logits.out_features], dim=-1)


# ------------------------------------------------------------------------------------------ injector and extractor


def _is_deformable(self: Injector | Extractor, *args: object) -> bool:
    return isinstance(self.attn, MSDeformAttn)


@fast_path(Injector.forward, is_supported=_is_deformable)
def injector(self: Injector, x: Tensor, c: Tensor, grids: Grids) -> Tensor:
    """An injector that does not hold what it has normed and read."""
    prefix, patches = x.tensor_split([x.shape[1] - grids.tokens[0] * grids.tokens[1]], dim=1)
    read = _attention(self.attn, patches, c, grids.injection, (self.query_norm, self.feat_norm))
    return torch.cat([prefix, patches + self.gamma * read], dim=1)


@fast_path(Extractor.forward, is_supported=_is_deformable)
def extractor(self: Extractor, c: Tensor, x: Tensor, grids: Grids) -> Tensor:
    """An extractor that holds nothing wide but its result."""
    c = _plus_attention(self.attn, c, x, grids.extraction, (self.query_norm, self.feat_norm))
    if self.ffn is None or self.ffn_norm is None:
        return c
    return _plus_ffn(self.ffn, c, self.ffn_norm, grids.levels, self.drop_path.scale(c))


def _plus_ffn(
    ffn: ConvFFN, c: Tensor, norm: nn.Module, levels: Sequence[tuple[int, int]], scale: Tensor | None
) -> Tensor:
    """``c + scale * ffn(norm(c))``, ``scale`` (B, 1, 1) per sample; it holds what is narrow before the convolution."""
    c, narrow = branch_linear(c, norm, ffn.fc1.weight, ffn.fc1.bias)
    mixed = _mix(ffn, narrow, levels)
    with recomputed((mixed, lambda: _mix(ffn, narrow, levels))):
        active = F.gelu(mixed)
    if scale is None:
        weight, bias = ffn.fc2.weight, ffn.fc2.bias
    else:  # it is cheaper to scale what is narrow, with the bias as one more channel
        weight, bias = torch.cat([ffn.fc2.weight, ffn.fc2.bias[:, None]], dim=1), None
    ready = _scaled(active, scale)
    with recomputed((ready, lambda: _scaled(F.gelu(_mix(ffn, narrow, levels)), scale))):
        return add_linear(c, ready, weight, bias)


def _mix(ffn: ConvFFN, x: Tensor, levels: Sequence[tuple[int, int]]) -> Tensor:
    parts = x.split([h * w for h, w in levels], dim=1)
    return torch.cat([map_to_tokens(ffn.dwconv(tokens_to_map(p, g))) for p, g in zip(parts, levels)], dim=1)


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    """(B, N, D), scaled per sample and with the scale as one more channel; x itself where there is none."""
    return x if scale is None else torch.cat([x * scale, scale.expand(*x.shape[:2], 1)], dim=2)


# --------------------------------------------------------------------------------------------------- spatial prior


@fast_path(SpatialPrior.forward)
def spatial_prior(self: SpatialPrior, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The prior with its stem, whose maps are the largest of all, part by part."""
    image = image.contiguous(memory_format=torch.channels_last)
    c1 = stem_by_strips(self.stem, image) if _is_local(self.stem) else stem(self.stem, image)
    c2 = _narrower(self.conv2, c1)
    c3 = _narrower(self.conv3, c2)
    c4 = _narrower(self.conv4, c3)
    return c1, self.fc2(c2), self.fc3(c3), self.fc4(c4)


def _is_local(layers: nn.Sequential) -> bool:
    """Whether no norm of the stem asks for the whole map, or for all images."""
    of_batch = [isinstance(m, nn.BatchNorm2d) and m.training for m in layers]
    return not any(of_batch) and not any(isinstance(m, nn.GroupNorm) for m in layers)


def stem_by_strips(layers: nn.Sequential, image: Tensor) -> Tensor:
    """``stem``, some rows at a time: its largest maps then fit in the cache, and in memory that was used before.

    A strip has rows of its neighbours around it. The zeros that the convolutions put beyond its edges spoil two rows of
    the result above and one below, which are cut off.
    """
    rows, step = image.shape[2] // 4, max(16, STRIP // (image.shape[3] // 4))
    images = []
    for one in image.split(1):
        strips = []
        for start in range(0, rows, step):
            stop, above = min(start + step, rows), min(start, 2)
            strip = stem(layers, one[:, :, 4 * (start - above) : 4 * (stop + 1)])
            strips.append(strip[:, :, above : above + stop - start])
        images.append(torch.cat(strips, dim=2))
    return torch.cat(images)


def stem(layers: nn.Sequential, x: Tensor) -> Tensor:
    """The stem without keeping its normed maps.

    The largest of what is positive is what is positive of the largest, on a quarter of the pixels: so the last ReLU
    comes after the pooling.
    """
    conv1, norm1, _, conv2, norm2, _, conv3, norm3, _, pool = layers
    if not norm1.training:
        x = conv_norm(conv2, norm2, conv_norm(conv1, norm1, x).relu_()).relu_()
        return pool(conv_norm(conv3, norm3, x)).relu_()
    x = conv1(x)
    if all(batch_norm.is_supported(norm, x) for norm in (norm1, norm2, norm3)):
        x = batch_norm.norm_relu_conv(batch_norm.norm_relu_conv(x, norm1, conv2.weight), norm2, conv3.weight)
        return batch_norm.norm_pool(x, norm3).relu_()
    x = _normed(x, norm1, conv2)
    x = _normed(x, norm2, conv3)
    y = norm_map(norm3, x)
    if isinstance(norm3, SyncBatchNorm2d):
        return pool(y).relu_()
    with recomputed((y, lambda: x)):  # the gradient of a largest value asks for its place, and for the shape of the map
        return pool(y).relu_()


def _narrower(layers: nn.Sequential, x: Tensor) -> Tensor:
    conv, norm, _ = layers
    return conv_norm(conv, norm, x).relu_()


def _normed(x: Tensor, norm: nn.Module, conv: nn.Conv2d) -> Tensor:
    """``conv(relu(norm(x)))``; x alone is kept for the backward pass."""
    if isinstance(norm, SyncBatchNorm2d):  # to compute it again would take all processes again
        return conv(norm_map(norm, x).relu_())
    y, again = norm_twice(norm, x)
    with recomputed((y, lambda: again().relu_())):
        return conv(y.relu_())


# --------------------------------------------------------------------------------------------------------- pyramid


@fast_path(finest_map)
def finest(
    fc1: nn.Conv2d, up: nn.ConvTranspose2d, norm: nn.Module, c1: Tensor, c2: Tensor, x: Tensor | None, patch: int
) -> Tensor:
    """The map at stride 4, larger than all others together: summed in place and part by part."""
    if torch.is_grad_enabled():
        m = fc1(c1)
    else:
        m = wide_linear(c1.movedim(1, 3), fc1.weight.flatten(1), fc1.bias).movedim(3, 1)
    m = add_upsampled(m, c2, up.weight, up.bias)
    if x is not None:
        m = add_resampled(m, x, patch, STRIDES[0])
    return batch_norm.norm_large(m, norm) if batch_norm.is_supported(norm, m) else norm_map(norm, m, mine=True)
