"""A frozen backbone over several devices: FSDP2 for its blocks, DDP for what is trained.

    model = adaptkit.shard(adaptkit.attach(backbone, "vit-adapter"))
    ddp = torch.nn.parallel.DistributedDataParallel(model)

Each block's weights lie in equal parts on the devices, are gathered when the block runs, and dropped after. Nothing of
them is trained, so nothing is sent back. Adapters and head are small: every device has them whole, DDP exchanges their
gradients, and a file is saved as ever, by one process, without the backbone.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from adaptkit.adapters.wrapped import RUN_WHOLE
from adaptkit.core.tree import blocks_of
from adaptkit.hub.backbone import digest_of, fingerprint, sums_of
from adaptkit.model.adapted import adapted_in

__all__ = ["blocks_of", "shard"]


def shard(model: Any, **options: Any) -> Any:
    """Shard the frozen backbone over the processes of the default group, in place; the rest stays whole.

    Args:
        model: as ``attach`` returns it, or a module around it; on its device. Call this before
            ``DistributedDataParallel``, which is told to leave the shards alone.
        options: of ``torch.distributed.fsdp.fully_shard``: ``mesh``, ``reshard_after_forward``, ``mp_policy``, ...

    Returns the same model. Raises ``RuntimeError`` where no process group exists, and ``TypeError`` where the blocks of
    the backbone are not found.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if not dist.is_initialized():
        raise RuntimeError(
            "shard() needs a process group: start with torchrun and call torch.distributed.init_process_group()"
        )
    adapted = adapted_in(model, "shard")
    vit = adapted.vit
    blocks = blocks_of(vit.backbone, len(vit.spec.widths))
    # While every process can read the weights:
    vit.fingerprint, vit.digest, vit.sums = fingerprint(vit), digest_of(vit), sums_of(vit)
    for block in blocks:
        fully_shard(block, **options)
        setattr(block, RUN_WHOLE, _call)
        register_fsdp_forward_method(block, RUN_WHOLE)
    vit.sharded = blocks
    own = set(model.parameters()) - set(vit.backbone.parameters())
    fully_shard(model, ignored_params=own, **options)
    model._ddp_params_and_buffers_to_ignore = [n for n, p in model.named_parameters() if hasattr(p, "full_tensor")]
    return model


def _call(function: Any, *args: Any) -> Any:
    return function(*args)
