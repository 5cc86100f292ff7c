"""Which weights a backbone has, layer by layer: exactly, and up to rounding.

``digest`` is exact. The bits of a tensor are read as 32-bit words in rows of ``ROW``, and a row is summed as

    h = sum_i word_i * odd_i  (mod 2^64),      odd_i a fixed odd 64-bit number for each place

so that one word that differs always shows, and two or more do but for one chance in some 2^33. Integers add up to the
same in any order: every device and every number of threads says the same, and nothing is rounded.

``sums`` holds in another library and another precision: the sum of the weights of a block, of their sizes and of
their squares are the same whether q, k and v are one matrix or three.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from adaptkit.core.tree import blocks_of, plain_name, unwrapped

__all__ = [
    "NEW_CHANNELS",
    "block_sums",
    "changed",
    "digest",
    "layers_of",
    "other_blocks",
    "other_layers",
    "stored",
    "tensors_of",
]

ROW = 1 << 14  #: words of a row: its products stay in a core's cache, and torch adds them up in one thread
ROWS = 256  #: how many at once on an accelerator, where a call costs more than memory
#: Parts that no feature depends on: only a classifier reads them, or masked training. A layer of their own each.
BESIDE = frozenset({"attn_pool", "classifier", "fc_norm", "head", "head_dist", "mask_token", "neck", "pooler"})
#: Rows of an expanded patch embedding: a layer of their own, for the rest is the RGB backbone's.
NEW_CHANNELS = "new_channels"
#: Under which name a layer of peft or of ours holds the layer of the backbone that it stands for.
STANDS_FOR = ("base_layer", "original_module", "base")
OURS = ("adaptkit.", "peft.")
DENSE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FORMAT = 1  #: of the digest: another one compares with none of this
U = 2.0**-8  #: bf16 rounds a weight by at most this share of it


class _Absent(Exception):
    """A tensor has no plain values here: on meta, fake, sparse, or in parts on several devices."""


# ------------------------------------------------------------------------------------------------------- what counts


def tensors_of(backbone: nn.Module, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Go through the parameters and persistent buffers of a backbone by plain names, tied ones under each name.

    A wrapper, a layer of peft and a layer or parametrisation of ours make no difference: what they stand for is seen.
    """
    backbone = _meant(backbone)
    buffers = {k: b for k, b in backbone._buffers.items() if k not in backbone._non_persistent_buffers_set}
    for name, tensor in (*backbone._parameters.items(), *buffers.items()):
        if tensor is not None:
            yield plain_name(path + name), tensor
    for name, child in backbone._modules.items():
        if isinstance(child, ParametrizationList):
            yield from _parametrised(child, path.removesuffix("parametrizations.") + name)
        elif child is not None:
            yield from tensors_of(child, f"{path}{name}.")


def _meant(module: nn.Module) -> nn.Module:
    module = unwrapped(module)
    while type(module).__module__.startswith(OURS):
        held = next((module._modules[name] for name in STANDS_FOR if module._modules.get(name) is not None), None)
        if held is None:
            break
        module = unwrapped(held)
    return module


def _parametrised(listed: ParametrizationList, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensor under the name that it has without a parametrisation, and what a foreign one adds."""
    for key, tensor in (*listed._parameters.items(), *listed._buffers.items()):
        if tensor is not None:
            yield plain_name(name if key == "original" else f"{name}.{key}"), tensor
    for key, child in listed._modules.items():
        if child is not None and not type(child).__module__.startswith(OURS):
            yield from tensors_of(child, f"{name}.{key}.")


def _layers(names: Sequence[str]) -> dict[str, str]:
    """Name of a tensor -> its layer: to the first number (``blocks.0``), or the part below what all names share."""
    paths = [name.split(".") for name in names]
    shared = sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*(path[:-1] for path in paths))))
    layers = {}
    for name, path in zip(names, paths):
        number = next((i for i, part in enumerate(path) if part.isdigit()), len(path))
        beside = next((i for i, part in enumerate(path[:number]) if part in BESIDE), None)
        end = beside if beside is not None else number if number < len(path) else shared
        layers[name] = name if path[-1] == NEW_CHANNELS else ".".join(path[: end + 1])
    return layers


def layers_of(backbone: nn.Module) -> dict[str, str]:
    """Return of each tensor of a backbone the layer that it counts to in its digest."""
    return _layers(sorted({name for name, _ in tensors_of(backbone)}))


# ------------------------------------------------------------------------------------------------------------- exact


@torch.no_grad()
def digest(backbone: nn.Module, trainable: bool = False) -> dict[str, str]:
    """Return a checksum for each layer of a backbone: names, dtypes and shapes, a dash, and all bits.

    The two parts are hexadecimal, 8 and 16 digits; where the first is the same the second can be compared. Quantised
    weights count as they are stored. The result is ``{}`` where the values are not here: tensors on meta, fake ones,
    sparse ones, or in parts on several devices.

    ``trainable``: of each parameter by itself; buffers and quantised weights, which no optimiser changes (but their
    library may), are left out.

    It is computed where the tensors are, with one synchronisation. On a CPU it takes about 0.1 s for a ViT-B.
    """
    named = sorted(tensors_of(backbone), key=lambda pair: pair[0])
    if trainable:
        named = [(n, t) for n, t in named if isinstance(t, nn.Parameter) and t.dtype in DENSE]
    try:
        whole = [(name, tensor, list(stored(tensor))) for name, tensor in named]
    except _Absent:
        return {}
    rows: dict[int, list[Tensor]] = {}  # by tensor: a tied one is read once
    odd: dict[torch.device, Tensor] = {}
    for _, tensor, parts in whole:
        if id(tensor) not in rows:
            rows[id(tensor)] = [sums for part in parts for sums in _row_sums(part, odd)]
    values = _read(rows)
    names = [name for name, _ in named]
    layers = dict(zip(names, names)) if trainable else _layers(names)
    said: dict[str, tuple[list[Any], list[Any]]] = {}
    for name, tensor, parts in whole:
        structure, bits = said.setdefault(layers[name], ([], []))
        kinds = [(str(part.dtype), tuple(part.shape)) for part in parts]
        structure.append((name, str(tensor.dtype), tuple(tensor.shape), kinds))
        bits.append(values[id(tensor)])
    return {layer: f"{_hashed(structure, 4)}-{_hashed(bits, 8)}" for layer, (structure, bits) in said.items()}


def _hashed(value: list[Any], size: int) -> str:
    return hashlib.blake2b(repr((FORMAT, value)).encode(), digest_size=size).hexdigest()


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Return the layers whose digest is another one, or that only one side has; none where a side is unknown."""
    if not before or not after:
        return []
    return [layer for layer in dict.fromkeys((*before, *after)) if before.get(layer) != after.get(layer)]


def other_layers(then: Mapping[str, str], now: Mapping[str, str], classifier: bool) -> tuple[list[str], bool]:
    """Compare two backbones exactly where that is possible.

    Args:
        then, now: their digests.
        classifier: whether parts count that only a classifier reads.

    Returns the layers of the same structure with other weights, and whether all that features depend on was compared.
    """

    def counts(layer: str) -> bool:
        last = layer.rpartition(".")[2]
        return last not in BESIDE or (classifier and last not in ("mask_token", "pooler"))

    layers = [layer for layer in dict.fromkeys((*then, *now)) if counts(layer)]
    same = [n for n in layers if then.get(n, "").partition("-")[0] == now.get(n, "-").partition("-")[0]]
    return [n for n in same if then[n] != now[n]], bool(layers) and len(same) == len(layers)


def stored(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors in which the values lie: several for a quantised one. Raises where they are not here."""
    if tensor.is_meta or isinstance(tensor, nn.parameter.UninitializedTensorMixin) or tensor.layout != torch.strided:
        raise _Absent
    if type(tensor) in (Tensor, nn.Parameter, nn.Buffer):
        yield tensor.detach()
        return
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.distributed.tensor import DTensor

    if isinstance(tensor, FakeTensor | DTensor):
        raise _Absent
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from stored(getattr(tensor, name))
        return
    yield tensor.detach().as_subclass(Tensor)
    state = getattr(tensor, "quant_state", None)  # bitsandbytes keeps the scales of four bits beside them
    while state is not None:
        yield from (t for _, t in sorted(vars(state).items()) if isinstance(t, Tensor))
        state = getattr(state, "state2", None)


def _row_sums(tensor: Tensor, odd: dict[torch.device, Tensor]) -> Iterator[Tensor]:
    """Yield the sums of the rows, as 64-bit integers on the tensor's device."""
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    flat = tensor.contiguous().view(-1)
    device = flat.device
    if device not in odd:
        odd[device] = _odd_numbers().to(device)
    row = ROW * 4 // flat.element_size()
    rows = _rows_at_once(device)
    products = torch.empty(ROW, dtype=torch.int64, device=device)
    for part in flat.split(row * rows):
        words = _words(part)
        whole = len(words) // ROW * ROW
        if rows == 1 and whole:  # the same memory again and again
            yield products.copy_(words).mul_(odd[device]).sum()[None]
        elif whole:
            yield (words[:whole].view(-1, ROW).long() * odd[device]).sum(1)
        if whole < len(words):
            rest = words[whole:]
            yield (rest.long() * odd[device][: len(rest)]).sum()[None]


def _rows_at_once(device: torch.device) -> int:
    return 1 if device.type == "cpu" else ROWS


def _words(flat: Tensor) -> Tensor:
    """The bits as 32-bit integers, with zeros at the end where they do not fill the last one."""
    octets = flat.view(torch.uint8)
    if len(octets) % 4 or octets.storage_offset() % 4:
        octets = F.pad(octets, (0, -len(octets) % 4)) if len(octets) % 4 else octets.clone()
    return octets.view(torch.int32)


def _odd_numbers() -> Tensor:
    """(ROW,) odd 64-bit integers that look random and are the same everywhere (the finaliser of SplitMix64)."""
    z = torch.arange(1, ROW + 1, device="cpu") * -7046029254386353131
    z = (z ^ (z >> 30)) * -4658895280553007687
    z = (z ^ (z >> 27)) * -7723592293110705685
    return (z ^ (z >> 31)) | 1


def _read(rows: dict[int, list[Tensor]]) -> dict[int, list[int]]:
    """Copy all sums to the CPU at once."""
    by_device: dict[torch.device, list[int]] = {}
    for key, sums in rows.items():
        if sums:
            by_device.setdefault(sums[0].device, []).append(key)
    found: dict[int, list[int]] = {key: [] for key in rows}
    for keys in by_device.values():
        values = torch.cat([s for key in keys for s in rows[key]]).tolist()
        start = 0
        for key in keys:
            count = sum(len(s) for s in rows[key])
            found[key], start = values[start : start + count], start + count
    return found


# --------------------------------------------------------------------------------------------------- up to rounding


@torch.no_grad()
def block_sums(backbone: nn.Module, depth: int) -> dict[str, list[float]]:
    """Return of each block, ``"0"`` to ``str(depth - 1)``, four sums over its weights w.

    They are of w, of |w|, of w^2, and of |w| over those weights that are vectors. Quantised blocks are left out, and so
    are all where the blocks are not found or their values are not here.
    """
    try:
        blocks = blocks_of(backbone, depth)
    except TypeError:
        return {}
    sums: dict[str, list[Tensor]] = {}
    for index, block in enumerate(blocks):
        weights = [t for _, t in tensors_of(block) if isinstance(t, nn.Parameter)]
        if weights and all(type(t) is nn.Parameter and not t.is_meta and t.dtype in DENSE for t in weights):
            sums[str(index)] = [_sums(t) for t in weights]
    return {index: [float(f"{v:.9g}") for v in torch.stack(of).sum(0).tolist()] for index, of in sums.items()}


def other_blocks(then: Mapping[str, Sequence[float]], now: Mapping[str, Sequence[float]]) -> list[str]:
    """Return the blocks whose sums differ by more than rounding to bf16 explains.

    A weight moves by at most U |w| either way. Of a matrix the moves are independent, so that their sum has a standard
    deviation below U sqrt(sum w^2); six of these are allowed. Of a vector (a norm, LayerScale) they need not be, for
    its values are often all the same: there the sum may move by U sum |w|.
    """
    return [index for index in then if index in now and not _close(then[index], now[index])]


def _close(then: Sequence[float], now: Sequence[float]) -> bool:
    square, vectors = max(then[2], now[2]), max(then[3], now[3])
    first = 6 * U * math.sqrt(square) + U * vectors
    return (
        abs(then[0] - now[0]) <= first and abs(then[1] - now[1]) <= first and abs(then[2] - now[2]) <= 3 * U * square
    )  # (1 + U)^2 - 1 < 3 U


def _sums(tensor: Tensor) -> Tensor:
    """Add up one tensor in float64, a row at a time."""
    total = torch.zeros(4, dtype=torch.float64, device=tensor.device)
    for part in tensor.detach().reshape(-1).split(ROW * _rows_at_once(tensor.device)):
        w = part.double()
        size = w.abs().sum()
        total += torch.stack([w.sum(), size, (w * w).sum(), size if tensor.ndim == 1 else torch.zeros_like(size)])
    return total
