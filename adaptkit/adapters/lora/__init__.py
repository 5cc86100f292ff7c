"""LoRA and its relatives, through peft: inside the layers of a frozen backbone."""

from adaptkit.adapters.lora.adapter import LoRA, LoRAConfig
from adaptkit.adapters.lora.peft_folder import from_peft_layout, peft_config_of
from adaptkit.core.registry import ForeignLayout, register_layout

__all__ = ["LoRA", "LoRAConfig"]

register_layout("peft", ForeignLayout(peft_config_of, from_peft_layout))
