"""Named sets of adapters on one frozen backbone: which are there, and how the backbone is brought to the one that acts.

What changes them is in :mod:`adaptkit.model.verbs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Self

import torch
from torch import nn

from adaptkit.core.near import hint
from adaptkit.core.view import View
from adaptkit.model.building import parts_of
from adaptkit.model.owner import Owner
from adaptkit.model.parts import AdapterSet
from adaptkit.model.saved_head import head_of

__all__ = ["NamedSets", "build_set", "checked_name", "ordinary_tensors"]


@contextmanager
def ordinary_tensors() -> Iterator[None]:
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
    it stays in eval mode whatever ``train()`` is told.
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
        if self._vit is not None:
            self._owner.belongs_to(self, self.backbone, self._vit.backbone)  # those of the copy

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

    def check_one_acts(self) -> None:
        """Raise ``TypeError`` for the mean of several sets, which has no one inside to look at."""
        if self._shares and not self._disabled:
            raise TypeError(
                f"the sets {', '.join(self._shares)} act as their mean, each in a pass of its own: look at one, "
                f"model.set_adapter({next(iter(self._shares))!r})"
            )

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

    def _settle_mode_of(self, *names: str) -> None:
        """Give sets that act the mode of the model. One that has it keeps what was said to modules inside it."""
        for one in (self.sets[name] for name in names):
            if one.training != self.training:
                one.train(self.training)

    def _settle_modes(self) -> None:
        self.backbone.eval()
        trained = None if self._active is None or self._disabled else self._acting.backbone
        if trained is not None:
            trained.train_backbone_modes(self.vit.backbone, self.training)


def _refuse_while_merged(module: Any, *_: Any) -> None:
    if module._merged:
        raise RuntimeError("adapters are merged into the weights: unmerge_adapter() before load_state_dict()")


def _after_loading(module: Any, *_: Any) -> None:
    """``assign=True`` and ``to_empty`` make new parameters: those of the active set go where the old ones were."""
    if module._vit is not None:
        module._owner.check(module._vit.backbone)
