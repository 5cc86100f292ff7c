"""The backbone belongs to the user. What adaptkit changes in it is changed, and put back, here and nowhere else.

An :class:`Owner` keeps flags and modes by name, so that copies, ``load_state_dict(assign=True)``, ``to_empty`` and
moves between devices leave the record right, and knows which weight adapters are in the backbone and whether they are
merged. Going from one set of adapters to another is a transaction: all of it happens, or nothing.

The backbone holds its owner (an attribute of the module that is seen, gone after release), so that a second ``attach``
finds it taken. So does one to another tree of modules that holds some of the same parameters.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from adaptkit.adapters.base import ExistingLayers, WeightAdapter
from adaptkit.core.proxy import own_layer, restore
from adaptkit.core.tree import plain_name, skeleton
from adaptkit.hub.digest import digest, other_layers
from adaptkit.ops.forks import Lock

__all__ = ["Owner", "check_free", "mark_shared"]

MARK, SHARED = "_adaptkit_owner", "_adaptkit_shared"  #: attributes of a tree: who has it, and that it is only run
#: All living owners. Parameters are compared, never referred to weakly: torch would not swap them.
_owners: weakref.WeakSet[Owner] = weakref.WeakSet()
_lock = Lock()  # of the set, for models that several threads attach and detach, each its own


def mark_shared(tree: nn.Module) -> nn.Module:
    """Say that a tree holds the weights of another on purpose, and is only run; returns it."""
    vars(tree)[SHARED] = True
    return tree


def check_free(backbone: nn.Module, seen: nn.Module) -> None:
    """Raise ``ValueError`` where an adapted model has this backbone, or one that shares weights with it.

    What an adapted model that is gone has left, in this tree or in one that shares weights, is put back.
    """
    owner: Owner | None = vars(seen).get(MARK)
    if owner is not None and owner.model is not None:
        raise ValueError(
            f"this {type(backbone).__name__} has adapters already, those of another adapted model: add_adapter() there "
            "adds a set beside them, attach_many() runs several at once, and detach() gives the backbone back"
        )
    sharing = [] if _is_shared(backbone, seen) else [one for one in _living() if one is not owner]
    own = {id(parameter): name for name, parameter in seen.named_parameters()}
    found = [(one, both) for one in sharing if (both := next((own[i] for i in one.held() if i in own), None))]
    for one, name in found:
        if one.model is not None:
            raise ValueError(
                f"{name} of this {type(backbone).__name__} belongs to the backbone of another adapted model too, as "
                "weights of a copy made by expand_channels() do: detach() there first, or give copy.deepcopy(backbone)"
            )
    for one in [one for one, _ in found] + ([] if owner is None else [owner]):
        one.give_back()
    if owner is not None and vars(seen).get(MARK) is owner:  # a copy of a tree, of which its owner does not know
        owner.release(backbone, seen)


def _is_shared(backbone: nn.Module, seen: nn.Module) -> bool:
    return SHARED in vars(backbone) or SHARED in vars(seen)


def _living() -> list[Owner]:
    with _lock:
        return list(_owners)


class Owner:
    """What one adapted model has changed in one backbone.

    Args:
        existing: the layers of another library that it came with.
    """

    def __init__(self, existing: ExistingLayers | None = None) -> None:
        self.existing = existing
        self.installed: list[WeightAdapter] = []  #: adapters that are in the backbone now
        self.merged = False  #: whether its weights hold their change
        self.weights: dict[str, str] = {}  #: digest of the weights that can be trained, as they were taken
        self._model: weakref.ref[nn.Module] | None = None
        self._trees: tuple[weakref.ref[nn.Module], ...] = ()  # the backbone, and the part of it that is seen
        self._modes: dict[str, bool] = {}
        self._flags: dict[str, bool] = {}

    @property
    def model(self) -> Any:
        """The adapted model; None where it is gone."""
        return None if self._model is None else self._model()

    def belongs_to(self, model: nn.Module, backbone: nn.Module, seen: nn.Module) -> None:
        """Say which model this is of, and in which backbone: after a copy they are others."""
        self._model, self._trees = weakref.ref(model), (weakref.ref(backbone), weakref.ref(seen))
        with _lock:
            _owners.add(self)

    def held(self) -> Iterator[int]:
        """Go through the identities of the backbone's parameters, those that trained copies stand for too."""
        trees = [tree for tree in (ref() for ref in self._trees) if tree is not None]
        if trees and not _is_shared(trees[0], trees[-1]):
            yield from (id(parameter) for parameter in trees[0].parameters())
            yield from (id(tensor) for adapter in self.installed for tensor in adapter.originals().values())

    def give_back(self) -> None:
        """Release the backbone of a model that is gone; nothing where that is gone too."""
        trees = [tree for tree in (ref() for ref in self._trees) if tree is not None]
        if len(trees) == 2 and vars(trees[1]).get(MARK) is self:
            self.release(*trees)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None, "_trees": ()}

    # --------------------------------------------------------------------------------------- taking and giving back

    def take(self, backbone: nn.Module, seen: nn.Module, model: nn.Module) -> None:
        """Freeze the backbone. ``seen`` is the part of it that adapters act in."""
        self._modes = {n: m.training for n, m in backbone.named_modules(remove_duplicate=False)}
        self._flags = {n: p.requires_grad for n, p in backbone.named_parameters(remove_duplicate=False)}
        self.weights = digest(seen, trainable=True)
        vars(seen)[MARK] = self
        self.belongs_to(model, backbone, seen)
        if self.existing is not None:
            self.existing.take_out(seen)
        backbone.requires_grad_(False)

    def release(self, backbone: nn.Module, seen: nn.Module) -> None:
        """Leave the backbone as it was taken: layers, weights, flags and modes."""
        self._remove(seen)
        restore(seen)
        if self.existing is not None:
            self.existing.restore(seen)
        vars(seen).pop(MARK, None)
        with _lock:
            _owners.discard(self)
        modes, flags = _by_plain_name(self._modes), _by_plain_name(self._flags)
        for name, module in backbone.named_modules(remove_duplicate=False):
            module.training = self._modes.get(name, modes.get(plain_name(name), module.training))
        for name, parameter in backbone.named_parameters(remove_duplicate=False):
            flag = self._flags.get(name, flags.get(plain_name(name), parameter.requires_grad))
            # A backbone that was built under inference_mode allows this there alone.
            with torch.inference_mode() if parameter.is_inference() else nullcontext():
                parameter.requires_grad_(flag)

    # ------------------------------------------------------------------------------------------------ what is in it

    def install(self, seen: nn.Module, adapters: Sequence[WeightAdapter], merged: bool = False) -> None:
        """Have these adapters in the backbone and no others, merged or not. Raises what they raise; all or nothing."""
        before, was_merged = list(self.installed), self.merged
        try:
            self._go(seen, list(adapters), merged)
        except BaseException:
            self.installed = [*before, *(a for a in self.installed if a not in before)]
            self._remove(seen)  # wherever it stopped, all that was or came in goes out
            self._go(seen, before, was_merged)
            raise

    def _go(self, seen: nn.Module, adapters: list[WeightAdapter], merged: bool) -> None:
        if [id(a) for a in adapters] != [id(a) for a in self.installed]:
            self._remove(seen)
            for adapter in adapters:
                self.installed.append(adapter)
                adapter.install(seen)
        for adapter in self.installed:
            if merged and adapter.merges:
                adapter.merge()
            else:
                adapter.unmerge()
        self.merged = merged

    def _remove(self, seen: nn.Module) -> None:
        for adapter in reversed(self.installed):
            adapter.remove(seen)
        self.installed, self.merged = [], False

    def as_given(self, seen: nn.Module) -> nn.Module:
        """Return a copy of the tree with the layers and tensors that are the backbone's own, whatever is in it now.

        Nothing is touched: the model may run in another thread meanwhile.
        """
        given = skeleton(seen, own_layer)
        for adapter in reversed(self.installed):  # what the first one found there is the backbone's own
            for name, tensor in adapter.originals().items():
                path, _, key = name.rpartition(".")
                module = given.get_submodule(path)
                own: dict[str, Any] = module._parameters if key in module._parameters else module._buffers
                weight = own is module._parameters and not isinstance(tensor, nn.Parameter)
                own[key] = nn.Parameter(tensor, requires_grad=False) if weight else tensor
        return given

    def check_untrained(self, seen: nn.Module) -> None:
        """Raise ``ValueError`` where somebody has trained the backbone: a file of adapters would lose that.

        ``seen``: :meth:`as_given`.
        """
        layers, _ = other_layers(self.weights, digest(seen, trainable=True), classifier=True)
        if layers:
            raise ValueError(
                f"the backbone has other weights than when it was attached to, in {', '.join(layers[:4])}"
                f"{' and more' if len(layers) > 4 else ''}; a file of adapters does not hold them: name what you train "
                f"when you attach, attach(..., train_backbone={tuple(layers[:2])}), and it is saved; or detach() and "
                "save the backbone itself"
            )

    def check(self, seen: nn.Module) -> None:
        """Raise ``RuntimeError`` where somebody has replaced a layer that an adapter is in: it would be ignored."""
        for adapter in self.installed:
            adapter.check(seen)


def _by_plain_name(record: dict[str, bool]) -> dict[str, bool]:
    return {plain_name(name): value for name, value in record.items()}
