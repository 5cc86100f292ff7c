"""The methods of peft: which of them act layer by layer, and so can be in a frozen backbone, and why the others cannot.

Every member of ``peft.PeftType`` stands in one of the two tables; a test asks peft for its list.
"""

from __future__ import annotations

import re
from typing import Any

from adaptkit.core.near import hint

__all__ = [
    "ADDITIVE",
    "BESIDE",
    "NORMS",
    "PARAMETER",
    "REFUSED_TYPES",
    "SHARED",
    "STARTS",
    "TYPES",
    "UNMERGED",
    "check_type",
    "type_of",
]

#: Methods that change single layers, and how the names of their tensors there begin.
TYPES: dict[str, tuple[str, ...]] = {
    "LORA": ("lora_",), "LOHA": ("hada_",), "LOKR": ("lokr_",), "OFT": ("oft_",), "BOFT": ("boft_",), "HRA": ("hra_",),
    "IA3": ("ia3_",), "ADAMSS": ("adamss_",), "BEFT": ("beft_",), "C3A": ("c3a_",), "DEFT": ("deft_",),
    "DELORA": ("delora_",), "FOURIERFT": ("fourierft_",), "FROD": ("frod_",), "GLORA": ("glora_",),
    "GRALORA": ("gralora_",), "HIRA": ("hira_",), "LILY": ("lily_",), "LN_TUNING": ("ln_tuning_",), "MISS": ("miss_",),
    "OSF": ("osf_", "_osf_"), "PEANUT": ("peanut_",), "PSOFT": ("psoft_", "_psoft_"), "PVERA": ("pvera_",),
    "RANDLORA": ("randlora_",), "ROAD": ("road_",), "SHIRA": ("shira_",), "SUPERTUNING": ("supertuning_",),
    "TINYLORA": ("tinylora_",), "UNILORA": ("unilora_",), "VBLORA": ("vblora_",), "VERA": ("vera_",),
    "WAVEFT": ("waveft_",),
}  # fmt: skip
PARAMETER = re.compile(rf"\.({'|'.join(prefix for prefixes in TYPES.values() for prefix in prefixes)})")
#: Methods that add a matrix to the weight. They also work in a layer whose weight is read without calling the layer.
ADDITIVE = ("LORA", "LOHA", "LOKR")
#: Methods that act on the layer's input and output and never read its weight, so that it may be quantised.
BESIDE = (*ADDITIVE, "IA3")
#: Methods with tensors that all layers share; peft saves those of each method in a layout of its own.
SHARED = ("FROD", "LILY", "PVERA", "RANDLORA", "TINYLORA", "UNILORA", "VBLORA", "VERA")
UNMERGED = ("LILY",)  #: methods whose change depends on the input, so that no weight can hold it
NORMS = ("LN_TUNING",)  #: methods that change normalisation layers
#: Defaults that start at the pretrained model, for methods where peft's own defaults do not.
STARTS: dict[str, dict[str, Any]] = {"C3A": {"init_weights": True}, "FOURIERFT": {"init_weights": True}}

_PROMPTS = (
    "it puts learned tokens before the text of a language model; the prompt tokens of a ViT are the adapter 'vpt'"
)
_VOCABULARY = "a vision transformer has no vocabulary"
#: Methods that are not changes of single layers, and why they are not for a frozen backbone.
REFUSED_TYPES = {
    "PROMPT_TUNING": _PROMPTS, "MULTITASK_PROMPT_TUNING": _PROMPTS, "P_TUNING": _PROMPTS, "PREFIX_TUNING": _PROMPTS,
    "CPT": _PROMPTS, "CARTRIDGE": _PROMPTS, "ADAPTION_PROMPT": _PROMPTS,
    "TRAINABLE_TOKENS": _VOCABULARY,
    "ADALORA": "its ranks are cut by calls after each step, and its loss has a term, that a PeftModel alone makes; use "
               "'LORA' with rank_pattern",
    "POLY": "every forward of it must be given the numbers of tasks; use one set of adapters for each task",
    "XLORA": "it mixes LoRAs of a language model by that model's hidden states; use set_adapter([...], weights=...)",
    "SHADOW": "it is a network beside the decoder blocks of a language model; use a side adapter",
}  # fmt: skip
#: Options that would train or rewrite the backbone itself, or that need calls during training.
REFUSED = {
    "modules_to_save": "it trains a copy of the backbone's own layers; a head is given by head=",
    "trainable_token_indices": _VOCABULARY,
    "target_parameters": "name layers by target_modules",
    "layer_replication": "it changes the number of blocks",
    "megatron_config": "it needs layers of Megatron",
    "alora_invocation_tokens": _VOCABULARY,
    "use_asa": "its subspaces are chosen by calls after each step, which a training loop here does not make",
}


def type_of(config: Any) -> str:
    """Return the method of a config of peft, which is a member of an enumeration there, or its plain name."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def check_type(peft_type: str, known: Any) -> None:
    """Raise ``ValueError`` for a method that is not for a frozen backbone, or that this version of peft lacks."""
    if peft_type in TYPES and peft_type in known:
        return
    there = [kind for kind in TYPES if kind in known]
    why = REFUSED_TYPES.get(peft_type)
    if why is not None:
        said = f"is no method that works layer by layer on a frozen ViT: {why}"
    elif peft_type in TYPES:
        said = "needs a newer peft than the one that is installed: pip install -U peft"
    else:
        said = f"is no method that works layer by layer{hint(peft_type, there)}"
    raise ValueError(f"peft_type={peft_type!r} {said}; the methods are {', '.join(there)}")
