"""What a decision costs: multiply-accumulates (MACs) of each image, from what AdaViT decided for it, or ToMe merged.

With n rows kept (class and register tokens always among them), a share s of the heads, and the sub-layers m, a block
of the frozen ViT costs::

    m_msa * (n * s * (qkv + out) + n^2 * s * pair) + m_ffn * n * mlp

and its gates cost what they cost. Where the backbone's heads do not come apart, as with one key for several queries,
none is skipped, and s = 1. ``qkv``, ``out`` and ``mlp`` are the MACs of one row, ``pair`` those of one query
with one key; they are read off the backbone itself by torch's flop counter, so that any family is counted alike. Norms,
softmax and activations are not counted, as everywhere in the literature.

With ToMe, whose every image costs alike, n rows enter a block and r of their patch tokens, of which a and b are in the
two sets that are matched, disappear before its FFN::

    n * (qkv + out) + n^2 * pair + a * b * (size of a head) + (n - r) * mlp
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from adaptkit.adapters.adavit import AdaViT
from adaptkit.adapters.tome import ToMe
from adaptkit.core.block import Block
from adaptkit.core.tree import evaluating
from adaptkit.core.view import Features
from adaptkit.model.adapted import AdaptedModel

__all__ = ["BlockCosts", "Costs", "Summary", "costs", "counted", "macs", "saved_bytes", "summary"]


class BlockCosts(NamedTuple):
    """MACs in one block."""

    qkv: float  #: of one row
    out: float  #: of one row
    mlp: float  #: of one row
    pair: float  #: of one query with one key, both products, all heads
    #: of its gates and its bottleneck, which see every row, 0 before the first gated block; or of ToMe's matching
    gates: float
    #: whether heads are computed one by one; else q, k and v are those of all heads and kept rows, whatever is off
    comes_apart: bool = True

    def dense(self, rows: int) -> float:
        """Return the MACs of the frozen block by itself."""
        return rows * (self.qkv + self.out + self.mlp) + rows * rows * self.pair


class Costs(NamedTuple):
    """MACs in one model at one image size."""

    blocks: tuple[BlockCosts, ...]
    other: float  #: outside the blocks: patches, head, and whatever a side adapter adds
    rows: int  #: tokens P+N
    prefix: int  #: of which are prefix tokens P
    adapter: AdaViT | ToMe

    @property
    def dense(self) -> float:
        """MACs of the same model without gates, or with nothing merged."""
        return self.other + sum(block.dense(self.rows) for block in self.blocks)


class Summary(NamedTuple):
    """How a set of images spreads."""

    mean: float
    p50: float
    p95: float


def costs(model: AdaptedModel, size: tuple[int, int]) -> Costs:
    """Count what one image of ``size`` (H, W) pixels costs, part by part; runs the model once.

    Raises ``TypeError`` where the model has no AdaViT gates and no ToMe, and where several sets act as their mean.
    """
    adapter = _saving(model)
    model.check_one_acts()
    with torch.no_grad(), evaluating(model), adapter.opened():
        parameter = next(model.backbone.parameters())
        image = torch.zeros(1, model.spec.channels, *size, device=parameter.device, dtype=parameter.dtype)
        grid = model.vit.grid(image)
        features: list[Features] = []
        total = counted(lambda: features.append(model(image)))
        prefix = features[0].prefix.shape[1]  # none where a side adapter drops them
        rows = prefix + grid[0] * grid[1]
        x, frozen = model.vit.begin(image)
        blocks = tuple(_block(adapter, i, block, x[:, -rows:], grid) for i, block in enumerate(frozen))
    return Costs(blocks, total - sum(block.dense(rows) for block in blocks), rows, prefix, adapter)


def _saving(model: nn.Module) -> AdaViT | ToMe:
    """What leaves work out in this model."""
    acting = getattr(model, "adapters", model)  # of several named sets the active one
    for module in acting.modules():
        if isinstance(module, AdaViT | ToMe):
            return module
    raise TypeError(
        f"this {type(model).__name__} has no AdaViT gates and no ToMe, so that each image costs what the dense model "
        "does (adaptkit.analysis.accounting.counted); attach 'adavit' or 'tome' to it"
    )


def macs(costs: Costs, aux: Mapping[str, Tensor]) -> Tensor:
    """Return the MACs (B,) of each image, from ``Features.aux``; differentiable in the decisions.

    What is counted is the work that the decisions leave where it can be left out at all; ``costs.dense`` is the same
    model without gates. With ToMe it is (1,), the same for every image, and ``aux`` is not read. Raises ``KeyError``
    where ``aux`` is not that of this model.
    """
    adapter = costs.adapter
    if isinstance(adapter, ToMe):
        return torch.tensor([costs.other + _merged(costs, adapter)], dtype=torch.float64)
    c = adapter.config
    some = aux[f"{c.gates[0]}_keep"]
    one = some.new_ones(len(some))
    total = one * costs.other
    for i, block in enumerate(costs.blocks):
        kept = {kind: aux[f"{kind}_keep"][:, i - adapter.first[kind]] for kind in c.gates if adapter.gated(kind, i)}
        patches = kept["patch"].sum(1) if "patch" in kept else one * (costs.rows - costs.prefix)
        share = kept["head"].mean(1) if "head" in kept else one
        msa, ffn = kept["layer"].unbind(1) if "layer" in kept else (one, one)
        only_prefix = c.last_block == "class" and i == len(costs.blocks) - 1
        total = total + _spent(block, costs.prefix, patches, share, msa, ffn, only_prefix, c.head_mode) + block.gates
    return total


def _merged(costs: Costs, adapter: ToMe) -> float:
    """The second equation of the module's head, over the blocks."""
    rows, total = costs.rows, 0.0
    for block, r in zip(costs.blocks, adapter.counts(costs.rows - costs.prefix)):
        total += block.dense(rows) - r * block.mlp + block.gates
        rows -= r
    return total


def _spent(
    block: BlockCosts, prefix: int, patches: Tensor, share: Tensor, msa: Tensor, ffn: Tensor, only: bool, mode: str
) -> Tensor:
    """The equation of the module's head; with ``only``, the patch tokens are keys and values alone."""
    keys = prefix + patches
    queries = prefix if only else keys
    each = block.qkv / 3
    if not block.comes_apart:
        return msa * (keys * block.qkv + queries * block.out + queries * keys * block.pair) + ffn * queries * block.mlp
    if mode == "full":
        projections = share * (queries * each + keys * 2 * each + queries * block.out)
    else:  # an off head still makes its values and hands them on
        projections = queries * (share * each + block.out) + keys * (share + 1) * each
    return msa * (projections + queries * keys * share * block.pair) + ffn * queries * block.mlp


def summary(values: Tensor) -> Summary:
    """Return mean, median and 95th percentile of MACs (or shares of them) over a set of images."""
    values = values.detach().double()
    p50, p95 = torch.quantile(values, values.new_tensor([0.5, 0.95])).tolist()
    return Summary(float(values.mean()), p50, p95)


def counted(run: Callable[[], Any]) -> float:
    """Return the MACs of ``run()``, counted operator by operator while it runs."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _Whole()
    # The counter does not know all fused attention kernels; the plain one is two products.
    with counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops() / 2


def saved_bytes(run: Callable[[], Any], model: nn.Module) -> int:
    """Return the bytes that ``run()`` keeps for its backward pass, beside the weights of ``model``.

    Every tensor that autograd saves is counted once, whatever views there are of it, on any device, fake tensors too.
    It is most of what training takes above weights, gradients and optimiser; ``adaptkit plan`` measures all of it.
    """
    weights = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
    held: dict[int, torch.UntypedStorage] = {}  # held, so that no other gets the place of one that is freed

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            held[storage._cdata] = storage
        return x

    with torch.inference_mode(False), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(storage.nbytes() for storage in held.values())


class _Whole:
    """What the counter asks where an operator ran: in the model, as a whole.

    Its own tracker hangs hooks on what modules are given, and a parameter among that (prompts) has none to hang them on
    where no gradient is recorded.
    """

    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _block(adapter: AdaViT | ToMe, index: int, block: Block, x: Tensor, grid: tuple[int, int]) -> BlockCosts:
    row = x[:, :1]
    q = block.qkv_unplaced(row)[0]  # (1, heads, 1, E)
    beside = _gates(adapter, str(index), x, grid) if isinstance(adapter, AdaViT) else _matching(adapter, index, q, grid)
    return BlockCosts(
        qkv=counted(lambda: block.qkv_unplaced(row)),
        out=counted(lambda: block.out(q)),
        mlp=counted(lambda: block.mlp(row)),
        pair=2.0 * q.shape[1] * q.shape[3],
        gates=beside,
        comes_apart=block.projections() is not None,
    )


def _gates(adapter: AdaViT, name: str, x: Tensor, grid: tuple[int, int]) -> float:
    gates = 0.0
    if name in adapter.gates:
        gates += counted(lambda: adapter.gates[name](x, x, grid))
    if name in adapter.bottlenecks:
        gates += counted(lambda: adapter.bottlenecks[name](x))
    return gates


def _matching(adapter: ToMe, index: int, q: Tensor, grid: tuple[int, int]) -> float:
    """Every patch token of one set with every one of the other, over the channels of a head."""
    counts = adapter.counts(grid[0] * grid[1])
    left = grid[0] * grid[1] - sum(counts[:index])
    return float(left // 2 * (left - left // 2) * q.shape[3]) if counts[index] else 0.0
