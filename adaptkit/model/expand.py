"""A frozen RGB backbone that reads images of more channels: infrared, depth, the thirteen bands of a satellite.

    embed(x) = conv(x[:, :3]; W_rgb) + conv(x[:, 3:]; W_new)            W_rgb (D, 3, p, p), W_new (D, n - 3, p, p)

W_rgb is the backbone's own kernel, the very tensor. With ``how="zero"`` W_new = 0, and the expanded backbone gives
for any further channels what the frozen one gives for red, green and blue, bit for bit: the two sums are kept apart, so
that no rounding changes. The new rows are a parameter of their own, so that they can be trained while the rest is
frozen, and are saved in the adapter's file, which also says how they began, for ``from_pretrained`` to build them::

    backbone = adaptkit.expand_channels(backbone, 13)
    model = adaptkit.attach(backbone, "lora", train_backbone=("*.new_channels",))
"""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from adaptkit.core.layers import check_choice
from adaptkit.core.registry import view
from adaptkit.core.tree import locate, named_modules, skeleton
from adaptkit.hub.backbone import EXPANSION
from adaptkit.model.owner import check_free

__all__ = ["expand_channels"]

How = Literal["zero", "mean", "wavelength"]
COUNTS = ("num_channels", "in_chans", "in_channels")  #: how modules and configs of others call the number of channels
#: Centres of red, green and blue in nanometres, as Sentinel-2 has them (bands 4, 3 and 2).
RGB = (665.0, 560.0, 490.0)


class ExpandedPatchEmbedding(nn.Module):
    """A patch embedding whose first three channels are the frozen kernel and the others ``new_channels``."""

    def __init__(self, conv: nn.Conv2d, new: Tensor) -> None:
        super().__init__()
        self.rgb: nn.Parameter = conv.weight  # of the backbone, the very object
        self.new_channels = nn.Parameter(new, requires_grad=conv.weight.requires_grad)
        self.bias = conv.bias
        self.kernel_size, self.stride, self.padding = conv.kernel_size, conv.stride, conv.padding
        self.dilation, self.groups = conv.dilation, conv.groups
        self.in_channels, self.out_channels = 3 + new.shape[1], conv.out_channels

    @property
    def weight(self) -> Tensor:
        """(D, n, p, p), as a convolution over all channels has it."""
        return torch.cat([self.rgb, self.new_channels], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, H, W) -> (B, D, h, w)."""
        first = F.conv2d(x[:, :3], self.rgb, self.bias, self.stride, self.padding)
        return first + F.conv2d(x[:, 3:], self.new_channels, None, self.stride, self.padding)


def expand_channels(
    backbone: nn.Module, n: int, how: How = "zero", wavelengths: Sequence[float] | None = None
) -> nn.Module:
    """Return a copy of a frozen RGB backbone that reads ``n`` channels; every tensor but the new rows is shared.

    So only one of the two can have adapters at a time.

    Args:
        backbone: a ViT whose first layer is a convolution over red, green and blue.
        n: channels of the image, more than 3; the first three are red, green and blue.
        how: the new rows start at zero (the answer is the frozen one, bit for bit), at the mean of the three, or
            between those of the two colours whose wavelengths are nearest, at the end of the range at the last one.
        wavelengths: with ``how="wavelength"``, the centre of each of the ``n - 3`` further channels in nanometres.

    Raises ``ValueError`` for a backbone of other than three channels or one that an adapted model holds, another ``n``
    and wavelengths that do not fit, ``TypeError`` where no plain convolution reads the image.
    """
    check_choice("how", how, get_args(How))
    seen = view(backbone)
    spec = seen.spec
    check_free(backbone, seen.backbone)
    if spec.channels != 3:
        raise ValueError(f"this {type(backbone).__name__} reads {spec.channels} channels; give one that reads three")
    if not isinstance(n, int) or isinstance(n, bool):
        raise TypeError(f"n={n!r} is no number of channels; give an int of 4 or more")
    if n <= 3:
        gray = "; one channel goes in as three equal ones, image.expand(-1, 3, -1, -1)" if n == 1 else ""
        raise ValueError(
            f"n={n} is not more than the three channels of {type(backbone).__name__}: give 4 or more{gray}"
        )
    path, conv = _patch_embedding(backbone)
    rows = _rows(conv.weight.detach(), n - 3, how, wavelengths)
    expanded = skeleton(backbone)
    parent, name = locate(expanded, path)
    parent._modules[name] = ExpandedPatchEmbedding(conv, rows).train(conv.training)
    for module in expanded.modules():
        _count(module, n)
    centres = None if wavelengths is None else [*map(float, wavelengths)]
    setattr(expanded, EXPANSION, {"how": how, "wavelengths": centres})
    return expanded


def _patch_embedding(backbone: nn.Module) -> tuple[str, nn.Conv2d]:
    found = [(path, m) for path, m in named_modules(backbone) if isinstance(m, nn.Conv2d) and m.in_channels == 3]
    if len(found) != 1 or not _is_plain(found[0][1]):
        said = ", ".join(f"{path}, a {type(m).__name__}" for path, m in found) or "none"
        raise TypeError(
            f"{type(backbone).__name__} has {len(found)} convolutions over three channels ({said}), and one plain "
            "nn.Conv2d is expanded: build it for your channels"
        )
    return found[0]


def _is_plain(conv: nn.Conv2d) -> bool:
    """Whether it computes conv(x; weight) of its own weight: timm's StdConv2d standardises it first."""
    own = type(conv).forward is nn.Conv2d.forward and type(conv)._conv_forward is nn.Conv2d._conv_forward
    usual = conv.padding_mode == "zeros" and conv.groups == 1 and conv.dilation == (1, 1)
    return own and usual and not is_parametrized(conv)


def _rows(kernel: Tensor, more: int, how: How, wavelengths: Sequence[float] | None) -> Tensor:
    """Kernel (D, 3, p, p) -> the new rows (D, more, p, p)."""
    if (how == "wavelength") != (wavelengths is not None):
        said = "no wavelengths" if wavelengths is None else "wavelengths"
        raise ValueError(f"how={how!r} with {said}: wavelengths belong to how='wavelength', and it needs them")
    if wavelengths is None:
        mix = kernel.new_full((more, 3), 1 / 3 if how == "mean" else 0.0)
    elif len(wavelengths) != more:
        raise ValueError(
            f"{len(wavelengths)} wavelengths for {more} further channels: give one for each, in nanometres"
        )
    elif not all(isinstance(w, numbers.Real) and 0 < w < math.inf for w in wavelengths):
        raise ValueError(f"wavelengths={list(wavelengths)}: give nanometres, above 0")
    else:
        mix = torch.stack([_between_colours(float(w)) for w in wavelengths]).to(kernel)
    return torch.einsum("mc,dcij->dmij", mix, kernel).contiguous()


def _between_colours(wavelength: float) -> Tensor:
    """Weights (3,) of red, green and blue: linear in the wavelength, constant beyond the last colour."""
    red, green, blue = RGB
    w = min(max(wavelength, blue), red)
    if w >= green:
        share = (w - green) / (red - green)
        return torch.tensor([share, 1 - share, 0.0])
    share = (green - w) / (green - blue)
    return torch.tensor([0.0, 1 - share, share])


def _count(module: nn.Module, n: int) -> None:
    """Let a copied module, and a config of its own, say the new number of channels."""
    own: dict[str, Any] = module.__dict__
    for name in COUNTS:
        if own.get(name) == 3 and not isinstance(module, nn.Conv2d):
            own[name] = n
    config = own.get("config")
    if config is not None and getattr(config, "num_channels", None) == 3:
        own["config"] = copy.deepcopy(config)
        own["config"].num_channels = n
