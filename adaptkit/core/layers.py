"""Small layers that adapters and heads share."""

from __future__ import annotations

import dataclasses
import numbers
import operator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as _TorchSyncBatchNorm

from adaptkit.core.near import hint

__all__ = [
    "DropPath",
    "LayerNorm2d",
    "Norm",
    "SyncBatchNorm2d",
    "check_choice",
    "check_numbers",
    "check_positive",
    "doubled",
    "indices",
    "init_weights",
    "norm2d",
    "parameter_dtype",
]

Norm = Literal["batch", "sync", "group", "layer"]
MOST, MOST_RATIO = 1 << 20, float(1 << 10)


class DropPath(nn.Module):
    """Drop a residual branch per sample with probability ``p`` in training (Huang et al. 2016)."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, ...)."""
        scale = self.scale(x)
        return x if scale is None else x * scale

    def scale(self, x: Tensor) -> Tensor | None:
        """(B, 1, ...): 0 where a sample is dropped, 1 / (1 - p) where it is kept, which keeps the mean; None: all 1."""
        if self.p == 0.0 or not self.training:
            return None
        keep = 1.0 - self.p
        return x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        """Show the probability."""
        return f"p={self.p}"


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a map (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class _SumOverRanks(torch.autograd.Function):
    """Sum a tensor over the processes; the gradient of a sum is summed in turn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return the sum."""
        out = x.contiguous().clone()
        torch.distributed.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        """Return the sum of the gradients."""
        return _SumOverRanks.forward(ctx, grad)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the batches of all processes, on every device; plain BatchNorm for a single process.

    ``torch.nn.SyncBatchNorm`` is for GPUs alone, and what runs there. The parameters are the same, so files interchange
    with ``norm="batch"``.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        alone = not together or torch.distributed.get_world_size() == 1
        if alone or not self.training:
            return super().forward(x)
        if x.is_cuda:
            return self._fused(x)
        dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
        count = _SumOverRanks.apply(x.new_full((), x.numel() // x.shape[1]))
        mean = _SumOverRanks.apply(x.sum((0, 2, 3))) / count
        x = x - mean[:, None, None]
        var = _SumOverRanks.apply(x.square().sum((0, 2, 3))) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.detach(), share)
            self.running_var.lerp_(var.detach() * count / (count - 1), share)
        scale = (var + self.eps).rsqrt() * self.weight
        return (x * scale[:, None, None] + self.bias[:, None, None]).to(dtype)

    def _fused(self, x: Tensor) -> Tensor:
        """``torch.nn.SyncBatchNorm``, as its own forward calls it: it keeps x alone for the backward pass."""
        share = 0.0 if self.momentum is None else self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            share = share if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        group, running = torch.distributed.group.WORLD, (self.running_mean, self.running_var)
        return _TorchSyncBatchNorm.apply(
            x, self.weight, self.bias, *running, self.eps, share, group, torch.distributed.get_world_size()
        )


def norm2d(kind: Norm, channels: int) -> nn.Module:
    """Build the normalisation of a map with ``channels`` channels.

    ``"batch"`` keeps running statistics (batches of one or two are noisy, and a 1x1 map of a single image has none);
    ``"sync"`` shares them over processes; ``"group"`` (32 groups or fewer) and ``"layer"`` look at one image alone.
    """
    check_choice("norm", kind, get_args(Norm))
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "sync":
        return SyncBatchNorm2d(channels)
    if kind == "group":
        return nn.GroupNorm(next(g for g in range(min(32, channels), 0, -1) if channels % g == 0), channels)
    return LayerNorm2d(channels, eps=1e-6)


def doubled(channels: int, times: int = 1) -> nn.Sequential:
    """Build a transposed convolution, group norm and GELU, so many times: (B, C, h, w) -> (B, C, 2h, 2w) each time."""
    step = [(nn.ConvTranspose2d(channels, channels, 2, 2), norm2d("group", channels), nn.GELU()) for _ in range(times)]
    return nn.Sequential(*(module for modules in step for module in modules))


def check_choice(option: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise ``ValueError`` where ``value`` is none of the choices."""
    if value not in choices:
        named = ", ".join(map(repr, choices))
        raise ValueError(f"{option}={value!r} is not a choice{hint(value, choices)}; choose one of {named}")


def check_numbers(config: Any, but: tuple[str, ...] = ()) -> None:
    """Raise ``ValueError`` where a number of a config, a dataclass, is beyond what any model has.

    A count is at most 2^20 and a ratio at most 2^10, so that what follows from them can be computed at once. A field
    that is annotated as an int takes no float.
    """

    def check(option: str, value: Any) -> None:
        if isinstance(value, dict):
            for key in value.keys() - {*but}:
                check(f"{option}.{key}", value[key])
        elif isinstance(value, list | tuple):
            for part in value:
                check(option, part)
        elif isinstance(value, int | float):
            most = MOST if isinstance(value, int) else MOST_RATIO
            if not abs(value) <= most:  # NaN too
                raise ValueError(f"{option}={value} is beyond what a model can have; give a number of at most {most}")

    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        fractional = isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral)
        if fractional and field.type in ("int", "int | None", int, int | None):
            raise ValueError(f"{field.name}={value} is counted in whole numbers; give an int")
        if field.name not in but:
            check(field.name, value)


def indices(option: str, blocks: Any) -> tuple[int, ...]:
    """Return the blocks that an option names as a tuple (JSON knows lists only); ``ValueError`` for anything else."""
    try:
        return tuple(operator.index(i) for i in blocks)
    except TypeError as error:
        raise ValueError(f"{option}={blocks!r}: give the indices of blocks, e.g. [2, 5, 8, 11]") from error


def check_positive(config: Any, *options: str) -> None:
    """Raise ``ValueError`` where one of these options of a config is given and below 1."""
    for option in options:
        value = getattr(config, option)
        if value is not None and value < 1:
            raise ValueError(f"{option}={value} must be at least 1")


def init_weights(module: nn.Module) -> None:
    """Initialise as ViT-Adapter does: linear layers trunc. normal 0.02, convolutions by their fan-out."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2.0 / fan_out) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.modules.batchnorm._BatchNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def parameter_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype that ``module`` computes in outside autocast."""
    return next(module.parameters()).dtype
