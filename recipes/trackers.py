"""Experiment trackers: one that is asked for and is not installed is an error, before any work."""

from __future__ import annotations

import importlib.util

#: Of each tracker that Accelerate knows: the module that it imports, and what pip calls it.
TRACKERS = {
    "aim": ("aim", "aim"),
    "clearml": ("clearml", "clearml"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "dvclive": ("dvclive", "dvclive"),
    "mlflow": ("mlflow", "mlflow"),
    "swanlab": ("swanlab", "swanlab"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "trackio": ("trackio", "trackio"),
    "wandb": ("wandb", "wandb"),
}


def check_tracker(name: str | None) -> None:
    """Raise ``ValueError`` where ``--tracker`` is no tracker, ``ImportError`` where it is not installed.

    Accelerate leaves it out without a word, and the curves would be missing when the run is over.
    """
    if name is None or name == "all":  # of those that are installed
        return
    if name not in TRACKERS:
        raise ValueError(f"--tracker {name}: there is no such tracker; give one of {', '.join(TRACKERS)}, or all")
    module, package = TRACKERS[name]
    others = ("tensorboardX",) if name == "tensorboard" else ()
    if not any(importlib.util.find_spec(m) for m in (module, *others)):
        raise ImportError(f"--tracker {name} needs {package}, which is not installed: pip install {package}")
