"""``attach``: a frozen backbone and trainable adapters in one module."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit import registry
from adaptkit.adapters._peft import Lodgers, lodgers
from adaptkit.adapters.adavit import AdaViT
from adaptkit.adapters.base import BlockAdapter, Trace, wrapped
from adaptkit.card import model_card
from adaptkit.file import check_fits, describe_backbone, write_folder
from adaptkit.hub import Commit, push
from adaptkit.parts import AdapterSet, as_file, differences, head_of, parts_of
from adaptkit.recorded import Recorded
from adaptkit.replay import Replay, Stored, replay
from adaptkit.vit import Features, View

__all__ = ["AdaptedModel", "attach", "list_adapters", "list_heads"]


def attach(
    model: nn.Module, *adapters: Any, head: Any = None, name: str = "default", strict: bool = False, **options: Any
) -> AdaptedModel:
    """Freeze ``model`` and attach adapters to it, and optionally a head.

    Args:
        model: a timm or transformers ViT; see ``adaptkit doctor`` for what is seen of it. A ``PeftModel`` too: its
            LoRA becomes the adapter ``"lora"``, is trained if it was, and is saved in the same file.
        adapters: each a name (``"vit-adapter"``), a config (``ViTAdapterConfig(injector=False)``, or peft's
            ``LoraConfig(r=16)``), a pair ``("vit-adapter", {"injector": False})``, or a saved adapter: its folder,
            ``"org/name"`` on the Hub, or what ``adaptkit.load`` returns. A folder that peft saved is taken too.
        head: a config (``LinearHeadConfig(num_classes=21)``), a pair ``("linear", {"num_classes": 21})``, or your
            own module, called with :class:`~adaptkit.vit.Features`. A saved adapter brings its own head.
        name: of these adapters together, for :meth:`AdaptedModel.set_adapter`.
        strict: make other backbone weights than those of the file an error instead of a warning.
        options: of the adapter, where it is the only one and given by name: ``attach(m, "vit-adapter", norm="group")``.

    Returns the adapted model, in the training mode of ``model``; in eval mode where a saved adapter is attached.

    Raises ``TypeError`` for a host of an unknown class and ``ValueError`` for an unknown name or option, or for a
    saved adapter that does not fit.
    """
    if isinstance(model, AdaptedModel):
        raise TypeError(
            "this model has adapters already: attach all of them in one call, or detach() first; "
            "add_adapter() adds a set under another name"
        )
    if options:
        if len(adapters) != 1 or not isinstance(adapters[0], str):
            raise TypeError(
                f"{', '.join(options)}: options go with one adapter given by name; otherwise use (name, {{...}})"
            )
        adapters = ((adapters[0], options),)
    vit = registry.view(model)
    inside = lodgers(vit.host)
    try:
        own = () if inside is None else (inside.config,)
        built, loaded = _build((*own, *adapters), head, vit, strict)
        if inside is not None:
            inside.share(built.adapters["lora"])
    except BaseException:
        if inside is not None:
            inside.put_back()
        raise
    return AdaptedModel(model, vit, built, name, inside).train(model.training and not loaded)


def list_adapters() -> list[str]:
    """Return the names that ``attach`` takes."""
    return sorted(registry.adapters())


def list_heads() -> list[str]:
    """Return the names that ``attach(head=...)`` takes."""
    return sorted(registry.heads())


def _build(adapters: tuple[Any, ...], head: Any, vit: View, strict: bool) -> tuple[AdapterSet, bool]:
    """Build a set of adapters for this host, and tell whether a file was loaded."""
    parts, files = parts_of(adapters, vit, strict)
    chosen, head_file = head_of(head, files)
    return AdapterSet(vit, parts, chosen, head_file), bool(files)


def run(vit: View, acting: AdapterSet, image: Tensor) -> Features:
    """Run a backbone with these adapters and their head: image (B, 3, H, W) -> features."""
    trace: Trace = {}
    wrappers = [a for a in acting if isinstance(a, BlockAdapter)]
    view: Any = wrapped(vit, wrappers, trace) if wrappers else vit
    features = view.features(image) if acting.side is None else acting.side(view, image, trace)
    features = features._replace(aux={**features.aux, **trace})
    logits = vit.logits(features) if acting.head is None else acting.head(features)
    return features._replace(logits=logits)


class AdaptedModel(nn.Module):
    """A frozen backbone with adapters, as :func:`attach` builds it; ``model(image)`` returns ``Features``.

    The backbone is never trained: no parameter of it requires a gradient and it stays in eval mode whatever
    ``train()`` is told. Several sets of adapters can be attached, each with a name; one is active at a time.
    """

    def __init__(self, model: nn.Module, vit: View, built: AdapterSet, name: str, inside: Lodgers | None) -> None:
        super().__init__()
        # Nothing of the host was touched before everything that can fail had been built.
        self._vit: View | None = vit
        self._inside = inside
        self._restore = [(m, m.training) for m in model.modules()]
        self._restore_grad = [(p, p.requires_grad) for p in model.parameters()]
        self.backbone = model.requires_grad_(False)
        self.sets = nn.ModuleDict({_checked_name(name): built})
        self._active: str | None = name
        self._disabled = False
        built.install()

    # ------------------------------------------------------------------------------------------- what it is made of

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

    @property
    def active_adapter(self) -> str | None:
        """Name of the active set; None where all were deleted."""
        return self._active

    @property
    def adapters(self) -> nn.ModuleDict:
        """The adapters of the active set, by method."""
        return self._acting.adapters if self._active is not None else nn.ModuleDict()

    @property
    def head(self) -> nn.Module | None:
        """The head of the active set."""
        return self._acting.head if self._active is not None else None

    @property
    def _acting(self) -> AdapterSet:
        if self._active is None:
            raise RuntimeError("every adapter of this model was deleted; add_adapter() one")
        return self.set_of(self._active)

    def set_of(self, name: str) -> AdapterSet:
        """Return the set of this name; ``ValueError`` where there is none."""
        if name not in self.sets:
            raise ValueError(f"no adapters are named {name!r}; there are {', '.join(map(repr, self.sets)) or 'none'}")
        found: Any = self.sets[name]
        return found

    def _away(self) -> Iterator[tuple[nn.Parameter, bool]]:
        """Parameters of the inactive sets, and whether they are trained when active."""
        for one in self.sets.values():
            yield from getattr(one, "away", ())

    # ------------------------------------------------------------------------------------------------------ running

    def forward(self, image: Tensor | Recorded) -> Features:
        """Image (B, 3, H, W), normalised as the backbone wants it, of any size -> features.

        Or what :meth:`record` made of such images: then the backbone does not run.
        """
        if isinstance(image, Recorded):
            return run(Stored(self.vit, image), self._readers(), image.image_or_shape())
        if image.ndim != 4:
            raise ValueError(f"image has shape {tuple(image.shape)}; expected (batch, channels, height, width)")
        vit = self.vit
        if self._disabled or self._active is None:
            features = vit.features(image)
            return features._replace(logits=vit.logits(features))
        return run(vit, self._acting, image)

    @torch.no_grad()
    def record(self, image: Tensor) -> Recorded:
        """Run the backbone on (B, 3, H, W) and keep what the active adapters read of it: ``model(recorded)``.

        Raises ``ValueError`` where an adapter changes what the blocks compute, and so needs them to run.
        """
        after, reads_image = self.reads()
        seen = replay(self.vit, image)
        if not isinstance(seen, Replay):
            raise ValueError(
                f"{type(self.vit.host).__name__} has stages, whose outputs are not recorded; use a plain ViT"
            )
        states = tuple(seen.states[i + 1] for i in after)
        size = (image.shape[-2], image.shape[-1])
        return Recorded(states, after, size, self.spec.patch, image if reads_image else None)

    def reads(self) -> tuple[tuple[int, ...], bool]:
        """Return the blocks whose outputs the active adapters read, and whether they read the image too.

        Raises ``ValueError`` as :meth:`record`.
        """
        side = self._readers().side
        taps = () if side is None else side.reads()
        return tuple(sorted({*taps, self.spec.depth - 1})), side is not None and side.reads_image()

    def _readers(self) -> AdapterSet:
        acting = self._acting
        if self._disabled or acting.why_alone():
            raise ValueError(f"recorded features do not do for these adapters: {acting.why_alone() or 'disabled'}")
        return acting

    def train(self, mode: bool = True) -> AdaptedModel:
        """Set the mode of adapters and head; the backbone stays in eval mode."""
        super().train(mode)
        if self._vit is not None:
            self.backbone.eval()
        return self

    # ---------------------------------------------------------------------------------------------- several adapters

    def add_adapter(self, *adapters: Any, name: str, head: Any = None, strict: bool = False) -> None:
        """Attach another set under a name, as :func:`attach` takes it. It does not act before :meth:`set_adapter`."""
        if _checked_name(name) in self.sets:
            raise ValueError(f"adapters named {name!r} are there already; delete_adapter({name!r}), or choose a name")
        with self._bare():
            built, loaded = _build(adapters, head, self.vit, strict)
        built.remove()
        like = next(self.backbone.parameters())
        self.sets[name] = built.to(like.device).train(self.training and not loaded)

    def set_adapter(self, name: str) -> None:
        """Make this set the active one: it alone runs and is trained. Nothing is recompiled for a set seen before."""
        chosen = self.set_of(name)
        if self._active is not None:
            self._acting.remove()
        self._active = name
        if not self._disabled:
            chosen.install()

    def delete_adapter(self, name: str) -> None:
        """Drop a set. If it was active, the first of the others now is; with none left the backbone runs plain."""
        dropped = self.set_of(name)
        dropped.remove()
        del self.sets[name]
        if self._active == name:
            self._active = None
            if len(self.sets):
                self.set_adapter(next(iter(self.sets)))

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the plain backbone inside: ``with model.disable_adapter(): model(image)``, bit for bit."""
        with self._bare():
            was, self._disabled = self._disabled, True
            try:
                yield
            finally:
                self._disabled = was

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """Inside, the host has its own layers, whatever acts in them."""
        acting = [] if self._active is None or self._disabled else self._acting.weight_adapters
        merged = [a for a in acting if a.merged]
        for adapter in acting:
            adapter.remove()
        try:
            yield
        finally:
            for adapter in acting:
                adapter.install()
            for adapter in merged:
                adapter.merge()

    def hotswap_adapter(self, source: Any, name: str | None = None, strict: bool = False) -> None:
        """Put the tensors of a saved adapter into a set of the same methods and options: a compiled model goes on.

        Args:
            source: a folder, or ``adaptkit.load(folder)``.
            name: of the set; the active one by default.
            strict: as :func:`attach`.

        Raises ``ValueError`` where the file was made with other methods or options.
        """
        file = as_file(source)
        if file is None:
            raise ValueError(f"{source!r} is no saved adapter: give its folder, or adaptkit.load(folder)")
        check_fits(file, self.vit, strict)
        chosen = self._acting if name is None else self.set_of(name)
        for theirs, mine in differences(file.header, chosen.header()):
            raise ValueError(
                f"{file.path} holds {theirs}, this set has {mine}; a swap in place needs the same: load it as another "
                "set with add_adapter(file, name=...)"
            )
        chosen.load(file.tensors)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return how many parameters are trained, and how many there are."""
        every = list(self.parameters())
        return sum(p.numel() for p in every if p.requires_grad), sum(p.numel() for p in every)

    def print_trainable_parameters(self) -> None:
        """Print these numbers."""
        trained, every = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,} || all params: {every:,} || trainable%: {100 * trained / every:.4f}")

    # ------------------------------------------------------------------------------------------------------- merging

    def merge_adapter(self) -> None:
        """Add LoRA to the backbone's weights, so that it costs nothing; other adapters run as before.

        Raises ``TypeError`` where the active set has nothing that merges.
        """
        found = self._acting.weight_adapters
        if not found:
            raise TypeError(f"{', '.join(self.adapters) or 'a head'}: none of these can be merged into weights")
        if self.training:
            raise RuntimeError("merged weights are not trained: call eval() before merge_adapter()")
        for adapter in found:
            adapter.merge()

    def unmerge_adapter(self) -> None:
        """Put the backbone's weights back as they were, exactly."""
        for adapter in self._acting.weight_adapters:
            adapter.unmerge()

    def merge_and_unload(self) -> nn.Module:
        """Return the backbone with LoRA in its weights and nothing attached.

        Raises ``TypeError`` where other adapters are attached, for they are no weights of the backbone.
        """
        acting = self._acting
        others = [n for n, a in zip(acting.adapters, acting) if a not in acting.weight_adapters]
        if others or not acting.weight_adapters:
            raise TypeError(f"{', '.join(others) or 'no adapter'}: this cannot become weights of the backbone; merge a "
                            "set that is LoRA alone, or use merge_adapter() and keep the model")  # fmt: skip
        if self._inside is not None:
            raise TypeError("this backbone is a PeftModel: detach() it and call its own merge_and_unload()")
        sites = [site for a in acting.weight_adapters for site in a.sites()]
        self.eval().merge_adapter()
        merged = [(site.base, site.base.weight.detach().clone()) for site in sites]
        model = self.detach()
        with torch.no_grad():
            for base, weight in merged:
                base.weight.copy_(weight)
        return model

    # -------------------------------------------------------------------------------------------------------- saving

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that the file holds: ``<adapter>.<own key>`` and ``head.<own key>``."""
        return self._acting.tensors()

    def load_adapter_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Put such tensors back; ``ValueError`` names what is missing, unexpected or of another shape."""
        self._acting.load(tensors)

    def header(self, name: str | None = None) -> dict[str, Any]:
        """Return what the file of a set, by default the active one, says besides its tensors."""
        chosen = self._acting if name is None else self.set_of(name)
        return {**chosen.header(), "backbone": describe_backbone(self.vit)}

    def save(self, folder: str | os.PathLike[str], *, name: str | None = None, **metadata: Any) -> Path:
        """Write a set of adapters and their head, the active one or ``name``, to ``folder``: weights, config and card.

        Each file is written atomically. ``metadata`` (JSON values, e.g. ``task="segmentation"``, ``classes=[...]``) is
        kept in the header. Of several processes one should call this. Raises ``OSError`` where the folder cannot be
        written.
        """
        chosen = self._acting if name is None else self.set_of(name)
        header = {**self.header(name), "metadata": metadata}
        return write_folder(folder, header, chosen.tensors(), model_card(header))

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
        if self._active is not None:
            for adapter in self._acting.weight_adapters:
                adapter.remove()
        if self._inside is not None:
            self._inside.put_back()
        for module, mode in self._restore:
            module.training = mode
        for parameter, flag in [*self._restore_grad, *self._away()]:
            parameter.requires_grad_(flag)
        model = self.backbone
        self._vit = None
        del self.backbone
        return model


def _checked_name(name: str) -> str:
    if not name or "." in name or "/" in name:
        raise ValueError(f"adapters cannot be named {name!r}: a name is not empty and has no '.' and no '/'")
    return name


def _outputs(features: Features) -> list[Tensor]:
    logits = [] if features.logits is None else [features.logits]
    return [x for x in (features.tokens, features.prefix, *features.maps, *logits) if x.numel()]


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp_min(1.0))
