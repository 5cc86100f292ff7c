"""``attach``: a frozen backbone and trainable adapters in one module."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adaptkit import registry
from adaptkit.adapters.adavit import AdaViT
from adaptkit.adapters.base import Adapter, BlockAdapter, SideAdapter, Trace, wrapped
from adaptkit.card import model_card
from adaptkit.file import AdapterFile, check_fits, describe_backbone, write_folder
from adaptkit.hub import Commit, is_hub_id, load, push
from adaptkit.staged import StagedSpec, StagedViT
from adaptkit.vit import Features, View, ViT

__all__ = ["AdaptedModel", "attach", "list_adapters", "list_heads"]


class Part(NamedTuple):
    """One adapter to build: what, how, and from which file its tensors come."""

    entry: registry.Entry
    config: Any
    file: AdapterFile | None


def attach(model: nn.Module, *adapters: Any, head: Any = None, strict: bool = False, **options: Any) -> AdaptedModel:
    """Freeze ``model`` and attach adapters to it, and optionally a head.

    Args:
        model: a timm or transformers ViT; see ``adaptkit doctor`` for what is seen of it.
        adapters: each a name (``"vit-adapter"``), a config (``ViTAdapterConfig(injector=False)``), a pair
            ``("vit-adapter", {"injector": False})``, or a saved adapter: its folder, ``"org/name"`` on the Hub, or
            what ``adaptkit.load`` returns.
        head: a config (``LinearHeadConfig(num_classes=21)``), a pair ``("linear", {"num_classes": 21})``, or your
            own module, called with :class:`~adaptkit.vit.Features`. A saved adapter brings its own head.
        strict: make other backbone weights than those of the file an error instead of a warning.
        options: of the adapter, where it is the only one and given by name: ``attach(m, "vit-adapter", norm="group")``.

    Returns the adapted model, in the training mode of ``model``; in eval mode where a saved adapter is attached.

    Raises ``TypeError`` for a host of an unknown class and ``ValueError`` for an unknown name or option, or for a
    saved adapter that does not fit.
    """
    if isinstance(model, AdaptedModel):
        raise TypeError("this model has adapters already: attach all of them in one call, or detach() first")
    if options:
        if len(adapters) != 1 or not isinstance(adapters[0], str):
            raise TypeError(
                f"{', '.join(options)}: options go with one adapter given by name; otherwise use (name, {{...}})"
            )
        adapters = ((adapters[0], options),)
    vit = registry.view(model)
    adapters = tuple(_as_file(a) or a for a in adapters)  # once: it may be a download
    parts: list[Part] = []
    for adapter in adapters:
        parts += _parts(adapter, vit, strict)
    files = [a for a in adapters if isinstance(a, AdapterFile)]
    return AdaptedModel(model, vit, parts, *_head(head, files))


def list_adapters() -> list[str]:
    """Return the names that ``attach`` takes."""
    return sorted(registry.adapters())


def list_heads() -> list[str]:
    """Return the names that ``attach(head=...)`` takes."""
    return sorted(registry.heads())


def _as_file(arg: Any) -> AdapterFile | None:
    if isinstance(arg, AdapterFile):
        return arg
    if not isinstance(arg, str | os.PathLike) or str(arg) in registry.adapters():
        return None
    return load(arg) if Path(arg).exists() or is_hub_id(arg) else None


def _parts(arg: Any, vit: View, strict: bool) -> list[Part]:
    file = _as_file(arg)
    if file is None:
        return [Part(*_configured(arg, registry.adapters(), "adapter"), None)]
    check_fits(file, vit, strict)
    saved = [(a["name"], a["config"]) for a in file.header["adapters"]]
    return [Part(*_configured(pair, registry.adapters(), "adapter"), file) for pair in saved]


def _head(arg: Any, files: list[AdapterFile]) -> tuple[Any, AdapterFile | None]:
    """Return the head to build (or the module given) and the file its tensors come from."""
    saved = [f for f in files if f.header["head"] is not None]
    if arg is None and len(saved) > 1:
        raise ValueError(f"{saved[0].path} and {saved[1].path} both bring a head; say which with head=")
    if arg is None and not saved:
        return None, None
    if arg is None and saved[0].header["head"]["name"] is None:
        raise ValueError(
            f"the head in {saved[0].path} is a custom module ({saved[0].header['head']['class']}); build it and pass "
            "it as head="
        )
    if arg is None:
        head = saved[0].header["head"]
        return _configured((head["name"], head["config"]), registry.heads(), "head"), saved[0]
    if isinstance(arg, nn.Module):
        custom = [f for f in saved if f.header["head"]["name"] is None]
        return arg, custom[0] if custom else None
    return _configured(arg, registry.heads(), "head"), None


def _configured(arg: Any, known: dict[str, registry.Entry], kind: str) -> tuple[registry.Entry, Any]:
    """Return the entry and config of a name, a config or a (name, options) pair."""
    if dataclasses.is_dataclass(arg) and not isinstance(arg, type):
        for entry in known.values():
            if type(arg) is entry.config:
                return entry, arg
    name, options = arg if isinstance(arg, tuple) and len(arg) == 2 else (arg, {})
    if not isinstance(name, str | os.PathLike) or not isinstance(options, dict):
        raise TypeError(
            f"{arg!r} is no {kind}: give a name ({', '.join(sorted(known))}), its config, a pair (name, options), or "
            "a saved adapter"
        )
    if str(name) not in known:
        raise ValueError(
            f"no {kind} is named {str(name)!r} and no file is there; the {kind}s are {', '.join(sorted(known))}"
        )
    entry = known[str(name)]
    try:
        return entry, entry.configure(options)
    except TypeError as error:  # a required option is missing
        raise ValueError(f"{kind} {str(name)!r} needs more options: {error}") from error


class AdaptedModel(nn.Module):
    """A frozen backbone with adapters, as :func:`attach` builds it; ``model(image)`` returns ``Features``.

    The backbone is never trained: no parameter of it requires a gradient and it stays in eval mode whatever
    ``train()`` is told.
    """

    def __init__(
        self, model: nn.Module, vit: View, parts: list[Part], head: Any = None, head_file: AdapterFile | None = None
    ) -> None:
        super().__init__()
        names = [p.entry.name for p in parts]
        if len(set(names)) != len(names):
            raise ValueError(f"adapters {', '.join(names)}: each may be attached once")
        spec = vit.spec
        _check_staged(parts, vit)
        built = {p.entry.name: _build(p, spec) for p in parts}
        _check_inside(built, vit)
        sides = [name for name, a in built.items() if isinstance(a, SideAdapter)]
        if len(sides) > 1:
            raise ValueError(f"{' and '.join(sides)} each own the loop over the blocks; attach one of them")
        strides = spec.strides if isinstance(spec, StagedSpec) else built[sides[0]].strides if sides else ()
        module, self._head_entry = _build_head(head, head_file, spec, strides)

        # Nothing of the host is touched before everything that can fail has been built.
        self._vit: View | None = vit
        self._restore = [(m, m.training) for m in model.modules()]
        self._restore_grad = [(p, p.requires_grad) for p in model.parameters()]
        self.backbone = model.requires_grad_(False)
        self.adapters = nn.ModuleDict(built)
        self.head: nn.Module | None = module
        loaded = head_file is not None or any(p.file is not None for p in parts)
        self.train(model.training and not loaded)

    @property
    def vit(self) -> Any:
        """The view of the backbone."""
        if self._vit is None:
            raise RuntimeError("this model was detached: attach to the backbone again")
        return self._vit

    @property
    def spec(self) -> Any:
        """What the adapters were built for."""
        return self.vit.spec

    def forward(self, image: Tensor) -> Features:
        """Image (B, 3, H, W), normalised as the backbone wants it, of any size -> features."""
        if image.ndim != 4:
            raise ValueError(f"image has shape {tuple(image.shape)}; expected (batch, channels, height, width)")
        trace: Trace = {}
        vit, side = self.vit, None
        wrappers = [a for a in self.adapters.values() if isinstance(a, BlockAdapter)]
        if wrappers:
            vit = wrapped(vit, wrappers, trace)
        for adapter in self.adapters.values():
            side = adapter if isinstance(adapter, SideAdapter) else side
        features = vit.features(image) if side is None else side(vit, image, trace)
        features = features._replace(aux={**features.aux, **trace})
        logits = self.vit.logits(features) if self.head is None else self.head(features)
        return features._replace(logits=logits)

    def train(self, mode: bool = True) -> AdaptedModel:
        """Set the mode of adapters and head; the backbone stays in eval mode."""
        super().train(mode)
        if self._vit is not None:
            self.backbone.eval()
        return self

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that the file holds: ``<adapter>.<own key>`` and ``head.<own key>``."""
        tensors = {f"{n}.{k}": v for n, a in self.adapters.items() for k, v in a.state_dict().items()}
        if self.head is not None:
            tensors.update({f"head.{k}": v for k, v in self.head.state_dict().items()})
        return tensors

    def load_adapter_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Put such tensors back; ``ValueError`` names what is missing, unexpected or of another shape."""
        own = self.adapter_state_dict()
        check_tensors(own, tensors, "the tensors given")
        for name, module in self._own_modules().items():
            prefix = name + "."
            module.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})

    def _own_modules(self) -> dict[str, nn.Module]:
        own: dict[str, nn.Module] = dict(self.adapters.items())
        return own if self.head is None else {**own, "head": self.head}

    def header(self) -> dict[str, Any]:
        """Return what the file says besides its tensors."""
        adapters = [{"name": n, "config": dataclasses.asdict(a.config)} for n, a in self._adapters().items()]
        head = None
        if self.head is not None:
            entry = self._head_entry
            cls = f"{type(self.head).__module__}.{type(self.head).__qualname__}"
            config: Any = getattr(self.head, "config", None)
            head = {"name": entry.name, "config": dataclasses.asdict(config)} if entry else {"name": None, "class": cls}
        return {"adapters": adapters, "head": head, "backbone": describe_backbone(self.vit)}

    def _adapters(self) -> dict[str, Adapter]:
        return {n: a for n, a in self.adapters.items() if isinstance(a, Adapter)}

    def save(self, folder: str | os.PathLike[str], **metadata: Any) -> Path:
        """Write the adapters and the head to ``folder``: weights, config and card, each atomically.

        ``metadata`` (JSON values, e.g. ``task="segmentation"``, ``classes=[...]``) is kept in the header. Raises
        ``OSError`` where the folder cannot be written.
        """
        header = {**self.header(), "metadata": metadata}
        return write_folder(folder, header, self.adapter_state_dict(), model_card(header))

    def push(self, repo_id: str, **options: Any) -> Commit:
        """Upload what ``save`` writes to a model repository on the Hub; see :func:`adaptkit.hub.push`."""
        return push(self, repo_id, **options)

    @torch.no_grad()
    def verify(self, image: Tensor, tolerance: float = 1e-5) -> float:
        """Prove that skipping changes nothing: run AdaViT masked, then packed under the same decisions.

        Args:
            image: (B, 3, H, W).
            tolerance: how far a value may be off, as a share of the largest value of its output (at least 1).

        Returns the largest such difference over all outputs. Raises ``RuntimeError`` where it exceeds the tolerance,
        and ``TypeError`` where nothing is skipped, for there are no gates.
        """
        gates, training = AdaViT.of(self), self.training
        self.eval()
        try:
            with gates.executing("masked"):
                reference = self(image)
            with gates.executing("packed"), gates.deciding(gates.given(reference.aux)):
                packed = self(image)
        finally:
            self.train(training)
        off = max(_distance(a, b) for a, b in zip(_outputs(packed), _outputs(reference)))
        if not off <= tolerance:
            raise RuntimeError(
                f"packed execution differs from masked by {off:.1e}, more than {tolerance:.1e}; report the backbone "
                f"({type(self.backbone).__name__}) and use execution='masked' with it"
            )
        return off

    def detach(self) -> nn.Module:
        """Return the very backbone that was given, its training modes and ``requires_grad`` flags as they were."""
        if self._vit is None:
            raise RuntimeError("this model was detached already")
        for module, mode in self._restore:
            module.training = mode
        for parameter, flag in self._restore_grad:
            parameter.requires_grad_(flag)
        model = self.backbone
        self._vit = None
        del self.backbone
        return model


def _outputs(features: Features) -> list[Tensor]:
    logits = [] if features.logits is None else [features.logits]
    return [x for x in (features.tokens, features.prefix, *features.maps, *logits) if x.numel()]


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp_min(1.0))


def _check_staged(parts: list[Part], vit: View) -> None:
    """On a host of several stages there is no one width and no one grid to build for."""
    for part in parts:
        if isinstance(vit, StagedViT) and not part.entry.module.staged:
            fits = ", ".join(name for name, entry in sorted(registry.adapters().items()) if entry.module.staged)
            raise TypeError(
                f"{part.entry.name} needs one width and one grid from the first block to the last, "
                f"{type(vit.host).__name__} has stages of {', '.join(map(str, vit.spec.dims))} channels at strides "
                f"{', '.join(map(str, vit.spec.strides))}, its own pyramid; attach {fits} to it, or use a plain ViT"
            )


def _check_inside(built: dict[str, nn.Module], vit: View) -> None:
    """Adapters that run a block from its parts need a host that has them, and the bare block."""
    wrappers = [(name, a) for name, a in built.items() if isinstance(a, BlockAdapter)]
    for place, (name, adapter) in enumerate(wrappers):
        if adapter.inside and not (isinstance(vit, ViT) and vit.splits):
            raise TypeError(
                f"{name} steps inside the attention, and that of {type(vit.host).__name__} does not come apart into "
                "q, k, v and an output; attach it to a ViT with plain attention"
            )
        if adapter.inside and place > 0:
            raise ValueError(
                f"{name} steps inside the blocks, but {wrappers[place - 1][0]} was given before it and would be left "
                f"out; name {name} first, and only one adapter of this kind"
            )


def _build(part: Part, spec: Any) -> nn.Module:
    module = part.entry.module(spec, part.config)
    if part.file is not None:
        tensors = part.file.tensors_of(part.entry.name)
        check_tensors(module.state_dict(), tensors, f"{part.file.path}, adapter {part.entry.name!r}")
        module.load_state_dict(tensors)
    return module


def _build_head(
    head: Any, file: AdapterFile | None, spec: Any, strides: tuple[int, ...]
) -> tuple[nn.Module | None, registry.Entry | None]:
    if head is None:
        return None, None
    entry = None if isinstance(head, nn.Module) else head[0]
    module = head if isinstance(head, nn.Module) else head[0].module(spec, head[1], strides)
    if file is not None:
        tensors = file.tensors_of("head")
        check_tensors(module.state_dict(), tensors, f"{file.path}, head")
        module.load_state_dict(tensors)
    return module, entry


def check_tensors(own: dict[str, Tensor], given: dict[str, Tensor], where: str) -> None:
    """Raise ``ValueError`` where the keys or shapes of ``given`` are not those of ``own``."""
    missing, unexpected = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(
            f"{where}: {len(missing)} tensors are missing ({', '.join(missing[:3])}), {len(unexpected)} are not "
            f"expected ({', '.join(unexpected[:3])}); the file does not match its own header: save it again"
        )
    for key, tensor in own.items():
        if tensor.shape != given[key].shape:
            raise ValueError(
                f"{where}: {key} has shape {tuple(given[key].shape)}, this model needs {tuple(tensor.shape)}"
            )
