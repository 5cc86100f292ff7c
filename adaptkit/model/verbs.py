"""What can be done with named sets of adapters, by peft's verbs: add, set, delete, disable, hotswap, merge, detach."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from adaptkit.core.packed import numel
from adaptkit.core.proxy import write
from adaptkit.hub.file import metadata_of
from adaptkit.hub.fits import check_fits
from adaptkit.model.building import as_file
from adaptkit.model.ensemble import shares_of
from adaptkit.model.parts import AdapterSet, differences
from adaptkit.model.sets import NamedSets, build_set, checked_name, ordinary_tensors

__all__ = ["Verbs"]


class Verbs(NamedSets):
    """Named sets that can be changed. Every verb is a transaction: it happens, or nothing does."""

    # ---------------------------------------------------------------------------------------------- several adapters

    def add_adapter(
        self, *adapters: Any, name: str, head: Any = None, strict: bool = False, train_backbone: Sequence[str] = ()
    ) -> None:
        """Attach another set under a name, as :func:`attach` takes it. It does not act before :meth:`set_adapter`.

        One from a file is in eval mode until then.
        """
        if checked_name(name) in self.sets:
            raise ValueError(f"adapters named {name!r} are there already; delete_adapter({name!r}), or choose a name")
        with ordinary_tensors(), self.disable_adapter():  # on the backbone's own weights, nothing merged or trained
            built, loaded = build_set(adapters, head, self.vit, strict, train_backbone)
            self._check_built(built)
        self.sets[name] = built.train(self.training and not loaded)
        self._settle_flags()

    def _check_built(self, built: AdapterSet) -> None:
        """Prove of a set that is to be added what a subclass demands."""

    def set_adapter(self, name: str | Sequence[str], weights: Sequence[float] | None = None) -> None:
        """Make this set the active one: it alone runs and is trained, in the mode of the model. Nothing is recompiled
        for a set seen before.

        Args:
            name: of the set; or several names, an ensemble to predict with. Then each set runs alone, in a pass of its
                own, and tokens, maps and logits (before the softmax) are averaged (:mod:`adaptkit.model.ensemble`).
                Metadata, and so what is predicted, are those of the first.
            weights: of an ensemble, one for each name, brought to a sum of 1; None: equal ones.

        Raises ``ValueError`` for an unknown name and weights that do not fit, ``RuntimeError`` for an ensemble in
        training mode or a model that was detached.
        """
        _ = self.vit  # of a detached model no name is asked for
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
        self._settle_mode_of(*(shares or (first,)))

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
        """Drop a set. If it was active, the first of the others now is; with none left the backbone runs plain.

        Raises ``ValueError`` for an unknown name, ``RuntimeError`` for a model that was detached.
        """
        _ = self.vit
        dropped = self.set_of(name)
        others = [n for n in self.sets if n != name]
        with self._changing():
            self._shares = {} if name in self._shares else self._shares
            if self._active == name:
                self._active, self._merged = next(iter(others), None), False
        del self.sets[name]
        if self._active is not None:
            self._settle_mode_of(self._active)
        rest = [(p, p.requires_grad) for one in self.sets.values() for p in one.parameters()]
        _thaw(dropped)
        for parameter, flag in rest:  # a head of the user's may be in two sets
            parameter.requires_grad_(flag)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the plain backbone inside: ``with model.disable_adapter(): model(image)``, bit for bit.

        An image is padded to the patch, or to the first stride of a backbone with stages; where the backbone alone
        does not pad (PoolFormer, NaFlex), what it says of such sizes is another.

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
        difference = next(differences(file.header, chosen.header()), None)
        if difference is not None:
            raise ValueError(
                f"{file.path} holds {difference[0]}, this set has {difference[1]}; a swap in place needs the same: "
                "load it as another set with add_adapter(file, name=...)"
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
        """Return how many parameters are trained, and how many there are; weights packed in 4 bits count each."""
        counts = [(numel(p), p.requires_grad) for p in self.parameters()]
        return sum(n for n, is_trained in counts if is_trained), sum(n for n, _ in counts)

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
