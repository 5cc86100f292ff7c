"""AdaViT (Meng et al., CVPR 2022): which patches, heads and sub-layers each image uses, decided block by block.

- ``gates``: the decision of a block (section 3.2), and policies that decide in the gates' place.
- ``execution``: a block under a decision; everything is computed, and what is off is masked.
- ``packed``: the same, image by image, without computing what is off.
- ``capacity``: the same for a whole batch, with shapes known beforehand, so that a GPU need not be waited for.
- ``gain``: measures whether ``capacity`` is faster than ``execution`` on the device at hand.
- ``layouts``: copies of the backbone's weights that a fast path on the CPU keeps.
- ``adapter``: the adapter, which chooses among them.
"""

from adaptkit.adapters.adavit.adapter import AdaViT
from adaptkit.adapters.adavit.config import AdaViTConfig
from adaptkit.adapters.adavit.gates import Decision, Given, Random

__all__ = ["AdaViT", "AdaViTConfig", "Decision", "Given", "Random"]
