"""Simple feature pyramid (ViTDet, Li et al. 2022, section 3): four maps from the last tokens alone.

The honest, cheap baseline for ViT-Adapter on the same frozen backbone: no spatial prior, nothing read from the image
but the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from adaptkit.adapters.base import Aux, SideAdapter
from adaptkit.core.layers import LayerNorm2d, init_weights, parameter_dtype
from adaptkit.core.registry import register_adapter
from adaptkit.core.view import Features, Spec, ViT
from adaptkit.ops.grid import STRIDES, cells, check_strides, resample_map, tokens_to_map

__all__ = ["SimpleFeaturePyramid", "SimpleFeaturePyramidConfig"]


@dataclass(frozen=True)
class SimpleFeaturePyramidConfig:
    """The pyramid has the backbone's width D at every level."""

    strides: tuple[int, ...] = STRIDES  #: of the maps that are made

    def __post_init__(self) -> None:
        object.__setattr__(self, "strides", check_strides(self.strides, STRIDES))


@register_adapter("sfp", SimpleFeaturePyramidConfig)
class SimpleFeaturePyramid(SideAdapter):
    """Simple feature pyramid: strides 4 to 32 from the last tokens alone.

    Transposed convolutions to strides p/4 and p/2, the identity, and pooling to 2p; then 1x1 and 3x3 convolutions.
    For a patch p other than 16 the maps are resampled from these strides to 4, 8, 16 and 32.
    """

    strides: tuple[int, ...] = STRIDES

    def __init__(self, spec: Spec, config: SimpleFeaturePyramidConfig) -> None:
        super().__init__(spec, config)
        self.strides = config.strides
        dim, half, quarter = spec.embed_dim, max(1, spec.embed_dim // 2), max(1, spec.embed_dim // 4)
        up4 = [nn.ConvTranspose2d(dim, half, 2, 2), LayerNorm2d(half, eps=1e-6), nn.GELU()]
        stages: list[nn.Module] = [
            nn.Sequential(*up4, nn.ConvTranspose2d(half, quarter, 2, 2)),
            nn.Sequential(nn.ConvTranspose2d(dim, half, 2, 2)),
            nn.Identity(),
            nn.MaxPool2d(2, 2, ceil_mode=True),
        ]
        outputs: list[nn.Module] = [
            nn.Sequential(
                nn.Conv2d(width, dim, 1, bias=False),
                LayerNorm2d(dim, eps=1e-6),
                nn.Conv2d(dim, dim, 3, padding=1, bias=False),
                LayerNorm2d(dim, eps=1e-6),
            )
            for width in (quarter, half, dim, dim)
        ]
        # Levels that are left out keep their index, so that the keys of a file do not depend on ``strides``.
        asked = [stride in config.strides for stride in STRIDES]
        self.stages = nn.ModuleList(m if is_asked else nn.Identity() for m, is_asked in zip(stages, asked))
        self.outputs = nn.ModuleList(m if is_asked else nn.Identity() for m, is_asked in zip(outputs, asked))
        self.apply(init_weights)

    def reads(self) -> tuple[int, ...]:
        """The last block."""
        return (self.spec.depth - 1,)

    def reads_image(self) -> bool:
        """No."""
        return False

    def why_alone(self) -> str:
        """Nothing: it reads the last tokens."""
        return ""

    def forward(self, vit: ViT, image: Tensor, aux: Aux) -> Features:
        """Image (B, C, H, W) -> features with maps (B, D, H/s, W/s), s of ``strides``, rounded up."""
        features = vit.features(image)
        x = tokens_to_map(features.tokens, features.grid).to(parameter_dtype(self.outputs))
        patch, (height, width) = vit.spec.patch_size, features.size
        maps = []
        for stage, output, made, stride in zip(
            self.stages, self.outputs, (patch / 4, patch / 2, patch, patch * 2), STRIDES
        ):
            if stride not in self.strides:
                continue
            size = (cells(height, stride), cells(width, stride))
            maps.append(output(resample_map(stage(x), made, stride, size)))
        return features._replace(maps=tuple(maps), aux=dict(aux))
