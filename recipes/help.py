"""What ``--help`` of a recipe looks like: its options in groups, each with its default."""

from __future__ import annotations

import argparse
import copy
from typing import Any

from adaptkit.core.arguments import Parser

__all__ = ["GROUPS", "RecipeParser"]

#: title -> options, by name, in the order in which they are shown; what is named nowhere is the task's own. An option
#: that a recipe does not have is passed over.
GROUPS: dict[str, tuple[str, ...]] = {
    "data": (
        "train", "val", "data", "train-images", "val-images", "train-masks", "val-masks", "train-maps", "val-maps",
        "image-column", "mask-column", "label-column", "depth-column", "num-classes", "classes", "ignore-index",
        "label-map", "palette", "mask-suffix", "depth-suffix",
        "reduce-zero-label", "mean", "std", "size", "augment", "least-crop", "streaming", "shuffle-buffer",
        "workers",
    ),
    "model": (
        "backbone", "random-backbone", "backbone-dtype", "adapter", "adapter-options", "init", "train-backbone", "head",
        "model", "pool",
        "zero-head", "head-options", "width", "queries", "layers", "points", "anchor", "bins",
    ),
    "optimisation": (
        "steps", "batch-size", "accumulate", "optimizer", "lr", "schedule", "warmup", "weight-decay", "layer-decay",
        "clip", "ema", "loss", "class-weights", "label-smoothing", "mixed-precision", "compile",
    ),
    "features of the backbone, computed once": (
        "views", "cache-features", "cache-dtype", "offload", "crop-features", "flip-features",
    ),
    "validation": ("slide", "stride", "resize", "scales", "flip"),
    "run": (
        "config", "out", "seed", "seeds", "eval-every", "save-every", "keep-best", "patience", "details",
        "tracker", "resume", "change", "overwrite", "shard", "help",
    ),
}  # fmt: skip
REST = "this task"


class RecipeParser(Parser):
    """A parser that shows its options in :data:`GROUPS`, however they were added."""

    def format_usage(self) -> str:
        """Name what must be given; the rest is in the help."""
        formatter = self._get_formatter()
        needed = [a for a in self._actions if a.required or not a.option_strings]
        # A group of argparse's own is shown as the text that it is.
        formatter.add_usage(None, needed, [])
        return formatter.format_help().rstrip() + " [options]\n"

    def format_help(self) -> str:
        """Usage, description, and a section for each group."""
        formatter = self._get_formatter()
        formatter.add_text(self.description)
        for title, actions in self._grouped().items():
            formatter.start_section(title)
            formatter.add_arguments([_with_default(action) for action in actions])
            formatter.end_section()
        formatter.add_text(self.epilog)
        return f"{self.format_usage()}\n{formatter.format_help()}"

    def _grouped(self) -> dict[str, list[argparse.Action]]:
        """Title -> its options; the task's own come first."""
        shown = [a for a in self._actions if a.help is not argparse.SUPPRESS]
        by_name = {flag.removeprefix("--"): a for a in shown for flag in a.option_strings}
        groups = {title: [by_name[n] for n in names if n in by_name] for title, names in GROUPS.items()}
        named = {id(a) for actions in groups.values() for a in actions}
        groups = {REST: [a for a in shown if id(a) not in named], **groups}
        return {title: actions for title, actions in groups.items() if actions}


def _with_default(action: argparse.Action) -> argparse.Action:
    """Return the action with its default in its help, where it has one and does not say it itself."""
    said = (action.help or "").removesuffix(" (default: %(default)s)")  # some versions add it to what has a --no- form
    default = _default(action)
    if default and "default" not in said:
        said = f"{said} (default: {default})".lstrip()
    shown = copy.copy(action)
    shown.help = said
    return shown


def _default(action: argparse.Action) -> str:
    value: Any = action.default
    if value is None or value is argparse.SUPPRESS or value == argparse.SUPPRESS or action.required:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)).replace("%", "%%")
    return "" if value == {} else str(value).replace("%", "%%")
