"""What LoRA needs of peft: layers of a host wrapped, without a trace in the host.

peft puts its layers into the host in place of the host's own, so that the host's parameters change their names
(``qkv.weight`` becomes ``qkv.base_layer.weight``). Here they are built by peft and taken out again at once: the host
is as before, and a :class:`Site` says where each one goes. To install a site, the wrapper is written into the
parent's instance dictionary, which Python reads before the registered modules: ``attn.qkv`` is then the wrapper,
while names, ``state_dict`` and ``parameters`` of the host stay what they were.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

from torch import Tensor, nn

__all__ = ["ADAPTER", "Lodgers", "Site", "lodgers", "stand_in", "wrap"]

ADAPTER = "default"  #: the name by which every wrapper knows its one adapter


class Site(NamedTuple):
    """Where a wrapper goes, and the layer of the host that it wraps."""

    path: str
    parent: nn.Module
    name: str
    base: nn.Module
    wrapper: nn.Module


def wrap(host: nn.Module, config: Any) -> list[Site]:
    """Build peft's layers for this host, and leave the host as it was.

    Args:
        host: the module whose layers are meant.
        config: peft's config, its ``target_modules`` resolved.

    Raises ``ValueError`` where peft finds nothing to adapt or refuses the config.
    """
    from peft import inject_adapter_in_model

    from adaptkit.adapters._traceable import make_traceable  # here, for it imports peft

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
    for site in sites:
        make_traceable(site.wrapper)
    return sites


def take_out(host: nn.Module) -> list[Site]:
    """Put the host's own layers back, and return the wrappers that stood in their places, each without its base."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: list[tuple[str, Any]] = [(path, m) for path, m in host.named_modules() if isinstance(m, BaseTunerLayer)]
    sites = []
    for path, wrapper in found:
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


class StandIn(nn.Module):
    """What a host calls in place of its own layer while LoRA is installed.

    It runs the wrapper and shares the parameters of the layer, the very dictionary, so that whoever goes by names
    (``functional_call``, export, a distributed checkpoint) finds ``qkv.weight`` where it was. It owns nothing.
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        own = self.__dict__
        own["wrapper"], own["base"] = site.wrapper, site.base
        own["_parameters"], own["_buffers"] = site.base._parameters, site.base._buffers

    def forward(self, x: Tensor) -> Tensor:
        """Run the wrapper."""
        return vars(self)["wrapper"](x)

    def __getattr__(self, name: str) -> Any:
        """``in_features`` and the like are the layer's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self)["base"], name)


class ReadsWeight(StandIn):
    """For a host that reads ``layer.weight`` and never calls the layer: the weight has the change added to it.

    timm's EVA and BEiT compute ``F.linear(x, qkv.weight, bias)`` where q and v have a bias and k has none. Dropout
    of the change does not act there.
    """

    @property
    def weight(self) -> Tensor:
        """(out, in) of the host plus the change; the host's own while merged."""
        wrapper: Any = vars(self)["wrapper"]
        weight: Any = self._parameters["weight"]
        return weight if wrapper.merged else weight + wrapper.get_delta_weight(ADAPTER).to(weight.dtype)


def stand_in(site: Site) -> nn.Module:
    """Return what takes the place of the layer; ``ValueError`` where nothing can."""
    parent: Any = site.parent
    if isinstance(parent, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise ValueError(f"{site.path} is an element of a {type(parent).__name__}, where LoRA cannot stand in for it; "
                         "leave it out of target_modules")  # fmt: skip
    if site.name == "qkv" and getattr(parent, "q_bias", None) is not None:
        if not hasattr(site.wrapper, "get_delta_weight") or getattr(site.wrapper, "use_dora", {}).get(ADAPTER):
            raise ValueError(
                f"{type(parent).__name__} reads the weight of {site.path} and does not call it, so that only a change "
                "that is added to the weight reaches it (LORA, LOHA, LOKR, without DoRA); choose one, or leave qkv out "
                "of target_modules"
            )
        return ReadsWeight(site)
    return StandIn(site)
