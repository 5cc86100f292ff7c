"""AdaViT (Meng et al., CVPR 2022): which patches, heads and sub-layers each image uses, decided block by block.

Before each gated block small linear layers look at the tokens and decide (:mod:`~adaptkit.adapters.adavit.gates`).
Patch tokens that are off, heads and sub-layers (MSA, FFN) are skipped: an off token passes by and is judged again by
the next block. Class and register tokens are always kept. Unlike the paper's, the backbone is frozen; the gates start
with everything on, so that step 0 is the pretrained model: bit for bit, but in float32 inference on a CPU to rounding
(1e-5), for large layers then go through oneDNN. In training everything is computed and masked; in inference what is
off is not computed (``execution``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from adaptkit.adapters.adavit.capacity import EVERYTHING, Capacities, counts, packed_to
from adaptkit.adapters.adavit.config import AdaViTConfig
from adaptkit.adapters.adavit.execution import How, Masks, masked
from adaptkit.adapters.adavit.gain import gain
from adaptkit.adapters.adavit.gates import Decision, Gates, Given, Policy
from adaptkit.adapters.adavit.layouts import Layouts
from adaptkit.adapters.adavit.packed import packed, skipping
from adaptkit.adapters.base import Aux, Openable
from adaptkit.adapters.wrapped import wrapped
from adaptkit.core.block import Block, Fn
from adaptkit.core.layers import check_choice, parameter_dtype
from adaptkit.core.registry import register_adapter
from adaptkit.core.view import Features, Spec, View, ViT
from adaptkit.losses import KINDS
from adaptkit.seam import is_traced, must_wait, records_gradients

__all__ = ["AdaViT"]


class Bottleneck(nn.Module):
    """``x + up(gelu(down(x)))`` on every token, zero at the start: it makes up for what was skipped."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, width), nn.Linear(width, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return x + self.up(nn.functional.gelu(self.down(x.to(parameter_dtype(self))))).to(x.dtype)


@register_adapter("adavit", AdaViTConfig)
class AdaViT(Openable):
    """Decides and skips. ``Features.aux`` says what was decided, as zeros and ones.

    ``patch_keep`` (B, gated blocks, N), ``head_keep`` (B, gated blocks, heads), ``layer_keep`` (B, gated blocks, 2:
    MSA, FFN), and ``patch_logits``, ``head_logits``, ``layer_logits`` of the same shapes. In training the decisions
    are sampled and carry a gradient, for :mod:`adaptkit.losses`.
    """

    inside = True
    switches = (*Openable.switches, "execution", "policy", "layouts", "capacities")

    def __init__(self, spec: Spec, config: AdaViTConfig) -> None:
        config = config.resolve(spec)
        super().__init__(spec, config)
        first_patch = config.first_block if config.first_patch_block is None else config.first_patch_block
        #: the first block with a gate of each kind
        self.first: dict[str, int] = {"patch": first_patch, "head": config.first_block, "layer": config.first_block}
        start = min(self.first[kind] for kind in config.gates)
        self.gates, self.bottlenecks = nn.ModuleDict(), nn.ModuleDict()
        for i in range(start, spec.depth):
            kinds = [kind for kind in KINDS if self.gated(kind, i)]
            self.gates[str(i)] = Gates(spec, config, kinds, self._layer_bias(i))
            if config.bottleneck:
                self.bottlenecks[str(i)] = Bottleneck(spec.embed_dim, config.bottleneck)
        self.execution: str = config.execution
        self.policy: Policy | None = None
        self.layouts: Layouts | None = None
        self.capacities = Capacities()

    @staticmethod
    def of(model: nn.Module) -> AdaViT:
        """Return the gates that are attached to ``model``; ``TypeError`` where there are none."""
        acting = getattr(model, "adapters", model)  # of several named sets the active one
        found = [module for module in acting.modules() if isinstance(module, AdaViT)]
        if not found:
            raise TypeError(f"this {type(model).__name__} has no AdaViT gates; attach 'adavit' to it")
        return found[0]

    def check_blocks(self, view: View) -> None:
        """Ask whether there is a class token, which decides; ``TypeError`` where it should be read and is not there."""
        has_class_token = isinstance(view, ViT) and view.has_class_token
        if self.config.last_block == "class" and not has_class_token:
            raise TypeError(
                f"last_block='class' computes the class token alone, and {type(view.backbone).__name__} has registers "
                "and no class token; use last_block='all'"
            )
        for gates in self.gates.values():
            gates.has_class_token = has_class_token

    def gated(self, kind: str, index: int) -> bool:
        """Whether block ``index`` has a gate of this kind."""
        return kind in self.config.gates and index >= self.first[kind]

    def _layer_bias(self, index: int) -> float:
        """Return the layer gates' logit at the start in this block."""
        if self.config.layer_bias is None:
            return self.config.keep_bias
        (high, low), first = self.config.layer_bias, self.first["layer"]
        return high + (low - high) * (index - first) / max(1, self.spec.depth - 1 - first)

    def wrap(self, block: Block, index: int, aux: Aux) -> Fn:
        """Return the block as it is before the first gated one, and under its gates' decision from there on."""
        if self.open or str(index) not in self.gates:
            return block
        return partial(self._run, block, index, aux)

    def _run(self, block: Block, index: int, aux: Aux, x: Tensor) -> Tensor:
        h = block.norm1(x)
        decision, logits = self.gates[str(index)](x, h, block.patch_grid())
        if self.policy is not None:
            decision = self.policy(index, decision)
        self._record(aux, index, decision, logits)
        only_prefix = index == self.spec.depth - 1 and self.config.last_block == "class"
        how = How(self.config.head_mode, only_prefix, self.layouts)
        x = self._execute(index, aux, block, x, h, decision, how)
        return self.bottlenecks[str(index)](x) if self.config.bottleneck else x

    def _execute(
        self, index: int, aux: Aux, block: Block, x: Tensor, h: Tensor, decision: Decision, how: How
    ) -> Tensor:
        """Mask in training and in a graph, which cannot follow shapes that depend on the data; else as it is asked."""
        if self.training or is_traced() or self.execution == "masked":
            return masked(block, x, h, decision, how)
        if records_gradients() and (self.execution == "auto" or must_wait(x)):
            return masked(block, x, h, decision, how)
        if must_wait(x):
            return self._without_waiting(index, aux, block, x, h, decision, how)
        return (packed if self.execution == "packed" else skipping)(block, x, h, decision, how)

    def _without_waiting(
        self, index: int, aux: Aux, block: Block, x: Tensor, h: Tensor, decision: Decision, how: How
    ) -> Tensor:
        """Pack to the block's capacity; with ``"auto"`` only where one is known and that is known to be faster."""
        mask = partial(masked, block, x, h, decision, how)
        if not block.repeatable:
            return mask()
        known = self.capacities.of(index)
        pack = partial(packed_to, block=block, x=x, h=h, decision=decision, how=how)
        packs = self.execution == "packed"
        if not packs:
            gained = gain(x, mask, pack)
            if not gained.is_profitable(0.0):
                return mask()
            packs = known is not None and gained.is_profitable(known.share)
        capacity = known if packs and known is not None else EVERYTHING
        aux[f"adavit.{index}.counts"] = counts(Masks.of(block, x, decision, how), x, capacity)
        return pack(capacity) if packs else mask()

    def must_repeat(self, aux: Aux) -> bool:
        """Read what the blocks counted, all at once. Where one had more on than its capacity, nothing holds."""
        names = {int(i): f"adavit.{i}.counts" for i in self.gates if f"adavit.{i}.counts" in aux}
        if not names:
            return False
        numbers = read(torch.stack([aux.pop(name) for name in names.values()]))
        return self.capacities.learn(dict(zip(names, numbers)))

    def _record(self, aux: Aux, index: int, decision: Decision, logits: Decision) -> None:
        """Keep what was decided; the last block stacks it, (B, gated blocks, ...)."""
        for kind, keep, logit in zip(KINDS, decision, logits):
            if keep is not None and logit is not None:
                aux[f"adavit.{index}.{kind}_keep"], aux[f"adavit.{index}.{kind}_logits"] = keep, logit
        if index != self.spec.depth - 1:
            return
        for kind in self.config.gates:
            for what in ("keep", "logits"):
                names = [f"adavit.{i}.{kind}_{what}" for i in range(self.first[kind], self.spec.depth)]
                aux[f"{kind}_{what}"] = torch.stack([aux.pop(n) for n in names if n in aux], dim=1)

    def thresholded(self, aux: Aux) -> Aux:
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

    def given(self, aux: Aux) -> Given:
        """Return the policy that repeats the decisions of another forward of the same images."""
        return Given(aux, self.first)

    def ways(self, model: nn.Module, view: View, image: Tensor) -> dict[str, tuple[Features, Features]]:
        """Packed and masked under the same decisions, and everything on against the backbone's own blocks."""
        with self.executing("masked"):
            reference = model(image)
        with self.executing("packed"), self.deciding(self.given(reference.aux)):
            model(image)  # on a GPU, the first forward learns the capacities
            packed = model(image)  # and the second gathers by them
        pairs = {"packed execution differs from masked": (packed, reference)}
        for execution in ("masked", "packed"):
            with self.executing(execution):  # type: ignore[arg-type]
                pairs[f"{execution} execution with everything on differs from the backbone's own blocks"] = self.all_on(
                    view,  # type: ignore[arg-type]
                    image,
                )
        return pairs

    def all_on(self, vit: ViT, image: Tensor) -> tuple[Features, Features]:
        """Run the gated blocks with everything kept, and the backbone's own in their place: these must be equal.

        Image (B, C, H, W) -> features of both; the bottlenecks act in both.
        """
        x, blocks = vit.begin(image)
        _, gated = wrapped(vit, [self], {}).begin(image)  # type: ignore[attr-defined]
        theirs, ours = x, x
        with self.deciding(_everything), self._full_capacity():
            for index, block in enumerate(blocks):
                theirs, ours = block(theirs), gated[index](ours)
                if str(index) in self.bottlenecks:
                    theirs = self.bottlenecks[str(index)](theirs)
        features = vit.finish(ours, image), vit.finish(theirs, image)
        if self.config.last_block == "class":  # the patches of the last block are not computed
            return features[0]._replace(tokens=x[:, :0]), features[1]._replace(tokens=x[:, :0])
        return features

    @contextmanager
    def _full_capacity(self) -> Iterator[None]:
        """Inside, forget what earlier forwards kept, so that every block is given the capacity for everything."""
        before, self.capacities = self.capacities, Capacities()
        try:
            yield
        finally:
            self.capacities = before

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
    def prepacked(self, layouts: Layouts | None = None) -> Iterator[Layouts]:
        """Inside, inference of single images on a CPU in float32 lays each of the backbone's weights out but once.

        The layouts, copies of the linear layers (of queries, keys and values one whole and one by head), are made at
        first use and dropped at the end, so a server stays inside, or gives what it got to the next time:
        ``layouts``. A weight that is changed in place or replaced is laid out anew, but not one that is changed behind
        autograd's back, through ``.data``.
        """
        before, self.layouts = self.layouts, layouts or Layouts()
        try:
            yield self.layouts
        finally:
            self.layouts = before


def _everything(_: int, decision: Decision) -> Decision:
    """The policy that keeps all."""
    return Decision(*(None if keep is None else torch.ones_like(keep) for keep in decision))


def read(counts: Tensor) -> list[list[float]]:
    """Numbers of the device (blocks, 4): the one time that a forward waits for them."""
    return counts.tolist()
