"""Quantised linear layers say their weights."""

import pytest
import torch

from adaptkit.core import unpacked


@pytest.mark.parametrize("rows", [3, 1024])
def test_a_packed_linear_layer_says_its_weight(rows, monkeypatch):
    """Whatever packs it: here one that keeps bytes and a scale for each row."""

    class Packed(torch.nn.Module):
        def __init__(self, layer, bend=0.0):
            super().__init__()
            self.in_features, self.out_features, self.bias, self.bend = 7, 5, layer.bias, bend
            self.scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
            stored = (layer.weight.detach() / self.scale).round().to(torch.int8)
            self.weight = torch.nn.Parameter(stored, requires_grad=False)

        def forward(self, x):
            y = torch.nn.functional.linear(x, self.weight.float() * self.scale, self.bias)
            return y + self.bend * y.square()

    monkeypatch.setattr(unpacked, "ROWS", rows)
    torch.manual_seed(0)
    packed = Packed(torch.nn.Linear(7, 5))
    assert unpacked.packs_its_weight(packed)
    assert not unpacked.packs_its_weight(torch.nn.Linear(7, 5).bfloat16())
    found = unpacked.unpacked(packed, torch.float32, "block 3, fc1")
    torch.testing.assert_close(found.weight, packed.weight * packed.scale)
    assert found.bias is packed.bias
    assert type(found) is torch.nn.Linear
    with pytest.raises(ValueError, match="block 3, fc1: what a Packed says is not linear"):
        unpacked.unpacked(Packed(torch.nn.Linear(7, 5), bend=1.0), torch.float32, "block 3, fc1")
    with torch.device("meta"):  # where a file is planned, nothing is computed
        planned = unpacked.unpacked(Packed(torch.nn.Linear(7, 5), bend=1.0), torch.float32, "block 3, fc1")
    assert planned.weight.is_meta
    assert planned.weight.shape == (5, 7)
