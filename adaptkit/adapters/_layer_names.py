"""Which layers of a host LoRA changes: one layer has many names over libraries and their versions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

__all__ = ["default_targets", "meaning", "resolve_targets"]

#: One layer, as different hosts and versions of transformers call it.
ALIASES = (
    ("q_proj", "query"),
    ("k_proj", "key"),
    ("v_proj", "value"),
    ("o_proj", "out_proj", "proj", "dense"),
    ("fc1", "up_proj"),
    ("fc2", "down_proj"),
)
QKV = ("q_proj", "k_proj", "v_proj")
#: What is adapted if nothing is said: the attention, as in LoRA (Hu et al. 2022, section 4.2), else the MLP.
DEFAULTS = (("qkv",), ("q_proj", "v_proj"), ("query", "value"), ("fc1", "fc2"))


def _leaves(host: nn.Module) -> dict[str, list[str]]:
    """Linear layers and convolutions of the blocks by their last name: those below a number, not the stem or head."""
    leaves: dict[str, list[str]] = {}
    for path, module in host.named_modules():
        parts = path.split(".")
        if _is_matrix(module) and not parts[-1].isdigit() and any(map(str.isdigit, parts)):
            leaves.setdefault(parts[-1], []).append(path)
    return leaves


def _is_matrix(module: nn.Module) -> bool:
    """Linear layers and convolutions over all channels; a depthwise one has no rank to be low."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def default_targets(host: nn.Module) -> list[str]:
    """Return what LoRA adapts in this host by default: the fused ``qkv``, else q and v, else the MLP."""
    leaves = _leaves(host)
    for names in DEFAULTS:
        if all(name in leaves for name in names):
            return _only_blocks(host, list(names), leaves)
    raise ValueError(
        f"{type(host).__name__} has none of the layers that LoRA adapts by default; say which: target_modules= some of "
        f"{', '.join(sorted(leaves))}"
    )


def resolve_targets(host: nn.Module, targets: str | Sequence[str]) -> str | list[str]:
    """Translate names of layers into those of this host: ``query`` or ``q_proj`` into the fused ``qkv``, and so on.

    A name that the host has is kept, so is a regular expression (a string); ``"all-linear"`` is every layer of the
    blocks. Raises ``ValueError`` for a name that nothing in the host answers to.
    """
    leaves = _leaves(host)
    if targets == "all-linear":
        return _only_blocks(host, sorted(leaves), leaves)
    if isinstance(targets, str):
        return targets
    paths = [path for path, _ in host.named_modules()]
    found: list[str] = []
    for target in targets:
        if any(path == target or path.endswith(f".{target}") for path in paths):
            found.append(target)
            continue
        own = [name for name in _aliases(target) if name in leaves]
        if not own:
            raise ValueError(
                f"{type(host).__name__} has no layer named {target!r}; its blocks have {', '.join(sorted(leaves))}"
            )
        found += own
    return _only_blocks(host, list(dict.fromkeys(found)), leaves)


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


def _only_blocks(host: nn.Module, names: list[str], leaves: dict[str, list[str]]) -> Any:
    """Names as they are if peft finds only blocks by them; else full paths, for `proj` is also in the stem."""
    inside = [path for name in names for path in leaves.get(name, [])]
    matched = [
        path
        for path, module in host.named_modules()
        if _is_matrix(module) and any(path == n or path.endswith(f".{n}") for n in names)
    ]
    return names if not inside or len(matched) == len(inside) else sorted(inside)
