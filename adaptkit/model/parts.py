"""Adapters that act together, with their head: what one file holds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from adaptkit.adapters.base import Adapter, BlockAdapter, SideAdapter, WeightAdapter
from adaptkit.core import registry
from adaptkit.core.hierarchical import HierarchicalSpec, HierarchicalViT
from adaptkit.core.view import View, ViT
from adaptkit.hub.file import AdapterFile, load_into, metadata_of
from adaptkit.hub.packages import origin_of
from adaptkit.model.building import Part, build_adapter, build_backbone, build_head
from adaptkit.model.saved import check_tensors

__all__ = ["AdapterSet", "differences"]


class AdapterSet(nn.Module):
    """Adapters that act together, and their head: what one file holds. Building it leaves the backbone as it was.

    Args:
        vit: the view of the backbone.
        parts: the adapters to build.
        head: an entry and its config, or a module.
        head_file: whose tensors the head gets.
        train_backbone: names of parts of the backbone that are trained with it.
        files: those that were loaded: their metadata are kept, and the trained parts of the backbone that they hold.
    """

    def __init__(
        self,
        vit: View,
        parts: list[Part],
        head: Any = None,
        head_file: AdapterFile | None = None,
        train_backbone: Sequence[str] = (),
        files: Sequence[AdapterFile] = (),
    ) -> None:
        super().__init__()
        names = [p.entry.name for p in parts]
        if len(set(names)) != len(names):
            raise ValueError(f"adapters {', '.join(names)}: each may be attached once")
        _check_hierarchical(parts, vit)
        built = {p.entry.name: build_adapter(p, vit) for p in parts}
        _check_inside(built, vit)
        sides = [a for a in built.values() if isinstance(a, SideAdapter)]
        if len(sides) > 1:
            both = " and ".join(name for name, a in built.items() if isinstance(a, SideAdapter))
            raise ValueError(f"{both} each own the loop over the blocks; attach one of them")
        spec = vit.spec
        self.strides = spec.strides if isinstance(spec, HierarchicalSpec) else sides[0].strides if sides else ()
        self.owns_head = isinstance(head, nn.Module)  #: whether the head is the user's module
        module, self.head_entry = build_head(head, head_file, spec, self.strides)
        self.adapters = nn.ModuleDict(built)
        self.head: nn.Module | None = module
        _check_reads(self, vit)
        self.backbone = build_backbone(vit, train_backbone, files)  #: parts of the backbone that are trained with it
        self.metadata = metadata_of(files)  #: what the files that were loaded say beside their tensors
        self.leaves_unread = False  #: whether the head leaves features unread that are trained
        #: while it is not the active set: which of its parameters are trained when it is, by name
        self.flags: dict[str, bool] | None = None
        _follow(vit.backbone, self)

    def __iter__(self) -> Iterator[Adapter]:
        """Go through the adapters in the order in which they act."""
        return (a for a in self.adapters.values() if isinstance(a, Adapter))

    @property
    def weight_adapters(self) -> list[WeightAdapter]:
        """Those that act inside the backbone's layers, trained parts of the backbone first."""
        own = [] if self.backbone is None else [self.backbone]
        return [*own, *(a for a in self if isinstance(a, WeightAdapter))]

    @property
    def side(self) -> SideAdapter | None:
        """The one that owns the loop over the blocks, if any."""
        return next((a for a in self if isinstance(a, SideAdapter)), None)

    @property
    def reads(self) -> tuple[int, ...]:
        """The blocks whose outputs are read, by the side adapter or the head, beside the last one."""
        return self.head_reads if self.side is None else self.side.reads()

    @property
    def pad(self) -> str:
        """Where an image that is no multiple of the patch is padded: see ``SideAdapter.pad``."""
        return "corner" if self.side is None else self.side.pad

    @property
    def head_reads(self) -> tuple[int, ...]:
        """The blocks whose outputs the head wants in ``Features.intermediates``: what its ``reads()`` says, if any."""
        reads = getattr(self.head, "reads", None)
        return tuple(reads()) if callable(reads) else ()

    def why_alone(self) -> str:
        """Say why this set cannot read a pass of the backbone that others read too; empty where it can."""
        if self.backbone is not None:
            return f"it trains parts of the backbone ({', '.join(self.backbone.config)})"
        inside = [n for n, a in zip(self.adapters, self) if isinstance(a, WeightAdapter | BlockAdapter)]
        if inside:
            return f"{', '.join(inside)} changes what the blocks compute"
        return "" if self.side is None else self.side.why_alone()

    def modules_by_name(self) -> dict[str, nn.Module]:
        """Adapters by name, ``head``, and ``backbone``, the trained parts of it."""
        own = dict(self.adapters.items())
        own |= {} if self.head is None else {"head": self.head}
        return own if self.backbone is None else {**own, "backbone": self.backbone.copies}

    def tensors(self) -> dict[str, Tensor]:
        """Return what the file holds: ``<adapter>.<own key>``, ``head.<own key>``, ``backbone.<name there>``."""
        return {f"{n}.{k}": v for n, m in self.modules_by_name().items() for k, v in m.state_dict().items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put such tensors back; ``ValueError`` names what is missing, unexpected or of another shape."""
        given: dict[str, Tensor] = {k: v for k, v in tensors.items() if k.partition(".")[0] not in self.adapters}
        for name, module in self.adapters.items():
            own = {k[len(name) + 1 :]: v for k, v in tensors.items() if k.startswith(name + ".")}
            own = module.translated(own) if isinstance(module, Adapter) else own
            given.update({f"{name}.{k}": v for k, v in own.items()})
        check_tensors(self.tensors(), given, "the tensors given")
        for name, module in self.modules_by_name().items():
            prefix = name + "."
            load_into(module, {k[len(prefix) :]: v for k, v in given.items() if k.startswith(prefix)})

    def header(self) -> dict[str, Any]:
        """Return what the file says of adapters and head."""
        adapters = [_said(n, a) for n, a in zip(self.adapters, self)]
        head = None
        if self.head is not None:
            entry = self.head_entry
            cls = f"{type(self.head).__module__}.{type(self.head).__qualname__}"
            head = _said(entry.name, self.head) if entry else {"name": None, "class": cls}
        said: dict[str, Any] = {"adapters": adapters, "head": head}
        return said if self.backbone is None else {**said, "train_backbone": list(self.backbone.config)}


def _said(name: str, method: Any) -> dict[str, Any]:
    """What a file says of an adapter or a head: and, of a plug-in, where it comes from."""
    return {"name": name, "config": dataclasses.asdict(method.config), **origin_of(type(method))}


def _follow(backbone: nn.Module, built: AdapterSet) -> None:
    """Move adapters and head to the backbone's device; peft's layers are each on their layer's device already."""
    device = next(backbone.parameters()).device
    for module in built.modules_by_name().values():
        if not isinstance(module, WeightAdapter) and module is not getattr(built.backbone, "copies", None):
            module.to(device)


def differences(one: dict[str, Any], other: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Go through what two headers say otherwise of adapters and head, each as two texts."""
    saved, mine = ([*h["adapters"], *([h["head"]] if h["head"] else [])] for h in (one, other))
    names = [" + ".join(str(m["name"]) for m in methods) or "nothing" for methods in (saved, mine)]
    if names[0] != names[1]:
        yield names[0], names[1]
        return
    for a, b in zip(saved, mine):
        # A file has lists where a config has tuples.
        a, b = (json.loads(json.dumps(m.get("config", m))) for m in (a, b))
        for key in sorted(a.keys() | b.keys()):
            if a.get(key) != b.get(key):
                yield f"{key}={a.get(key)!r}", f"{key}={b.get(key)!r}"


def _check_reads(built: AdapterSet, vit: View) -> None:
    """A head that reads outputs of the blocks takes the place of a side adapter, and needs a plain ViT."""
    reads, entry = built.head_reads, built.head_entry
    head = f"the head {entry.name!r}" if entry else f"the head {type(built.head).__name__}"
    if not reads:
        return
    if not isinstance(vit, ViT):
        raise TypeError(
            f"{head} reads outputs of the blocks, and {type(vit.backbone).__name__} has stages: use a plain ViT"
        )
    if built.side is not None:
        side = next(name for name, adapter in zip(built.adapters, built) if adapter is built.side)
        raise ValueError(
            f"{head} reads the blocks {list(reads)} itself and nothing that {side} makes: attach it without {side}, "
            "alone or with adapters that change the tokens ('lora', 'metaformer', ...)"
        )
    if list(reads) != sorted(set(reads)) or not 0 <= reads[0] <= reads[-1] < vit.spec.depth:
        raise ValueError(
            f"{head} reads the blocks {list(reads)}; give some of 0..{vit.spec.depth - 1}, each once and in order"
        )


def _check_hierarchical(parts: list[Part], vit: View) -> None:
    """On a backbone of several stages there is no one width and no one grid to build for."""
    for part in parts:
        if isinstance(vit, HierarchicalViT) and not part.entry.module.hierarchical:
            fits = ", ".join(name for name, entry in sorted(registry.adapters().items()) if entry.module.hierarchical)
            raise TypeError(
                f"{part.entry.name} needs one width and one grid from the first block to the last, "
                f"{type(vit.backbone).__name__} has stages of {', '.join(map(str, vit.spec.embed_dims))} channels at "
                f"strides {', '.join(map(str, vit.spec.strides))}, its own pyramid; attach {fits} to it, or use a "
                "plain ViT"
            )


def _check_inside(built: dict[str, nn.Module], vit: View) -> None:
    """Adapters that run a block from its parts need a backbone that has them, and the bare block."""
    wrappers = [(name, a) for name, a in built.items() if isinstance(a, BlockAdapter)]
    for place, (name, adapter) in enumerate(wrappers):
        if adapter.inside and not (isinstance(vit, ViT) and vit.splits):
            raise TypeError(
                f"{name} steps inside the attention, and that of {type(vit.backbone).__name__} does not come apart "
                "into q, k, v and an output; attach it to a ViT with plain attention"
            )
        if adapter.inside and place > 0:
            raise ValueError(
                f"{name} steps inside the blocks, but {wrappers[place - 1][0]} was given before it and would be left "
                f"out; name {name} first, and only one adapter of this kind"
            )
        adapter.check_blocks(vit)
