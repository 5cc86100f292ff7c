"""LoRA and its relatives, through peft: inside the layers of a frozen backbone."""

from adaptkit.adapters.lora.adapter import LoRA, LoRAConfig

__all__ = ["LoRA", "LoRAConfig"]
