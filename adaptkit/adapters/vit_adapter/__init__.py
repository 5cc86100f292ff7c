"""ViT-Adapter (Chen et al., ICLR 2023): what is chosen in ``config``, the paper in ``network``."""

from adaptkit.adapters.vit_adapter.config import ViTAdapterConfig, even_groups
from adaptkit.adapters.vit_adapter.network import (
    ConvFFN,
    Extractor,
    Grids,
    Injector,
    Interaction,
    SpatialPrior,
    ViTAdapter,
)

__all__ = [
    "ConvFFN",
    "Extractor",
    "Grids",
    "Injector",
    "Interaction",
    "SpatialPrior",
    "ViTAdapter",
    "ViTAdapterConfig",
    "even_groups",
]
