"""What ViT-Adapter is made of: the spatial prior, the injector and the extractor.

Maps are kept channels-last in memory. Tokens (B, h*w, D) and a map (B, D, h, w) are then the same numbers in the same
order, so that going from one to the other costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.layers import DropPath, Norm, SyncBatchNorm2d, conv_norm, norm2d, norm_map
from adaptkit.mixers import CrossMixer, Layout, cross_mixer
from adaptkit.ops import batch_norm
from adaptkit.ops.device import eager_cpu, pair, pairs
from adaptkit.ops.forget import forgotten
from adaptkit.ops.grid import cell_centres, map_to_tokens, tokens_to_map
from adaptkit.ops.linear import add_linear, branch_linear
from adaptkit.vit import Fn, identity

__all__ = ["ConvFFN", "Extractor", "Grids", "Injector", "Interaction", "SpatialPrior"]

STRIDES = (4, 8, 16, 32)
STRIP = 8192  # pixels of the stem's result that are made at a time
EPS = 1e-6  # of every LayerNorm, as in the official code


class Grids(NamedTuple):
    """Where the tokens of x and of c lie in one image."""

    tokens: tuple[int, int]  #: (h, w) of x
    levels: tuple[tuple[int, int], ...]  #: (h, w) of the three parts of c, strides 8, 16, 32
    to_prior: Tensor  #: (N, 2) centre of each token of x, as (x, y) over the extent of c
    to_tokens: Tensor  #: (M, 2) centre of each token of c, over the extent of x
    sizes: Tensor  #: (4, 2) width and height of the levels, then of the grid of x, in cells

    @staticmethod
    def of(tokens: tuple[int, int], patch: int, levels: Sequence[tuple[int, int]], image: Tensor) -> Grids:
        """Lay out both grids for a token grid, its patch and the levels of the prior."""
        device, dtype = image.device, torch.promote_types(image.dtype, torch.float32)
        x = cell_centres(tokens, patch, device, dtype)
        c = torch.cat([cell_centres(g, s, device, dtype) for g, s in zip(levels, STRIDES[1:])])
        extent_x = pair(tokens[1] * patch, tokens[0] * patch, x)
        extent_c = pair(levels[0][1] * STRIDES[1], levels[0][0] * STRIDES[1], x)
        sizes = pairs([(w, h) for h, w in (*levels, tokens)], x)
        return Grids(tokens, tuple(levels), x / extent_c, c / extent_x, sizes)

    def injection(self) -> Layout:
        """Tokens of x read the levels of c."""
        return Layout((self.tokens,), self.levels, self.to_prior, self.sizes[:-1])

    def extraction(self) -> Layout:
        """Tokens of c read the map of x."""
        return Layout(self.levels, (self.tokens,), self.to_tokens, self.sizes[-1:])


def _attention(dim: int, levels: int, config: Any) -> CrossMixer:
    heads, points, ratio = config.deform_num_heads, config.n_points, config.deform_ratio
    return cross_mixer(config.attention, dim, levels=levels, heads=heads, points=points, ratio=ratio)


class Injector(nn.Module):
    """``x + gamma * attn(norm(x), norm(c))`` on the patch tokens (paper, eq. 1)."""

    def __init__(self, dim: int, config: Any) -> None:
        super().__init__()
        attn = _attention(dim, 3, config)
        self.query_norm = nn.LayerNorm(dim, eps=EPS) if attn.reads_query else nn.Identity()
        self.feat_norm = nn.LayerNorm(dim, eps=EPS)
        self.attn = attn
        self.gamma = nn.Parameter(torch.full((dim,), float(config.gamma_init)))

    def forward(self, x: Tensor, c: Tensor, grids: Grids) -> Tensor:
        """x (B, P+N, D), c (B, M, D) -> (B, P+N, D); the P prefix tokens pass by."""
        prefix, patches = x.tensor_split([x.shape[1] - grids.to_prior.shape[0]], dim=1)
        patches = patches.to(self.gamma.dtype)
        injected = self.gamma * self.attn.normed(patches, c, grids.injection(), (self.query_norm, self.feat_norm))
        return torch.cat([prefix, (patches + injected).to(x.dtype)], dim=1)


class ConvFFN(nn.Module):
    """FFN with a depthwise 3x3 convolution between its layers, one kernel for the three scales."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def onto(self, c: Tensor, norm: nn.Module, levels: Sequence[tuple[int, int]], scale: Tensor | None) -> Tensor:
        """(B, M, D) -> ``c + scale * ffn(norm(c))``, ``scale`` (B, 1, 1) per sample; without gradients c is changed."""
        c, narrow = branch_linear(c, norm, self.fc1.weight, self.fc1.bias)
        mixed = self._mix(narrow, levels)
        with forgotten((mixed, lambda: self._mix(narrow, levels))):
            active = F.gelu(mixed)
        if scale is None:
            weight, bias = self.fc2.weight, self.fc2.bias
        else:  # it is cheaper to scale what is narrow, with the bias as one more channel
            weight, bias = torch.cat([self.fc2.weight, self.fc2.bias[:, None]], dim=1), None
        ready = _scaled(active, scale)
        with forgotten((ready, lambda: _scaled(F.gelu(self._mix(narrow, levels)), scale))):
            return add_linear(c, ready, weight, bias)

    def _mix(self, narrow: Tensor, levels: Sequence[tuple[int, int]]) -> Tensor:
        parts = narrow.split([h * w for h, w in levels], dim=1)
        return torch.cat([map_to_tokens(self.dwconv(tokens_to_map(p, g))) for p, g in zip(parts, levels)], dim=1)


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    """(B, N, D), scaled per sample and with the scale as one more channel; x itself where there is none."""
    return x if scale is None else torch.cat([x * scale, scale.expand(*x.shape[:2], 1)], dim=2)


class Extractor(nn.Module):
    """``c + attn(norm(c), norm(x))``, then ``c + ffn(norm(c))`` (paper, eq. 2-3)."""

    def __init__(self, dim: int, config: Any) -> None:
        super().__init__()
        attn = _attention(dim, 1, config)
        self.query_norm = nn.LayerNorm(dim, eps=EPS) if attn.reads_query else nn.Identity()
        self.feat_norm = nn.LayerNorm(dim, eps=EPS)
        self.attn = attn
        self.ffn_norm = nn.LayerNorm(dim, eps=EPS) if config.with_cffn else None
        self.ffn = ConvFFN(dim, int(dim * config.cffn_ratio)) if config.with_cffn else None
        self.drop_path = DropPath(config.drop_path)

    def forward(self, c: Tensor, x: Tensor, grids: Grids) -> Tensor:
        """c (B, M, D), patch tokens x (B, N, D) -> (B, M, D); without gradients c itself is changed."""
        c = self.attn.onto(c, x, grids.extraction(), (self.query_norm, self.feat_norm))
        if self.ffn is None or self.ffn_norm is None:
            return c
        return self.ffn.onto(c, self.ffn_norm, grids.levels, self.drop_path.scale(c))


class Interaction(nn.Module):
    """One injector, and the extractors that follow its group of blocks."""

    def __init__(self, dim: int, config: Any, extra: int) -> None:
        super().__init__()
        self.injector = Injector(dim, config) if config.injector else None
        self.extractor = Extractor(dim, config)
        self.extra_extractors = nn.ModuleList(Extractor(dim, config) for _ in range(extra))

    def inject(self, x: Tensor, c: Tensor, grids: Grids) -> Tensor:
        """Tokens as the group of blocks gets them."""
        return x if self.injector is None else self.injector(x, c, grids)

    def extract(self, c: Tensor, x: Tensor, grids: Grids) -> Tensor:
        """Multi-scale tokens after the group."""
        for extractor in (self.extractor, *self.extra_extractors):
            c = extractor(c, x, grids)
        return c


class SpatialPrior(nn.Module):
    """A small ResNet-like stem (paper, section 3.2): maps at strides 4, 8, 16 and 32, channels-last."""

    def __init__(self, dim: int, inplane: int, norm: Norm, finest: bool = True, channels: int = 3) -> None:
        """``finest=False`` leaves out what the map at stride 4 is projected by; ``channels`` are those of the image."""
        super().__init__()

        def conv(cin: int, cout: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(cin, cout, 3, stride, 1, bias=False), norm2d(norm, cout), nn.ReLU(inplace=True)]

        *stem, relu = [*conv(channels, inplane, 2), *conv(inplane, inplane, 1), *conv(inplane, inplane, 1)]
        # The largest of what is positive is what is positive of the largest, on a quarter of the pixels.
        self.stem = nn.Sequential(*stem, nn.MaxPool2d(3, stride=2, padding=1), relu)
        self.conv2 = nn.Sequential(*conv(inplane, 2 * inplane, 2))
        self.conv3 = nn.Sequential(*conv(2 * inplane, 4 * inplane, 2))
        self.conv4 = nn.Sequential(*conv(4 * inplane, 4 * inplane, 2))
        self.fc1 = nn.Conv2d(inplane, dim, 1) if finest else None
        self.fc2 = nn.Conv2d(2 * inplane, dim, 1)
        self.fc3 = nn.Conv2d(4 * inplane, dim, 1)
        self.fc4 = nn.Conv2d(4 * inplane, dim, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, C, H, W), sides multiples of 32 -> (B, inplane, H/4, W/4), which ``fc1`` is for, and three of width D."""
        image = image.contiguous(memory_format=torch.channels_last)
        c1 = self._by_strips(image) if self._is_local(image) else self._stem(image)
        c2 = _narrower(self.conv2, c1)
        c3 = _narrower(self.conv3, c2)
        c4 = _narrower(self.conv4, c3)
        return c1, self.fc2(c2), self.fc3(c3), self.fc4(c4)

    def _is_local(self, image: Tensor) -> bool:
        """Whether the stem is better run on parts of an image: on a CPU, and where no norm asks for the whole."""
        norm = self.stem[1]
        of_batch = (isinstance(norm, nn.BatchNorm2d) and norm.training) or isinstance(norm, nn.GroupNorm)
        return not of_batch and eager_cpu(image)

    def _by_strips(self, image: Tensor) -> Tensor:
        """``_stem``, some rows at a time: its largest maps then fit in the cache, and in memory that was used before.

        A strip has rows of its neighbours around it. The zeros that the convolutions put beyond its edges spoil two
        rows of the result above and one below, which are cut off.
        """
        rows, step = image.shape[2] // 4, max(16, STRIP // (image.shape[3] // 4))
        images = []
        for one in image.split(1):
            strips = []
            for start in range(0, rows, step):
                stop, above = min(start + step, rows), min(start, 2)
                strip = self._stem(one[:, :, 4 * (start - above) : 4 * (stop + 1)])
                strips.append(strip[:, :, above : above + stop - start])
            images.append(torch.cat(strips, dim=2))
        return torch.cat(images)

    def _stem(self, x: Tensor) -> Tensor:
        """``stem``, without keeping its normed maps: they are the largest of all, and cheap."""
        conv1, norm1, relu, conv2, norm2, _, conv3, norm3, pool, _ = self.stem
        if not norm1.training:  # a norm that rests is part of the convolution
            x = relu(conv_norm(conv2, norm2, relu(conv_norm(conv1, norm1, x))))
            return relu(pool(conv_norm(conv3, norm3, x)))
        x = conv1(x)
        if all(batch_norm.suits(norm, x) for norm in (norm1, norm2, norm3)):
            x = batch_norm.norm_relu_conv(batch_norm.norm_relu_conv(x, norm1, conv2.weight), norm2, conv3.weight)
            return relu(batch_norm.norm_pool(x, norm3))
        x = _normed(x, norm1, relu, conv2)
        x = _normed(x, norm2, relu, conv3)
        # The gradient of a largest value asks for its place, and of the map for its shape alone (but on MPS): x has it.
        stand_in = None if x.device.type == "mps" else lambda: x
        return relu(_normed(x, norm3, identity, pool, again=stand_in))


def _narrower(layers: nn.Sequential, x: Tensor) -> Tensor:
    conv, norm, relu = layers
    return relu(conv_norm(conv, norm, x))


def _normed(x: Tensor, norm: nn.Module, act: Fn, layer: Fn, again: Callable[[], Tensor] | None = None) -> Tensor:
    """``layer(act(norm(x)))``, where ``act`` may work in place; x alone is kept for the backward pass.

    ``again`` makes what the backward pass of ``layer`` asks for; by default ``act(norm(x))``.
    """
    y = norm_map(norm, x, keep=torch.is_grad_enabled())
    if isinstance(norm, SyncBatchNorm2d):  # to compute it again would take all processes again
        return layer(act(y))
    with forgotten((y, again or (lambda: act(_again(norm, x))))):
        return layer(act(y))


def _again(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(x)`` once more: the running statistics have seen x."""
    if isinstance(norm, nn.BatchNorm2d) and norm.training:
        return F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
    return norm_map(norm, x, keep=True)
