"""A copy of a backbone to try things on: it shares the large tensors, and nobody else sees what is done to it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.core.block import Block
from adaptkit.core.hierarchical import HierarchicalViT
from adaptkit.core.tensors import is_plain
from adaptkit.core.tree import at_rest, skeleton
from adaptkit.core.view import View, ViT

__all__ = ["Copy", "distance", "module_of"]

PERTURBED = 2**22  #: most elements of a parameter that is perturbed


class Copy:
    """A view of a copy of the backbone, in eval mode and without hooks, that shares its large tensors."""

    def __init__(self, view: View) -> None:
        self.original, self.view = view, copy.copy(view)
        self.view.backbone = backbone = skeleton(view.backbone)
        at_rest(backbone)
        parameters = list(view.backbone.parameters())
        self.quantised = any(not is_plain(p) for p in parameters)
        floating = [p for p in parameters if p.is_floating_point()] or parameters
        given = floating[0].dtype if floating[0].is_floating_point() else torch.float32
        self.dtype = given if self.quantised or given == torch.float64 else torch.float32
        self.device = parameters[0].device
        self.channels = int(view.fingerprint_tensors()["patch"].shape[1])
        self.generator = torch.Generator("cpu").manual_seed(0)
        self.made: dict[int, Any] = {}

    @property
    def tolerance(self) -> float:
        """Rounding of this dtype, a few operations deep, and sums in float32; a layer in 4 or 8 bits may round anew."""
        eps = torch.finfo(self.dtype).eps
        if self.device.type != "cpu" and self.dtype == torch.float32:
            eps = 2**-10  # TF32
        return 1e-4 + 16 * eps + 0.05 * self.quantised

    def agree(self, a: Tensor, b: Tensor) -> bool:
        """Whether two tensors (..., D) are the same but for rounding."""
        return a.shape == b.shape and distance(a, b) <= self.tolerance

    def randn(self, *shape: int) -> Tensor:
        """Random numbers that touch no state of others."""
        x = torch.randn(shape, generator=self.generator, dtype=torch.float32, device="cpu")
        return x.to(self.device, self.dtype)

    def bound(self, grid: tuple[int, int]) -> Iterator[tuple[nn.Module | None, Block, int]]:
        """Go through the blocks bound to a grid: the module that runs, the block, its width."""
        view: Any = self.view
        if isinstance(view, ViT):
            image = self.randn(1, self.channels, grid[0] * view.spec.patch_size, grid[1] * view.spec.patch_size)
            for block in view.blocks(image, grid):
                yield module_of(block.run), block, view.spec.embed_dim
        elif isinstance(view, HierarchicalViT):
            for stage, width in enumerate(view.spec.embed_dims):
                for block in view.blocks(stage, grid):
                    yield module_of(block.run), block, width

    def blocks(self, size: tuple[int, int]) -> list[nn.Module]:
        """Return the blocks that run on an image of this size; ``[]`` where the view does not say which they are."""
        view: Any = self.view
        if isinstance(view, ViT):
            grid = view.grid(torch.empty(1, 1, *size))
            found = [module_of(b.run) for b in view.blocks(self.randn(1, self.channels, *size), grid)]
        else:
            grids = [(size[0] // s, size[1] // s) for s in view.spec.strides]
            found = [module_of(b.run) for stage, grid in enumerate(grids) for b in view.blocks(stage, grid)]
        distinct = {id(m) for m in found if m is not None}
        return [m for m in found if m is not None] if len(distinct) == len(found) else []

    def own(self, root: nn.Module, but: Iterable[nn.Module | None] = ()) -> None:
        """Give the copy parameters of its own: in float32 where they were in half, small ones perturbed."""
        left = {id(m) for kept in but if kept is not None for m in kept.modules()}
        for module in root.modules():
            if id(module) in left:
                continue
            for name, p in module._parameters.items():
                if p is not None and is_plain(p):
                    module._parameters[name] = self._owned(p)
            for name, b in module._buffers.items():
                if b is not None and is_plain(b):
                    module._buffers[name] = b.to(self.dtype) if b.dtype in (torch.float16, torch.bfloat16) else b

    def _owned(self, p: Tensor) -> Any:
        if id(p) not in self.made:
            x = p.detach().to(self.dtype) if p.dtype in (torch.float16, torch.bfloat16) else p.detach()
            small = x.ndim < 4 and x.numel() <= PERTURBED and (x.ndim != 2 or min(x.shape) <= 32)
            if small:
                x = x + 0.5 * self.randn(*x.shape).to(x)
            self.made[id(p)] = nn.Parameter(x, requires_grad=False)
            self.made[id(self.made[id(p)])] = self.made[id(p)]
        return self.made[id(p)]


def module_of(run: Any) -> nn.Module | None:
    """The module that a block runs, itself or inside a partial."""
    if isinstance(run, nn.Module):
        return run
    if isinstance(run, partial):
        return next((m for m in map(module_of, (run.func, *run.args)) if m is not None), None)
    return None


def distance(a: Tensor, b: Tensor) -> float:
    """How far a token of ``a`` (..., D) is from that of ``b``, at most, as a share of its length. NaN equals NaN."""
    if torch.equal(a, b):
        return 0.0
    a, b = a.detach().double(), b.detach().double()
    off = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, a - b).norm(dim=-1)
    if not off.numel():
        return 0.0
    length = torch.nan_to_num(b, posinf=0.0, neginf=0.0).norm(dim=-1)
    share = off / torch.maximum(length, length.mean()).clamp_min(torch.finfo(torch.float64).tiny)
    return float("inf") if bool(share.isnan().any()) else float(share.max())
