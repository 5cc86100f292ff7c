"""What LoRA needs of peft: its layers built for a backbone that is not touched, and those that a backbone came with."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

from torch import nn

from adaptkit.adapters.base import ExistingLayers
from adaptkit.adapters.lora.methods import SHARED, type_of
from adaptkit.core.proxy import own_layer
from adaptkit.core.tree import locate, named_modules, skeleton

__all__ = ["ADAPTER", "ExistingPeftLayers", "existing_layers", "wrap"]

ADAPTER = "default"  #: the name by which every wrapper knows its one adapter


def wrap(backbone: nn.Module, config: Any) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Build peft's layers for this backbone, by the plain path of the layer that each wraps; it is not touched.

    Args:
        backbone: the module whose layers are meant.
        config: peft's config, its ``target_modules`` resolved.

    Also returns, by name, the modules that all these layers have in common (VeRA's projections, say), which are then no
    children of any of them.

    Raises ``ValueError`` where peft finds nothing to adapt or refuses the config.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as TUNERS
    from peft.tuners._buffer_dict import BufferDict
    from peft.tuners.tuners_utils import BaseTunerLayer

    from adaptkit.adapters.lora.traceable import make_traceable  # here, for it imports peft

    model = skeleton(backbone, own_layer)
    vars(model).pop("peft_config", None)
    flags = [(p, p.requires_grad) for p in backbone.parameters()]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*peft_config. attribute.*")
            tuner: Any = TUNERS[config.peft_type](model, config, ADAPTER)
    except (TypeError, NotImplementedError) as error:  # an option of another type, and what this method cannot do
        raise ValueError(f"peft cannot put {config.peft_type} into {type(backbone).__name__}: {error}") from error
    finally:
        for parameter, flag in flags:  # the copy shares them, and peft freezes what is not its own
            parameter.requires_grad_(flag)
    found: dict[str, Any] = {path: m for path, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    for wrapper in found.values():
        wrapper.__dict__["base_layer"] = wrapper._modules.pop("base_layer")  # still read by it, no longer its child
        make_traceable(wrapper)
        if "shira_indices" in vars(wrapper):  # which entries SHiRA trains: no state of peft's layer, but of our file
            wrapper.add_module("shira_indices", BufferDict(wrapper.__dict__.pop("shira_indices"), persistent=True))
    shared = {name: module for name, module in tuner._modules.items() if module is not model}
    for wrapper in found.values():
        for name in [n for n, m in wrapper._modules.items() if any(m is one for one in shared.values())]:
            wrapper.__dict__[name] = wrapper._modules.pop(name)
    return found, shared


class ExistingPeftLayers(ExistingLayers):
    """The LoRA that a backbone came with (a ``PeftModel``), out of its places for as long as adapters are attached."""

    adapter = "lora"

    def __init__(self, config: Any, name: str, wrappers: dict[str, Any]) -> None:
        self.config = config  #: peft's, of the adapter that is active
        self.name = name  #: its name in peft
        self.wrappers = wrappers  #: peft's layers by plain path
        self.in_place: nn.Module | None = None  #: the adapter that has taken their place

    def share(self, adapter: nn.Module) -> None:
        """Give these very parameters to the adapter that takes their place, so that what is trained is the same.

        Raises ``ValueError`` where the config of the ``PeftModel`` makes others; nothing is shared then.
        """
        pairs = []
        for key, parameter in adapter.named_parameters():
            path, name = self._theirs(key)
            theirs = self.wrappers[path].get_parameter(name)
            if theirs.shape != parameter.shape:
                raise ValueError(f"{key} has shape {tuple(theirs.shape)}, its config makes {tuple(parameter.shape)}")
            pairs.append((key, theirs))
        for key, theirs in pairs:
            set_parameter(adapter, key, theirs)
        self.in_place = adapter

    def take_out(self, backbone: nn.Module) -> None:
        """Put the backbone's own layers into the places of these."""
        for path, wrapper in self.wrappers.items():
            parent, name = locate(backbone, path)
            parent._modules[name] = wrapper.get_base_layer()

    def restore(self, backbone: nn.Module) -> None:
        """Put these where they were, with the parameters that the adapter has now."""
        for path, wrapper in self.wrappers.items():
            parent, name = locate(backbone, path)
            if own_layer(parent._modules[name]) is wrapper.get_base_layer():  # type: ignore[arg-type]
                parent._modules[name] = wrapper
        for key, parameter in () if self.in_place is None else list(self.in_place.named_parameters()):
            path, name = self._theirs(key)
            set_parameter(self.wrappers[path], name, parameter)

    def _theirs(self, key: str) -> tuple[str, str]:
        """Path of the layer and name of the parameter in it, of a key of the adapter."""
        rest = key.removeprefix("layers.")
        path = next(p for p in self.wrappers if rest.startswith(p + "."))
        return path, _renamed(rest[len(path) + 1 :], ADAPTER, self.name)


def existing_layers(backbone: nn.Module) -> ExistingPeftLayers | None:
    """Look at a backbone that peft's layers are in; None for one without. Nothing is changed.

    Raises ``ValueError`` where they are merged, disabled, or not one of them is active.
    """
    configs = getattr(backbone, "peft_config", None)
    if not isinstance(configs, dict) or not configs:
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrappers: dict[str, Any] = {path: m for path, m in named_modules(backbone) if isinstance(m, BaseTunerLayer)}
    active = {name for wrapper in wrappers.values() for name in wrapper.active_adapters}
    if any(getattr(wrapper, "merged", False) for wrapper in wrappers.values()):
        raise ValueError("the LoRA of this PeftModel is merged: call unmerge_adapter() on it before it is attached")
    if any(wrapper.disable_adapters for wrapper in wrappers.values()):
        raise ValueError("the LoRA of this PeftModel is disabled: enable it, or unload() it, before it is attached")
    if len(active) != 1:
        raise ValueError(
            f"this PeftModel has {len(active)} active adapters ({', '.join(sorted(active))}); set_adapter() one"
        )
    (name,) = active
    kind = type_of(configs[name])
    if kind in SHARED:
        raise ValueError(
            f"the layers of this PeftModel have tensors of {kind} in common, which it keeps for itself: attach its "
            "get_base_model() after unload(), and give the config: attach(backbone, peft_config)"
        )
    return ExistingPeftLayers(configs[name], name, wrappers)


def set_parameter(module: nn.Module, key: str, parameter: nn.Parameter) -> None:
    """Register a parameter under a dotted name, in place of the one that is there."""
    path, _, name = key.rpartition(".")
    module.get_submodule(path)._parameters[name] = parameter


def _renamed(key: str, old: str, new: str) -> str:
    """Parameter key with another adapter name: ``lora_A.default.weight`` or ``hada_w1_a.default``."""
    *parents, before, last = key.split(".")
    if last == old:
        return ".".join([*parents, before, new])
    return ".".join([*parents, new if before == old else before, last])


class Kept(NamedTuple):
    """The tensors of a layer as they were before a merge."""

    tensors: dict[str, Any]

    @classmethod
    def of(cls, layer: nn.Module) -> Kept:
        """Copy every parameter and buffer."""
        there = {**layer._parameters, **layer._buffers}
        return cls({name: tensor.detach().clone() for name, tensor in there.items() if tensor is not None})

    def restore(self, layer: nn.Module) -> None:
        """Write them back, bit for bit."""
        there: dict[str, Any] = {**layer._parameters, **layer._buffers}
        for name, tensor in self.tensors.items():
            there[name].data.copy_(tensor)
