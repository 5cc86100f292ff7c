"""Proof that every part of a set of adapters is trained: found by a small run, not assumed.

A parameter that no gradient reaches is never trained, and plain ``DistributedDataParallel`` waits for it in vain: a
pyramid under a head that reads tokens only, LoRA in a layer that the backbone never calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from adaptkit.core import registry
from adaptkit.core.proxy import own_layer
from adaptkit.core.shown import listed
from adaptkit.core.tensors import stands_in
from adaptkit.core.tree import at_rest, skeleton
from adaptkit.core.view import Features, View
from adaptkit.core.warned import warn
from adaptkit.model.parts import AdapterSet

__all__ = ["check_trained", "tensors_in"]


def check_trained(vit: View, built: AdapterSet, run: Callable[[View, AdapterSet, Tensor], Features]) -> None:
    """Prove that a gradient reaches each trained parameter of a set.

    Two random images of a few patches go through a copy of the structure that shares the weights: the backbone, the
    random numbers and the set's statistics are left as they were. One on the meta device or in shards is not run,
    nor one in inference mode, where nothing is trained.

    Where a head leaves features unread (a pyramid under a head that reads tokens), the set is told so, and a warning
    names what only a loss on these features would train.

    Args:
        vit: the view of the backbone.
        built: the set, not yet installed.
        run: runs a view and a set on an image.

    Raises ``ValueError`` where none of the features that the set returns depends on a parameter.
    """
    trained = {n: p for n, p in built.named_parameters() if p.requires_grad}
    tensors = [*vit.backbone.parameters(), *trained.values()]
    if not trained or vit.sharded or any(t.is_meta or t.is_inference() or stands_in(t) for t in tensors):
        return
    try:
        with _small_run(vit, built, run) as features:
            unread = _unreached(features, trained, everything=False)
            missing = _unreached(features, unread, everything=True)
    except Exception:
        if built.owns_head:  # the user's head may want images of its own size: then nothing can be said of it
            return
        raise
    missing = {n: p for n, p in missing.items() if not (built.owns_head and n.startswith("head."))}  # the user's affair
    if missing and not any(isinstance(vars(m).get("forward"), FunctionType) for m in vit.backbone.modules()):
        # A function that was put over a forward calls the user's own modules, not the copies that were tried.
        raise ValueError(_explained(vit, built, list(missing)))
    read_by_none = [n for n in unread if built.owns_head and n.startswith("head.")]
    unread = {n: p for n, p in unread.items() if n not in read_by_none}
    built.leaves_unread = bool(unread)
    if unread and built.head is not None:
        warn(
            f"the head {type(built.head).__name__} does not read all that {' + '.join(built.adapters)} makes: its loss "
            f"does not train {listed(list(unread))}. {_remedy(list(unread))}, or add a loss on the features yourself",
        )


@contextmanager
def _small_run(vit: View, built: AdapterSet, run: Callable[[View, AdapterSet, Tensor], Features]) -> Iterator[Features]:
    backbone = at_rest(skeleton(vit.backbone, own_layer))
    view, side = registry.view(backbone), 4 * vit.spec.patch_size
    first = next(vit.backbone.parameters())
    devices = [first.device] if first.device.type == "cuda" else []
    inside = built.weight_adapters
    with torch.random.fork_rng(devices), _as_it_was(built), _frozen(vit.backbone, built), torch.enable_grad():
        built.train()
        for module in built.modules():
            if isinstance(module, _BatchNorm):  # one over all processes would wait for the others
                module.eval()
        try:
            for adapter in inside:
                adapter.install(backbone)
            yield run(view, built, torch.randn(2, vit.spec.channels, side, side, device=first.device))
        finally:
            for adapter in reversed(inside):
                adapter.remove(backbone)


@contextmanager
def _frozen(backbone: nn.Module, built: nn.Module) -> Iterator[None]:
    """Nothing of the backbone wants a gradient but what the set trains, as it will be when it is attached.

    A backbone as libraries build it wants gradients of all that is not quantised, and its quantised layers, which then
    get tokens that want one, may have no backward pass (bitsandbytes' on a CPU in eval mode).
    """
    trained = {id(p) for p in built.parameters()}
    others = [p for p in backbone.parameters() if p.requires_grad and id(p) not in trained]
    for p in others:
        p.requires_grad = False
    try:
        yield
    finally:
        for p in others:
            p.requires_grad = True


def _unreached(features: Features, trained: dict[str, nn.Parameter], everything: bool) -> dict[str, nn.Parameter]:
    """Which of these get no gradient from the logits and what adapters report; or from any of the features."""
    f = features
    read = [f.logits] if f.logits is not None and not everything else [f.tokens, f.prefix, *f.maps, f.logits]
    outputs = [x for x in (*tensors_in(read), *f.aux.values()) if x.requires_grad]
    if not outputs or not trained:
        return trained
    ones = [torch.ones_like(x) for x in outputs]
    found = torch.autograd.grad(outputs, list(trained.values()), ones, allow_unused=True, retain_graph=True)
    return {name: p for (name, p), gradient in zip(trained.items(), found) if gradient is None}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in what a head returned: one, several, or several by name."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)


@contextmanager
def _as_it_was(built: nn.Module) -> Iterator[None]:
    """Modes are put back, and statistics are written to copies."""
    modes = [(m, m.training) for m in built.modules()]
    buffers = [(m, dict(m._buffers)) for m in built.modules()]
    for module, own in buffers:
        module._buffers.update({name: None if b is None else b.clone() for name, b in own.items()})
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, own in buffers:
            module._buffers.update(own)


def _remedy(unread: list[str]) -> str:
    if all(name.startswith("backbone.") for name in unread):
        return "Leave these parts out of train_backbone"
    return (
        "Choose a head that reads maps ('fpn', 'depth'), or an adapter that changes tokens ('lora', 'metaformer', ...)"
    )


def _explained(vit: View, built: AdapterSet, missing: list[str]) -> str:
    backbone, what = type(vit.backbone).__name__, " + ".join(built.adapters) or "no adapter"
    said = f"{what} on {backbone}: no gradient would reach {listed(missing)}"
    if any(name.startswith("adapters.lora.") for name in missing):
        return (
            f"{said}: {backbone} reads these weights without calling the layer, or their output is not used here (a "
            "classifier, where head= is given). Leave these layers out of target_modules"
        )
    if any(name.startswith("backbone.") for name in missing):
        return f"{said}: what {backbone} computes from them is not used here. Leave them out of train_backbone"
    return (
        f"{said}: none of the features depends on them. Leave out the adapter or option that adds them, or use them in "
        "its forward"
    )
