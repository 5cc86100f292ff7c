"""What every command asks that puts a saved adapter on a backbone."""

from __future__ import annotations

from typing import Any

__all__ = ["add_backbone"]


def add_backbone(parser: Any, default: str = "as recorded") -> None:
    """Add ``--backbone`` and ``--positions``, as :func:`adaptkit.from_pretrained` takes them."""
    parser.add_argument("--backbone", help=f"demo, a timm name, a folder, ... (default: {default})")
    parser.add_argument(
        "--positions",
        metavar="RULE",
        help="by which positions go to another grid, 'bicubic' (transformers) or 'bicubic antialias' (timm): give that "
        "of the file where --backbone is of another library (default: the backbone's own)",
    )
