"""Fast paths for float32 on a CPU, behind :mod:`adaptkit.seam`: importing this package registers them."""

from adaptkit._cpu import (
    adavit,  # noqa: F401
    frozen,  # noqa: F401
    vit_adapter,  # noqa: F401
)
