"""Named sets of adapters on one frozen backbone: which are there, which one acts, and what its weights hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn

from adaptkit.core.near import hint
from adaptkit.core.proxy import write
from adaptkit.core.view import View
from adaptkit.hub.file import check_fits, metadata_of
from adaptkit.model.ensemble import shares_of
from adaptkit.model.owner import Owner
from adaptkit.model.parts import AdapterSet, as_file, differences, head_of, parts_of

__all__ = ["NamedSets", "build_set", "checked_name", "ordinarily"]


@contextmanager
def ordinarily() -> Iterator[None]:
    """Inside, tensors are made as torch makes them by itself, on the CPU and for autograd, whatever the caller entered.

    What is built under ``torch.inference_mode()`` could never be trained, and under ``torch.device("meta")`` it would
    have no values.
    """
    on_cpu = torch.get_default_device().type == "cpu"  # as a rule: a device that is entered slows every small call
    with torch.inference_mode(False), nullcontext() if on_cpu else torch.device("cpu"):
        yield


def build_set(
    adapters: tuple[Any, ...], head: Any, vit: View, strict: bool, train_backbone: Sequence[str] = ()
) -> tuple[AdapterSet, bool]:
    """Build a set of adapters for this backbone, and say whether a file was loaded; arguments as of ``attach``."""
    parts, files = parts_of(adapters, vit, strict)
    chosen, head_file = head_of(head, files)
    return AdapterSet(vit, parts, chosen, head_file, train_backbone, files), bool(files)


def checked_name(name: Any) -> str:
    """Return the name of a set; ``ValueError`` for one that no module can have."""
    if not isinstance(name, str) or not name or "." in name or "/" in name:
        raise ValueError(f"adapters cannot be named {name!r}: a name is not empty and has no '.' and no '/'")
    if name in dir(nn.ModuleDict()):
        raise ValueError(f"adapters cannot be named {name!r}: torch's modules use the name; choose another")
    return name


class NamedSets(nn.Module):
    """A frozen backbone and sets of adapters by name, of which one is active; how it runs is the subclass's business.

    The backbone is never trained but for parts named by ``train_backbone``: no parameter of it requires a gradient and
    it stays in eval mode whatever ``train()`` is told. Every verb is a transaction: it happens, or nothing does.
    """

    def __init__(self, model: nn.Module, vit: View, built: AdapterSet, name: str, owner: Owner) -> None:
        super().__init__()
        self._vit: View | None = vit
        self._owner = owner
        self._given = (model,)  # a tuple: registered once, as ``backbone``
        self._active: str | None = name
        self._shares: dict[str, float] = {}  # of an ensemble, whose first set is the active one
        self._disabled = 0
        self._merged = False
        self._together = False  # whether all sets act at once, each on its own rows (attach_many)
        self.sets = nn.ModuleDict({name: built})
        self.backbone = model
        self.register_load_state_dict_pre_hook(_refuse_while_merged)
        self.register_load_state_dict_post_hook(_after_loading)
        owner.take(model, vit.backbone, self)
        try:
            self._settle()
        except BaseException:
            owner.release(model, vit.backbone)
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"_shares": {}, **state})  # a pickle from before there were ensembles has none
        self._owner.belongs_to(self)  # a copy has the copied backbone, and its owner

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        _after_loading(self)
        return self

    # ------------------------------------------------------------------------------------------- what it is made of

    @property
    def vit(self) -> Any:
        """The view of the backbone."""
        if self._vit is None:
            raise RuntimeError("this model was detached: attach to the backbone again")
        if self._modules.get("backbone") is not self._given[0]:
            raise RuntimeError(
                "model.backbone was replaced by another module, which the adapters do not know: detach() and attach to "
                "that one; to compile or wrap, take the adapted model as a whole or the blocks of its backbone"
            )
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
            there = ", ".join(map(repr, self.sets)) or "none"
            raise ValueError(f"no adapters are named {name!r}{hint(name, self.sets)}; there are {there}")
        found: Any = self.sets[name]
        return found

    def train(self, mode: bool = True) -> Self:
        """Set the mode of adapters and head; the backbone stays in eval mode, but for the parts that are trained.

        Raises ``RuntimeError`` while merged and for an ensemble, before any mode is changed.
        """
        if mode and self._shares:
            raise RuntimeError(
                f"an ensemble ({', '.join(self._shares)}) is not trained: set_adapter() one of them first"
            )
        if mode and self._merged:
            raise RuntimeError("adapters are merged into the weights: unmerge_adapter() before training")
        super().train(mode)
        if self._vit is not None:
            self._settle_modes()
        return self

    # --------------------------------------------------------------------------------- the state, and how it is reached

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Change ``_active``, ``_shares``, ``_disabled`` and ``_merged`` inside; afterwards the backbone is as they
        say, or all as it was."""
        _ = self.vit
        before = self._active, self._shares, self._disabled, self._merged
        try:
            yield
            self._settle()
        except BaseException:
            self._active, self._shares, self._disabled, self._merged = before
            self._settle()
            raise

    def _settle(self) -> None:
        """Have in the backbone what is active, and train that; nothing is done where it is so already."""
        acting = [] if self._active is None or self._disabled else self._acting.weight_adapters
        if not self._together:
            self._owner.install(self.vit.backbone, acting, self._merged and not self._disabled)
        self._settle_flags()
        self._settle_modes()

    def _settle_flags(self) -> None:
        """Only the active set is trained, so that no optimiser waits for the others; one module may be in two."""
        acts = {name: self._together or name == self._active for name in self.sets}
        live: list[tuple[nn.Parameter, bool]] = []
        for name in self.sets:
            one = self.set_of(name)
            if one.flags is None:
                one.flags = {n: p.requires_grad for n, p in one.named_parameters()}
            if acts[name]:
                live += [(p, one.flags.get(n, p.requires_grad)) for n, p in one.named_parameters()]
        for name in (n for n in self.sets if not acts[n]):
            self.sets[name].requires_grad_(False)
        for parameter, flag in live:
            parameter.requires_grad_(flag)
        for name in (n for n in self.sets if acts[n]):
            self.set_of(name).flags = None  # while it acts, its flags are the parameters' own

    def _settle_modes(self) -> None:
        self.backbone.eval()
        trained = None if self._active is None or self._disabled else self._acting.backbone
        if trained is not None:
            trained.train_backbone_modes(self.vit.backbone, self.training)

    # ---------------------------------------------------------------------------------------------- several adapters

    def add_adapter(
        self, *adapters: Any, name: str, head: Any = None, strict: bool = False, train_backbone: Sequence[str] = ()
    ) -> None:
        """Attach another set under a name, as :func:`attach` takes it. It does not act before :meth:`set_adapter`."""
        if checked_name(name) in self.sets:
            raise ValueError(f"adapters named {name!r} are there already; delete_adapter({name!r}), or choose a name")
        with ordinarily(), self.disable_adapter():  # on the backbone's own weights: nothing merged or trained in place
            built, loaded = build_set(adapters, head, self.vit, strict, train_backbone)
            self._check_built(built)
        self.sets[name] = built.train(self.training and not loaded)
        self._settle_flags()

    def _check_built(self, built: AdapterSet) -> None:
        """Prove of a set that is to be added what a subclass demands."""

    def set_adapter(self, name: str | Sequence[str], weights: Sequence[float] | None = None) -> None:
        """Make this set the active one: it alone runs and is trained. Nothing is recompiled for a set seen before.

        Args:
            name: of the set; or several names, an ensemble to predict with. Then each set runs alone, in a pass of its
                own, and tokens, maps and logits (before the softmax) are averaged (:mod:`adaptkit.model.ensemble`).
                Metadata, and so what is predicted, are those of the first.
            weights: of an ensemble, one for each name, brought to a sum of 1; None: equal ones.

        Raises ``ValueError`` for an unknown name and weights that do not fit, ``RuntimeError`` for an ensemble in
        training mode.
        """
        if isinstance(name, str):
            if weights is not None:
                raise ValueError(f"weights={list(weights)} with the set {name!r} alone: they are for several names")
            first, shares = name, {}
        else:
            shares = shares_of(name, weights)
            first = name[0]
            if self.training or self._together:
                raise RuntimeError("an ensemble is not trained: call eval() before set_adapter([...]), on a model of "
                                   "attach()")  # fmt: skip
        for one in shares or (first,):
            self.set_of(one)
        with self._changing():
            self._merged = self._merged and not shares and first == self._active
            self._active, self._shares = first, shares

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Have one set of an ensemble act inside."""
        before = self._active, self._shares
        with self._changing():
            self._active, self._shares = name, {}
        try:
            yield
        finally:
            with self._changing():
                self._active, self._shares = before

    def delete_adapter(self, name: str) -> None:
        """Drop a set. If it was active, the first of the others now is; with none left the backbone runs plain."""
        dropped = self.set_of(name)
        others = [n for n in self.sets if n != name]
        with self._changing():
            self._shares = {} if name in self._shares else self._shares
            if self._active == name:
                self._active, self._merged = next(iter(others), None), False
        del self.sets[name]
        rest = [(p, p.requires_grad) for one in self.sets.values() for p in one.parameters()]
        _thaw(dropped)
        for parameter, flag in rest:  # a head of the user's may be in two sets
            parameter.requires_grad_(flag)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the plain backbone inside: ``with model.disable_adapter(): model(image)``, bit for bit.

        What is active and merged when it is left acts again: also a set that was made the active one inside.
        """
        with self._changing():
            self._disabled += 1
        try:
            yield
        finally:
            if self._vit is not None:  # detached inside: there is nothing to put back
                with self._changing():
                    self._disabled -= 1

    def hotswap_adapter(self, source: Any, name: str | None = None, strict: bool = False) -> None:
        """Put the tensors of a saved adapter into a set of the same methods and options: a compiled model goes on.

        Args:
            source: a folder, or ``adaptkit.load(folder)``.
            name: of the set; the active one by default. Where it is merged, the new tensors are.
            strict: as :func:`attach`.

        Raises ``ValueError`` where the file was made with other methods or options.
        """
        file = as_file(source)
        if file is None:
            raise ValueError(f"{source!r} is no saved adapter: give its folder, or adaptkit.load(folder)")
        chosen = self._acting if name is None else self.set_of(name)
        with self.disable_adapter():
            check_fits(file, self.vit, strict)
        for theirs, mine in differences(file.header, chosen.header()):
            raise ValueError(
                f"{file.path} holds {theirs}, this set has {mine}; a swap in place needs the same: load it as another "
                "set with add_adapter(file, name=...)"
            )
        self._load(chosen, file.tensors)
        chosen.metadata = metadata_of([file])

    def _load(self, chosen: AdapterSet, tensors: dict[str, Tensor]) -> None:
        """Load tensors into a set, also one that is merged; with an error it is as it was."""
        before = {key: tensor.clone() for key, tensor in chosen.tensors().items()}
        merged = self._merged and self._active is not None and chosen is self._acting
        if not merged:
            chosen.load(tensors)
            return
        with self._changing():
            self._merged = False
        try:
            chosen.load(tensors)
            with self._changing():
                self._merged = True
        except BaseException:
            chosen.load(before)
            with self._changing():
                self._merged = True
            raise

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

        Raises ``TypeError`` where the active set has nothing that merges, or weights are quantised, ``ValueError``
        where a merged weight would not be finite, and ``RuntimeError`` in training or inside ``disable_adapter()``.
        """
        _ = self.vit
        if not any(adapter.merges for adapter in self._acting.weight_adapters):
            raise TypeError(f"{', '.join(self.adapters) or 'a head'}: none of these can be merged into weights")
        if self._shares:
            raise RuntimeError("of an ensemble nothing is merged: each set has a pass of its own")
        if self.training:
            raise RuntimeError("merged weights are not trained: call eval() before merge_adapter()")
        if self._disabled:
            raise RuntimeError("adapters are disabled here: merge_adapter() after the with block")
        with self._changing():
            self._merged = True

    def unmerge_adapter(self) -> None:
        """Put the backbone's weights back as they were, exactly."""
        _ = self._acting
        with self._changing():
            self._merged = False

    def merge_and_unload(self) -> nn.Module:
        """Return the backbone with LoRA in its weights and nothing attached.

        Raises ``TypeError`` where other adapters are attached, for they are no weights of the backbone.
        """
        _, acting = self.vit, self._acting
        inside = acting.weight_adapters
        others = [n for n, a in zip(acting.adapters, acting) if a not in inside]
        if others or not inside:
            raise TypeError(f"{', '.join(others) or 'no adapter'}: this cannot become weights of the backbone; merge a "
                            "set that is LoRA alone, or use merge_adapter() and keep the model")  # fmt: skip
        if self._owner.existing is not None:
            raise TypeError("this backbone is a PeftModel: detach() it and call its own merge_and_unload()")
        self.eval()
        if any(adapter.merges for adapter in inside):
            self.merge_adapter()
        backbone, changed = self.vit.backbone, {name: tensor for a in inside for name, tensor in a.weights().items()}
        model = self.detach()
        write(backbone, changed)
        return model

    def detach(self, keep: bool = False) -> nn.Module:
        """Return the very backbone that was given, its training modes and ``requires_grad`` flags as they were.

        Args:
            keep: leave what was trained of the backbone (``train_backbone``) in its weights.
        """
        if self._vit is None:
            raise RuntimeError("this model was detached already")
        backbone, model = self._vit.backbone, self._given[0]  # also where another module was put into its place
        trained = None if self._active is None else self._acting.backbone
        kept = trained.weights() if keep and trained is not None else {}
        self._owner.release(model, backbone)
        if kept:
            write(backbone, kept)
        for one in self.sets.values():
            _thaw(one)
        self._vit, self._given, self._merged = None, (None,), False
        del self.backbone
        return model


def _thaw(one: Any) -> None:
    """A set that is no longer one of several is trained as it would be if it acted."""
    for name, parameter in one.named_parameters():
        parameter.requires_grad_((one.flags or {}).get(name, parameter.requires_grad))
    one.flags = None


def _refuse_while_merged(module: Any, *_: Any) -> None:
    if module._merged:
        raise RuntimeError("adapters are merged into the weights: unmerge_adapter() before load_state_dict()")


def _after_loading(module: Any, *_: Any) -> None:
    """``assign=True`` and ``to_empty`` make new parameters: those of the active set go where the old ones were."""
    if module._vit is not None:
        module._owner.check(module._vit.backbone)
