"""Layers of peft that ``torch.compile(fullgraph=True)`` can trace: the same sums, said so that Dynamo can follow.

Two places in peft stop Dynamo. DoRA of a linear layer asks for the name of the module that defines the type of the
weight (is it torchao's?), and LoHa and LoKr draw a number in training mode and branch on it, even where nothing is
ever dropped. Each class here is peft's with that one step in another form; :func:`make_traceable` turns a layer that
peft built into it. Parameters, names, merging and files stay peft's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import ln_tuning, loha, lokr
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn

__all__ = ["make_traceable"]


class DoRA(DoraLinearLayer):
    """What DoRA adds to the output of a linear layer (DoRA, Liu et al., ICML 2024, eq. 5 and section 4.3).

    y = g (W x + s B A x),   g = m / ||W + s B A||,   the norm taken over each row and held constant.
    """

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: nn.Module,
        lora_B: nn.Module,
        scaling: float,
        base_layer: nn.Module,
        base_result: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """(..., in) -> (..., out), y - W x. ``base_result`` is the layer's own output, absent under dropout."""
        weight: Any = base_layer.weight
        if type(weight) not in (nn.Parameter, Tensor):  # quantised: peft knows how to read it
            known = {"lora_A": lora_A, "lora_B": lora_B, "scaling": scaling, "base_layer": base_layer}
            return super().forward(x, **known, base_result=base_result, **options)
        bias: Any = base_layer.bias
        weight = weight.to(x.dtype)
        if base_result is None:
            base = F.linear(x, weight)
        else:
            base = base_result if bias is None else base_result - bias
        # B A by way of the two layers, which FSDP can gather, and not of their weights.
        eye = torch.eye(lora_A.in_features, device=x.device, dtype=lora_A.weight.dtype)  # type: ignore[call-overload]
        change = lora_B(lora_A(eye)).T.to(x.dtype)  # (out, in)
        norm = torch.linalg.norm(weight + scaling * change, dim=1).to(x.dtype).detach()
        gain = self.weight / norm
        return (gain - 1) * base + gain * lora_B(lora_A(x)) * scaling


class _WholeDropout(nn.Module):
    """For LoHa and LoKr: dropping the whole change is a product with 0 or 1, no branch.

    So its parameters have a gradient in every step, of zero where the change was dropped, as DDP wants it.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the layer says, and the change of each active adapter."""
        layer: Any = self
        if not self.training or layer.disable_adapters or layer.merged:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        result = layer.base_layer(x, *args, **kwargs)
        for name in layer.active_adapters:
            if name not in layer._available_adapters:
                continue
            change = layer._get_delta_activations(name, x, *args, **kwargs)
            dropped = layer.module_dropout[name]
            if dropped:
                change = change * (torch.rand(1, device=change.device) > dropped)
            result = result + change
        return result.to(x.dtype)


class LoHaLinear(_WholeDropout, loha.Linear):
    """LoHa of a linear layer."""


class LoHaConv2d(_WholeDropout, loha.Conv2d):
    """LoHa of a convolution."""


class LoKrLinear(_WholeDropout, lokr.Linear):
    """LoKr of a linear layer."""


class LoKrConv2d(_WholeDropout, lokr.Conv2d):
    """LoKr of a convolution."""


class LNTuning(ln_tuning.layer.LNTuningLayer):  # type: ignore[name-defined,misc]
    """A trained copy of a norm. peft merges by exchanging the two; here the values go into the backbone's own."""

    def merge(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write the trained values into the layer; ``ValueError`` where they are not finite and it is to be safe."""
        (name,) = adapter_names or self.active_adapters
        layer: Any = self.base_layer
        trained = dict(self.ln_tuning_layers[name].named_parameters())
        if safe_merge and not all(value.isfinite().all() for value in trained.values()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        with torch.no_grad():
            for key, value in trained.items():
                layer._parameters[key].copy_(value)
        self.merged_adapters.append(name)


TRACEABLE: dict[type[nn.Module], type[nn.Module]] = {
    DoraLinearLayer: DoRA,
    ln_tuning.layer.LNTuningLayer: LNTuning,  # type: ignore[attr-defined]
    loha.Linear: LoHaLinear,
    loha.Conv2d: LoHaConv2d,
    lokr.Linear: LoKrLinear,
    lokr.Conv2d: LoKrConv2d,
}


def make_traceable(wrapper: nn.Module) -> None:
    """Turn this layer of peft, and what it holds, into the kinds above; others stay what they are."""
    for module in wrapper.modules():
        module.__class__ = TRACEABLE.get(type(module), type(module))
