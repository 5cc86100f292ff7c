"""Proof of a forward: the same tokens and answer, whatever the blocks compute."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from adaptkit.core.view import View, ViT
from adaptkit.model.copied import Copy, distance
from adaptkit.model.proof.refusals import differs, tried

__all__ = ["prove_forward"]

CHANNELS = 32  #: that a block's stand-in changes


def prove_forward(view: View) -> None:
    """Compare tokens and answer at the sizes that the backbone takes, each block replaced by a stand-in."""
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
        said = tried(view, where, partial(seen.view.reference, image))
        if said is None:
            return
        theirs = run.taken()
        whole = image[..., : size[0] // side * side, : size[1] // side * side]  # backbones drop a rest, a view pads it
        features = tried(view, where, partial(seen.view.features, whole))
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
        raise differs(seen.original, f"the tokens for {where} have shape {shapes}", float("inf"))
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
    raise differs(seen.original, f"{what} for {where}", off)


def _compare_answer(seen: Copy, where: str, image: Tensor, said: Tensor) -> None:
    """Raise where what the backbone returns is not made from these tokens."""
    allowed = seen.view.answers(said)
    if not allowed:
        return
    answer = tree_leaves(tried(seen.original, where, partial(seen.view.backbone, image)))
    pairs = [(a, b) for a in answer if isinstance(a, Tensor) for b in allowed if a.shape == b.shape]
    off = min((distance(a, b) for a, b in pairs), default=float("inf"))
    if not off <= seen.tolerance:
        raise differs(seen.original, f"what it returns for {where} and what its tokens give", off)


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
