"""A frozen backbone in fewer bits: bfloat16, or the linear layers of its blocks in int8 or nf4.

int8: eight bits for each weight and a scale for each row (torchao), or LLM.int8() (bitsandbytes)
nf4:  four bits, the quantiles of a normal distribution, and a scale for 64 weights (bitsandbytes; QLoRA, section 3)

Libraries do the work. What is no linear layer of a block (patches, positions, norms) becomes bfloat16. Adapters and
head stay float32: a file fits the backbone in any of these.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.core.registry import view
from adaptkit.core.tree import blocks_of

__all__ = ["DTYPES", "in_fewer_bits", "linear_layers", "numel"]

DTYPES = ("float32", "bfloat16", "int8", "nf4")
LIBRARIES = {"int8": ("torchao", "bitsandbytes"), "nf4": ("bitsandbytes",)}


def in_fewer_bits(backbone: nn.Module, dtype: str, library: str | None = None) -> nn.Module:
    """Return the backbone with its weights in one of :data:`DTYPES`, changed in place.

    ``library`` chooses between ``"torchao"`` and ``"bitsandbytes"``; None: the first that is installed. Raises
    ``ImportError`` where none is, and ``ValueError`` for another dtype or library.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} of a backbone: choose among {', '.join(DTYPES)}")
    if dtype == "float32":
        return backbone.float()
    backbone = backbone.bfloat16()
    if dtype == "bfloat16":
        return backbone
    return MAKERS[dtype, _library(dtype, library)](backbone)


def numel(parameter: Tensor) -> int:
    """Return how many weights a parameter stands for: bitsandbytes keeps two of four bits in an octet."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def _library(dtype: str, asked: str | None) -> str:
    known = LIBRARIES[dtype]
    if asked is not None and asked not in known:
        raise ValueError(f"{dtype} weights by {asked!r}: choose among {', '.join(known)}")
    found = [name for name in known if asked in (None, name) and importlib.util.find_spec(name)]
    if not found:
        names = " or ".join(known if asked is None else [asked])
        raise ImportError(f"{dtype} weights need {names}: pip install {known[0] if asked is None else asked}")
    return found[0]


def linear_layers(backbone: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Yield the linear layers of the blocks: (the module that holds it, its name there, the layer)."""
    for block in blocks_of(backbone, len(view(backbone).spec.widths)):
        for module in list(block.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear:
                    yield module, name, child


def _torchao_int8(backbone: nn.Module) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    chosen = {id(layer) for _, _, layer in linear_layers(backbone)}
    quantize_(backbone, Int8WeightOnlyConfig(), filter_fn=lambda module, _: id(module) in chosen)
    return backbone


def _bitsandbytes(backbone: nn.Module, cls: str, *args: Any, **options: Any) -> nn.Module:
    import bitsandbytes

    for module, name, layer in linear_layers(backbone):
        sizes = (layer.in_features, layer.out_features, layer.bias is not None)
        made = getattr(bitsandbytes.nn, cls)(*sizes, *args, **options)
        made.load_state_dict(layer.state_dict())
        # On processors with AVX-512 it would pack a weight anew at the first call in eval mode, in a form that has no
        # backward pass: a backbone is in eval mode while adapters in it are trained.
        made.support_avx512bf16_for_cpu = False
        if layer.bias is not None:
            made.bias.data = layer.bias.data  # in its own dtype
        setattr(module, name, made.to(layer.weight.device))  # on its way to a device it is quantised
    return backbone


def _bitsandbytes_int8(backbone: nn.Module) -> nn.Module:
    return _bitsandbytes(backbone, "Linear8bitLt", has_fp16_weights=False)


def _bitsandbytes_nf4(backbone: nn.Module) -> nn.Module:
    return _bitsandbytes(backbone, "Linear4bit", compute_dtype=torch.bfloat16, quant_type="nf4")


MAKERS: dict[tuple[str, str], Callable[[nn.Module], nn.Module]] = {
    ("int8", "torchao"): _torchao_int8,
    ("int8", "bitsandbytes"): _bitsandbytes_int8,
    ("nf4", "bitsandbytes"): _bitsandbytes_nf4,
}
