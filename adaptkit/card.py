"""The model card of a saved adapter, written from its header."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["model_card"]


def model_card(header: dict[str, Any]) -> str:
    """Return the Hub card: front matter that links adapter and backbone, and a snippet that attaches it."""
    backbone, names = header["backbone"], [a["name"] for a in header["adapters"]]
    front = ["---", "library_name: adaptkit"]
    if "/" in backbone["source"]:
        front += [f"base_model: {backbone['source']}", "base_model_relation: adapter"]
    front += ["tags:", "- adaptkit", *[f"- {name}" for name in names], "---", ""]
    spec = ", ".join(f"{name} {value}" for name, value in backbone["spec"].items() if name != "family")
    title = " + ".join(names) or "head"
    config = json.dumps({"adapters": header["adapters"], "head": header["head"]}, indent=2)
    return (
        "\n".join(front)
        + f"""
# {title} for {backbone["source"] or backbone["class"]}

Trained with adaptkit (`pip install adaptkit`) beside a frozen backbone: {spec}. The backbone is not in this file.

```python
import adaptkit

model = adaptkit.attach(backbone, adaptkit.load("path/to/this/folder"))
features = model(image)  # features.maps, features.logits
```

```json
{config}
```
"""
    )
