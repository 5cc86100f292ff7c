"""Networks of other libraries on an adapter's pyramid: built from a few words, saved with the adapter in one file.

    mask-rcnn, faster-rcnn, retinanet, fcos    torchvision
    upernet, mask2former                       transformers

The words (the recipe) are kept in the file, so that ``adaptkit.from_pretrained`` builds the same network again.
"""

from adaptkit.networks.network import Network, build, load, restore, save

__all__ = ["Network", "build", "load", "restore", "save"]
