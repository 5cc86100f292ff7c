"""LoRA in peft's own layout, for programs that know peft and not adaptkit."""

from __future__ import annotations

import json
import os
from pathlib import Path

from adaptkit.adapters.lora.adapter import LoRA
from adaptkit.adapters.lora.peft_folder import to_peft_layout
from adaptkit.hub.file import CONFIG, WEIGHTS, serialised
from adaptkit.hub.write import write_together
from adaptkit.model.adapted import AdaptedModel

__all__ = ["to_peft"]


def to_peft(model: AdaptedModel, folder: str | os.PathLike[str]) -> Path:
    """Write the LoRA of the active set so that ``PeftModel.from_pretrained(backbone, folder)`` loads it.

    The other adapters of the set and its head have no place in a PeftModel and are not written; ``model.save`` keeps
    them all. A folder of peft is read back by ``attach(backbone, folder)``.

    Raises ``TypeError`` where the active set has no LoRA.
    """
    lora = dict(model.adapters.items()).get("lora")
    if not isinstance(lora, LoRA):
        raise TypeError(f"the active adapters are {', '.join(model.adapters) or 'none'}: there is no lora for peft")
    names = [name for name, module in model.backbone.named_modules() if module is model.vit.backbone]
    prefix = f"{names[0]}." if names and names[0] else ""
    config, tensors = to_peft_layout(lora, prefix, model.vit.source().id)
    said = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    return write_together(folder, {CONFIG: said, WEIGHTS: serialised(tensors, {"format": "pt"})})
