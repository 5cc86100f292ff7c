"""Whether a file belongs to a backbone: the structure must be the same, and the weights are compared.

Layers are compared bit by bit where both sides hold the same tensors, else block by block up to rounding, else by a few
values of a few tensors (:mod:`adaptkit.hub.digest`, :mod:`adaptkit.hub.backbone`).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial

from adaptkit.core.hierarchical import HierarchicalSpec
from adaptkit.core.shown import listed
from adaptkit.core.tree import blocks_of, plain_name
from adaptkit.core.view import Spec, View
from adaptkit.core.warned import warn
from adaptkit.hub.backbone import digest_of, expansion, fingerprint, normalisation_of, sums_of
from adaptkit.hub.digest import NEW_CHANNELS, layers_of, other_blocks, other_layers
from adaptkit.hub.file import AdapterFile
from adaptkit.hub.header import say_spec

__all__ = ["OtherNormalisation", "check_fits", "normalised_by_file", "other_parts"]


class OtherNormalisation(UserWarning):
    """Warns that a file was trained on images normalised otherwise than the backbone declares."""


@contextlib.contextmanager
def normalised_by_file() -> Iterator[None]:
    """Inside, silence :class:`OtherNormalisation`: the caller normalises images as the file says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OtherNormalisation)
        yield


def check_fits(file: AdapterFile, vit: View, strict: bool = False) -> None:
    """Compare a file with a backbone.

    Raises ``ValueError`` for a backbone of another structure. Other weights of the same structure are a warning, or
    with ``strict`` a ``ValueError``: the adapter runs, but was trained on other features. Layers are compared bit by
    bit where both sides hold the same tensors, else block by block up to rounding. A block that one side holds
    quantised is not compared; the patch embedding and the norms stand in for it. Nor are weights that the file brings
    itself, which replace the backbone's. Another rule for resampling position embeddings and another normalisation
    (:class:`OtherNormalisation`) are warnings.
    """
    if file.header["backbone"] is None:  # a folder of peft knows the names of layers and nothing else
        return
    then, now = file.spec, vit.spec
    if type(then) is not type(now):
        raise ValueError(
            f"{file.path} was trained on a {_kind(then)} ({say_spec(then)}), this backbone is a {_kind(now)} "
            f"({vit.source().id or type(vit.backbone).__name__}: {say_spec(now)}); attach it to a {_kind(then)}"
        )
    for name in then._fields[1:]:  # whichever library holds them: the family does not matter
        a, b = getattr(then, name), getattr(now, name)
        if a != b:
            saved = file.header["backbone"]
            here = vit.source().id or type(vit.backbone).__name__
            remedy = f"attach it to a {_kind(then)} with {name}={a}"
            if name == "channels" and b == 3 and saved.get("expanded"):
                remedy = f"attach it to {expansion(saved, 'backbone')}"
            raise ValueError(
                f"{file.path} was trained on {name}={a} ({saved['source'] or saved['class']}: {say_spec(then)}), this "
                f"backbone has {name}={b} ({here}: {say_spec(now)}); {remedy}"
            )
    saved, source = file.header["backbone"], vit.source()
    other = _other_weights(file, vit)
    if other:
        message = (
            f"{file.path} was trained on other weights of this structure (file: {saved['source'] or 'unnamed'}, "
            f"backbone: {source.id or 'unnamed'}; they differ in {listed(other, 6)}): its results will differ. Load "
            "the weights it was trained on"
        )
        if strict:
            raise ValueError(message)
        warn(message)
    if saved.get("positions", vit.positions) != vit.positions:
        warn(
            f"{file.path} was trained with position embeddings resampled as {saved['positions']!r}, this backbone "
            f"({type(vit.backbone).__name__}) resamples them as {vit.positions!r}: results agree at the native size "
            f"only. For other sizes use {_other_rule(saved['positions'], vit)}",
        )
    mean, std = normalisation_of(file.header.get("metadata") or {}, now.channels) or (saved["mean"], saved["std"])
    known = len(mean) == len(source.mean) > 0  # an expanded backbone says it of its first three channels
    if known and (mean, std) != (list(source.mean), list(source.std)):
        warn(
            f"{file.path} was trained on images normalised by mean {mean}, std {std}; this backbone declares mean "
            f"{list(source.mean)}, std {list(source.std)}. Normalise as the file says",
            OtherNormalisation,
        )


def _other_rule(rule: str, vit: View) -> str:
    known = rule in vit.position_rules
    if known:
        return f"attach(..., positions={rule!r}), in a command --positions {rule!r}"
    return "the library it was trained in"


def _kind(spec: Spec | HierarchicalSpec) -> str:
    return "ViT" if isinstance(spec, Spec) else "hierarchical backbone"


def _other_weights(file: AdapterFile, vit: View) -> list[str]:
    """Return the parts of the backbone whose weights are not those of the file."""
    brought = file.tensors_of("backbone")  # whatever the backbone has there, it is replaced
    if not brought:
        return other_parts(file, digest_of(vit), partial(sums_of, vit), partial(fingerprint, vit))
    replaced = {id(p) for name, p in vit.backbone.named_parameters() if plain_name(name) in brought}
    marked = vit.fingerprint_tensors()
    out = {name for name, tensor in marked.items() if id(tensor) in replaced}
    out |= {"patch"} if any(name.endswith(NEW_CHANNELS) for name in brought) else set()  # a part of that kernel
    marks = {name: mark for name, mark in fingerprint(vit).items() if name not in out}
    without = {layer for name, layer in layers_of(vit.backbone).items() if name in brought}
    return other_parts(file, digest_of(vit), partial(_sums_without, vit, replaced), lambda: marks, without)


def _sums_without(vit: View, replaced: set[int]) -> dict[str, list[float]]:
    """Return the sums over those blocks that hold none of these parameters."""
    sums = sums_of(vit)
    blocks = blocks_of(vit.backbone, len(vit.spec.widths)) if sums else []
    touched = {str(i) for i, block in enumerate(blocks) if any(id(p) in replaced for p in block.parameters())}
    return {index: of for index, of in sums.items() if index not in touched}


def other_parts(
    file: AdapterFile,
    now: Mapping[str, str],
    sums: Callable[[], Mapping[str, Sequence[float]]],
    marks: Callable[[], Mapping[str, Sequence[float]]],
    without: Collection[str] = (),
) -> list[str]:
    """Return the parts of two backbones whose weights differ: of the one that a file records, and of another.

    Args:
        file: an adapter's.
        now: digest of the other backbone.
        sums: returns its sums over blocks, asked for where digests do not say it all: between libraries, precisions.
        marks: returns its fingerprint, likewise.
        without: layers of which the file brings tensors itself, so that their digests are not compared.
    """
    saved = file.header["backbone"]
    then, now = ({k: v for k, v in (d or {}).items() if k not in without} for d in (saved.get("digest"), now))
    # The backbone's own classifier speaks where the adapter has no head.
    other, complete = other_layers(then, now, classifier=file.header["head"] is None and saved.get("classes", 0) > 0)
    if complete and not without:
        return other
    if saved.get("sums"):
        other += [f"block {i}" for i in other_blocks(saved["sums"], sums())]
    mine = marks()
    theirs = {name: mark for name, mark in saved["fingerprint"].items() if not without or name in mine}
    return other if other or (without and not theirs) else _other_marks(theirs, mine)


def _other_marks(then: Mapping[str, Sequence[float]], now: Mapping[str, Sequence[float]]) -> list[str]:
    """Return the tensors that differ by more than the rounding of bf16 (8 bits); all where no name is common."""
    if not then.keys() & now.keys():
        return [f"{name!r}" for name in then] or ["every layer"]
    return [f"{name!r}" for name in then if name in now and not _near(then[name], now[name])]


def _near(then: Sequence[float], now: Sequence[float]) -> bool:
    return len(then) == len(now) and all(abs(a - b) <= 1e-4 + 2e-2 * abs(b) for a, b in zip(then, now))
