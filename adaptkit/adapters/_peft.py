"""What LoRA needs of peft: which layers of a host to wrap, and the wrapping without a trace in the host.

peft puts its layers into the host in place of the host's own, so that the host's parameters change their names
(``qkv.weight`` becomes ``qkv.base_layer.weight``). Here they are built by peft and taken out again at once: the host
is as before, and a :class:`Site` says where each one goes. To install a site, the wrapper is written into the
parent's instance dictionary, which Python reads before the registered modules: ``attn.qkv`` is then the wrapper,
while names, ``state_dict`` and ``parameters`` of the host stay what they were.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

__all__ = ["Lodgers", "ReadsWeight", "Site", "default_targets", "lodgers", "resolve_targets", "take_out", "wrap"]

ADAPTER = "default"  #: the name by which every wrapper knows its one adapter

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


class Site(NamedTuple):
    """Where a wrapper goes, and the layer of the host that it wraps."""

    path: str
    parent: nn.Module
    name: str
    base: nn.Module
    wrapper: nn.Module


# ------------------------------------------------------------------------------------------------- which layers


def _leaves(host: nn.Module) -> dict[str, list[str]]:
    """Linear and convolution layers of the blocks by their last name: those below a number, not the stem or head."""
    leaves: dict[str, list[str]] = {}
    for path, module in host.named_modules():
        parts = path.split(".")
        if isinstance(module, nn.Linear | nn.Conv2d) and not parts[-1].isdigit() and any(map(str.isdigit, parts)):
            leaves.setdefault(parts[-1], []).append(path)
    return leaves


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


def _only_blocks(host: nn.Module, names: list[str], leaves: dict[str, list[str]]) -> Any:
    """Names as they are if peft finds only blocks by them; else full paths, for `proj` is also in the stem."""
    inside = [path for name in names for path in leaves.get(name, [])]
    matched = [
        path
        for path, module in host.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and any(path == n or path.endswith(f".{n}") for n in names)
    ]
    return names if not inside or len(matched) == len(inside) else sorted(inside)


# ----------------------------------------------------------------------------------------------------- wrapping


def wrap(host: nn.Module, config: Any) -> list[Site]:
    """Build peft's layers for this host, and leave the host as it was.

    Args:
        host: the module whose layers are meant.
        config: peft's config, its ``target_modules`` resolved.

    Raises ``ValueError`` where peft finds nothing to adapt or refuses the config.
    """
    from peft import inject_adapter_in_model

    flags = [(p, p.requires_grad) for p in host.parameters()]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*peft_config. attribute.*")
            inject_adapter_in_model(config, host, ADAPTER)
    except (TypeError, NotImplementedError) as error:
        raise ValueError(f"peft cannot put {config.peft_type} into {type(host).__name__}: {error}") from error
    finally:
        sites = take_out(host)
        vars(host).pop("peft_config", None)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return sites


def take_out(host: nn.Module) -> list[Site]:
    """Put the host's own layers back, and return the wrappers that stood in their places, each without its base."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = [(path, module) for path, module in host.named_modules() if isinstance(module, BaseTunerLayer)]
    sites = []
    for path, module in found:
        wrapper: Any = module
        parent_path, _, name = path.rpartition(".")
        parent = host.get_submodule(parent_path)
        base: Any = wrapper.get_base_layer()
        parent._modules[name] = base
        wrapper._modules.pop("base_layer", None)
        wrapper.__dict__["base_layer"] = base  # still read by the wrapper, no longer its child
        sites.append(Site(path, parent, name, base, wrapper))
    return sites


class Lodgers(NamedTuple):
    """The LoRA that a host came with (a ``PeftModel``), taken out of it for as long as adapters are attached."""

    config: Any  #: peft's, of the adapter that was active
    name: str  #: its name in peft
    sites: list[Site]

    def share(self, adapter: nn.Module) -> None:
        """Give these very parameters to the adapter that stands in for them, so that what is trained is the same."""
        theirs = {f"layers.{s.path}.{k}": p for s in self.sites for k, p in s.wrapper.named_parameters()}
        for key, parameter in list(adapter.named_parameters()):
            module_path, _, name = key.rpartition(".")
            parent: Any = adapter.get_submodule(module_path)
            shared = theirs[_renamed(key, ADAPTER, self.name)]
            if shared.shape != parameter.shape:
                raise ValueError(f"{key} has shape {tuple(shared.shape)}, its config makes {tuple(parameter.shape)}")
            parent._parameters[name] = shared

    def put_back(self) -> None:
        """Put the layers back where they were."""
        for site in self.sites:
            vars(site.wrapper).pop("base_layer", None)
            rest = dict(site.wrapper._modules)
            site.wrapper._modules.clear()
            site.wrapper._modules.update({"base_layer": site.base, **rest})
            site.parent._modules[site.name] = site.wrapper


def lodgers(host: nn.Module) -> Lodgers | None:
    """Take peft's layers out of a host that has some; None for one without.

    Raises ``ValueError`` where they are merged, several are active, or their kind does not work layer by layer.
    """
    configs = getattr(host, "peft_config", None)
    if not isinstance(configs, dict) or not configs:
        return None
    sites = take_out(host)
    found = Lodgers(None, "", sites)
    try:
        active = {name for site in sites for name in site.wrapper.active_adapters}  # type: ignore[union-attr,operator]
        if any(getattr(site.wrapper, "merged", False) for site in sites):
            raise ValueError("the LoRA of this PeftModel is merged: call unmerge_adapter() on it before it is attached")
        if len(active) != 1:
            raise ValueError(
                f"this PeftModel has {len(active)} active adapters ({', '.join(sorted(active))}); set_adapter() one"
            )
        (name,) = active
        return Lodgers(configs[name], name, sites)
    except BaseException:
        found.put_back()
        raise


def _renamed(key: str, old: str, new: str) -> str:
    """Parameter key with another adapter name: ``...lora_A.default.weight`` or ``...hada_w1_a.default``."""
    *parents, before, last = key.split(".")
    if last == old:
        return ".".join([*parents, before, new])
    return ".".join([*parents, new if before == old else before, last])


class ReadsWeight(nn.Module):
    """Stands where a host reads ``layer.weight`` and never calls the layer: its weight has the change added to it.

    timm's EVA and BEiT compute ``F.linear(x, qkv.weight, bias)`` where q and v have a bias and k has none.
    """

    def __init__(self, wrapper: Any) -> None:
        super().__init__()
        vars(self)["wrapper"] = wrapper  # owned by the adapter

    @property
    def weight(self) -> Tensor:
        """(out, in) of the host plus the change, without dropout; the host's own while merged."""
        wrapper: Any = vars(self)["wrapper"]
        weight = wrapper.base_layer.weight
        return weight if wrapper.merged else weight + wrapper.get_delta_weight(ADAPTER).to(weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The host's."""
        return vars(self)["wrapper"].base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Run the wrapper."""
        return vars(self)["wrapper"](x)
