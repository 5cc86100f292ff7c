"""LoRA and its kin, built by peft, inside the layers of the frozen host.

    W' = W + (alpha / r) B A,      A (r, in) random, B (out, r) zero

so that the model starts as the pretrained one. Source: LoRA (Hu et al., ICLR 2022), eq. 3; DoRA (Liu et al., ICML
2024) by ``use_dora=True``; the other methods by ``peft_type=``.

LoRA is the one adapter whose tensors carry names of the host's layers: a file made on timm's fused ``qkv`` does not
fit the three layers of transformers. It needs the host to be built, and nothing of the host is changed by it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.adapters._layer_names import default_targets, meaning, resolve_targets
from adaptkit.adapters._peft import ADAPTER, Site, stand_in, wrap
from adaptkit.adapters.base import WeightAdapter
from adaptkit.registry import register_adapter

__all__ = ["LoRA", "LoRAConfig"]

#: Methods of peft that change single layers and keep their tensors there.
TYPES = ("LORA", "LOHA", "LOKR", "OFT", "BOFT", "HRA", "IA3")
#: How the names of their tensors begin.
PARAMETER = re.compile(r"\.(lora_|hada_|lokr_|oft_|boft_|hra_|ia3_)")
#: Options that would train or rewrite the backbone itself, and what to do instead.
REFUSED = {
    "modules_to_save": "it trains a copy of the host's own layers; a head is given by head=",
    "trainable_token_indices": "a vision transformer has no vocabulary",
    "target_parameters": "name layers by target_modules",
    "layer_replication": "it changes the number of blocks",
    "megatron_config": "it needs layers of Megatron",
    "alora_invocation_tokens": "a vision transformer has no vocabulary",
}
#: What peft records beside the method; the file says it in its own words.
RECORDS = ("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
           "inference_mode", "runtime_config")  # fmt: skip


@dataclass(frozen=True)
class LoRAConfig:
    """A method of peft and its options, by peft's own names: ``attach(model, "lora", r=16, lora_alpha=32)``."""

    peft_type: str = "LORA"
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def configure(cls, options: dict[str, Any]) -> LoRAConfig:
        """From options as a user or a file gives them; ``ValueError`` for one that peft's config does not have."""
        kind = str(options.get("peft_type", "LORA")).upper()
        saved = set(options) == {"peft_type", "options"} and isinstance(options["options"], dict)
        own = options["options"] if saved else {k: v for k, v in options.items() if k != "peft_type"}
        config = cls(kind, _plain(own))
        config.to_peft()
        return config

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> LoRAConfig:
        """From the ``adapter_config.json`` of peft, of any version: what is unknown here and unset is left out."""
        kind = str(saved["peft_type"]).upper()
        default = cls(kind).to_peft().to_dict()
        given = {k: v for k, v in saved.items() if k not in RECORDS and (v or k in default) and v != default.get(k)}
        given.pop("modules_to_save", None)  # layers of its own head, which are not LoRA
        return cls.configure({"peft_type": kind, "options": given})

    @classmethod
    def from_peft(cls, config: Any) -> LoRAConfig:
        """From a config of peft: what differs from peft's defaults."""
        default = type(config)().to_dict()
        given = {k: v for k, v in config.to_dict().items() if k not in RECORDS and v != default[k]}
        return cls.configure({"peft_type": _type(config), "options": given})

    @classmethod
    def converted(cls, arg: Any) -> LoRAConfig | None:
        """Recognise a config of peft among the arguments of ``attach``."""
        return cls.from_peft(arg) if hasattr(arg, "peft_type") and hasattr(arg, "to_dict") else None

    def to_peft(self) -> Any:
        """Build peft's config. Raises ``ValueError`` for another kind of method or an option that cannot be."""
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS

        if self.peft_type not in TYPES or self.peft_type not in CONFIGS:
            raise ValueError(f"peft_type={self.peft_type!r} is no method that works layer by layer; the methods are "
                             f"{', '.join(t for t in TYPES if t in CONFIGS)}")  # fmt: skip
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
        except TypeError as error:
            known = sorted(set(kind().to_dict()) - set(RECORDS) - set(REFUSED))
            raise ValueError(f"{self.peft_type}: {error}; its options are {', '.join(known)}") from error


def _type(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _plain(value: Any) -> Any:
    """Options as JSON has them: sets and tuples become lists."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


@register_adapter("lora", LoRAConfig)
class LoRA(WeightAdapter):
    """Low-rank and other small changes of the host's linear layers (peft: LoRA, DoRA, LoHa, LoKr, OFT, IA3, ...)."""

    def __init__(self, spec: Any, config: LoRAConfig, host: nn.Module) -> None:
        asked = config.to_peft()
        targets = getattr(asked, "target_modules", None)
        found = default_targets(host) if targets is None else resolve_targets(host, _plain(targets))
        # What the names were resolved to is kept, so that the file says exactly which layers it changes.
        options = {**config.options, "target_modules": found}
        if config.peft_type == "IA3":  # which of them take their change at the input
            last = [name for name in found if name.rpartition(".")[2] in ("fc2", "down_proj")]
            options.setdefault("feedforward_modules", last)
        config = LoRAConfig(config.peft_type, options)
        super().__init__(spec, config)
        self._place(wrap(host, config.to_peft()))

    def _place(self, sites: list[Site]) -> None:
        self.layers = nn.Module()  # the wrappers by their path in the host: layers.blocks.0.attn.qkv.lora_A...
        for site in sites:
            _put(self.layers, site.path, site.wrapper)
        # Unregistered: parents and bases belong to the host.
        self._sites = tuple(sites)
        self._stand_ins = tuple(stand_in(site) for site in sites)
        self._kept: dict[str, Tensor] = {}
        for parameter in self.parameters():  # a half-precision host gets its change trained in float32
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()

    def sites(self) -> Iterator[Site]:
        """Where the wrappers go."""
        return iter(self._sites)

    def install(self) -> None:
        """Put the wrappers into the host's places."""
        for site, module in zip(self._sites, self._stand_ins):
            site.parent.__dict__[site.name] = module

    def remove(self) -> None:
        """Take them out: the host is as it was, bit for bit."""
        self.unmerge()
        for site in self._sites:
            vars(site.parent).pop(site.name, None)

    @property
    def merged(self) -> bool:
        """Whether the host's weights hold the change."""
        return bool(self._kept)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the change to the host's weights; the weights as they were are kept for :meth:`unmerge`."""
        if self.merged:
            return
        kept = {site.path: site.base.weight.detach().clone() for site in self._sites}
        for site in self._sites:
            wrapper: Any = site.wrapper
            wrapper.merge(safe_merge=True, adapter_names=[ADAPTER])
        self._kept = kept

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the kept weights back: exactly, where a subtraction would leave rounding."""
        for site in self._sites if self.merged else ():
            wrapper: Any = site.wrapper
            wrapper.merged_adapters.clear()
            site.base.weight.data.copy_(self._kept[site.path])
        self._kept = {}

    def train(self, mode: bool = True) -> LoRA:
        """Dropout of the change; while merged there is nothing to train."""
        if mode and self.merged:
            raise RuntimeError("LoRA is merged into the weights: unmerge_adapter() before training")
        super().train(mode)
        return self

    def translated(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a file by this host's paths: layers that another version of a library calls otherwise.

        A tensor goes to the layer of the same block whose name means the same. Raises ``ValueError`` where a file
        names layers that this host does not have.
        """
        own = set(self.state_dict())
        if set(tensors) <= own:
            return tensors
        places = {meaning(path): path for path in (site.path for site in self._sites)}
        renamed, strange = {}, []
        for key, tensor in tensors.items():
            path, parameter = _split(key)
            target = places.get(meaning(path), path)
            renamed[f"layers.{target}.{parameter}"] = tensor
            strange += [] if f"layers.{target}.{parameter}" in own else [path]
        if strange:
            mine = sorted({re.sub(r"\d+", "N", site.path) for site in self._sites})
            theirs = sorted({re.sub(r"\d+", "N", path) for path in strange})
            raise ValueError(
                f"this LoRA changes {', '.join(theirs)}, this backbone has {', '.join(mine)}: LoRA is bound to the "
                "layers of the library it was trained in; build the backbone there, or train it again here"
            )
        return renamed


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, name = path.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(name, module)


def _split(key: str) -> tuple[str, str]:
    """``layers.blocks.0.attn.qkv.lora_A.default.weight`` -> the layer, and its parameter."""
    path = re.sub(r"^layers\.", "", key)
    at = PARAMETER.search(path)
    return (path, "") if at is None else (path[: at.start()], path[at.start() + 1 :])
