"""The MetaFormer block (Yu et al. 2022) as an adapter beside each frozen block, with any token mixer.

Per block, with tokens x of the frozen backbone and n the norm of the adapter::

    z = down(n(x))                     D -> width
    z = z + mixer(n(z))                patch tokens on their grid; class and register tokens pass by
    z = z + mlp(n(z))
    x = block(x) + up(act(z))          up = 0 at the start: the one zero

It stands at block level, outside the backbone's LayerScale, which would shrink it by 1e-5. What others have published
are points of this family:

* ``mixer="identity", mlp_ratio=0, norm="none", residual=False, act="relu"`` is AdaptFormer (Chen et al. 2022), but for
  its scale of 0.1, beside the whole block instead of the MLP;
* ``mixer="conv"`` is close to Convpass (Jie & Deng 2022), whose convolution is dense;
* ``mixer="mona", mlp_ratio=0, residual=False`` has the filters of Mona (Yin et al. 2025), which stand after the block
  there, twice in each, and start at random;
* ``mixer="pool"`` is PoolFormer's block.

``width=0`` leaves out the bottleneck: ``x = block(x) + gamma * mixer(n(x))``, gamma = 0 at the start, D parameters per
block with ``mixer="pool"``. Parameter-free mixers as adapters of a frozen ViT are ours, no paper has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.adapters.base import Aux, BlockAdapter
from adaptkit.core.block import Block, Fn, identity
from adaptkit.core.hierarchical import HierarchicalSpec
from adaptkit.core.layers import check_choice, check_numbers, parameter_dtype
from adaptkit.core.registry import register_adapter
from adaptkit.core.view import Spec
from adaptkit.mixers import list_mixers, mixer
from adaptkit.ops.grid import map_to_tokens, tokens_to_map

__all__ = ["MetaFormer", "MetaFormerConfig"]

T = TypeVar("T")
Norm = Literal["layer", "group1", "none"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "none": identity}


@dataclass(frozen=True)
class MetaFormerConfig:
    """The mixer, and the paper's ablations of the block around it."""

    #: A name, or several: one per block, or spread evenly over the depth ("pool, pool, global, global"). On a
    #: hierarchical backbone one per block or per stage.
    mixer: str | tuple[str, ...] = "pool"
    #: Of the bottleneck; 0: none, the gate gamma. Several: one per stage of a hierarchical backbone.
    width: int | tuple[int, ...] = 64
    #: hidden width of the MLP over the bottleneck's; 0: no MLP; None: 1, or 0 without a bottleneck
    mlp_ratio: float | None = None
    norm: Norm = "layer"  #: "group1" is the paper's GroupNorm over channels and places: it looks at the whole image
    act: Literal["gelu", "relu", "silu", "none"] = "gelu"  #: in the MLP and before ``up``
    residual: bool = True  #: around mixer and MLP
    mixer_options: dict[str, dict[str, Any]] = field(default_factory=dict)  #: by mixer: ``{"pool": {"size": 5}}``
    seed: int = 0  #: of the first block's "random" mixer; block i has seed + i

    def __post_init__(self) -> None:
        check_numbers(self, but=("seed",))
        names = (self.mixer,) if isinstance(self.mixer, str) else self.mixer
        for name in names:
            check_choice("mixer", name, tuple(list_mixers()))
        check_choice("norm", self.norm, ("layer", "group1", "none"))
        check_choice("act", self.act, tuple(ACTIVATIONS))
        if not names:
            raise ValueError("mixer=() names no mixer; give one name, or several to spread over the depth")
        widths = (self.width,) if isinstance(self.width, int) else self.width
        if not widths:
            raise ValueError("width=() gives no width; give one, or one per stage of a hierarchical backbone")
        if min(widths) < 0 or (self.mlp_ratio or 0) < 0:
            raise ValueError(f"width={self.width} and mlp_ratio={self.mlp_ratio} must not be negative")
        if len(widths) > 1 and min(widths) == 0:
            raise ValueError(f"width={self.width} mixes bottlenecks and gates; use 0 for all, or no 0")
        if self.width == 0 and self.mlp_ratio:
            raise ValueError(f"mlp_ratio={self.mlp_ratio} needs a bottleneck, width=0 has none; leave it out")
        unused = sorted(set(self.mixer_options) - set(names))
        if unused:
            raise ValueError(f"mixer_options are for {', '.join(unused)}, but mixer={self.mixer!r}; name them there")

    def resolve(self, spec: Spec | HierarchicalSpec) -> MetaFormerConfig:
        """Fill in what depends on the backbone. ``ValueError`` where the two do not fit."""
        self.mixers(spec)
        self.widths(spec)
        mlp_ratio = (1.0 if self.width else 0.0) if self.mlp_ratio is None else float(self.mlp_ratio)
        return replace(self, mlp_ratio=mlp_ratio)

    def mixers(self, spec: Spec | HierarchicalSpec) -> list[str]:
        """Return the mixer's name of each block."""
        names = (self.mixer,) if isinstance(self.mixer, str) else self.mixer
        if isinstance(spec, HierarchicalSpec) and len(names) not in (1, spec.depth):
            return _per_stage("mixer", names, spec)
        if len(names) > spec.depth:
            raise ValueError(f"mixer names {len(names)} mixers for {spec.depth} blocks; give one per block or fewer")
        return [names[i * len(names) // spec.depth] for i in range(spec.depth)]

    def widths(self, spec: Spec | HierarchicalSpec) -> list[int]:
        """Return the width of the bottleneck of each block."""
        if isinstance(self.width, int):
            return [self.width] * spec.depth
        if isinstance(spec, HierarchicalSpec):
            return _per_stage("width", self.width, spec)
        raise ValueError(
            f"width={self.width} is for a backbone of {len(self.width)} stages, a ViT has one; give one width"
        )


def _per_stage(option: str, values: tuple[T, ...], spec: HierarchicalSpec) -> list[T]:
    if len(values) != len(spec.depths):
        raise ValueError(
            f"{option}={values} has {len(values)} entries, the backbone {len(spec.depths)} stages of "
            f"{', '.join(map(str, spec.depths))} blocks; give one, or one per stage"
        )
    return [value for value, depth in zip(values, spec.depths) for _ in range(depth)]


class TokenNorm(nn.Module):
    """The norm of the adapter on the patch tokens of one image, and on each prefix token by itself.

    GroupNorm with one group has its statistics over channels and places. A prefix token is a 1x1 map to it. There is
    no bias: the mean over neighbours minus the centre takes a constant away, so it would never learn before a pool.
    """

    def __init__(self, kind: Norm, width: int, affine: bool = True) -> None:
        super().__init__()
        self.kind, self.width = kind, width
        self.weight = nn.Parameter(torch.ones(width)) if affine and kind != "none" else None

    def forward(self, x: Tensor, patches: int) -> Tensor:
        """(B, P+N, C) with N = ``patches`` -> (B, P+N, C)."""
        if self.kind == "none":
            return x
        if self.kind == "layer":
            return self._each(x)
        prefix, x = x.tensor_split([x.shape[1] - patches], dim=1)
        x = F.group_norm(x.mT, 1, self.weight).mT
        return torch.cat([self._each(prefix), x], dim=1) if prefix.shape[1] else x

    def _each(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.width,), self.weight)

    def extra_repr(self) -> str:
        """Show kind and width."""
        return f"{self.kind}, {self.width}"


class MixerGate(nn.Module):
    """``gamma * mixer(n(x))``, gamma = 0 at the start; the norm has no parameters, gamma has them."""

    def __init__(self, dim: int, width: int, mix: nn.Module, config: MetaFormerConfig) -> None:
        super().__init__()
        self.norm = TokenNorm(config.norm, dim, affine=False)
        self.mixer = mix
        self.gamma = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, P+N, D) -> what is added to the block's output; nothing for the P prefix tokens."""
        patches = grid[0] * grid[1]
        prefix, z = self.norm(x.to(self.gamma.dtype), patches).tensor_split([x.shape[1] - patches], dim=1)
        return torch.cat([torch.zeros_like(prefix), self.gamma * _on_grid(self.mixer, z, grid)], dim=1)


class MetaBlock(nn.Module):
    """The MetaFormer block in a bottleneck: down, norm and mixer, norm and MLP, activation, up = 0."""

    def __init__(self, dim: int, width: int, mix: nn.Module, config: MetaFormerConfig) -> None:
        super().__init__()
        hidden = round(width * (config.mlp_ratio or 0))
        self.residual, self.act = config.residual, ACTIVATIONS[config.act]
        self.norm = TokenNorm(config.norm, dim, affine=False)  # `down` is affine already
        self.down = nn.Linear(dim, width)
        self.norm1 = TokenNorm(config.norm, width)
        self.mixer = mix
        self.norm2 = TokenNorm(config.norm, width) if hidden else None
        self.fc1 = nn.Linear(width, hidden) if hidden else None
        self.fc2 = nn.Linear(hidden, width) if hidden else None
        self.up = nn.Linear(width, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, P+N, D) -> what is added to the block's output."""
        patches = grid[0] * grid[1]
        z = self.down(self.norm(x.to(parameter_dtype(self)), patches))
        z = self._mix(z, grid)
        if self.norm2 is not None and self.fc1 is not None and self.fc2 is not None:
            y = self.fc2(self.act(self.fc1(self.norm2(z, patches))))
            z = z + y if self.residual else y
        return self.up(self.act(z))

    def _mix(self, z: Tensor, grid: tuple[int, int]) -> Tensor:
        """``z + mixer(norm1(z))`` on the patches; the prefix stays as it is."""
        patches = grid[0] * grid[1]
        first = z.shape[1] - patches
        y = _on_grid(self.mixer, self.norm1(z, patches)[:, first:], grid)
        y = z[:, first:] + y if self.residual else y
        return torch.cat([z[:, :first], y], dim=1)


def _on_grid(mix: nn.Module, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, N, C) -> (B, N, C), mixed as a map."""
    return map_to_tokens(mix(tokens_to_map(tokens, grid)))


@register_adapter("metaformer", MetaFormerConfig)
class MetaFormer(BlockAdapter):
    """A MetaFormer block beside each frozen block, with any token mixer: pooling, convolution, attention, ..."""

    hierarchical = True

    def __init__(self, spec: Spec | HierarchicalSpec, config: MetaFormerConfig) -> None:
        config = config.resolve(spec)
        super().__init__(spec, config)
        make = MetaBlock if config.width else MixerGate
        sizes = zip(config.mixers(spec), spec.widths, config.widths(spec))
        self.blocks = nn.ModuleList(
            make(dim, width, _mixer(name, width or dim, i, config), config)
            for i, (name, dim, width) in enumerate(sizes)
        )

    def wrap(self, block: Block, index: int, aux: Aux) -> Fn:
        """``block(x) + up(...)``: (B, P+N, D) -> (B, P+N, D)."""
        beside, grid = self.blocks[index], block.patch_grid()

        def run(x: Tensor) -> Tensor:
            return block(x) + beside(x, grid).to(x.dtype)

        return run


def _mixer(name: str, width: int, index: int, config: MetaFormerConfig) -> nn.Module:
    options = config.mixer_options.get(name, {})
    return mixer(name, width, **{"seed": config.seed + index, **options} if name == "random" else options)
