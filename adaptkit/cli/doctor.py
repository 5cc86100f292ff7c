"""``adaptkit doctor MODEL``: how a backbone is seen, and what attaches to it."""

from __future__ import annotations

import argparse
from typing import Any

from adaptkit.cli._show import table

__all__ = ["add", "run"]


def add(commands: Any) -> None:
    """Add the command and its arguments."""
    parser = commands.add_parser("doctor", help="how a backbone is seen, and what attaches to it")
    parser.add_argument("model", help="demo, a timm name, hf-hub:..., org/repo, or a local folder")
    parser.add_argument("--pretrained", action="store_true", help="load the weights too (may download them)")


def run(args: argparse.Namespace) -> None:
    """Print what the view says of the model, and try every adapter on one image of an odd size."""
    import torch

    from adaptkit.core import registry
    from adaptkit.core.view import Spec
    from adaptkit.create import create_backbone
    from adaptkit.hub.file import say_spec
    from adaptkit.model.adapted import attach
    from adaptkit.ops.grid import cells

    model = create_backbone(args.model, pretrained=args.pretrained)
    vit = registry.view(model)
    spec, source = vit.spec, vit.source()
    structure = ("structure", say_spec(spec))
    if isinstance(spec, Spec):
        structure = ("width, depth, heads", f"{spec.embed_dim}, {spec.depth}, {spec.num_heads}")
    rows = [
        ("class", f"{type(vit.backbone).__module__}.{type(vit.backbone).__qualname__}"),
        ("family", spec.family),
        ("source", source.id or "unnamed"),
        structure,
        (
            "patch",
            f"{spec.patch_size} pixels; an image of 240x320 is a grid of {cells(240, spec.patch_size)}x"
            f"{cells(320, spec.patch_size)}",
        ),
        ("prefix tokens", str(spec.num_prefix_tokens)),
        ("channels of the image", str(spec.channels)),
        ("positions", f"{vit.positions} to another grid"),
        (
            "normalisation",
            f"mean {list(source.mean)}, std {list(source.std)}" if source.mean else "not recorded by the model",
        ),
    ]
    image = torch.zeros(1, spec.channels, 5 * spec.patch_size + 3, 7 * spec.patch_size)
    for name in sorted(registry.adapters()):
        rows.append((f"attach {name!r}", _try(attach, model, name, image)))
    table(args.model, rows)


def _try(attach: Any, model: Any, name: str, image: Any) -> str:
    """Attach, run one odd-sized image, detach; say what happened."""
    import torch

    try:
        adapted = attach(model, name).eval()
    except (TypeError, ValueError) as error:
        return f"no: {error}"
    try:
        with torch.no_grad():
            maps = adapted(image).maps
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        made = ", ".join(f"{m.shape[-2]}x{m.shape[-1]}" for m in maps)
        size = f"{image.shape[-2]}x{image.shape[-1]}"
        return f"yes: {trained:,} trainable parameters; {size} pixels give {f'maps of {made}' if made else 'tokens'}"
    finally:
        adapted.detach()
