"""Many devices: the frozen blocks sharded, adapters gathered for the file.

DDP needs nothing of this: ``DistributedDataParallel(model)`` exchanges the gradients of the adapters alone. FSDP2 is
for a backbone that does not fit one device::

    model = adaptkit.shard(adaptkit.attach(backbone, "vit-adapter"))   # then the optimiser
    ...
    model.save("folder")                                               # called by every rank, written by the first

Each block of the host is a group of its own, gathered when it runs and dropped after. What is left, the embedding,
the adapters and the head, is the outermost group.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["blocks_of", "first_rank", "run_sharded", "shard", "sharded_like", "whole"]

RUN = "run_with_parameters"  #: a method of each sharded block: calls a function while its parameters are whole


def shard(model: Any, **options: Any) -> Any:
    """Shard the frozen blocks, and what is trained, over the processes of the default group, in place (FSDP2).

    Args:
        model: as ``attach`` returns it, on its device.
        options: of ``torch.distributed.fsdp.fully_shard``: ``mesh``, ``reshard_after_forward``, ``mp_policy``, ...

    Returns the same model. Build the optimiser after this call: the parameters are new ones. Raises ``RuntimeError``
    where no process group exists.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if not dist.is_initialized():
        raise RuntimeError(
            "shard() needs a process group: start with torchrun and call torch.distributed.init_process_group()"
        )
    blocks = blocks_of(model.vit.host, len(model.spec.widths))
    for block in blocks:
        fully_shard(block, **options)
        setattr(block, RUN, _call)
        register_fsdp_forward_method(block, RUN)
    model.vit.sharded = blocks
    return fully_shard(model, **options)


def _call(function: Any, *args: Any) -> Any:
    return function(*args)


def run_sharded(block: nn.Module | None, function: Any) -> Any:
    """Return ``function`` run with the parameters of ``block`` whole: for adapters that run a block from its parts."""
    run = getattr(block, RUN, None)
    return function if run is None else lambda *args: run(function, *args)


def blocks_of(host: nn.Module, depth: int) -> list[nn.Module]:
    """Return the host's blocks: the elements of the lists that hold ``depth`` modules in all.

    Raises ``TypeError`` for a host whose blocks are not found.
    """
    lists = [m for m in host.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m)]
    for kept in lists:
        if len(kept) == depth and len({type(m) for m in kept}) == 1:
            return list(kept)
    per_stage = [m for m in lists if len({type(b) for b in m}) == 1 and any(True for _ in m[0].children())]
    names = {type(m[0]) for m in per_stage}
    for cls in names:
        found = [block for m in per_stage if type(m[0]) is cls for block in m]
        if len(found) == depth:
            return found
    raise TypeError(
        f"{type(host).__name__}: no list of its {depth} blocks was found, so they cannot be sharded one by one"
    )


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor whole: every rank must ask. Another tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


def sharded_like(tensor: Tensor, own: Tensor) -> Tensor:
    """Return a whole tensor as it lies in ``own``."""
    if not hasattr(own, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements)  # type: ignore[attr-defined]


def first_rank(vit: Any) -> bool:
    """Whether this process writes files: the first one of a sharded model, any that asks of another."""
    return not vit.sharded or dist.get_rank() == 0
