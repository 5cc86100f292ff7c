"""What the tests of the owner compare with: models built afresh, and a backbone's state written down bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import adaptkit
from adaptkit.core.registry import view


def image(side: int, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def stirred(tensors: dict[str, Tensor], seed: int, scale: float = 0.1) -> dict[str, Tensor]:
    """Copies of these tensors, the floating-point ones moved off their values."""
    g = torch.Generator().manual_seed(seed)
    return {
        k: v.detach().clone() + scale * torch.randn(v.shape, generator=g) if v.is_floating_point() else v.clone()
        for k, v in tensors.items()
    }


def stir(model: Any, seed: int) -> Any:
    """Move the active adapters and their head off their initial values."""
    model.load_adapter_state_dict(stirred(model.adapter_state_dict(), seed))
    return model


def outputs(features: Any) -> list[Tensor]:
    logits = [] if features.logits is None else [features.logits]
    return [features.tokens, features.prefix, *features.maps, *logits]


def said(model: Any, x: Tensor, seed: int = 5) -> list[Tensor]:
    """What a model says, its dropout drawn from this seed."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return outputs(model(x))


def plain(host: nn.Module, x: Tensor) -> list[Tensor]:
    """What a backbone says without adapters."""
    with torch.no_grad():
        seen = view(host)
        features = seen.features(x)
        return outputs(features._replace(logits=seen.logits(features)))


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference, as a share of the largest value of its tensor."""
    assert [x.shape for x in a] == [y.shape for y in b]
    pairs = [(x.double(), y.double()) for x, y in zip(a, b) if x.numel()]
    return max(float((x - y).abs().max() / y.abs().max().clamp_min(1e-30)) for x, y in pairs)


def afresh(host: nn.Module, adapters: Any, head: Any, tensors: dict[str, Tensor]) -> Any:
    """A model on a copy of ``host`` with these adapters and their tensors, in eval mode."""
    model = adaptkit.attach(copy.deepcopy(host), *adapters, head=head)
    model.load_adapter_state_dict({k: v.clone() for k, v in tensors.items()})
    return model.eval()


def value(tensor: Tensor) -> Tensor:
    """A tensor that ``torch.equal`` takes: torchao's are dequantised."""
    plain_tensor = tensor.detach()
    return plain_tensor.dequantize() if type(plain_tensor).__name__.startswith(("Int8", "Affine")) else plain_tensor


class State:
    """A backbone as it was: objects, attributes, modes, flags, keys and values, to be compared bit for bit."""

    def __init__(self, host: nn.Module, whose: str = "") -> None:
        self.backbone = host
        self.skip = whose  # tensors whose value is not compared: those that an adapter trains in place
        self.modules = [(n, id(m), type(m), m.training, frozenset(vars(m))) for n, m in host.named_modules()]
        self.kept = list(host.modules())  # so that no id is used again
        self.flags = {n: p.requires_grad for n, p in host.named_parameters()}
        self.keys = list(host.state_dict())
        self.values = {n: value(t).clone() for n, t in self._tensors()}
        self.hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in host.modules()]

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [*self.backbone.named_parameters(), *self.backbone.named_buffers()]

    def changes(self) -> list[str]:
        """What is no longer as it was, in words; empty where all is."""
        now = State.__new__(State)
        State.__init__(now, self.backbone)
        names = ("modules", "flags", "keys", "hooks")
        found = [
            f"{n}: {_diff(getattr(self, n), getattr(now, n))}" for n in names if getattr(self, n) != getattr(now, n)
        ]
        found += [f"grad of {n}" for n, p in self.backbone.named_parameters() if p.grad is not None]
        return found + self.changed_values()

    def changed_values(self) -> list[str]:
        now = dict(self._tensors())
        return [
            n
            for n, v in self.values.items()
            if not (self.skip and self.skip in n) and (n not in now or not torch.equal(value(now[n]), v))
        ]


def _diff(was: Any, now: Any) -> str:
    pairs = zip(was.items(), now.items()) if isinstance(was, dict) else zip(was, now)
    first = next(((a, b) for a, b in pairs if a != b), (len(was), len(now)))
    return f"was {first[0]}, is {first[1]}"
