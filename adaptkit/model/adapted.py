"""``attach``: a frozen backbone and trainable adapters in one module."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit import _cpu  # noqa: F401  fast paths are registered by importing them
from adaptkit.adapters.base import ExistingLayers
from adaptkit.core import registry
from adaptkit.core.tree import evaluating
from adaptkit.core.view import Features, ViT
from adaptkit.features.cached import CachedFeatures
from adaptkit.features.replay import CachedView, replay
from adaptkit.hub.backbone import describe_backbone
from adaptkit.hub.card import card_beside
from adaptkit.hub.file import write_folder
from adaptkit.hub.metadata import plain
from adaptkit.hub.repository import Commit, push
from adaptkit.model.building import view_of
from adaptkit.model.described import describe
from adaptkit.model.ensemble import averaged
from adaptkit.model.facts import Facts
from adaptkit.model.forward import run
from adaptkit.model.image import check_image
from adaptkit.model.owner import Owner, check_free
from adaptkit.model.parts import AdapterSet
from adaptkit.model.proof import prove
from adaptkit.model.sets import build_set, checked_name, ordinary_tensors
from adaptkit.model.shown import ShownModel
from adaptkit.model.trainable import check_trained, tensors_in
from adaptkit.model.verbs import Verbs
from adaptkit.predict.predicts import Predicts
from adaptkit.predict.tasks import Described

__all__ = ["AdaptedModel", "adapted_in", "attach", "list_adapters", "list_heads"]


def attach(
    model: nn.Module,
    *adapters: Any,
    head: Any = None,
    name: str = "default",
    strict: bool = False,
    train_backbone: Sequence[str] = (),
    positions: str | None = None,
    **options: Any,
) -> AdaptedModel:
    """Freeze ``model`` and attach adapters to it, and optionally a head.

    Args:
        model: the backbone, a vision transformer of timm, transformers, torchvision, open_clip or torch.hub;
            ``adaptkit doctor NAME`` says what attaches to it. The LoRA of a ``PeftModel`` becomes the adapter
            ``"lora"``: it is trained if it was trainable, and saved in the same file.
        adapters: each a name (``"vit-adapter"``), a config (``ViTAdapterConfig(injector=False)``, or peft's
            ``LoraConfig(r=16)``), a pair ``("vit-adapter", {"injector": False})``, or a saved adapter: its folder,
            ``"org/name"`` on the Hub, or what ``adaptkit.load`` returns. A folder that peft saved is taken too.
        head: a config (``LinearHeadConfig(num_classes=21)``), a pair ``("linear", {"num_classes": 21})``, or your
            own module, called with :class:`~adaptkit.core.view.Features`. A saved adapter brings its own head.
        name: of this set of adapters, for :meth:`AdaptedModel.set_adapter`.
        strict: raise an error, not a warning, where the backbone's weights are not those the file was trained on.
        train_backbone: parts of the backbone to train as well, by the names of its modules or parameters, or patterns
            of them: ``("blocks.11", "norm")``, ``("*.bias",)``. They are saved in the file; ``detach()`` gives the
            backbone back without them, ``detach(keep=True)`` with them.
        positions: how position embeddings are resampled to another grid: ``"bicubic"`` (as transformers does it) or
            ``"bicubic antialias"`` (timm), so that a file from one library gives the same output on the other at any
            size. None: as the backbone does it. The file records the rule; attaching it under another one warns.
        options: of the adapter, where it is the only one and given by name: ``attach(m, "vit-adapter", norm="group")``.

    Returns the adapted model on the backbone's device, in training mode, or in eval mode where a saved adapter is
    attached. ``model`` is changed only after everything that can fail has been built and checked.

    Raises ``TypeError`` for a backbone of an unknown class or one that does not compute what its class does, and
    ``ValueError`` for an unknown name or option, a saved adapter that does not fit, a backbone that another adapted
    model holds, and a parameter that no gradient would reach.
    """
    if isinstance(model, AdaptedModel):
        raise TypeError(
            "this model has adapters already: attach all of them in one call, or detach() first; "
            "add_adapter() adds a set under another name"
        )
    if options:
        if len(adapters) != 1 or not isinstance(adapters[0], str):
            given = ", ".join(options)
            raise TypeError(f"{given}: options go with one adapter given by name; otherwise use (name, {{...}})")
        adapters = ((adapters[0], options),)
    checked_name(name)
    with ordinary_tensors():
        vit = view_of(model, adapters)
        check_free(model, vit.backbone)
        prove(vit)
        if positions is not None:
            vit.follow(positions)
        existing = _existing(vit.backbone)
        every = adapters if existing is None else (existing.config, *adapters)
        built, loaded = build_set(every, head, vit, strict, train_backbone)
        if existing is not None:
            existing.share(built.adapters[existing.adapter])
        check_trained(vit, built, run)
        return AdaptedModel(model, vit, built, name, Owner(existing)).train(not loaded)


def _existing(backbone: nn.Module) -> ExistingLayers | None:
    """The adapter that a backbone came with, if any: the LoRA of a ``PeftModel``."""
    found = (entry.module.existing(backbone) for entry in registry.adapters().values())  # type: ignore[attr-defined]
    return next((layers for layers in found if layers is not None), None)


def list_adapters() -> list[str]:
    """Return the names that ``attach`` takes."""
    return sorted(registry.adapters())


def list_heads() -> list[str]:
    """Return the names that ``attach(head=...)`` takes."""
    return sorted(registry.heads())


class AdaptedModel(Predicts, ShownModel, Facts, Verbs):
    """A frozen backbone with adapters, as :func:`attach` builds it; ``model(image)`` returns ``Features``.

    The backbone is never trained: no parameter of it requires a gradient and it stays in eval mode whatever
    ``train()`` is told. Several sets of adapters can be attached, each with a name; one is active at a time.

    ``print(model)`` is ten lines; ``print(torch.nn.Module.__repr__(model))`` is every module in it.
    """

    # ------------------------------------------------------------------------------------------------------ running

    def forward(self, image: Tensor | CachedFeatures) -> Features:
        """Image (B, C, H, W) of any size, normalised as the backbone expects -> features.

        Given the result of :meth:`extract`, the adapters and the head run on it without the backbone. Raises
        ``TypeError`` or ``ValueError`` for anything else (:mod:`adaptkit.model.image`).
        """
        if self._shares and not self._disabled:
            if torch.compiler.is_compiling():
                raise RuntimeError("an ensemble switches adapters between passes: compile the blocks, not the model")
            return averaged(self._shares, lambda name: self._by(name, image))
        return self._run(image)

    def _by(self, name: str, image: Tensor | CachedFeatures) -> Features:
        with self._alone(name):
            return self._run(image)

    def _run(self, image: Tensor | CachedFeatures) -> Features:
        if isinstance(image, CachedFeatures):
            return run(CachedView(self.vit, image), self._reading(image), image.image_or_shape())
        vit = self.vit
        check_image(vit, image)
        if not torch.compiler.is_compiling():
            self._owner.check(vit.backbone)
        if self._disabled or self._active is None:
            features = vit.features(image)
            return features._replace(logits=vit.logits(features))
        return run(vit, self._acting, image)

    def _check_built(self, built: AdapterSet) -> None:
        check_trained(self.vit, built, run)

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(
            "nn.DataParallel copies modules piece by piece and would run the adapters on the first device's backbone: "
            "use DistributedDataParallel, one process for each GPU"
        )

    @torch.no_grad()
    def extract(self, image: Tensor) -> CachedFeatures:
        """Run the backbone on images (B, C, H, W) and keep the features that the active adapters read.

        ``model(cached)`` then runs adapters and head on them, without the backbone. Raises ``ValueError`` for a
        hierarchical backbone, and where an adapter changes what the blocks compute and so needs them to run.
        """
        if not isinstance(self.vit, ViT):
            raise ValueError(
                f"{type(self.vit.backbone).__name__} has stages, whose outputs are not cached; use a plain ViT"
            )
        check_image(self.vit, image)
        seen: Any = replay(self.vit, self._framed(image))
        return self._seen(image, [seen.states[i + 1] for i in self.reads()[0]])

    def _framed(self, image: Tensor) -> Tensor:
        """Images as the backbone gets them: padded by the side adapter where that pads on all sides."""
        side = self._readers().side
        return image if side is None else side.framed(image)

    def _seen(self, image: Tensor, states: Sequence[Tensor]) -> CachedFeatures:
        """What the adapters read of these images: tokens (B, P+N, D) after the blocks of :meth:`reads`."""
        (after, reads_image), size = self.reads(), (image.shape[-2], image.shape[-1])
        kept = image if reads_image else None
        return CachedFeatures(tuple(states), after, size, self.spec.patch_size, kept, self._acting.pad)

    def record(self, image: Tensor) -> CachedFeatures:
        """Old name of :meth:`extract`."""
        warnings.warn("record() is called extract() now; the old name will go", DeprecationWarning, stacklevel=2)
        return self.extract(image)

    def reads(self) -> tuple[tuple[int, ...], bool]:
        """Return the blocks whose outputs the active adapters read, and whether they read the image too.

        Raises ``ValueError`` as :meth:`extract`.
        """
        acting = self._readers()
        image = acting.side is not None and acting.side.reads_image()
        return tuple(sorted({*acting.reads, self.spec.depth - 1})), image

    @property
    def pad(self) -> str:
        """Where the active adapters pad an image to whole patches: ``"corner"`` or ``"centre"``."""
        return self._acting.pad

    def _reading(self, seen: CachedFeatures) -> AdapterSet:
        """Those that read these features; ``ValueError`` where they pad images otherwise than was done."""
        acting = self._readers()
        if acting.pad != seen.pad and any(side % seen.patch for side in seen.size):
            raise ValueError(
                f"the features are of images of {seen.size[0]}x{seen.size[1]} pixels, padded to whole patches with "
                f"pad={seen.pad!r}, and these adapters pad with {acting.pad!r}: extract them with this model"
            )
        return acting

    def _readers(self) -> AdapterSet:
        acting = self._acting
        if self._disabled:
            raise ValueError("the adapters are disabled, so nothing reads cached features: leave disable_adapter()")
        why = "there are several, which read other blocks; make one active" if self._shares else acting.why_alone()
        if why:
            raise ValueError(f"these adapters cannot run on cached features: {why}")
        return acting

    # ---------------------------------------------------------------------------------------------------- predicting

    @property
    def metadata(self) -> dict[str, Any]:
        """What the file of the active set says beside tensors and configs: ``task``, ``classes``, ``size``, ..."""
        return {} if self._active is None else dict(self._acting.metadata)

    def described(self) -> Described:
        """Return what the model predicts: its head's ``answers``, or the ``task`` in its file.

        Without a head it predicts the backbone's own classes. Raises ``TypeError`` where there is no classifier either,
        and for a head of your own that has no ``answers`` and no ``task``.
        """
        return describe(self.vit, self.metadata, self.head, self)

    # -------------------------------------------------------------------------------------------------------- saving

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that the file holds: ``<adapter>.<own key>`` and ``head.<own key>``."""
        return self._acting.tensors()

    def load_adapter_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Put such tensors back; ``ValueError`` names what is missing, unexpected or of another shape."""
        self._load(self._acting, tensors)

    def header(self, name: str | None = None, **metadata: Any) -> dict[str, Any]:
        """Return the header of a set's file, by default the active one's; ``metadata`` as :meth:`save` takes them."""
        chosen = self._acting if name is None else self.set_of(name)
        said = plain({**chosen.metadata, **metadata})
        return {**chosen.header(), "backbone": describe_backbone(self._given_view(), said), "metadata": said}

    def _given_view(self) -> Any:
        """The view of a copy of the backbone as it was given: nothing in it, nothing merged, nothing trained."""
        given = copy.copy(self.vit)
        given.backbone = self._owner.as_given(given.backbone)
        return given

    def check_untrained(self) -> None:
        """Raise ``ValueError`` where the backbone itself has other weights than when it was attached to."""
        self._owner.check_untrained(self._given_view().backbone)

    def save(self, folder: str | os.PathLike[str], *, name: str | None = None, **metadata: Any) -> Path:
        """Write a set of adapters and their head, the active one or ``name``, to ``folder``: weights, config and card.

        All is serialised before anything is written, and all is written or nothing. ``metadata`` (e.g.
        ``task="segmentation"``, ``classes=[...]``; see :func:`adaptkit.hub.metadata.plain`) is kept in the header
        beside what the file that was loaded says; ``mean=`` and ``std=`` say how the images were normalised, where that
        is not as the backbone says. A README.md in the folder that adaptkit did not write stays as it is. Of several
        processes one should call this.

        Raises ``ValueError`` for metadata that JSON cannot say, and for a backbone that was trained since it was
        attached to but for ``train_backbone``; ``OSError`` where the folder cannot be written.
        """
        if name is None and self._shares:
            raise ValueError(f"an ensemble is not one file: save its sets one by one, name={' or '.join(self._shares)}")
        self.check_untrained()
        chosen = self._acting if name is None else self.set_of(name)
        header = self.header(name, **metadata)
        return write_folder(folder, header, chosen.tensors(), card_beside(folder, header))

    def push(self, repo_id: str, **options: Any) -> Commit:
        """Upload what ``save`` writes to a model repository on the Hub; see :func:`adaptkit.hub.repository.push`."""
        return push(self, repo_id, **options)

    @torch.no_grad()
    def verify(self, image: Tensor, tolerance: float = 1e-5) -> float:
        """Check that an adapter gives the same output however it runs: ``"adavit"`` packed, masked, and all kept.

        Args:
            image: (B, C, H, W).
            tolerance: how far a value may be off, as a share of the largest value of its output (at least 1).

        Returns the largest such difference over all outputs. Raises ``RuntimeError`` where it exceeds the tolerance,
        and ``TypeError`` where no adapter runs in more than one way.
        """
        self.check_one_acts()
        with evaluating(self):
            pairs = {what: two for a in self._acting for what, two in a.ways(self, self.vit, image).items()}
        if not pairs:
            raise TypeError(
                f"{', '.join(self._acting.adapters) or 'no adapter'}: nothing to verify, it runs in one way; 'adavit' "
                "runs in several"
            )
        worst = 0.0
        for what, (one, other) in pairs.items():
            off = max(_distance(a, b) for a, b in zip(_outputs(one), _outputs(other)))
            worst = max(worst, off)
            if not off <= tolerance:
                raise RuntimeError(
                    f"{what} by {off:.1e}, more than {tolerance:.1e}; report the backbone "
                    f"({type(self.backbone).__name__}), and use execution='masked' with it if packed execution differs"
                )
        return worst


def adapted_in(model: nn.Module, verb: str) -> AdaptedModel:
    """Return the adapted model that this one is or holds; ``TypeError`` where there is none for this verb."""
    found = next((m for m in model.modules() if isinstance(m, AdaptedModel)), None)
    if found is None:
        raise TypeError(f"{type(model).__name__} holds nothing that attach() made: attach an adapter, then {verb}")
    return found


def _outputs(features: Features) -> list[Tensor]:
    read = [features.tokens, features.prefix, *features.maps, features.logits]
    return [x for x in tensors_in(read) if x.numel()]


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp_min(1.0))
