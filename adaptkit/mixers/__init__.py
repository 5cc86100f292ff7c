"""Token mixers: what stands where a transformer has attention.

MetaFormer (Yu et al. 2022) sees every block as ``x + mixer(norm(x))`` and ``x + mlp(norm(x))``; PoolFormer is the block
with the plainest mixer. Here is one registry of them, in two forms:

* :func:`mixer`, the self form: a map (B, C, H, W) -> (B, C, H, W), on a grid of any size;
* :func:`cross_mixer`, the cross form of ViT-Adapter's injector and extractor: queries (B, Q, D) on one or several grids
  read maps of one or several levels, see :class:`~adaptkit.mixers.base.Layout`.

A mixer has no residual, no norm and no gate: those belong to the block around it, which has exactly one zero (a
zero up-projection, or a zero gamma). Class and register tokens have no place on a grid and are never passed in.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from adaptkit.core.near import hint
from adaptkit.mixers.base import CrossMixer, Layout, Mixer

__all__ = ["CrossMixer", "Layout", "Mixer", "cross_mixer", "list_mixers", "mixer", "register_mixer"]

T = TypeVar("T", bound=Callable[..., nn.Module])

#: Where each mixer is; imported when it is built.
_BUILT_IN = {
    "identity": "adaptkit.mixers.plain:Identity",
    "random": "adaptkit.mixers.plain:RandomMixing",
    "pool": "adaptkit.mixers.plain:Pool",
    "fourier": "adaptkit.mixers.plain:Fourier",
    "conv": "adaptkit.mixers.conv:DepthwiseConv",
    "multi-conv": "adaptkit.mixers.conv:MultiKernelConv",
    "mona": "adaptkit.mixers.conv:MonaConv",
    "sepconv": "adaptkit.mixers.conv:SepConv",
    "global": "adaptkit.mixers.attention:GlobalAttention",
    "window": "adaptkit.mixers.attention:WindowAttention",
    "msda": "adaptkit.mixers.msda:MSDeformMixer",
    "dat": "adaptkit.mixers.deformed:dat",
}
_REGISTERED: dict[str, Callable[..., nn.Module]] = {}


def register_mixer(name: str) -> Callable[[T], T]:
    """Class decorator: ``mixer(name, dim, **options)`` builds this module as ``cls(dim, **options)``."""

    def register(cls: T) -> T:
        _REGISTERED[name] = cls
        return cls

    return register


def list_mixers() -> list[str]:
    """Return the names that :func:`mixer` takes."""
    return sorted({*_BUILT_IN, *_REGISTERED})


def mixer(name: str, dim: int, **options: Any) -> nn.Module:
    """Build a mixer of ``dim`` channels in its self form, (B, dim, H, W) -> (B, dim, H, W).

    Raises ``ValueError`` for a name that is not registered or options that this mixer does not have.
    """
    return _built(name, _builder(name), dim, **options)


def cross_mixer(
    name: str, dim: int, *, levels: int, heads: int, points: int, ratio: float, **options: Any
) -> CrossMixer:
    """Build a mixer in its cross form: queries of D channels read ``levels`` maps of D channels.

    ``"msda"``, ``"global"`` and ``"window"`` are attention by their papers. The others have no cross form in any paper.
    Ours of ``"dat"`` is in ``adaptkit.mixers.deformed``; of the rest, it brings the values to the queries' own grids
    bilinearly, averages the levels, and mixes there. ``"pool"`` is then the mean alone: its minus belongs to a residual
    of the values, which a cross form does not have.

    Args:
        name: of the mixer.
        dim: width D of queries and maps.
        levels: number of maps.
        heads: attention heads, where there are any; they divide ``int(dim * ratio)``.
        points: sampling points per head and level, for ``"msda"``.
        ratio: width of the values over D.
        options: of the mixer.

    Raises ``ValueError`` as :func:`mixer` does.
    """
    from adaptkit.mixers.attention import GlobalCrossAttention, WindowCrossAttention
    from adaptkit.mixers.cross import Resampled
    from adaptkit.mixers.deformed import DeformableCrossAttention
    from adaptkit.mixers.msda import MSDeformAttn

    width = int(dim * ratio)
    if name == "msda":
        return _built(name, MSDeformAttn, dim, levels, heads, points, ratio, **options)
    if name == "global":
        return _built(name, GlobalCrossAttention, dim, width, heads, **options)
    if name == "dat":
        return _built(name, DeformableCrossAttention, dim, width, heads, **options)
    if name == "window":
        return _built(name, WindowCrossAttention, dim, width, heads, **options)
    if name == "pool":
        options = {"minus": False, **options}
    return Resampled(dim, width, mixer(name, width, **options))


def _built(name: str, build: Callable[..., Any], /, *sizes: Any, **options: Any) -> Any:
    """Build a mixer; ``ValueError`` for options that it does not take."""
    try:
        return build(*sizes, **options)
    except TypeError as error:
        raise ValueError(f"mixer {name!r} does not take {options}: {error}") from error


def _builder(name: str) -> Callable[..., nn.Module]:
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name not in _BUILT_IN:
        known = list_mixers()
        raise ValueError(f"no mixer is named {name!r}{hint(name, known)}; the mixers are {', '.join(known)}")
    module, _, attribute = _BUILT_IN[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
