"""``adaptkit inspect FILE``: what an adapter file holds and what it fits."""

from __future__ import annotations

import argparse
import json
from typing import Any

from adaptkit.cli._show import table

__all__ = ["add", "run"]


def add(commands: Any) -> None:
    """Add the command and its arguments."""
    parser = commands.add_parser("inspect", help="what an adapter file holds and what it fits")
    parser.add_argument("file", help="a saved folder, its adapter_model.safetensors, or org/name on the Hub")
    parser.add_argument("--json", action="store_true", help="print the header as it is")


def run(args: argparse.Namespace) -> None:
    """Print the header as a table, or as the JSON that it is."""
    from adaptkit.hub.header import say_spec
    from adaptkit.hub.repository import load

    file = load(args.file)
    if args.json:
        print(json.dumps(file.header, indent=2, sort_keys=True))
        return
    backbone = file.header["backbone"]
    count = sum(t.numel() for t in file.tensors.values())
    rows = [
        (
            "file",
            f"{file.path} ({file.path.stat().st_size / 1e6:.2f} MB, {len(file.tensors)} tensors, {count:,} values)",
        )
    ]
    rows += [(f"adapter {a['name']}", json.dumps(a["config"])) for a in file.header["adapters"]]
    head = file.header["head"]
    if head is not None:
        rows += [(f"head {head['name'] or head['class']}", json.dumps(head.get("config", {})))]
    if backbone is None:
        base = file.header["metadata"]["base_model"] or "unnamed"
        table("LoRA in peft's layout", [*rows, ("trained on", base), ("written by", file.header["adaptkit"])])
        return
    rows += [
        ("trained on", f"{backbone['source'] or 'unnamed'} ({backbone['class']})"),
        ("fits", f"backbones of {say_spec(file.spec)}"),
        (
            "images",
            f"mean {backbone['mean']}, std {backbone['std']}" if backbone["mean"] else "normalisation not recorded",
        ),
        ("positions", backbone.get("positions", "not recorded")),
        ("metadata", json.dumps(file.header.get("metadata", {}))),
        ("written by", f"adaptkit {file.header.get('adaptkit', '')}, format {file.header['format']}"),
    ]
    table("adapter file", rows)
