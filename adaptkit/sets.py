"""Named sets of adapters on one frozen backbone: which are there, which one acts, and what the host's weights hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import nn

from adaptkit.adapters._peft import Lodgers
from adaptkit.file import check_fits, metadata_of
from adaptkit.parts import AdapterSet, as_file, differences, head_of, parts_of
from adaptkit.vit import View

__all__ = ["NamedSets", "build_set"]


def build_set(adapters: tuple[Any, ...], head: Any, vit: View, strict: bool) -> tuple[AdapterSet, bool]:
    """Build a set of adapters for this host, and tell whether a file was loaded; arguments as ``attach`` takes them."""
    parts, files = parts_of(adapters, vit, strict)
    chosen, head_file = head_of(head, files)
    built = AdapterSet(vit, parts, chosen, head_file)
    built.metadata = metadata_of(files)
    return built, bool(files)


class NamedSets(nn.Module):
    """A frozen backbone and sets of adapters by name, of which one is active; how it runs is the subclass's business.

    The backbone is never trained: no parameter of it requires a gradient and it stays in eval mode whatever
    ``train()`` is told.
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

    def train(self, mode: bool = True) -> Self:
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
            built, loaded = build_set(adapters, head, self.vit, strict)
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
        chosen.metadata = metadata_of([file])

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
