"""AdaViT (Meng et al., CVPR 2022): which patches, heads and sub-layers each image uses, decided block by block.

Before each gated block small linear layers look at the tokens and decide, per image::

    keep = 1[sigmoid((logits + noise) / temperature) > threshold]      noise in training only

Patch tokens that are off, heads and sub-layers (MSA, FFN) are skipped: an off token passes by and is judged again by
the next block. Class and register tokens are always kept. Unlike the paper's, the backbone is frozen; the gates start
with everything on, so that step 0 is the pretrained model: bit for bit, but in float32 inference on a CPU to rounding
(1e-5), for large layers then go through oneDNN. In training everything is computed and masked; in inference what is
off is not computed (``execution``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from adaptkit.adapters._adavit_gates import Decision, Gates, Given, Policy, Random, Usage
from adaptkit.adapters._adavit_run import Way, dense, masked, packed
from adaptkit.adapters.base import BlockAdapter, Trace, wrapped
from adaptkit.layers import check_choice, parameter_dtype
from adaptkit.losses import KINDS
from adaptkit.ops.kept import SHORT
from adaptkit.ops.onednn import Prepacked
from adaptkit.registry import register_adapter
from adaptkit.vit import Block, Features, Fn, Spec, ViT

__all__ = ["AdaViT", "AdaViTConfig", "Decision", "Given", "Random"]

Run = Callable[[Block, Tensor, Tensor, Decision, Way], Tensor]

CALL_MACS = 4e6  #: what one more call per image costs on a CPU core, in MACs that it could have done instead


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
    grid: tuple[int, int] = (14, 14)  #: patches that ``patch_policy="class"`` decides on, resampled to another grid
    bottleneck: int = 0  #: width of a zero-initialised bottleneck on all tokens of a gated block; 0: none
    last_block: Literal["all", "class"] = "all"  #: "class": its patch tokens are read but not updated
    execution: Literal["auto", "packed", "masked"] = "auto"  #: in inference; training is always masked

    def __post_init__(self) -> None:
        object.__setattr__(self, "gates", tuple(self.gates))
        object.__setattr__(self, "grid", tuple(int(n) for n in self.grid))
        for kind in self.gates:
            check_choice("gates", kind, KINDS)
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
        if self.last_block == "class" and spec.prefix == 0:
            raise ValueError("last_block='class' needs a class token and this backbone has none; use 'all'")
        return replace(self, first_patch_block=first_patch)


class Bottleneck(nn.Module):
    """``x + up(gelu(down(x)))`` on every token, zero at the start: it makes good for what was skipped."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, width), nn.Linear(width, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return x + self.up(nn.functional.gelu(self.down(x.to(parameter_dtype(self))))).to(x.dtype)


@register_adapter("adavit", AdaViTConfig)
class AdaViT(BlockAdapter):
    """Decides and skips. ``Features.aux`` says what was decided, as zeros and ones.

    ``patch_keep`` (B, gated blocks, N), ``head_keep`` (B, gated blocks, heads), ``layer_keep`` (B, gated blocks, 2:
    MSA, FFN), and ``patch_logits``, ``head_logits``, ``layer_logits`` of the same shapes. In training the decisions
    are sampled and carry a gradient, for :mod:`adaptkit.losses`.
    """

    inside = True

    def __init__(self, spec: Spec, config: AdaViTConfig) -> None:
        config = config.resolve(spec)
        super().__init__(spec, config)
        first_patch = config.first_block if config.first_patch_block is None else config.first_patch_block
        #: the first block with a gate of each kind
        self.first: dict[str, int] = {"patch": first_patch, "head": config.first_block, "layer": config.first_block}
        start = min(self.first[kind] for kind in config.gates)
        self.gates, self.bottlenecks = nn.ModuleDict(), nn.ModuleDict()
        for i in range(start, spec.depth):
            self.gates[str(i)] = Gates(spec, config, [kind for kind in KINDS if self.gated(kind, i)])
            if config.bottleneck:
                self.bottlenecks[str(i)] = Bottleneck(spec.dim, config.bottleneck)
        self.execution: str = config.execution
        self.policy: Policy | None = None
        self.open = False
        self.layouts: Prepacked | None = None

    @staticmethod
    def of(model: nn.Module) -> AdaViT:
        """Return the gates that are attached to ``model``; ``TypeError`` where there are none."""
        acting = getattr(model, "adapters", model)  # of several named sets the active one
        found = [module for module in acting.modules() if isinstance(module, AdaViT)]
        if not found:
            raise TypeError(f"this {type(model).__name__} has no AdaViT gates; attach 'adavit' to it")
        return found[0]

    def gated(self, kind: str, index: int) -> bool:
        """Whether block ``index`` has a gate of this kind."""
        return kind in self.config.gates and index >= self.first[kind]

    def wrap(self, block: Block, index: int, trace: Trace) -> Fn:
        """Return the block as it is before the first gated one, and under its gates' decision from there on."""
        if self.open or str(index) not in self.gates:
            return block
        return partial(self._run, block, index, trace)

    def _run(self, block: Block, index: int, trace: Trace, x: Tensor) -> Tensor:
        if block.grid is None:
            raise ValueError("this block does not know its patch grid; run it through attach, which tells it")
        h = block.norm1(x)
        decision, logits = self.gates[str(index)](x, h, block.grid)
        if self.policy is not None:
            decision = self.policy(index, decision)
        self._record(trace, index, decision, logits)
        only_prefix = index == self.spec.depth - 1 and self.config.last_block == "class"
        way = Way(self.config.head_mode, only_prefix, prepacked=self.layouts)
        run, way = self._choose(x, decision, way)
        x = run(block, x, h, decision, way)
        return self.bottlenecks[str(index)](x) if self.config.bottleneck else x

    def _choose(self, x: Tensor, decision: Decision, way: Way) -> tuple[Run, Way]:
        """Masked in training and for the compiler, which cannot follow shapes that depend on the data."""
        masks = self.training or torch.compiler.is_compiling() or self.execution == "masked"
        if masks or (self.execution == "auto" and torch.is_grad_enabled()):
            return masked, way
        if self.execution == "packed" or len(x) == 1:
            return packed, way
        usage = decision.usage()
        if usage.everything and not way.only_prefix:
            return dense, way
        way = way._replace(by_image=decision.head is not None and _heads_pay(x, decision, usage))
        return (packed if _pays(x, usage, way) else masked), way

    def _record(self, trace: Trace, index: int, decision: Decision, logits: Decision) -> None:
        """Keep what was decided; the last block stacks it, (B, gated blocks, ...)."""
        for kind, keep, logit in zip(KINDS, decision, logits):
            if keep is not None and logit is not None:
                trace[f"adavit.{index}.{kind}_keep"], trace[f"adavit.{index}.{kind}_logits"] = keep, logit
        if index != self.spec.depth - 1:
            return
        for kind in self.config.gates:
            for what in ("keep", "logits"):
                names = [f"adavit.{i}.{kind}_{what}" for i in range(self.first[kind], self.spec.depth)]
                trace[f"{kind}_{what}"] = torch.stack([trace.pop(n) for n in names if n in trace], dim=1)

    def thresholded(self, aux: Trace) -> Trace:
        """Return the decisions that the same logits give without noise, as evaluation takes them: ``<kind>_keep``."""
        c = self.config
        found = {}
        for kind in c.gates:
            soft = torch.sigmoid(aux[f"{kind}_logits"].detach() / c.temperature)
            found[f"{kind}_keep"] = (soft > getattr(c, f"{kind}_threshold")).to(soft.dtype)
        return found

    @contextmanager
    def deciding(self, policy: Policy | None) -> Iterator[None]:
        """Let ``policy`` decide in place of the gates, which are computed all the same: ``Random(...)`` for one."""
        before, self.policy = self.policy, policy
        try:
            yield
        finally:
            self.policy = before

    def given(self, aux: Trace) -> Given:
        """Return the policy that repeats the decisions of another forward of the same images."""
        return Given(aux, self.first)

    def all_on(self, vit: ViT, image: Tensor) -> tuple[Features, Features]:
        """Run the gated blocks with everything kept, and the host's own in their place: these must be equal.

        Image (B, C, H, W) -> features of both; the bottlenecks act in both.
        """
        x, blocks = vit.begin(image)
        _, gated = wrapped(vit, [self], {}).begin(image)  # type: ignore[attr-defined]
        theirs, ours = x, x
        with self.deciding(_everything):
            for index, block in enumerate(blocks):
                theirs, ours = block(theirs), gated[index](ours)
                if str(index) in self.bottlenecks:
                    theirs = self.bottlenecks[str(index)](theirs)
        features = vit.finish(ours, image), vit.finish(theirs, image)
        if self.config.last_block == "class":  # the patches of the last block are not computed
            return features[0]._replace(tokens=x[:, :0]), features[1]._replace(tokens=x[:, :0])
        return features

    @contextmanager
    def executing(self, execution: Literal["auto", "packed", "masked"]) -> Iterator[None]:
        """Run inference this way for a while."""
        check_choice("execution", execution, ("auto", "packed", "masked"))
        before, self.execution = self.execution, execution
        try:
            yield
        finally:
            self.execution = before

    @contextmanager
    def prepacked(self, layouts: Prepacked | None = None) -> Iterator[Prepacked]:
        """Inside, inference of single images on a CPU in float32 lays each of the backbone's weights out but once.

        The layouts, copies of the linear layers (of queries, keys and values one whole and one by head), are made at
        first use and dropped at the end, so a server stays inside, or gives what it got to the next time:
        ``layouts``. See :class:`adaptkit.ops.onednn.Prepacked` for when a weight may change.
        """
        before, self.layouts = self.layouts, layouts or Prepacked()
        try:
            yield self.layouts
        finally:
            self.layouts = before

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Open all gates and leave the bottlenecks out: the pretrained model, bit for bit."""
        before, self.open = self.open, True
        try:
            yield
        finally:
            self.open = before


def _everything(_: int, decision: Decision) -> Decision:
    """The policy that keeps all."""
    return Decision(*(None if keep is None else torch.ones_like(keep) for keep in decision))


def _heads_pay(x: Tensor, decision: Decision, usage: Usage) -> bool:
    """Whether the heads that are off outweigh running attention image by image, each with weights of its own."""
    rows = x.shape[1] if decision.patch is None else usage.patch * decision.patch.shape[1]
    return 4 * rows * x.shape[2] ** 2 * (1.0 - usage.head) > CALL_MACS


def _pays(x: Tensor, usage: Usage, way: Way) -> bool:
    """Whether the work that is off outweighs gathering rows and calling image by image."""
    count, tokens, dim = x.shape
    keep, on = usage.patch, usage.layer
    saved = (1.0 - (keep if not way.only_prefix else 0.0) * on) * count * tokens * 12 * dim * dim
    one_by_one = way.by_image or keep * tokens > SHORT
    return saved > CALL_MACS * (1 + (count * on if one_by_one else 2))
