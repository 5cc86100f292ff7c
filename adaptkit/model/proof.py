"""Whether a view says what its backbone computes: proven on a few random tokens, for a class name proves nothing.

A subclass may add positions of its own, a block may hide another attention, a method may have been replaced on one
object. So both are run and compared, on a copy of the tree that shares the weights: the user's modules, modes, hooks
and random numbers are left alone.

1. *The forward*, at the sizes that the backbone takes. Each block is replaced by a cheap function of its own that also
   depends on the arguments it gets, so that embedding, positions, order of the blocks and final norm run as its
   class has them, and the whole costs little more than the embedding.
2. *The blocks*, on a grid of a few tokens: one of each kind, ``run`` against the parts.

Small parameters are perturbed in the copy, for a bias of zero or a tiny LayerScale would hide what is added or scaled.
Half precision is computed in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from adaptkit.core.block import Block
from adaptkit.core.hierarchical import HierarchicalViT
from adaptkit.core.tensors import stands_in
from adaptkit.core.view import View, ViT
from adaptkit.model.copied import Copy, distance, module_of

__all__ = ["prove"]

GRID = (2, 3)  #: of the tokens that the blocks of a plain ViT are tried on; not square, so that h and w are told apart
HIERARCHICAL_GRID = (9, 10)  #: several windows of 7 or 8, so that a shift acts
CHANNELS = 32  #: that a block's stand-in changes
FAILURES = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError)
_MODULE = set(vars(nn.Module()))


@torch.no_grad()
def prove(view: View) -> None:
    """Compare a view with the backbone it sees. Nothing is changed, but for ``view.splits``.

    An attention whose inside is not what the view says sets ``view.splits`` to ``False``: adapters that step inside it
    are then refused by name, and the others, which run the backbone's own blocks, attach.

    What cannot be computed here is passed over: the meta device, fake tensors, sharded parameters.

    Raises ``TypeError`` that names what differs, by how much, and what to do.
    """
    parameters = list(view.backbone.parameters())
    if not parameters or any(map(_is_out_of_reach, parameters)):
        return
    devices = {p.device for p in parameters if p.device.type != "cpu"}
    with ExitStack() as stack:
        for kind in {d.type for d in devices} or {"cuda"}:
            own = [d for d in devices if d.type == kind]
            stack.enter_context(torch.random.fork_rng(own, device_type=kind))
        for kind in {p.device.type for p in parameters}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        _prove_blocks(view)
        _prove_forward(view)


def _is_out_of_reach(p: Tensor) -> bool:
    return p.is_meta or stands_in(p)


# ------------------------------------------------------------------------------------------------------- the forward


def _prove_forward(view: View) -> None:
    sizes = view.sizes()
    if not sizes:
        return
    seen, run = Copy(view), _Run()
    side = view.spec.patch_size if isinstance(view, ViT) else view.spec.strides[0]
    blocks = seen.blocks((sizes[0][0] // side * side, sizes[0][1] // side * side))
    seen.own(seen.view.backbone, but=blocks)
    for index, module in enumerate(blocks):
        _stand_in(module, index, run, view.tupled)
    for size in sizes:
        where = f"an image of {size[0]}x{size[1]} pixels"
        image = seen.randn(1, seen.channels, *size)
        run.taken()
        said = _tried(view, where, partial(seen.view.reference, image))
        if said is None:
            return
        theirs = run.taken()
        whole = image[..., : size[0] // side * side, : size[1] // side * side]  # backbones drop a rest, a view pads it
        features = _tried(view, where, partial(seen.view.features, whole))
        _compare_tokens(seen, where, torch.cat([features.prefix, features.tokens], dim=1), said, run.taken(), theirs)
        _compare_answer(seen, where, image, said)


class _Run:
    """What the stand-ins of the blocks saw: index and arguments of each, and the tokens before the first."""

    def __init__(self) -> None:
        self.blocks: list[tuple[int, float]] = []
        self.first: Tensor | None = None

    def taken(self) -> _Run:
        """Return it, and start anew."""
        taken = _Run()
        taken.blocks, taken.first = self.blocks, self.first
        self.blocks, self.first = [], None
        return taken


def _compare_tokens(seen: Copy, where: str, tokens: Tensor, said: Tensor, ours: _Run, theirs: _Run) -> None:
    """Raise where the tokens differ, and say from which step on."""
    if said.ndim != 3 or said.shape[2] != tokens.shape[2] or said.shape[1] > tokens.shape[1]:
        shapes = f"{tuple(said.shape)}, and {tuple(tokens.shape)} by the view: they"
        raise _other(seen.original, f"the tokens for {where} have shape {shapes}", float("inf"))
    off = distance(tokens[:, tokens.shape[1] - said.shape[1] :], said)
    if off <= seen.tolerance:
        return
    indices = [[index for index, _ in run.blocks] for run in (ours, theirs)]
    if ours.first is not None and theirs.first is not None and not seen.agree(ours.first, theirs.first):
        what = "the tokens before block 0 (patches, prefix, positions and the norm after them)"
    elif indices[0] != indices[1]:
        what = f"the blocks that run ({_listed(indices[1])}; by the view {_listed(indices[0])})"
    else:
        pairs = zip(indices[0], (d for _, d in ours.blocks), (d for _, d in theirs.blocks))
        other = next((i for i, a, b in pairs if abs(a - b) > seen.tolerance * max(1.0, abs(b))), None)
        what = (
            "the tokens after the last block (the final norm)" if other is None else f"the arguments of block {other}"
        )
    raise _other(seen.original, f"{what} for {where}", off)


def _compare_answer(seen: Copy, where: str, image: Tensor, said: Tensor) -> None:
    """Raise where what the backbone returns is not made from these tokens."""
    allowed = seen.view.answers(said)
    if not allowed:
        return
    answer = tree_leaves(_tried(seen.original, where, partial(seen.view.backbone, image)))
    pairs = [(a, b) for a in answer if isinstance(a, Tensor) for b in allowed if a.shape == b.shape]
    off = min((distance(a, b) for a, b in pairs), default=float("inf"))
    if not off <= seen.tolerance:
        raise _other(seen.original, f"what it returns for {where} and what its tokens give", off)


def _listed(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:8]))
    return f"{shown}, ... {len(indices)} in all" if len(indices) > 8 else shown or "none"


def _stand_in(module: nn.Module, index: int, run: _Run, tupled: bool) -> None:
    """Make a block of the copy a cheap function, of its place among the blocks and of the arguments it gets.

    It is nonlinear, so that no norm undoes it; of small slope, so that rounding does not grow; and every token affects
    all the others, as in attention.
    """

    def forward(self: nn.Module, x: Any, *args: Any, **given: Any) -> Any:
        if isinstance(x, list):  # DINOv3 runs crops of several sizes at once: here it is one
            return [forward(self, crop, *args, **given) for crop in x]
        digest = _digest((args, {k: v for k, v in given.items() if not k.startswith("output_")}))
        run.blocks.append((index, digest))
        run.first = x if run.first is None else run.first
        few = x[..., :CHANNELS]
        mean = few.mean(dim=tuple(range(1, x.ndim - 1)), keepdim=True)
        x = x.clone()
        x[..., :CHANNELS] = few * 0.5 + torch.sin(few + index + digest) + torch.cos(mean + index)
        return (x, None) if tupled else x

    module.__dict__.pop("forward", None)
    module.__class__ = type(module.__class__.__name__, (module.__class__,), {"forward": forward})


def _digest(arguments: Any) -> float:
    """Return one number that tells arguments apart; those that say nothing (None, False) count as not given.

    What asks for more outputs (``output_hidden_states`` of transformers) is left out before.
    """
    total = 0.0
    for leaf in tree_leaves(arguments):
        if isinstance(leaf, Tensor):
            x = torch.nan_to_num(leaf.detach().flatten().float(), neginf=-9.0, posinf=9.0)
            total += float((x * torch.linspace(0.5, 1.5, x.numel(), device=x.device)).mean())
        elif isinstance(leaf, bool | float):  # whole numbers are sizes, of the image with or without a rest
            total += float(leaf)
    return total


# -------------------------------------------------------------------------------------------------------- the blocks


def _prove_blocks(view: View) -> None:
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
            f"{_name(view.backbone)}: the attention is not softmax(q k^T + bias) v of its own projections, which is "
            f"how this view computes it on other grids; {_remedy(view)}"
        )
    view.splits = False


def _compare_block(seen: Copy, where: str, block: Block, x: Tensor) -> None:
    """Raise where what a block adds to its tokens is not what its parts add."""
    view = seen.original
    y = _tried(view, where, partial(block.run, x.clone()))
    try:
        z = block.equation(x)
    except FAILURES as error:
        if isinstance(view, HierarchicalViT) and isinstance(error, TypeError):
            return  # it says itself that it has no parts
        raise TypeError(
            f"{_name(view.backbone)}: {where} does not run from its parts: {error}; {_remedy(view)}"
        ) from error
    off = distance(y - x, z - x) if isinstance(y, Tensor) and y.shape == z.shape == x.shape else float("inf")
    if not off <= seen.tolerance:
        kind = type(module_of(block.run) or block.run).__name__
        raise _other(view, f"{where} ({kind}) and x + attn(norm(x)), x + mlp(norm(x)) of its parts", off)


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


# --------------------------------------------------------------------------------------------------------- refusals


def _tried(view: View, where: str, run: Callable[[], Any]) -> Any:
    try:
        return run()
    except FAILURES as error:
        raise TypeError(f"{_name(view.backbone)} could not be run on {where}: {error}; {_remedy(view)}") from error


def _other(view: View, what: str, off: float) -> TypeError:
    seen_by, by = type(view).__name__, "in shape" if off == float("inf") else f"by {off:.1%}"
    return TypeError(f"{_name(view.backbone)} is not what {seen_by} sees of it: {what} differ {by}; {_remedy(view)}")


def _remedy(view: View) -> str:
    cls = type(view.backbone)
    base = "core.hierarchical.HierarchicalViT" if isinstance(view, HierarchicalViT) else "core.view.ViT"
    return (
        "hand over a plain model of the class that it derives from, or register a family of its own: subclass "
        f"adaptkit.{base} and decorate it with @adaptkit.register_family('{cls.__module__}.{cls.__qualname__}')"
    )


def _name(backbone: nn.Module) -> str:
    return f"{type(backbone).__module__}.{type(backbone).__qualname__}"
