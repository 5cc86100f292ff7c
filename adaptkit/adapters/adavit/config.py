"""What of AdaViT can be chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from adaptkit.core.layers import check_choice, check_numbers
from adaptkit.core.view import Spec
from adaptkit.losses import KINDS

__all__ = ["AdaViTConfig"]


@dataclass(frozen=True)
class AdaViTConfig:
    """What is gated, from which block on, and how it is decided and run."""

    gates: tuple[str, ...] = KINDS  #: any of "patch", "head", "layer"
    patch_policy: Literal["token", "class"] = "token"  #: each patch decides for itself, or the class token for all
    head_mode: Literal["full", "partial"] = "full"  #: an off head gives nothing, or passes each token's own value
    first_block: int = 1  #: the first block with gates
    first_patch_block: int | None = None  #: the first with a patch gate; None: the same
    patch_threshold: float = 0.5
    head_threshold: float = 0.5
    layer_threshold: float = 0.5
    temperature: float = 1.0  #: of the sigmoid, in training and evaluation alike
    keep_bias: float = 3.0  #: the gates' logits at the start; above 0 keeps everything
    #: instead of it, those of the layer gates, in the first and the last gated block and in a straight line between.
    #: One that falls, as (5.0, 0.5), is the prior that late blocks are what an image can do without; not of the paper
    layer_bias: tuple[float, float] | None = None
    grid: tuple[int, int] = (14, 14)  #: patches that ``patch_policy="class"`` decides on, resampled to another grid
    bottleneck: int = 0  #: width of a zero-initialised bottleneck on all tokens of a gated block; 0: none
    last_block: Literal["all", "class"] = "all"  #: "class": its patch tokens are read but not updated
    execution: Literal["auto", "packed", "masked"] = "auto"  #: in inference; training is always masked

    def __post_init__(self) -> None:
        object.__setattr__(self, "gates", (self.gates,) if isinstance(self.gates, str) else tuple(self.gates))
        object.__setattr__(self, "grid", tuple(int(n) for n in self.grid))
        if self.layer_bias is not None:
            object.__setattr__(self, "layer_bias", logits("layer_bias", self.layer_bias))
        check_numbers(self)
        for kind in self.gates:
            check_choice("gates", kind, KINDS)
        if len(set(self.gates)) < len(self.gates):
            raise ValueError(f"gates={self.gates} names a kind twice; give each of {', '.join(KINDS)} at most once")
        check_choice("patch_policy", self.patch_policy, ("token", "class"))
        check_choice("head_mode", self.head_mode, ("full", "partial"))
        check_choice("last_block", self.last_block, ("all", "class"))
        check_choice("execution", self.execution, ("auto", "packed", "masked"))
        for option in ("patch_threshold", "head_threshold", "layer_threshold"):
            value = getattr(self, option)
            if not 0.0 < value < 1.0:
                raise ValueError(f"{option}={value}, and a sigmoid lies between 0 and 1; choose one inside, as 0.5")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be above 0; 1.0 is the plain sigmoid")
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise ValueError(f"grid={self.grid} is no (rows, columns) of patches; give two numbers of at least 1")
        if self.bottleneck < 0:
            raise ValueError(f"bottleneck={self.bottleneck} must be at least 0; 0 is none")
        if self.layer_bias is not None and "layer" not in self.gates:
            raise ValueError(f"layer_bias is of layer gates, and gates={self.gates} has none: add 'layer'")
        if not self.gates:
            raise ValueError("gates=() leaves nothing to decide; give some of 'patch', 'head', 'layer'")

    def resolve(self, spec: Spec) -> AdaViTConfig:
        """Fill in what depends on the backbone. ``ValueError`` where the two do not fit."""
        first_patch = self.first_block if self.first_patch_block is None else self.first_patch_block
        for option, first in (("first_block", self.first_block), ("first_patch_block", first_patch)):
            if not 0 <= first < spec.depth:
                raise ValueError(
                    f"{option}={first} is none of the {spec.depth} blocks 0..{spec.depth - 1}; choose one of them"
                )
        if self.last_block == "class" and spec.num_prefix_tokens == 0:
            raise ValueError("last_block='class' needs a class token and this backbone has none; use 'all'")
        return replace(self, first_patch_block=first_patch)


def logits(option: str, pair: Any) -> tuple[float, float]:
    """Return two logits as a tuple (JSON knows lists only); ``ValueError`` for anything else."""
    try:
        first, last = map(float, () if isinstance(pair, str) else pair)
        return first, last
    except (TypeError, ValueError) as error:
        raise ValueError(f"{option}={pair!r}: give two logits, of the first gated block and the last") from error
