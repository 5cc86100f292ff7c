"""Whether a view says what its host computes: proven on a few random tokens, for a class name proves nothing.

A subclass may add positions of its own, a block may hide another attention, a method may have been replaced on one
object. So both are run and compared, on a copy of the tree that shares the weights: the user's modules, modes, hooks
and random numbers are left alone.

1. *The forward*, at the sizes that the host takes. Each block is replaced by a cheap function of its own that also
   depends on the arguments it gets, so that embedding, positions, order of the blocks and final norm run as the host's
   class has them, and the whole costs little more than the embedding.
2. *The blocks*, on a grid of a few tokens: one of each kind, ``run`` against the parts.

Small parameters are stirred in the copy, since a bias of zero or a tiny LayerScale would hide what is added or scaled.
Half precision is computed in float32.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from adaptkit.staged import StagedViT
from adaptkit.tree import skeleton
from adaptkit.vit import Block, View, ViT

__all__ = ["prove"]

GRID = (2, 3)  #: of the tokens that the blocks of a plain ViT are tried on; not square, so that h and w are told apart
STAGED_GRID = (9, 10)  #: several windows of 7 or 8, so that a shift acts
STIRRED = 2**22  #: elements of a parameter that is not too large to be stirred
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
FAILURES = (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError, IndexError, KeyError)
_MODULE = set(vars(nn.Module()))


@torch.no_grad()
def prove(view: View) -> None:
    """Compare a view with the host it sees. Nothing is changed, but for ``view.splits``.

    An attention whose inside is not what the view says sets ``view.splits`` to ``False``: adapters that step inside it
    are then refused by name, and the others, which run the host's own blocks, attach.

    Hosts on the meta device, of fake tensors, or with sharded parameters cannot be computed here and are passed over.

    Raises ``TypeError`` that names what differs, by how much, and what to do.
    """
    parameters = list(view.host.parameters())
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
    from torch._subclasses.fake_tensor import FakeTensor

    if p.is_meta or isinstance(p, FakeTensor):
        return True
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(p, DTensor)


# ------------------------------------------------------------------------------------------------------- the forward


def _prove_forward(view: View) -> None:
    sizes = view.sizes()
    if not sizes:
        return
    seen = _Copy(view)
    run: list[tuple[int, float]] = []
    ends: list[Tensor] = []
    for index, module in enumerate(seen.blocks(sizes[0])):
        _stand_in(module, index, run, ends)
    seen.own(seen.view.host)
    for size in sizes:
        where = f"an image of {size[0]}x{size[1]} pixels"
        image = seen.randn(1, seen.channels, *size)
        run.clear(), ends.clear()
        said = _tried(view, where, partial(seen.view.reference, image))
        if said is None:
            return
        of_host, run[:], first, ends[:] = run[:], [], ends[:1], []
        answer = tree_leaves(_tried(view, where, partial(seen.view.host, image))) if seen.view.answers(said) else []
        run.clear(), ends.clear()
        features = seen.view.features(image)
        tokens = torch.cat([features.prefix, features.tokens], dim=1)
        _refuse_other(seen, where, tokens, said, (of_host, run), (first, ends[:1]))
        allowed = seen.view.answers(said)
        tensors = [x for x in answer if isinstance(x, Tensor)]
        if allowed and not any(seen.agree(a, b) for a in tensors for b in allowed if a.shape == b.shape):
            off = min((_distance(a, b) for a in tensors for b in allowed if a.shape == b.shape), default=float("inf"))
            raise _other(view, f"what its forward returns for {where} is no function of the tokens that are seen", off)


def _refuse_other(
    seen: _Copy, where: str, tokens: Tensor, said: Tensor, runs: tuple[Any, Any], firsts: tuple[Any, Any]
) -> None:
    """Raise where the tokens differ, and say from which step on."""
    if said.shape[-1:] == tokens.shape[-1:] and said.shape[1] <= tokens.shape[1]:
        off = _distance(tokens[:, tokens.shape[1] - said.shape[1] :], said)
        if off <= seen.tolerance:
            return
    else:
        shapes = f"tokens of shape {tuple(said.shape)} and not {tuple(tokens.shape)}"
        raise _other(seen.original, f"{where} becomes {shapes}", float("inf"))
    theirs, ours = ([index for index, _ in run] for run in runs)
    if firsts[0] and firsts[1] and not seen.agree(firsts[0][0], firsts[1][0]):
        what = "the tokens before block 0 (patches, prefix, positions, the norm after them)"
    elif theirs != ours:
        what = f"the blocks that run, {_listed(theirs)} and not {_listed(ours)},"
    else:
        digests = zip(*([digest for _, digest in run] for run in runs))
        other = next((i for i, (a, b) in enumerate(digests) if abs(a - b) > 1e-3 * max(1.0, abs(b))), None)
        what = "the final norm" if other is None else f"the arguments of block {ours[other]}"
    raise _other(seen.original, f"{what} for {where}", off)


def _listed(indices: list[int]) -> str:
    return "none" if not indices else f"{len(indices)} of them ({', '.join(map(str, indices[:6]))}, ...)"


def _stand_in(module: nn.Module, index: int, run: list[tuple[int, float]], ends: list[Tensor]) -> None:
    """Make a block of the copy a cheap function, of its place among the blocks and of the arguments it gets."""

    def forward(self: nn.Module, x: Tensor, *args: Any, **given: Any) -> Tensor:
        digest = _digest((args, given))
        run.append((index, digest))
        if not ends:
            ends.append(x)
        return x * 0.5 + torch.sin(x + index + digest)

    module.__dict__.pop("forward", None)
    module.__class__ = type(module.__class__.__name__, (module.__class__,), {"forward": forward})


def _digest(arguments: Any) -> float:
    """Return one number that tells arguments apart; those that say nothing (None, False) count as not given."""
    total = 0.0
    for leaf in tree_leaves(arguments):
        if isinstance(leaf, Tensor):
            x = torch.nan_to_num(leaf.detach().flatten().float(), neginf=-9.0, posinf=9.0)
            total += float((x * torch.linspace(0.5, 1.5, x.numel(), device=x.device)).mean())
        elif isinstance(leaf, bool | int | float):
            total += float(leaf)
    return total


# -------------------------------------------------------------------------------------------------------- the blocks


def _prove_blocks(view: View) -> None:
    seen = _Copy(view)
    grid = GRID if isinstance(view, ViT) else STAGED_GRID
    seen.view.accept(grid)
    first: dict[Any, int] = {}  # of each kind of block
    for index, (module, _, _) in enumerate(seen.bound(grid)):
        if module is None or first.setdefault(_kind(module), index) == index:
            first.setdefault(index, index)
            seen.own(module if module is not None else seen.view.host, blocks=True)
    tried = set(first.values())
    splits = True
    for index, (_, block, width) in enumerate(seen.bound(grid)):
        if index not in tried:
            continue
        prefix = view.spec.prefix
        x = seen.randn(1, prefix + grid[0] * grid[1], width)
        where = f"block {index}"
        y = _tried(view, where, partial(block.run, x))
        try:
            z = block.equation(x)
        except FAILURES as error:
            if isinstance(view, StagedViT) and isinstance(error, TypeError):
                continue  # it says itself that it has no parts
            raise TypeError(
                f"{_name(view.host)}: {where} cannot be run from its parts: {error}; {_remedy(view)}"
            ) from error
        if y.shape != x.shape or not seen.agree(y - x, z - x):
            off = _distance(y - x, z - x) if y.shape == z.shape else float("inf")
            raise _other(
                view, f"{where} ({_name_of_run(block)}) and x + attn(norm(x)), x + mlp(norm(x)) of its parts", off
            )
        if isinstance(view, ViT) and view.splits:
            splits &= _comes_apart(seen, block, x, prefix, grid)
    if isinstance(view, ViT) and view.splits and not splits:
        if view.rebuilds:
            raise TypeError(
                f"{_name(view.host)}: the attention is not softmax(q k^T + bias) v of its own projections, and on other "
                f"grids this view computes it so; {_remedy(view)}"
            )
        view.splits = False


def _comes_apart(seen: _Copy, block: Block, x: Tensor, prefix: int, grid: tuple[int, int]) -> bool:
    """Whether the inside of an attention, and of an FFN, is what the block says of it."""
    h = block.norm1(x)
    try:
        pairs = [(block.attention(h), block.attn(h))]
        pairs += _by_head(block, h)
        perceptron = block.perceptron()
        if perceptron is not None:
            g = block.norm2(x)
            pairs.append((perceptron.fc2(perceptron.act(perceptron.fc1(g))), block.mlp(g)))
        if block.qkv_at is not None:
            count = grid[0] * grid[1]
            places = torch.cat([x.new_full((prefix,), -1).long(), torch.arange(count, device=x.device)])
            pairs += list(zip(block.qkv_at(h, places), block.qkv(h)))
    except FAILURES:
        return False
    if block.rotate is not None and block.qkv_at is not None:
        count = grid[0] * grid[1]
        cells = torch.stack([torch.arange(count) // grid[1], torch.arange(count) % grid[1]], dim=-1).to(x)
        still = block.qkv_at(h[:, prefix:], torch.full((count,), -1, device=x.device))
        try:
            pairs.append((block.rotate(still[0], cells), block.qkv(h)[0][:, :, prefix:]))
        except TypeError:
            pass  # a kind of rotation that says itself that it has no rule between cells
    return all(a.shape == b.shape and seen.agree(a, b) for a, b in pairs)


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
    """What decides how a block computes, but for the numbers in its parameters."""
    return tuple(
        (name, type(m), _facts({k: v for k, v in vars(m).items() if k not in _MODULE}), _shapes(m))
        for name, m in module.named_modules()
    )


def _facts(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((str(k), _facts(v)) for k, v in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_facts, value))
    return value if isinstance(value, bool | int | float | str | None) else id(value)


def _shapes(module: nn.Module) -> Any:
    tensors = {**module._parameters, **module._buffers}
    return tuple((n, None if t is None else (type(t), t.shape, t.dtype)) for n, t in tensors.items())


# ---------------------------------------------------------------------------------------------------------- the copy


class _Copy:
    """A view of a copy of the host, in eval mode and without hooks, that shares its large tensors."""

    def __init__(self, view: View) -> None:
        self.original, self.view = view, copy.copy(view)
        self.view.host = host = skeleton(view.host)
        for module in host.modules():
            module.__dict__["training"] = False
            module.__dict__.update({name: type(vars(module)[name])() for name in HOOKS if name in vars(module)})
            for flag in (
                "grad_checkpointing",
                "gradient_checkpointing",
            ):  # of timm and transformers; nothing is trained
                if flag in vars(module):
                    module.__dict__[flag] = False
        parameters = list(view.host.parameters())
        self.quantised = any(not _is_plain(p) for p in parameters)
        floating = [p for p in parameters if p.is_floating_point()] or parameters
        given = floating[0].dtype if floating[0].is_floating_point() else torch.float32
        self.dtype = given if self.quantised or given == torch.float64 else torch.float32
        self.device = parameters[0].device
        self.channels = int(view.fingerprint_tensors()["patch"].shape[1])
        self.generator = torch.Generator().manual_seed(0)
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
        return _distance(a, b) <= self.tolerance

    def randn(self, *shape: int) -> Tensor:
        """Random numbers that touch no state of others."""
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def bound(self, grid: tuple[int, int]) -> Iterator[tuple[nn.Module | None, Block, int]]:
        """Go through the blocks bound to a grid: the module that runs, the block, its width."""
        view: Any = self.view
        if isinstance(view, ViT):
            image = self.randn(1, self.channels, grid[0] * view.spec.patch, grid[1] * view.spec.patch)
            for block in view.blocks(image, grid):
                yield _module(block.run), block, view.spec.dim
        elif isinstance(view, StagedViT):
            for stage, width in enumerate(view.spec.dims):
                for block in view.blocks(stage, grid):
                    yield _module(block.run), block, width

    def blocks(self, size: tuple[int, int]) -> list[nn.Module]:
        """Return the blocks that run on an image of this size; ``[]`` where the view does not say which they are."""
        view: Any = self.view
        if isinstance(view, ViT):
            grid = view.grid(torch.empty(1, 1, *size))
            found = [_module(b.run) for b in view.blocks(self.randn(1, self.channels, *size), grid)]
        else:
            grids = [(size[0] // s, size[1] // s) for s in view.spec.strides]
            found = [_module(b.run) for stage, grid in enumerate(grids) for b in view.blocks(stage, grid)]
        distinct = {id(m) for m in found if m is not None}
        return [m for m in found if m is not None] if len(distinct) == len(found) else []

    def own(self, root: nn.Module, blocks: bool = False) -> None:
        """Give modules of the copy parameters of their own: in float32 where they were in half, the small ones stirred."""
        for module in root.modules():
            for name, p in module._parameters.items():
                if p is not None and _is_plain(p):
                    module._parameters[name] = self._owned(p)
            for name, b in module._buffers.items():
                if b is not None and _is_plain(b):
                    module._buffers[name] = b.to(self.dtype) if b.dtype in (torch.float16, torch.bfloat16) else b

    def _owned(self, p: Tensor) -> Any:
        if id(p) not in self.made:
            x = p.detach().to(self.dtype) if p.dtype in (torch.float16, torch.bfloat16) else p.detach()
            small = x.ndim < 4 and x.numel() <= STIRRED and (x.ndim != 2 or min(x.shape) <= 32)
            if small:
                x = x + 0.5 * torch.randn(x.shape, generator=self.generator).to(x)
            self.made[id(p)] = nn.Parameter(x, requires_grad=False)
            self.made[id(self.made[id(p)])] = self.made[id(p)]
        return self.made[id(p)]


def _is_plain(p: Tensor) -> bool:
    return type(p) in (Tensor, nn.Parameter) and p.is_floating_point() and p.dtype.itemsize > 1


def _module(run: Any) -> nn.Module | None:
    """The module that a block runs, itself or inside a partial."""
    if isinstance(run, nn.Module):
        return run
    if isinstance(run, partial):
        return next((m for m in map(_module, (run.func, *run.args)) if m is not None), None)
    return None


def _distance(a: Tensor, b: Tensor) -> float:
    """How far a token of ``a`` (..., D) is from that of ``b``, at most, as a share of its length. NaN equals NaN."""
    a, b = a.detach().double(), b.detach().double()
    off = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, a - b).norm(dim=-1)
    if not off.numel():
        return 0.0
    length = torch.nan_to_num(b, posinf=0.0, neginf=0.0).norm(dim=-1)
    share = off / torch.maximum(length, length.mean()).clamp_min(torch.finfo(torch.float64).tiny)
    return float("inf") if bool(share.isnan().any()) else float(share.max())


# --------------------------------------------------------------------------------------------------------- refusals


def _tried(view: View, where: str, run: Callable[[], Any]) -> Any:
    try:
        return run()
    except FAILURES as error:
        raise TypeError(f"{_name(view.host)} could not be run on {where}: {error}; {_remedy(view)}") from error


def _other(view: View, what: str, off: float) -> TypeError:
    by = "in shape" if off == float("inf") else f"by {off:.1%}"
    return TypeError(
        f"{_name(view.host)} is not what {type(view).__name__} sees of it: {what} differ {by}; {_remedy(view)}"
    )


def _remedy(view: View) -> str:
    cls = type(view.host)
    return (
        "hand over a plain model of the class that it derives from, or register a family of its own: subclass "
        f"adaptkit.vit.{'StagedViT' if isinstance(view, StagedViT) else 'ViT'} and decorate it with "
        f"@adaptkit.register_family('{cls.__module__}.{cls.__qualname__}')"
    ).replace("adaptkit.vit.StagedViT", "adaptkit.staged.StagedViT")


def _name(host: nn.Module) -> str:
    return f"{type(host).__module__}.{type(host).__qualname__}"


def _name_of_run(block: Block) -> str:
    module = _module(block.run)
    return "its run" if module is None else type(module).__name__
