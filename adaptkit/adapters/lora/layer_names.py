"""Which layers of a backbone LoRA changes: one layer has many names over libraries and their versions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from adaptkit.adapters.lora.methods import NORMS
from adaptkit.core.proxy import own_layer
from adaptkit.core.tree import named_modules

__all__ = ["default_targets", "meaning", "resolve_targets", "resolved"]

#: One layer, as different backbones and versions of transformers call it.
ALIASES = (
    ("q_proj", "query"),
    ("k_proj", "key"),
    ("v_proj", "value"),
    ("o_proj", "out_proj", "proj", "dense"),
    ("fc1", "up_proj", "linear1", "conv1"),
    ("fc2", "down_proj", "linear2", "conv2"),
)
QKV = ("q_proj", "k_proj", "v_proj")
#: What is adapted if nothing is said: the attention, as in LoRA (Hu et al. 2022, section 4.2), else the MLP.
DEFAULTS = (
    ("qkv",), ("q_proj", "v_proj"), ("query", "value"), ("in_proj",), ("proj_qkv", "proj_q", "proj_v"),
    ("proj_qkv",), ("proj_q", "proj_v"), ("fc1", "fc2"), ("c_fc", "c_proj"), ("conv1", "conv2"),
)  # fmt: skip


def resolved(backbone: nn.Module, peft_type: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return peft's options with the names of layers as this backbone has them.

    ``layers_to_transform`` (with ``layers_pattern``) becomes the full paths of these layers. Raises ``ValueError`` as
    :func:`resolve_targets`, and where a layer of that number is not there.
    """
    options = dict(options)
    targets = options.get("target_modules")
    if peft_type in NORMS:
        found = options["target_modules"] = _norms(backbone, targets)
        if not isinstance(found, str):  # peft takes a path for the end of others, too
            meant = [p for p in _modules(backbone) if any(_names(p, name) for name in found)]
            options["exclude_modules"] = sorted({*(options.get("exclude_modules") or ()), *meant} - set(found)) or None
        return options
    found = default_targets(backbone) if targets is None else resolve_targets(backbone, targets)
    numbers, pattern = options.pop("layers_to_transform", None), options.pop("layers_pattern", None)
    if numbers is not None:
        found = _of_layers(backbone, found, [numbers] if isinstance(numbers, int) else numbers, pattern)
    options["target_modules"] = found
    for option in ("rank_pattern", "alpha_pattern"):
        _check_patterns(backbone, option, options.get(option) or {}, found)
    if peft_type == "IA3":  # which of them take their change at the input
        paths = found
        if isinstance(found, str):  # a pattern of whole paths
            paths = [path for path in _modules(backbone) if re.fullmatch(found, path)]
        last = [name for name in paths if name.rpartition(".")[2] in ("fc2", "down_proj")]
        options.setdefault("feedforward_modules", last)
    return options


def _norms(backbone: nn.Module, targets: Any) -> str | list[str]:
    """Full paths of the layers of normalisation that these names mean; by default those of the blocks."""
    if isinstance(targets, str):
        return targets
    norms = ((path, m) for path, m in _modules(backbone).items() if "Norm" in type(m).__name__)
    there = [path for path, m in norms if m._parameters.get("weight") is not None]
    if targets is None:
        named = [path for path in there if any(map(str.isdigit, path.split(".")))]
    else:
        named = [path for path in there if any(_names(path, target) for target in targets)]
    strange = [t for t in targets or () if not any(_names(path, t) for path in there)]
    if strange or not named:
        last = sorted({path.rpartition(".")[2] for path in there})
        raise ValueError(
            f"{type(backbone).__name__} has no norm named {', '.join(map(repr, strange)) or 'in a block'}; its norms "
            f"with a weight are {', '.join(last) or 'none'}"
        )
    return sorted(named)


def _check_patterns(backbone: nn.Module, option: str, patterns: dict[str, Any], targets: str | list[str]) -> None:
    """Raise ``ValueError`` for a pattern that means none of the layers: peft would leave it out."""
    paths = list(_modules(backbone)) if isinstance(targets, str) else _matches(backbone, targets)
    for pattern in patterns:
        if not any(re.match(rf"(.*\.)?({pattern})$", path) for path in paths):
            raise ValueError(
                f"{option} names {pattern!r}, which is none of the layers that are changed: {paths[:3]}, ..."
            )


def _of_layers(backbone: nn.Module, targets: str | list[str], numbers: Sequence[int], pattern: Any) -> list[str]:
    """Full paths of the targets in the blocks of these numbers; ``pattern`` names the list that holds the blocks."""
    if isinstance(targets, str):
        raise ValueError(
            f"target_modules={targets!r} is a regular expression and layers_to_transform={list(numbers)} numbers of "
            "layers: say both in the expression, or name the layers in a list"
        )
    lists = [pattern] if isinstance(pattern, str) else list(pattern or ())
    found: dict[int, list[str]] = {}
    for path in _matches(backbone, targets):
        parts = path.split(".")
        at = [i for i, part in enumerate(parts) if part.isdigit() and (not lists or parts[i - 1] in lists)]
        if at:
            found.setdefault(int(parts[at[0]]), []).append(path)
    missing = [n for n in numbers if n not in found]
    if missing or not numbers:
        raise ValueError(
            f"layers_to_transform={list(numbers)}: {', '.join(targets)} stand in the layers "
            f"{', '.join(map(str, sorted(found))) or 'none'} of {type(backbone).__name__}, not in "
            f"{', '.join(map(str, missing)) or 'an empty list'}"
        )
    return sorted(path for n in numbers for path in found[n])


def _modules(backbone: nn.Module) -> dict[str, nn.Module]:
    """The backbone's own layers by plain path: without what adapters have put around them."""
    found: dict[str, nn.Module] = {}
    inside: list[str] = []
    for path, module in named_modules(backbone):
        if any(path.startswith(outer) for outer in inside[-1:]):
            continue
        own = own_layer(module)
        if own is not module:
            inside.append(path + ".")
        found[path] = own
    return found


def _leaves(backbone: nn.Module) -> dict[str, list[str]]:
    """Linear layers and convolutions of the blocks by their last name: those below a number, not the stem or head."""
    leaves: dict[str, list[str]] = {}
    for path, module in _modules(backbone).items():
        parts = path.split(".")
        if _is_matrix(module) and not parts[-1].isdigit() and any(map(str.isdigit, parts)):
            leaves.setdefault(parts[-1], []).append(path)
    return leaves


def _is_matrix(module: nn.Module) -> bool:
    """Linear layers and convolutions over all channels; a depthwise one has no rank to be low."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def default_targets(backbone: nn.Module) -> list[str]:
    """Return what LoRA adapts in this backbone by default: the fused ``qkv``, else q and v, else the MLP."""
    leaves = _leaves(backbone)
    for names in DEFAULTS:
        if all(name in leaves for name in names):
            return _only_blocks(backbone, list(names), leaves)
    matrices = (path.split(".") for path, module in _modules(backbone).items() if _is_matrix(module))
    numbered = {".".join(parts[-2:]) for parts in matrices if parts[-1].isdigit()}
    raise ValueError(
        f"{type(backbone).__name__} has none of the layers that LoRA adapts by default; say which: target_modules= "
        f"some of {', '.join(sorted(leaves) or sorted(numbered))}"
    )


def resolve_targets(backbone: nn.Module, targets: str | Sequence[str]) -> str | list[str]:
    """Translate names of layers into those of this backbone: ``query`` or ``q_proj`` into the fused ``qkv``, and so on.

    A name that the backbone has is kept, so is a regular expression (a string); ``"all-linear"`` is every layer of the
    blocks. Raises ``ValueError`` for a name that nothing in the backbone answers to.
    """
    leaves, modules = _leaves(backbone), _modules(backbone)
    if targets == "all-linear":
        return _only_blocks(backbone, sorted(leaves), leaves)
    if isinstance(targets, str):
        return targets
    found: list[str] = []
    for target in targets:
        named = [path for path in modules if _names(path, target)]
        if any(_is_matrix(modules[path]) for path in named):
            found.append(target)
            continue
        if named:
            raise ValueError(
                f"{target!r} names {type(modules[named[0]]).__name__} layers of {type(backbone).__name__}, which have "
                f"no weight matrix to adapt; its blocks have {', '.join(sorted(leaves))}"
            )
        own = [name for name in _aliases(target) if name in leaves]
        if not own:
            raise ValueError(
                f"{type(backbone).__name__} has no layer named {target!r}; its blocks have {', '.join(sorted(leaves))}"
            )
        found += own
    return _only_blocks(backbone, list(dict.fromkeys(found)), leaves)


def _aliases(name: str) -> Iterable[str]:
    if name == "qkv":
        return [alias for part in QKV for alias in _aliases(part)]
    group = next((names for names in ALIASES if name in names), ())
    return [*group, "qkv"] if set(group) & set(QKV) else group


def meaning(path: str) -> tuple[str, ...]:
    """Return the numbers of a path and what its last name means: the same for one layer in different versions."""
    *parents, name = path.split(".")
    group = next((names[0] for names in ALIASES if name in names), name)
    if name == "dense" and "output" in parents and "attention" not in parents:
        group = "fc2"
    if name == "dense" and "intermediate" in parents:
        group = "fc1"
    return (*filter(str.isdigit, parents), group)


def _names(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _matches(backbone: nn.Module, names: Sequence[str]) -> list[str]:
    return [p for p, m in _modules(backbone).items() if _is_matrix(m) and any(_names(p, n) for n in names)]


def _only_blocks(backbone: nn.Module, names: list[str], leaves: dict[str, list[str]]) -> list[str]:
    """Names as they are if peft finds by each of them the blocks' layers only; else full paths.

    ``proj`` is also in the stem, and means the blocks' own; or it is an identity elsewhere, which peft refuses. A name
    that the blocks do not have (``head``, or a full path) means just the layer that it names.
    """
    wanted = []
    for name in names:
        everywhere = _matches(backbone, [name])
        in_blocks = [path for path in everywhere if path in leaves.get(path.rpartition(".")[2], ())]
        wanted += in_blocks or everywhere
    named = [path for path in _modules(backbone) if any(_names(path, name) for name in names)]
    return names if len(set(wanted)) == len(named) else sorted(set(wanted))
