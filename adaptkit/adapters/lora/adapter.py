"""LoRA and its kin, built by peft, inside the layers of the frozen backbone.

    W' = W + (alpha / r) B A,      A (r, in) random, B (out, r) zero

so that the model starts as the pretrained one. Source: LoRA (Hu et al., ICLR 2022), eq. 3; DoRA (Liu et al., ICML
2024) by ``use_dora=True``; the other methods by ``peft_type=``.

LoRA is the one adapter whose tensors are named after the backbone's layers: a file made on timm's fused ``qkv`` does
not fit the three layers of transformers. It is built from the backbone's own layers and changes none of them;
``install`` puts it in place.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.adapters.base import WeightAdapter
from adaptkit.adapters.lora.layer_names import meaning, resolved
from adaptkit.adapters.lora.methods import ADDITIVE, BESIDE, PARAMETER, REFUSED, STARTS, UNMERGED, check_type, type_of
from adaptkit.adapters.lora.peft_layers import ADAPTER, ExistingPeftLayers, Kept, existing_layers, wrap
from adaptkit.adapters.lora.saved_options import check_patterns, check_types
from adaptkit.core.near import hint
from adaptkit.core.proxy import LayerProxy, WeightProxy, edges, in_place, missing, put, restore
from adaptkit.core.registry import register_adapter
from adaptkit.core.schema import check
from adaptkit.core.tensors import is_packed
from adaptkit.core.tree import locate, nested

__all__ = ["LoRA", "LoRAConfig"]

#: Options of ADDITIVE methods that act when the layer is called, not through its weight.
BESIDE_THE_WEIGHT = ("lora_bias", "lora_dropout", "rank_dropout", "module_dropout")
#: Fields of peft's configs that are bookkeeping and no options of a method; our header records them in its own fields.
SETS = ("target_modules", "exclude_modules", "feedforward_modules")  #: of names, in whatever order they were given
SEQUENCES = (list, tuple, set, frozenset)
RECORDS = ("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
           "inference_mode", "runtime_config")  # fmt: skip


@dataclass(frozen=True)
class LoRAConfig:
    """A method of peft and its options, by peft's own names: ``attach(model, "lora", r=16, lora_alpha=32)``."""

    peft_type: str = "LORA"  #: the method, a member of ``peft.PeftType``
    options: dict[str, Any] = field(default_factory=dict)  #: fields of its config class in peft

    @classmethod
    def configure(cls, options: dict[str, Any]) -> LoRAConfig:
        """From options as a user or a file gives them; ``ValueError`` for one that peft's config does not have."""
        kind = str(options.get("peft_type", "LORA")).upper()
        saved = set(options) == {"peft_type", "options"} and isinstance(options["options"], dict)
        given = {k: v for k, v in options.items() if k != "peft_type"}
        own = options["options"] if saved else {**STARTS.get(kind, {}), **given}
        config = cls(kind, _plain(own))
        config.to_peft()
        return config

    @classmethod
    def from_file(cls, saved: dict[str, Any]) -> LoRAConfig:
        """From the header of a file, whose values and regular expressions are checked before peft sees them."""
        fields = {"peft_type": str, "options": dict[str, Any]}
        for name in saved.keys() | fields.keys():
            if name not in fields or name not in saved:
                raise ValueError(f"found {', '.join(map(repr, saved)) or 'no field'}, expected {', '.join(fields)}")
            check(saved[name], fields[name], name)
        check_patterns(saved["options"])
        return cls._checked(saved["peft_type"], saved["options"])

    @classmethod
    def _checked(cls, kind: str, options: dict[str, Any]) -> LoRAConfig:
        check_types(type(cls(kind.upper()).to_peft()), options)
        return cls.configure({"peft_type": kind, "options": options})

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> LoRAConfig:
        """From the ``adapter_config.json`` of peft, of any version: what is unknown here and unset is left out."""
        kind = str(saved["peft_type"]).upper()
        default = cls(kind).to_peft().to_dict()
        given = {k: v for k, v in saved.items() if k not in RECORDS and (v or k in default) and v != default.get(k)}
        given.pop("modules_to_save", None)  # layers of its own head, which are not LoRA
        return cls._checked(kind, given)

    @classmethod
    def from_peft(cls, config: Any) -> LoRAConfig:
        """From a config of peft: what differs from peft's defaults."""
        default = type(config)().to_dict()
        given = {k: v for k, v in config.to_dict().items() if k not in RECORDS and v != default[k]}
        return cls.configure({"peft_type": type_of(config), "options": given})

    @classmethod
    def converted(cls, arg: Any) -> LoRAConfig | None:
        """Recognise a config of peft among the arguments of ``attach``."""
        peft = sys.modules.get("peft.config")  # where nobody has imported it, nothing is a config of it
        return None if peft is None or not isinstance(arg, peft.PeftConfigMixin) else cls.from_peft(arg)

    def to_peft(self) -> Any:
        """Build peft's config. Raises ``ValueError`` for another kind of method or an option that cannot be."""
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS

        check_type(self.peft_type, CONFIGS)
        for name, why in REFUSED.items():
            if self.options.get(name):
                raise ValueError(f"lora option {name} is not for a frozen backbone: {why}")
        if self.options.get("bias", "none") != "none":
            raise ValueError(f"bias={self.options['bias']!r} would train biases of the backbone; leave it 'none'")
        start = self.options.get("init_lora_weights", True)
        if not (isinstance(start, bool) or start in ("gaussian", "orthogonal")):
            raise ValueError(
                f"init_lora_weights={start!r} rewrites the weights of the backbone, which stays frozen here; use True, "
                "False, 'gaussian' or 'orthogonal'"
            )
        kind = CONFIGS[self.peft_type]  # type: ignore[index]
        try:
            return kind(**self.options)
        except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
            known = sorted(set(kind().to_dict()) - set(RECORDS) - set(REFUSED))
            near = "".join(hint(name, known) for name in self.options if name not in known)
            raise ValueError(f"{self.peft_type}: {error}{near}; its options are {', '.join(known)}") from error


def _plain(value: Any) -> Any:
    """Options as JSON has them: sets and tuples become lists, and what peft makes a set of comes in order."""
    if isinstance(value, dict):
        return {k: sorted(v) if k in SETS and isinstance(v, SEQUENCES) else _plain(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


@register_adapter("lora", LoRAConfig)
class LoRA(WeightAdapter):
    """Low-rank and other small changes of a backbone's linear layers (peft: LoRA, DoRA, LoHa, OFT, IA3, ...)."""

    def __init__(self, spec: Any, config: LoRAConfig, backbone: nn.Module) -> None:
        # What the names were resolved to is kept, so that the file says exactly which layers it changes.
        config = LoRAConfig(config.peft_type, resolved(backbone, config.peft_type, config.options))
        super().__init__(spec, config)
        self._place(backbone, *wrap(backbone, config.to_peft()))

    def _place(self, backbone: nn.Module, wrappers: dict[str, nn.Module], shared: dict[str, nn.Module]) -> None:
        self.shared = nn.ModuleDict(shared)  # what all layers have in common: it is in the file once
        self.layers = nn.Module()  # the wrappers by their path in the backbone: layers.blocks.0.attn.qkv.lora_A...
        for path, wrapper in wrappers.items():
            parent, _, name = path.rpartition(".")
            nested(self.layers, parent).add_module(name, wrapper)
        #: what takes the place of each layer, by its plain path; unregistered, for the layers belong to the backbone
        self.__dict__["proxies"] = {p: self._proxy(backbone, p, w) for p, w in wrappers.items()}
        self._kept: dict[str, Kept] = {}
        for parameter in self.parameters():  # a half-precision backbone gets its change trained in float32
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()

    def _proxy(self, backbone: nn.Module, path: str, wrapper: Any) -> LayerProxy:
        """Return what takes the place of the layer; ``ValueError`` where nothing can."""
        parent, name = locate(backbone, path)
        self._check_quantised(path, wrapper.base_layer)
        if name != "qkv" or getattr(parent, "q_bias", None) is None:
            return LayerProxy(wrapper, wrapper.base_layer)
        reads = f"{type(parent).__name__} reads the weight of {path} and does not call it, so that"
        if self.config.peft_type not in ADDITIVE or self.config.options.get("use_dora"):
            raise ValueError(
                f"{reads} only a change that is added to the weight reaches it ({', '.join(ADDITIVE)}, without DoRA), "
                f"not {self.config.peft_type}; choose one of these, or leave qkv out of target_modules"
            )
        for option in BESIDE_THE_WEIGHT:
            if self.config.options.get(option):
                raise ValueError(f"{reads} {option} would not act there: leave it out, or qkv out of target_modules")
        return WeightProxy(wrapper, wrapper.base_layer)

    def _check_quantised(self, path: str, layer: Any) -> None:
        """Refuse what computes with a weight as it is stored, where that is quantised."""
        weight = layer._parameters.get("weight")
        if weight is None or not is_packed(weight):
            return
        packed = tuple(weight.shape) != (layer.out_features, layer.in_features)
        if (
            self.config.peft_type not in BESIDE
            or self.config.options.get("use_dora")
            or (packed and self.config.peft_type in ("LOHA", "LOKR"))
        ):
            dora = " with DoRA" if self.config.options.get("use_dora") else ""
            raise ValueError(
                f"{path} is quantised ({type(weight).__name__} of {weight.dtype}), and {self.config.peft_type}{dora} "
                "computes with the weight as it is stored: use plain LORA, which acts beside it"
            )

    @classmethod
    def existing(cls, backbone: nn.Module) -> ExistingPeftLayers | None:
        """Those of a ``PeftModel``."""
        return existing_layers(backbone)

    @property
    def mixes(self) -> bool:
        """Whether each row of a batch can have its own: not where the backbone reads a weight, which all rows share."""
        return not any(isinstance(proxy, WeightProxy) for proxy in self.proxies.values())

    @property
    def proxies(self) -> dict[str, LayerProxy]:
        """What takes the place of each layer, by the plain path of the layer."""
        return self.__dict__["proxies"]

    def install(self, backbone: nn.Module) -> None:
        """Put the proxies into the backbone, all of them or none."""
        put(backbone, self.proxies)
        self.__dict__["_edges"] = edges(backbone, self.proxies.values())

    def check(self, backbone: nn.Module) -> None:
        """Raise ``RuntimeError`` where somebody replaced a layer that LoRA is in. A wrapped layer is fine."""
        if in_place(self.__dict__["_edges"]):
            return
        gone = missing(backbone, self.proxies)
        if gone:
            raise RuntimeError(
                f"{', '.join(gone[:3])}: somebody has replaced these layers, or what they are in, while LoRA was in "
                "them, and it would be ignored: detach(), replace, and attach again"
            )
        self.__dict__["_edges"] = edges(backbone, self.proxies.values())

    def remove(self, backbone: nn.Module) -> None:
        """Take them out: the backbone is as it was, bit for bit."""
        self.unmerge()
        restore(backbone, self.proxies)

    @property
    def merged(self) -> bool:
        """Whether the backbone's weights hold the change."""
        return bool(self._kept)

    def check_merges(self) -> None:
        """Raise ``TypeError`` where peft does not merge this method, or a weight is quantised: it would be rounded."""
        if self.config.peft_type in UNMERGED:
            raise TypeError(
                f"{self.config.peft_type} cannot be merged: its change depends on what the layer is given, and is no "
                "weight; keep it beside the layers"
            )
        for path, proxy in self.proxies.items():
            for name, tensor in proxy.layer._parameters.items():
                if tensor is not None and is_packed(tensor):
                    raise TypeError(
                        f"{path}.{name} is a quantised {type(tensor).__name__} of {tensor.dtype}, and what is merged "
                        "into it would be rounded: keep the adapter beside it, or merge it in full precision"
                    )

    @torch.no_grad()
    def merge(self) -> None:
        """Add the change to the backbone's weights, to all layers or none; the weights are kept for :meth:`unmerge`.

        Raises ``ValueError`` where a merged weight would not be finite, and as :meth:`check_merges`.
        """
        if self.merged:
            return
        self.check_merges()
        self._kept = {path: Kept.of(proxy.layer) for path, proxy in self.proxies.items()}
        try:
            for path, proxy in self.proxies.items():
                wrapper: Any = vars(proxy)["wrapper"]
                try:
                    wrapper.merge(safe_merge=True, adapter_names=[ADAPTER])
                except ValueError as error:
                    raise ValueError(f"{path} cannot be merged: {error}") from error
        except BaseException:
            self.unmerge()
            raise

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the kept weights back: exactly, where a subtraction would leave rounding."""
        for path, kept in self._kept.items():
            wrapper: Any = vars(self.proxies[path])["wrapper"]
            wrapper.merged_adapters.clear()
            kept.restore(self.proxies[path].layer)
        self._kept = {}

    def originals(self) -> dict[str, Tensor]:
        """While merged, the weights as they were before."""
        return {f"{path}.{name}": t for path, kept in self._kept.items() for name, t in kept.tensors.items()}

    def weights(self) -> dict[str, Tensor]:
        """Return a copy of every tensor of the layers that it is in, by name, as they are now."""
        return {f"{path}.{name}": t for path, p in self.proxies.items() for name, t in Kept.of(p.layer).tensors.items()}

    def translated(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a file by this backbone's paths: layers that another version of a library calls otherwise.

        A tensor goes to the layer of the same block whose name means the same. Raises ``ValueError`` where a file
        names layers that this backbone does not have.
        """
        own = set(self.state_dict())
        if set(tensors) <= own:
            return tensors
        places = {meaning(path): path for path in self.proxies}
        renamed, strange = {}, []
        for key, tensor in tensors.items():
            if key.startswith("shared."):
                renamed[key] = tensor
                strange += [] if key in own else [key]
                continue
            path, parameter = _split(key)
            target = places.get(meaning(path), path)
            renamed[f"layers.{target}.{parameter}"] = tensor
            strange += [] if f"layers.{target}.{parameter}" in own else [path]
        if strange:
            mine = sorted({re.sub(r"\d+", "N", path) for path in self.proxies})
            theirs = sorted({re.sub(r"\d+", "N", path) for path in strange})
            raise ValueError(
                f"this LoRA changes {', '.join(theirs)}, this backbone has {', '.join(mine)}: LoRA is bound to the "
                "layers of the library it was trained in; build the backbone there, or train it again here"
            )
        return renamed


def _split(key: str) -> tuple[str, str]:
    """``layers.blocks.0.attn.qkv.lora_A.default.weight`` -> the layer, and its parameter."""
    path = re.sub(r"^layers\.", "", key)
    at = PARAMETER.search(path)
    return (path, "") if at is None else (path[: at.start()], path[at.start() + 1 :])
