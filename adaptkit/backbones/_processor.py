"""How a transformers model wants its images: its image processor says it, in a file beside the weights.

What transformers computes from pixels p in 0..255, channel by channel, and what a ``Source`` says of it::

    y = (factor * p - mean) / std  =  (p / 255 - mean / (255 * factor)) / (std / (255 * factor))

``factor`` is 1/255 as a rule, and mean and std are then what the file says. A processor that does not rescale is given
values that fit its mean and std: with a number above 1 among them pixels in 0..255, else values in 0..1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["FILES", "Normalisation", "framing", "normalisation"]

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]  #: mean and std, for values in 0..1; empty: not known

#: Where an image processor is kept, the first file of these that has one: nested in a processor's, or alone.
FILES = ("processor_config.json", "preprocessor_config.json")
UNKNOWN: Normalisation = ((), ())


def normalisation(name: str, commit: str, channels: int, cache: str | None = None) -> Normalisation:
    """Return what the image processor beside a model says, ``channels`` numbers each; nothing is downloaded.

    Args:
        name: what ``from_pretrained`` was given: a folder, or an id on the Hub that is looked up in the local cache.
        commit: of the Hub's repository. Where it is not known, all that are in the cache must say the same.
        channels: of the image. A file with another number of them says nothing of this model.
        cache: folder of the Hub's cache, where it is not the default one.

    Raises ``ValueError`` for a file that is damaged.
    """
    found = {_in_folder(folder, channels) for folder in _folders(name, commit, cache)} - {UNKNOWN}
    return found.pop() if len(found) == 1 else UNKNOWN


def framing(name: str, commit: str, cache: str | None = None) -> dict[str, Any]:
    """Return how the image processor beside a model frames an image, as ``Source`` has it; {} where none says it."""
    found = [said for said in (_frame(_processor(folder)) for folder in _folders(name, commit, cache)) if said]
    return found[0] if found and all(said == found[0] for said in found) else {}


def _frame(said: dict[str, Any]) -> dict[str, Any]:
    """``size`` is one side, a height and a width, or the shorter side; ``crop_size`` is cut from the middle."""
    size, crop = said.get("size"), said.get("crop_size")
    exact = isinstance(size, dict) and "height" in size
    side = _side(size)
    if said.get("do_resize") is False or not side:
        return {}
    cut = _side(crop) if said.get("do_center_crop") else 0
    names = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
    return {
        "resize": 0 if exact else side,
        "crop": side if exact else cut or side,
        "squash": exact,
        "interpolation": names.get(said.get("resample", 2), "bilinear"),
    }


def _side(size: Any) -> int:
    """One number, or the smaller of two; 0 where there is none."""
    if isinstance(size, dict):
        sides: list[Any] = [size[k] for k in ("height", "width") if size.get(k)]
        size = size.get("shortest_edge") or min(sides, default=0)
    return size if type(size) is int and size > 0 else 0


def _folders(name: str, commit: str, cache: str | None) -> Iterator[Path]:
    if not name:
        return
    if Path(name).is_dir():
        yield Path(name)
        return
    from huggingface_hub import constants

    snapshots = Path(cache or constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots"
    if commit:
        yield snapshots / commit
    elif snapshots.is_dir():
        yield from sorted(snapshots.iterdir())


def _in_folder(folder: Path, channels: int) -> Normalisation:
    for name in FILES:
        path = folder / name
        said = _part(path)
        if said:
            return _said(said, channels, path)
    return UNKNOWN


def _processor(folder: Path) -> dict[str, Any]:
    """What the image processor in a folder says; {} where there is none."""
    found = (_part(folder / name) for name in FILES)
    return next((said for said in found if isinstance(said, dict) and said), {})


def _part(path: Path) -> Any:
    said = _json(path) if path.is_file() else {}
    return said.get("image_processor", {}) if path.name == FILES[0] else said


def _json(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, f"cannot be read as JSON: {error}") from error
    if not isinstance(said, dict):
        raise _damaged(path, f"holds {type(said).__name__} and no object")
    return said


def _said(said: Any, channels: int, path: Path) -> Normalisation:
    if not isinstance(said, dict):
        raise _damaged(path, f"has image_processor={said!r}, which is no object")
    mean, std = _numbers(said, "image_mean", path), _numbers(said, "image_std", path)
    normalises = said.get("do_normalize") is not False
    if not normalises:
        mean, std = [0.0], [1.0]
    if not mean or not std:
        return UNKNOWN
    if min(std) <= 0:
        raise _damaged(path, f"has image_std={said['image_std']!r}, and nothing can be divided by that")
    if said.get("do_rescale") is False:
        if not normalises:
            return UNKNOWN  # the values go to the model as they are, whatever they are
        scale = 255.0 if max(*mean, *std) > 1 else 1.0
    else:
        factor = (_numbers(said, "rescale_factor", path) or [1 / 255])[0]
        if factor <= 0:
            raise _damaged(path, f"has rescale_factor={factor}, which leaves nothing of an image")
        scale = 255 * factor
        scale = 1.0 if math.isclose(scale, 1.0, rel_tol=1e-6) else scale
        if said.get("rescale_offset") is True:  # to -1..1: one is taken off after rescaling
            mean = [m + 1 for m in mean]
    mean, std = [m / scale for m in mean], [s / scale for s in std]
    mean, std = (v * channels if len(v) == 1 else v for v in (mean, std))
    return (tuple(mean), tuple(std)) if len(mean) == len(std) == channels else UNKNOWN


def _numbers(said: dict[str, Any], key: str, path: Path) -> list[float]:
    """Return one number for all channels, or one each; none where the file does not say."""
    value = said.get(key)
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values):
        raise _damaged(path, f"has {key}={value!r}, which are no numbers")
    return [float(v) for v in values]


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{path} says how images are normalised for this backbone, and {what}. Save or download the image processor "
        "again, or delete the file and say mean and std yourself"
    )
