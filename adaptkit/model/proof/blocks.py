"""Proof of the blocks: one of each kind, what it runs against its parts."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from adaptkit.core.block import Block
from adaptkit.core.hierarchical import HierarchicalViT
from adaptkit.core.view import View, ViT
from adaptkit.model.copied import Copy, distance, module_of
from adaptkit.model.proof.refusals import FAILURES, differs, name_of, remedy, tried

__all__ = ["prove_blocks"]

GRID = (2, 3)  #: of the tokens that the blocks of a plain ViT are tried on; not square, so that h and w are told apart
HIERARCHICAL_GRID = (9, 10)  #: several windows of 7 or 8, so that a shift acts
_MODULE = set(vars(nn.Module()))


def prove_blocks(view: View) -> None:
    """Compare one block of each kind with its parts, on a few tokens."""
    seen = Copy(view)
    grid = GRID if isinstance(view, ViT) else HIERARCHICAL_GRID
    seen.view.accept(grid)
    modules = [module for module, _, _ in seen.bound(grid)]
    first: dict[Any, int] = {}  # of each kind of block
    for index, module in enumerate(modules):
        first.setdefault(index if module is None else _kind(module), index)
    tried = set(first.values())
    seen.own(seen.view.backbone, but=[m for i, m in enumerate(modules) if i not in tried])
    splits = True
    for index, (_, block, width) in enumerate(seen.bound(grid)):
        if index in tried:
            tokens = view.spec.num_prefix_tokens + grid[0] * grid[1]
            x = seen.randn(2, tokens, width)  # two images, since one must not affect the other
            _compare_block(seen, f"block {index}", block, x)
            splits = splits and _comes_apart(seen, block, x, grid)
    if not isinstance(view, ViT) or splits or not view.splits:
        return
    if view.rebuilds:
        raise TypeError(
            f"{name_of(view.backbone)}: the attention is not softmax(q k^T + bias) v of its own projections, which is "
            f"how this view computes it on other grids; {remedy(view)}"
        )
    view.splits = False


def _compare_block(seen: Copy, where: str, block: Block, x: Tensor) -> None:
    """Raise where what a block adds to its tokens is not what its parts add."""
    view = seen.original
    y = tried(view, where, partial(block.run, x.clone()))
    try:
        z = block.equation(x)
    except FAILURES as error:
        if isinstance(view, HierarchicalViT) and isinstance(error, TypeError):
            return  # it says itself that it has no parts
        raise TypeError(
            f"{name_of(view.backbone)}: {where} does not run from its parts: {error}; {remedy(view)}"
        ) from error
    off = distance(y - x, z - x) if isinstance(y, Tensor) and y.shape == z.shape == x.shape else float("inf")
    if not off <= seen.tolerance:
        kind = type(module_of(block.run) or block.run).__name__
        raise differs(view, f"{where} ({kind}) and x + attn(norm(x)), x + mlp(norm(x)) of its parts", off)


def _comes_apart(seen: Copy, block: Block, x: Tensor, grid: tuple[int, int]) -> bool:
    """Whether the inside of an attention, and of an FFN, is what the block says of it."""
    if not (isinstance(seen.original, ViT) and seen.original.splits):
        return False
    h, count = block.norm1(x), grid[0] * grid[1]
    prefix = x.shape[1] - count
    try:
        pairs = [(block.attention(h), block.attn(h))]
        pairs += _by_head(block, h)
        mlp_layers = block.mlp_layers()
        if mlp_layers is not None:
            g = block.norm2(x)
            pairs.append((mlp_layers.fc2(mlp_layers.act(mlp_layers.fc1(g))), block.mlp(g)))
        if block.qkv_at is not None:
            places = torch.cat([x.new_full((prefix,), -1).long(), torch.arange(count, device=x.device)])
            pairs += list(zip(block.qkv_at(h, places), block.qkv(h)))
    except FAILURES:
        return False
    if block.rotate is not None and block.qkv_at is not None:
        cells = torch.stack([torch.arange(count) // grid[1], torch.arange(count) % grid[1]], dim=-1).to(x)
        still = block.qkv_at(h[:, prefix:], torch.full((count,), -1, device=x.device))
        with suppress(TypeError):  # a kind of rotation that says itself that it has no rule between cells
            pairs.append((block.rotate(still[0], cells), block.qkv(h)[0][:, :, prefix:]))
    return all(seen.agree(a, b) for a, b in pairs)


def _by_head(block: Block, h: Tensor) -> list[tuple[Tensor, Tensor]]:
    """q, k, v and the output made from the weights by head, and by the layers."""
    by_head = block.projections()
    if by_head is None:
        return []
    weights = torch.cat([w.flatten(0, 1) for w in by_head.qkv])  # (3 * heads, E, D)
    made = torch.einsum("bnd,hed->bhne", h, weights.to(h.dtype))
    biases = [torch.zeros_like(w[..., 0]) if b is None else b for w, b in zip(by_head.qkv, by_head.qkv_bias)]
    made = made + torch.cat([b.flatten(0, 1) for b in biases])[:, None]
    q, k, v = made.chunk(3, dim=1)
    said = block.qkv(h)
    out = torch.einsum("bhne,dhe->bnd", said[2], by_head.out_weight)
    out = out if by_head.out_bias is None else out + by_head.out_bias
    return [*zip((by_head.norms[0](q), by_head.norms[1](k), v), said), (out, block.out(said[2]))]


def _kind(module: nn.Module) -> Any:
    """What decides how a block computes in eval mode, but for the numbers in its parameters."""
    return tuple((name, type(m), _options(m), _shapes(m)) for name, m in module.named_modules())


def _options(module: nn.Module) -> Any:
    if type(module).__name__.endswith(("Dropout", "DropPath")):  # of another rate in each block
        return ()
    return _facts({name: value for name, value in vars(module).items() if name not in _MODULE})


def _facts(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((str(k), _facts(v)) for k, v in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_facts, value))
    return value if isinstance(value, bool | int | float | str | None) else id(value)


def _shapes(module: nn.Module) -> Any:
    tensors = {**module._parameters, **module._buffers}
    return tuple((n, None if t is None else (type(t), t.shape, t.dtype)) for n, t in tensors.items())
