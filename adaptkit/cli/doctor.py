"""``adaptkit doctor MODEL``: how a backbone is seen, and what attaches to it."""

from __future__ import annotations

import argparse
from typing import Any

from adaptkit.cli._show import table

__all__ = ["add", "run"]


def add(commands: Any) -> None:
    """Add the command and its arguments."""
    parser = commands.add_parser("doctor", help="how a backbone is seen, and what attaches to it")
    parser.add_argument(
        "model", help="demo, a timm name, hf-hub:..., org/repo, a local folder, or the name of a class of transformers"
    )
    parser.add_argument("--pretrained", action="store_true", help="load the weights too (may download them)")


def run(args: argparse.Namespace) -> None:
    """Print what the view says of the model, and try every adapter on one image of an odd size."""
    import torch

    from adaptkit.core import registry
    from adaptkit.core.towers import class_path
    from adaptkit.core.view import Spec
    from adaptkit.hub.header import say_spec
    from adaptkit.ops.grid import cells

    model = _built(args.model, args.pretrained)
    given: list[tuple[str, str]] = []
    try:
        vit = registry.view(model)
    except TypeError as error:
        towers, _ = registry.inside(model)
        if not towers:
            raise
        given = [("given", class_path(type(model))), ("attach it", f"no: {error}")]
        given += [("hand over", str(tower)) for tower in towers]
        model = towers[0].module
        vit = registry.view(model)
    spec, source = vit.spec, vit.source()
    structure = ("structure", say_spec(spec))
    if isinstance(spec, Spec):
        structure = ("width, depth, heads", f"{spec.embed_dim}, {spec.depth}, {spec.num_heads}")
    rows = [
        *given,
        ("class", class_path(type(vit.backbone))),
        ("family", spec.family),
        ("source", source.id or "unnamed"),
        structure,
        (
            "patch",
            f"{spec.patch_size} pixels; an image of 240x320 is a grid of {cells(240, spec.patch_size)}x"
            f"{cells(320, spec.patch_size)}",
        ),
        ("prefix tokens", str(spec.num_prefix_tokens)),
        ("classifier", f"of {source.classes} classes, kept" if source.classes else "none"),
        ("channels of the image", str(spec.channels)),
        ("positions", f"{vit.positions} to another grid"),
        (
            "normalisation",
            f"mean {list(source.mean)}, std {list(source.std)}" if source.mean else "not recorded by the model",
        ),
    ]
    image = torch.zeros(
        1, spec.channels, 5 * spec.patch_size + 3, 7 * spec.patch_size, device=next(vit.backbone.parameters()).device
    )
    for name in sorted(registry.adapters()):
        rows.append((f"attach {name!r}", _try(model, name, image)))
    table(args.model, rows)


def _built(name: str, pretrained: bool) -> Any:
    """Build what is named; a class of transformers by its default config and without memory for its weights."""
    import torch

    from adaptkit.create import create_backbone

    cls = _class(name)
    if cls is None:
        return create_backbone(name, pretrained=pretrained)
    try:
        with torch.device("meta"):
            return cls(cls.config_class())
    except Exception as error:  # of many kinds: no default config, values that are asked for while it is built
        raise ValueError(
            f"{name} cannot be built from its default config ({str(error).splitlines()[0]}): give the folder "
            "or the Hub id of one"
        ) from error


def _class(name: str) -> Any:
    """Return the class of transformers of this name, or None."""
    if not name.isidentifier() or name == name.lower():
        return None
    try:
        import transformers
    except ImportError:
        return None
    cls = getattr(transformers, name, None)
    return cls if isinstance(cls, type) and getattr(cls, "config_class", None) is not None else None


def _try(model: Any, name: str, image: Any) -> str:
    """Attach, run one odd-sized image where the weights are more than shapes, detach; say what happened."""
    import torch

    from adaptkit.model.adapted import attach

    try:
        adapted = attach(model, name).eval()
    except (TypeError, ValueError) as error:
        return f"no: {error}"
    try:
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        if image.is_meta:
            return f"yes: {trained:,} trainable parameters"
        with torch.no_grad():
            maps = adapted(image).maps
        made = ", ".join(f"{m.shape[-2]}x{m.shape[-1]}" for m in maps)
        size = f"{image.shape[-2]}x{image.shape[-1]}"
        return f"yes: {trained:,} trainable parameters; {size} pixels give {f'maps of {made}' if made else 'tokens'}"
    finally:
        adapted.detach()
