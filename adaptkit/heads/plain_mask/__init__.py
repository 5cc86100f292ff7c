"""The plain mask decoder of PMT (arXiv 2603.25398): choices in ``config``, the paper in ``network``, its ``loss``."""

from adaptkit.heads.plain_mask.blocks import rotary_table
from adaptkit.heads.plain_mask.config import PlainMaskHeadConfig, even_layers
from adaptkit.heads.plain_mask.loss import set_loss
from adaptkit.heads.plain_mask.network import PlainMaskHead, annealed

__all__ = ["PlainMaskHead", "PlainMaskHeadConfig", "annealed", "even_layers", "rotary_table", "set_loss"]
