"""ViT-Split (Li et al., ICCV 2025): choices in ``config``, the paper in ``network``, its blocks in ``copies``."""

from adaptkit.adapters.vit_split.config import ViTSplitConfig
from adaptkit.adapters.vit_split.copies import BlockCopies
from adaptkit.adapters.vit_split.network import DeformableBlock, ViTSplit, deformable_stack

__all__ = ["BlockCopies", "DeformableBlock", "ViTSplit", "ViTSplitConfig", "deformable_stack"]
