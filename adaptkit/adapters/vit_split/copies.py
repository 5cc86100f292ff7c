"""Trainable copies of blocks of a backbone, of any plain family.

A copy is the block itself once more: the same class and settings, parameters of its own. So that rotary angles,
relative positions and masks reach it as they reach the block, the copies stand in the backbone's list of blocks, in a
second tree that shares everything else, and the family's own view binds them.

Libraries write one block in different ways. ``state_dict`` and ``load_state_dict`` speak timm's names, so that a file
fits the timm and the transformers copy of a backbone; the parameters themselves have the names of the block.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.core import registry
from adaptkit.core.block import Block
from adaptkit.core.proxy import own_layer
from adaptkit.core.tensors import is_plain
from adaptkit.core.tree import at_rest, blocks_of, skeleton, unwrapped
from adaptkit.core.unpacked import packs_its_weight, unpacked
from adaptkit.core.view import ViT

__all__ = ["BlockCopies", "common_names"]

#: How timm, and so a file, calls what transformers and timm's EVA and BEiT call otherwise.
NAMES = (
    (r"^(?:layernorm_before|layer_norm1)\.", "norm1."),
    (r"^(?:layernorm_after|layer_norm2)\.", "norm2."),
    (r"^(?:attention|self_attn|relative_position_bias)\.", "attn."),
    (r"^attn\.(?:o_proj|out_proj)\.", "attn.proj."),
    (r"^(?:gamma_|lambda_)([12])$", r"ls\1.gamma"),
    (r"^layer_scale([12])\.lambda1$", r"ls\1.gamma"),
    (r"^mlp\.(?:fc1_g|gate_proj)\.", "mlp.fc1.0."),
    (r"^mlp\.(?:fc1_x|up_proj)\.", "mlp.fc1.1."),
    (r"^mlp\.down_proj\.", "mlp.fc2."),
    (r"^attn\.q_proj\.", "attn.qkv.0."),
    (r"^attn\.k_proj\.", "attn.qkv.1."),
    (r"^attn\.v_proj\.", "attn.qkv.2."),
)
PART = re.compile(r"^(attn\.qkv|mlp\.fc1)\.(\d)\.")
#: EVA and BEiT keep the biases of q and v by themselves where k has none.
ALONE = {"attn.qkv.0.bias": "attn.q_bias", "attn.qkv.1.bias": "attn.k_bias", "attn.qkv.2.bias": "attn.v_bias"}


def common_names(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return timm's names of a block's parameters, and by which names the block has them, one below the other.

    ``attn.qkv.weight`` (3D, D) is ``q_proj.weight``, ``k_proj.weight``, ``v_proj.weight`` of another library.
    """
    found: dict[str, dict[str, str]] = {}
    for name in names:
        common = name
        for pattern, by in NAMES:
            common = re.sub(pattern, by, common)
        found.setdefault(PART.sub(r"\1.", common), {})[common] = name
    biases = found.get("attn.qkv.bias", {})
    if 0 < len(biases.keys() & ALONE.keys()) < len(ALONE):
        found |= {ALONE[part]: {part: name} for part, name in found.pop("attn.qkv.bias").items()}
    return {common: tuple(parts[part] for part in sorted(parts)) for common, parts in found.items()}


class BlockCopies(nn.ModuleList):
    """Trainable copies of the blocks ``indices`` of a backbone.

    Half precision becomes float32, in which small steps of training are not lost, and so do the weights of quantised
    linear layers: the copies start at what the quantised layers compute. Raises ``TypeError`` where the backbone's
    blocks are not found, ``ValueError`` for one whose numbers are otherwise than in full or half precision.
    """

    def __init__(self, backbone: nn.Module, depth: int, indices: Sequence[int]) -> None:
        blocks = blocks_of(backbone, depth)
        super().__init__(_copy(blocks[i], i) for i in indices)
        self.indices = tuple(indices)
        self.names = [common_names([n for n, _ in block.named_parameters(remove_duplicate=False)]) for block in self]
        # Not as a child: what it shares with the backbone is the backbone's.
        self.__dict__["view"] = registry.view(_beside(backbone, blocks, dict(zip(self.indices, self))))
        self.register_state_dict_post_hook(_to_common)
        self.register_load_state_dict_pre_hook(_from_common)

    def bound(self, grid: tuple[int, int]) -> list[Block]:
        """Return the copies as blocks that are bound to an image of this grid (h, w)."""
        view: ViT = self.__dict__["view"]
        side, like = view.spec.patch_size, next(self.parameters())
        image = like.new_empty(1, view.spec.channels, grid[0] * side, grid[1] * side)  # its shape alone is read
        blocks = view.blocks(image, grid)
        chosen = [blocks[i] for i in self.indices]
        same = next(view.backbone.parameters()).dtype == like.dtype
        return chosen if same else [_raised(block, like.dtype) for block in chosen]

    def check(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        """Raise ``ValueError`` where tensors below this prefix have other names than the blocks need.

        Other copies of the same weights may have a bias, a norm or a table more: then they compute something else.
        """
        place = f"{prefix}0."
        given = {name.removeprefix(place) for name in tensors if name.startswith(place)}
        if given and given != self.names[0].keys():
            more, less = sorted(given - self.names[0].keys()), sorted(self.names[0].keys() - given)
            here = type(unwrapped(self[0])).__name__
            raise ValueError(
                f"the copied blocks in it have {', '.join(more) or 'nothing'} which a {here} here has not, and lack "
                f"{', '.join(less) or 'nothing'} of it: attach to a backbone of the library and kind that it was "
                "trained on"
            )


def _raised(block: Block, dtype: torch.dtype) -> Block:
    """A block of a backbone in half precision: a bias that all blocks share is the backbone's, and comes in its own."""
    bound = replace(block, attn=_in(dtype, block.attn))
    rebuilt = getattr(block.run, "__func__", None) is Block.equation
    return replace(bound, run=bound.equation if rebuilt else _in(dtype, block.run))


def _in(dtype: torch.dtype, part: Any) -> Any:
    if isinstance(part, Tensor) and torch.promote_types(part.dtype, dtype) == dtype:
        return part.to(dtype)
    if isinstance(part, partial):
        told = {name: _in(dtype, value) for name, value in part.keywords.items()}
        return partial(_in(dtype, part.func), *(_in(dtype, value) for value in part.args), **told)
    return part


def _copy(block: nn.Module, index: int) -> nn.Module:
    """The block with parameters and buffers of its own, without what others have put into it."""
    copy, made = at_rest(skeleton(block, own_layer)), {}
    dtype = next((p.dtype for p in copy.parameters() if is_plain(p)), torch.float32)
    for module in list(copy.modules()):
        for name, layer in module._modules.items():
            if layer is not None and packs_its_weight(layer):
                module._modules[name] = unpacked(layer, dtype, f"block {index}, {name}")
    for module in copy.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in made:
                    made[id(tensor)] = _own(tensor, index)
                tensors[name] = tensor if tensor is None else made[id(tensor)]
    return copy.train()


def _own(tensor: Tensor, index: int) -> Any:
    """A copy of a parameter or buffer; without values where tensors are made without any."""
    trained = isinstance(tensor, nn.Parameter)
    if type(tensor.data) is not Tensor or (trained and not tensor.is_floating_point()):
        raise ValueError(
            f"block {index} holds a {type(tensor.data).__name__} of {tensor.dtype}, which cannot be trained: attach to "
            "the backbone before it is sharded, and quantise its linear layers alone"
        )
    dtype = torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype
    copy = torch.empty(tensor.shape, dtype=dtype)
    if not copy.is_meta and not tensor.is_meta:
        copy.copy_(tensor.detach())
    return nn.Parameter(copy) if trained else copy


def _beside(backbone: nn.Module, blocks: Sequence[nn.Module], copies: dict[int, nn.Module]) -> nn.Module:
    """A second tree of the backbone's own modules, in whose list of blocks the copies stand."""
    path = next(
        name
        for name, module in backbone.named_modules()
        if len(module._modules) == len(blocks)
        and all(b is not None and unwrapped(b) is own for b, own in zip(module._modules.values(), blocks))
    )
    root = parent = _twin(backbone)
    for part in path.split("."):
        child = parent._modules[part]
        parent._modules[part] = _twin(unwrapped(child))  # type: ignore[arg-type]
        parent = parent._modules[part]  # type: ignore[assignment]
    keys = list(parent._modules)
    parent._modules.update({keys[index]: copy for index, copy in copies.items()})
    return root


def _twin(module: nn.Module) -> nn.Module:
    """Another object with the same attributes, tensors and children, but a table of children of its own."""
    twin = object.__new__(type(module))
    twin.__dict__.update(vars(module))
    twin.__dict__["_modules"] = dict(module._modules)
    return twin


# ------------------------------------------------------------------------------------------------------- in a file


def _to_common(copies: BlockCopies, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    for place, names in enumerate(copies.names):
        for common, own in names.items():
            parts = [state.pop(f"{prefix}{place}.{name}") for name in own if f"{prefix}{place}.{name}" in state]
            if parts:
                state[f"{prefix}{place}.{common}"] = parts[0] if len(parts) == 1 else torch.cat(parts)


def _from_common(copies: BlockCopies, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for place, names in enumerate(copies.names):
        for common, own in names.items():
            if f"{prefix}{place}.{common}" not in state:
                continue
            tensor = state.pop(f"{prefix}{place}.{common}")
            rows = [copies[place].get_parameter(name).shape[0] for name in own]
            parts = tensor.split(rows) if len(own) > 1 and sum(rows) == len(tensor) else [tensor]
            state.update({f"{prefix}{place}.{name}": part for name, part in zip(own, parts)})
