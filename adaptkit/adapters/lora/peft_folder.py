"""A LoRA as peft saves it: ``adapter_config.json`` and ``adapter_model.safetensors``, read and written.

peft names a tensor by the layer in its ``PeftModel`` and leaves the adapter's name out:

    base_model.model.blocks.0.attn.qkv.lora_A.weight   is here   lora.layers.blocks.0.attn.qkv.lora_A.default.weight
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from adaptkit.adapters.lora.adapter import LoRA, LoRAConfig
from adaptkit.adapters.lora.methods import PARAMETER, SHARED
from adaptkit.core.schema import check, read_json
from adaptkit.core.warned import warn

__all__ = ["from_peft_layout", "peft_config_of", "to_peft_layout"]

PREFIX = "base_model.model."


def peft_config_of(folder: Path) -> dict[str, Any] | None:
    """Return the config of a folder that peft saved, None for another folder; ``ValueError`` where it is damaged."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return None
    config = read_json(path.read_bytes(), str(path))
    return config if "peft_type" in config else None


def from_peft_layout(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the header and tensors that the same LoRA has here.

    What the folder holds besides (a classifier in ``modules_to_save``) is left out with a warning: its place is in
    the head. Nothing is known of the backbone but the names of its layers, and perhaps its own.
    """
    kind = str(config["peft_type"]).upper()
    if kind in SHARED:
        raise ValueError(
            f"this folder of peft holds {kind}, whose layers share tensors that peft saves in a layout of its own: "
            f"load it with peft, merge_and_unload(), and attach to that; or train it here with peft_type={kind!r}"
        )
    lora = {k: v for k, v in tensors.items() if PARAMETER.search(k)}
    other = sorted(k.removeprefix(PREFIX) for k in tensors.keys() - lora.keys())
    if other:
        warn(
            f"{', '.join(other[:4])} in this peft folder are no LoRA and were left out: give the task's head by head=",
        )
    own = LoRAConfig.from_json(config)
    base = config.get("base_model_name_or_path") or ""
    check(base, str, "base_model_name_or_path")
    header = {
        "format": 1,
        "adaptkit": f"peft {config.get('peft_version', '')}".strip(),
        "adapters": [{"name": "lora", "config": {"peft_type": own.peft_type, "options": own.options}}],
        "head": None,
        "backbone": None,
        "metadata": {"base_model": base},
    }
    return header, {f"lora.layers.{_with_name(k.removeprefix(PREFIX))}": v for k, v in lora.items()}


def to_peft_layout(lora: LoRA, prefix: str, base: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return peft's config and tensors of a LoRA; ``prefix`` is where its backbone is in what peft will wrap."""
    if lora.config.peft_type in SHARED:
        raise ValueError(
            f"{lora.config.peft_type} has tensors that all layers share, which peft saves in a layout of its own: use "
            "model.save(folder), or a method without them, such as LORA"
        )
    config = lora.config.to_peft()
    config.base_model_name_or_path, config.inference_mode = base or None, True
    said = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    return said, {
        f"{PREFIX}{prefix}{_without_name(k.removeprefix('layers.'))}": v for k, v in lora.state_dict().items()
    }


def _with_name(key: str) -> str:
    """``lora_A.weight`` -> ``lora_A.default.weight``; a bare parameter, ``hada_w1_a`` -> ``hada_w1_a.default``."""
    if key.endswith("lora_magnitude_vector"):
        return f"{key}.default.weight"
    at = PARAMETER.search(key)
    if at is None:
        return key
    name, dot, rest = key[at.start() + 1 :].partition(".")
    return f"{key[: at.start()]}.{name}.default{dot}{rest}"


def _without_name(key: str) -> str:
    key = key.replace(".default.", ".").removesuffix(".default")
    return key.removesuffix(".weight") if key.endswith("lora_magnitude_vector.weight") else key
