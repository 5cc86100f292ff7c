"""ViT-Split (Li et al., ICCV 2025): a task head of copied blocks and a prior head, on one pass of a frozen ViT.

T_l are the tokens after block l, LN is the ViT's own final norm, M drops the prefix tokens and makes a map, B'_j are
trainable copies of the blocks s to e (section 3)::

    prior = DC(concat_i M(LN(T_i)))                             i of out_indices
    task  = M(LN(B'_e(... B'_s(stopgrad(T_{s-1})))))
    fused = DC(concat(prior, task))

    DC    = conv 1x1, GELU, deformable conv 3x3, GELU

No gradient enters the ViT, so that its outputs can be cached and shared. The pyramid is that of the authors' detectors:
transposed convolutions and pooling of the fused map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.adapters.base import Aux, SideAdapter
from adaptkit.adapters.vit_split.config import STRIDES, ViTSplitConfig
from adaptkit.adapters.vit_split.copies import BlockCopies
from adaptkit.core.checkpointing import recompute
from adaptkit.core.layers import doubled, norm2d, parameter_dtype
from adaptkit.core.registry import register_adapter
from adaptkit.core.view import Features, Spec, ViT
from adaptkit.ops.grid import cell_centres, cells, resample_map, tokens_to_map
from adaptkit.ops.sample import coordinate_dtype, sample
from adaptkit.seam import constant, full_precision, modes

__all__ = ["DeformableBlock", "DeformableConv", "ViTSplit", "deformable_stack"]


class DeformableConv(nn.Module):
    """``out[p] = sum_k W_k x(p + p_k + offset_k(p))``, a 3x3 convolution that reads where it is told (Dai et al. 2017).

    No bias and no modulation; bilinear, zeros beyond the map.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dim, 3, 3))
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x (B, D, h, w), offsets (B, 18, h, w) as (dy, dx) of each point of the kernel, row by row -> (B, D, h, w)."""
        grid = (x.shape[-2], x.shape[-1])
        dtype = coordinate_dtype(x)
        cell = cell_centres(grid, 1, x.device, dtype).flip(-1) - 0.5  # (N, 2), y then x, the first at 0
        kernel = cell_centres((3, 3), 1, x.device, dtype).flip(-1) - 1.5  # (9, 2), from -1 to 1
        offset = offsets.flatten(2).unflatten(1, (9, 2)).transpose(2, 3)  # (B, 9, N, 2)
        places = cell + kernel[:, None] + offset.to(dtype)
        read = sample(x, places.flatten(1, 2)).unflatten(2, (9, -1))  # (B, D, 9, N)
        return (self.weight.flatten(1) @ read.flatten(1, 2)).unflatten(2, grid)


class DeformableBlock(nn.Module):
    """A deformable convolution whose offsets a plain one says. They do not start at zero, as in the authors' code."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.offsets = nn.Conv2d(dim, 18, 3, padding=1)
        self.deform_conv = DeformableConv(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, D, h, w). Half precision could not tell places between two cells apart."""
        with full_precision(x):
            offsets = self.offsets(x.to(self.offsets.weight.dtype))
        return self.deform_conv(x, offsets)


def deformable_stack(width: int, dim: int) -> nn.Sequential:
    """``DC``: (B, width, h, w) -> (B, dim, h, w)."""
    return nn.Sequential(nn.Conv2d(width, dim, 1), nn.GELU(), DeformableBlock(dim), nn.GELU())


@register_adapter("vit-split", ViTSplitConfig)
class ViTSplit(SideAdapter):
    """ViT-Split: trained copies of the last blocks and a prior of frozen maps, fused; strides 4 to 32."""

    strides: tuple[int, ...] = STRIDES
    takes_backbone: ClassVar[bool] = True
    learning_rates: ClassVar[Mapping[str, float]] = MappingProxyType({"split_head": 0.1})  # they are pretrained

    def __init__(self, spec: Spec, config: ViTSplitConfig, backbone: nn.Module) -> None:
        config = config.resolve(spec)
        super().__init__(spec, config)
        dim = spec.embed_dim
        self.select_layers, self.out_indices = config.select_layers or (), config.out_indices or ()
        self.strides = config.strides or (spec.patch_size,)
        self.split_head = BlockCopies(backbone, spec.depth, self.select_layers)
        self.frozen_conv = deformable_stack(len(self.out_indices) * dim, dim)
        self.fusion_conv = deformable_stack(2 * dim, dim)
        asked = [stride in self.strides for stride in STRIDES] if config.strides else [False] * len(STRIDES)
        self.up1 = doubled(dim, 2) if asked[0] else nn.Identity()
        self.up2 = doubled(dim) if asked[1] else nn.Identity()
        self.up3 = nn.Identity()
        self.up4 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.norm1, self.norm2, self.norm3, self.norm4 = (
            norm2d(config.norm, dim) if is_asked else nn.Identity() for is_asked in asked
        )

    def translated(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors themselves; ``ValueError`` where they are of blocks that are built otherwise."""
        self.split_head.check(tensors, "split_head.")
        return tensors

    def reads(self) -> tuple[int, ...]:
        """The blocks of the prior, and the one before the first copy."""
        return tuple(sorted({*self.out_indices, self.select_layers[0] - 1}))

    def reads_image(self) -> bool:
        """No."""
        return False

    def why_alone(self) -> str:
        """Nothing: it reads tokens."""
        return ""

    def forward(self, vit: ViT, image: Tensor, aux: Aux) -> Features:
        """Image (B, C, H, W) -> features with maps (B, D, H/s, W/s), s of ``strides``, rounded up.

        Tokens and prefix are those of the frozen backbone.
        """
        grid, taps, read = vit.grid(image), {}, self.reads()
        x, blocks = vit.begin(self._padded(vit, image))  # what is cached was framed before it ran
        for index, block in enumerate(blocks):
            x = block(x)
            if index in read:
                taps[index] = x
        prior = self.frozen_conv(torch.cat([self._map(vit, taps[i], grid) for i in self.out_indices], dim=1))
        task = self._map(vit, self._task(vit, taps[self.select_layers[0] - 1], grid), grid)
        fused = self.fusion_conv(torch.cat([prior, task], dim=1))
        return vit.finish(x, image, self._pyramid(fused, image), aux)

    def _task(self, vit: ViT, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, P+N, D) before the first copy -> after the last."""
        frozen, x = x.dtype, constant(x).to(parameter_dtype(self.split_head))
        for index, block in zip(self.select_layers, self.split_head.bound(grid)):
            again = self.config.checkpoint or vit.how_checkpointing().of(index)
            x = recompute(modes(self.split_head.modules()) if again else None, block, x)
        return x.to(frozen)

    def _map(self, vit: ViT, x: Any, grid: tuple[int, int]) -> Tensor:
        """``M(LN(x))``: tokens (B, P+N, D) -> (B, D, h, w)."""
        x = vit.norm(x)
        return tokens_to_map(x[:, x.shape[1] - grid[0] * grid[1] :], grid).to(parameter_dtype(self.frozen_conv))

    def _pyramid(self, fused: Tensor, image: Tensor) -> Sequence[Tensor]:
        """Return a map (B, D, H/s, W/s) for each stride s, or the fused map itself."""
        if self.config.strides is None:
            return [fused]
        maps, patch = [], self.spec.patch_size
        stages = (self.up1, self.norm1), (self.up2, self.norm2), (self.up3, self.norm3), (self.up4, self.norm4)
        for (up, norm), made, stride in zip(stages, (patch / 4, patch / 2, patch, 2 * patch), STRIDES):
            if stride in self.strides:
                size = (cells(image.shape[-2], stride), cells(image.shape[-1], stride))
                maps.append(resample_map(norm(up(fused)), made, stride, size))
        return maps

    @property
    def pad(self) -> str:
        """As its config says."""
        return self.config.pad

    def framed(self, image: Tensor) -> Tensor:
        """Pad the image (B, C, H, W) with zeros to whole patches on all sides if asked; left and top less."""
        down, right = (-n % self.spec.patch_size for n in image.shape[-2:])
        if self.pad == "corner" or not (down or right):
            return image
        return F.pad(image, (right // 2, right - right // 2, down // 2, down - down // 2))

    def _padded(self, vit: ViT, image: Tensor) -> Tensor:
        """As the backbone is to be given it.

        Raises ``ValueError`` where the pass is one that others have run: they pad at the right and the bottom.
        """
        if not vit.replayed:
            return self.framed(image)
        if self.pad != getattr(vit, "pad", "corner") and any(n % self.spec.patch_size for n in image.shape[-2:]):
            raise ValueError(
                f"images of {image.shape[-2]}x{image.shape[-1]} pixels are padded on all sides here (pad='centre'), "
                "and a pass that is shared with others at the right and the bottom; give images whose sides are "
                f"multiples of {self.spec.patch_size}"
            )
        return image
