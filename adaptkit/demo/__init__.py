"""Everything the demonstration needs, offline: a small pretrained backbone of our own and a drawn segmentation set.

`demo_backbone()` returns the frozen ViT, `scenes(split)` the images with their masks, `CLASSES` their class names.
Importing this package imports neither timm nor datasets nor torch; the functions do, when they are called.
"""

from .backbone import demo_backbone
from .scenes import CLASSES, scenes

__all__ = ["CLASSES", "demo_backbone", "scenes"]
