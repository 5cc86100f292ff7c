"""A frozen backbone that does not fit the device: its blocks stay in CPU memory, and each is there while it runs.

    with offload(adaptkit.attach(backbone, "sfp"), "cuda"):
        seen = model.extract(images)

On the device are all that is no block (patches, norms, adapters, head), one block, and the activations::

    bytes = bytes(model) - bytes(blocks) + bytes(largest block) + activations

Accelerate's ``cpu_offload`` does the like, but puts other parameters in place of the backbone's, empty ones while they
wait: then no file could be saved, whose header has a checksum of every layer. Here a block is at rest what it always
was, the same tensors in the same memory, and nothing is copied back, for nothing in it is trained. The values are those
of a backbone on the device, bit for bit: where its weights lie in between changes no operation.

Each pass copies every block once. That is worth its time where many images share the pass: :func:`extract_each`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.core.tensors import is_plain
from adaptkit.core.tree import blocks_of
from adaptkit.core.view import ViT
from adaptkit.features.cached import CachedFeatures
from adaptkit.hub.digest import stored
from adaptkit.model.adapted import AdaptedModel, adapted_in
from adaptkit.model.image import check_image

__all__ = ["Offload", "bytes_of", "extract_each", "offload", "offloaded"]


def offload(model: Any, device: torch.device | str) -> Offload:
    """Put a model on a device but for the backbone's blocks, each of which is brought there whenever it runs.

    Args:
        model: as ``attach`` returns it, or a module around it. From now on ``model.to(...)`` must not be called.
        device: where everything runs. With the CPU nothing moves.

    Returns a handle: ``remove()``, or the end of a ``with`` block, leaves the blocks as they were, in CPU memory; what
    is no block stays on the device. Called a second time it returns the same handle. One thread may run the model.

    Raises ``ValueError`` where the active adapters do more than read the backbone, where the blocks lie in
    parts on several devices or are not plain numbers (quantised), and ``TypeError`` where they are not found or
    weights of theirs are read before they run (timm's BEiT).
    """
    there = offloaded(model)
    return Offload(model, device) if there is None else there


def offloaded(model: nn.Module) -> Offload | None:
    """Return the handle of a model whose blocks are offloaded, else None."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return next((hook.__self__.owner for hook in hooks if isinstance(getattr(hook, "__self__", None), _Guest)), None)


def bytes_of(module: nn.Module) -> int:
    """Return the bytes of the parameters and buffers of a module, as they are stored."""
    every = (*module.parameters(), *module.buffers())
    return sum(part.nbytes for t in every for part in ([t] if is_plain(t) else stored(t)))


@torch.no_grad()
def extract_each(model: AdaptedModel, images: Sequence[Tensor]) -> list[CachedFeatures]:
    """Return ``model.extract(image)`` for several batches, block after block, so that each block is copied once.

    Of an offloaded model the features are on the CPU, so that the device holds one state of each image, not all that
    adapters read. Raises what :meth:`AdaptedModel.extract` raises.
    """
    there, vit = offloaded(model), model.vit
    if there is None or not isinstance(vit, ViT):
        return [model.extract(image) for image in images]
    after, _ = model.reads()
    for image in images:
        check_image(vit, image)
    begun = [vit.begin(model._framed(image)) for image in images]
    tokens, states = [x for x, _ in begun], [[] for _ in begun]  # type: ignore[var-annotated]
    for index in range(vit.spec.depth):
        with there.held(index):
            tokens = [blocks[index](x) for x, (_, blocks) in zip(tokens, begun)]
        if index in after:
            for kept, x in zip(states, tokens):
                kept.append(x.cpu())
    return [model._seen(image, kept) for image, kept in zip(images, states)]


class Offload:
    """The blocks that are offloaded, and where they run."""

    def __init__(self, model: nn.Module, device: torch.device | str) -> None:
        adapted = adapted_in(model, "offload")
        vit = adapted.vit
        if vit.sharded:
            raise ValueError("the backbone is sharded, so in parts on several devices: shard it, or offload it")
        if getattr(vit, "rebuilds", True):
            raise TypeError(
                f"{type(vit.backbone).__name__}: only blocks that are run as they are can be offloaded, and of these "
                "adaptkit reads weights beforehand (tables of relative positions) or they change width: use a plain "
                "ViT, or adaptkit.shard"
            )
        try:
            adapted.reads()
        except ValueError as error:
            raise ValueError(
                f"offload is for a backbone that is only read ({error}); use an adapter beside it (sfp, vit-split, "
                "vit-adapter with injector=False), or adaptkit.shard"
            ) from error
        self.blocks = blocks_of(vit.backbone, len(vit.spec.widths))
        for index, block in enumerate(self.blocks):
            _check(index, block)
        self.device = torch.empty(0, device=device).device  # with its index
        inside = {id(module) for block in self.blocks for module in block.modules()}
        for module in model.modules():
            _put(module, torch.device("cpu") if id(module) in inside else self.device)
        here = {id(t) for block in self.blocks for t in (*block.parameters(), *block.buffers())}
        named = (*model.named_parameters(), *model.named_buffers())
        model._ddp_params_and_buffers_to_ignore = [n for n, t in named if id(t) in here]  # type: ignore[assignment]
        self.present: _Guest | None = None  #: the block that is on the device
        self._guests = [_Guest(self, block) for block in self.blocks]

    def largest(self) -> int:
        """Return the bytes of the largest block: what the device needs for weights beside what stays there."""
        return max(map(bytes_of, self.blocks))

    def bytes(self) -> int:
        """Return the bytes of all blocks, in CPU memory."""
        return sum(map(bytes_of, self.blocks))

    def held(self, index: int) -> _Guest:
        """Within, one block is on the device for several calls: ``with offload.held(3): ...``."""
        return self._guests[index]

    def remove(self) -> None:
        """Run the blocks where they lie, in CPU memory, from now on."""
        for guest in self._guests:
            guest.leave()
            guest.remove()
        self._guests = []

    def __enter__(self) -> Offload:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()


class _Guest:
    """One block, which is on the device while it runs; it may be called again meanwhile."""

    def __init__(self, owner: Offload, block: nn.Module) -> None:
        self.owner, self.block, self.calls = owner, block, 0
        self.kept: list[tuple[dict[str, Any], str, Tensor]] = []
        self.handles = (
            block.register_forward_pre_hook(self.come, prepend=True),
            block.register_forward_hook(self.go, always_call=True),  # after an error too
        )

    def come(self, *_: Any) -> None:
        """Put copies on the device in place of parameters and buffers; of a shared one, one copy."""
        self.calls += 1
        if self.calls > 1:
            return
        if self.owner.present is not None:  # Ctrl-C ended its forward: torch then calls no hook
            self.owner.present.leave()
        self.owner.present = self
        copies: dict[int, Tensor] = {}
        for module in self.block.modules():
            for own in (module._parameters, module._buffers):
                for name, tensor in own.items():
                    if tensor is None or tensor.device == self.owner.device:
                        continue
                    self.kept.append((own, name, tensor))
                    if id(tensor) not in copies:
                        copies[id(tensor)] = _copied(tensor, self.owner.device)
                    own[name] = copies[id(tensor)]

    def go(self, *_: Any) -> None:
        """Leave where this was the outermost call."""
        self.calls -= 1
        if self.calls <= 0:
            self.leave()

    def leave(self) -> None:
        """Put the block's own tensors back; the copies are dropped."""
        self.calls, self.owner.present = 0, None
        for own, name, tensor in self.kept:
            own[name] = tensor
        self.kept = []

    def remove(self) -> None:
        """Take the hooks out."""
        for handle in self.handles:
            handle.remove()

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.callback(self.go)
            self.come()
            stack.pop_all()

    def __exit__(self, *_: object) -> None:
        self.go()


def _put(module: nn.Module, device: torch.device) -> None:
    """Move a module's own tensors, and not its children's, where one is elsewhere."""
    own = (*module._parameters.values(), *module._buffers.values())
    if any(t is not None and t.device != device for t in own):
        module._apply(lambda t: t.to(device), recurse=False)


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    copy = tensor.detach().to(device, non_blocking=tensor.is_pinned())
    return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy


def _check(index: int, block: nn.Module) -> None:
    """Raise ``ValueError`` where a block cannot be exchanged for a copy of it while it runs."""
    from torch._subclasses.fake_tensor import FakeTensor

    for name, tensor in (*block.named_parameters(), *block.named_buffers()):
        if type(tensor) not in (Tensor, nn.Parameter) and not isinstance(tensor, FakeTensor):
            raise ValueError(
                f"block {index} holds {name} as a {type(tensor).__name__}, which is quantised or in parts: only plain "
                "tensors are offloaded. A quantised backbone is small: leave it on the device"
            )
