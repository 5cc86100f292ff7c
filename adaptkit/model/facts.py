"""What an adapted model says as its backbone would, and the switch of both for gradient checkpointing.

Tools ask a model how to treat it: timm for ``pretrained_cfg``, from which it makes the transform of the images,
transformers for ``config``. These names are absent where the backbone lacks them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from adaptkit.core.checkpointing import OFF, Checkpointing

__all__ = ["ConfigProxy", "Facts"]


class ConfigProxy(nn.Module):
    """A module that shows the configuration of the one that it holds."""

    holds: ClassVar[str] = "backbone"  #: under which name it holds it

    @property
    def pretrained_cfg(self) -> Any:
        """timm's record of the weights: name, size and normalisation of the images. Read-only.

        A timm model inside transformers has it in the wrapper's config.
        """
        in_config = getattr(getattr(self, "config", None), "pretrained_cfg", None)
        return _told(self, "pretrained_cfg") if in_config is None else in_config

    @property
    def default_cfg(self) -> Any:
        """The same by its older name. Read-only."""
        return _told(self, "default_cfg")

    @property
    def config(self) -> Any:
        """transformers' configuration. Read-only."""
        return _told(self, "config")


def _told(module: ConfigProxy, name: str) -> Any:
    """Return an attribute of what is inside; ``AttributeError`` where that has none, or was detached."""
    inside = module._modules.get(module.holds)
    if inside is None:
        raise AttributeError(f"{type(module).__name__} has no backbone to ask for {name!r}: it was detached")
    return getattr(inside, name)


class Facts(ConfigProxy):
    """What ``AdaptedModel`` hands on from its backbone, and gradient checkpointing; ``self.vit`` is the view."""

    vit: Any

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Keep the input of each block alone for the backward pass, and run the block a second time there.

        Values and gradients are the same, bit for bit. The backbone itself is left as it is.

        Args:
            gradient_checkpointing_kwargs: of ``torch.utils.checkpoint.checkpoint``, e.g. ``preserve_rng_state=False``.
            every_n_layers: 2 for every second block, from the first on, and so on.
            offload: only False; transformers' Trainer passes it.

        Raises ``ValueError`` for ``use_reentrant=True``, which gives no gradient where the tokens that enter a block
        want none, as those of a frozen backbone do, and for ``offload=True``.
        """
        options = dict(gradient_checkpointing_kwargs or {})
        if options.pop("use_reentrant", False):
            raise ValueError(
                "use_reentrant=True gives no gradient where the input of a block wants none, as that of a frozen "
                "backbone's first block: leave it out, or say False"
            )
        if offload:
            raise ValueError("offload=True is not built: what the blocks keep stays on their device; say False")
        if every_n_layers < 1:
            raise ValueError(f"every_n_layers={every_n_layers} must be at least 1, which is every block")
        self.vit.checkpointing = Checkpointing(every_n_layers, options)

    def gradient_checkpointing_disable(self) -> None:
        """Keep everything for the backward pass, whatever the backbone was told."""
        self.vit.checkpointing = OFF

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """As :meth:`gradient_checkpointing_enable`, by the name that transformers 5 gave it."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    def activation_checkpointing_disable(self) -> None:
        """As :meth:`gradient_checkpointing_disable`."""
        self.gradient_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks run a second time: as the model was told, else as the backbone was."""
        return bool(self.vit.how_checkpointing().every)
