"""Products in oneDNN's tensors: the same sums, and the plain way wherever it must be."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adaptkit.ops import onednn


@pytest.fixture
def calls(monkeypatch):
    """Send small products there too, and count them."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(onednn, "LARGE", 1)
    seen = []
    there = torch.Tensor.to_mkldnn
    monkeypatch.setattr(torch.Tensor, "to_mkldnn", lambda x: seen.append(tuple(x.shape)) or there(x))
    return seen


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_it_is_the_same_product(calls, bias):
    torch.manual_seed(0)
    x, layer = torch.randn(96, 24), nn.Linear(24, 40, bias=bias)
    torch.testing.assert_close(onednn.linear(x, layer.weight, layer.bias), layer(x), atol=1e-5, rtol=1e-5)
    assert calls == [(96, 24)]


@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU("tanh"), nn.ReLU(), F.silu])
@torch.no_grad()
def test_it_is_the_same_mlp(calls, act):
    torch.manual_seed(0)
    x, fc1, fc2 = torch.randn(96, 24), nn.Linear(24, 40), nn.Linear(40, 24)
    torch.testing.assert_close(onednn.mlp(x, fc1, act, fc2), fc2(act(fc1(x))), atol=1e-5, rtol=1e-5)
    assert calls[0] == (96, 24)


@torch.no_grad()
def test_small_weights_and_those_of_another_kind_stay_where_they_are(calls, monkeypatch):
    x, layer = torch.randn(96, 24), nn.Linear(24, 40)
    columns = torch.randn(24, 40).t()  # not contiguous
    assert torch.equal(onednn.linear(x, columns, None), F.linear(x, columns))
    assert onednn.linear(x.double(), layer.weight.double(), None).dtype == torch.float64
    monkeypatch.setattr(onednn, "LARGE", 10**9)
    assert torch.equal(onednn.linear(x, layer.weight, layer.bias), layer(x))
    assert calls == []


def test_it_is_not_for_gradients_other_dtypes_autocast_or_who_counts(calls):
    x = torch.randn(4, 24)
    assert not onednn.usable(x)  # gradients are on
    with torch.no_grad():
        assert onednn.usable(x)
        assert not onednn.usable(x.double())
        assert not onednn.usable(x.to("meta"))
        with torch.autocast("cpu", torch.bfloat16):
            assert not onednn.usable(x)
        with onednn.avoided():
            assert not onednn.usable(x)
        assert onednn.usable(x)


def test_the_numbers_of_rows_are_few_and_hardly_too_many():
    wide = {n: onednn.rounded(n) for n in range(1, 1025)}
    assert all(n <= m <= n + n / 16 and wide.get(m, m) == m for n, m in wide.items())
    assert len({wide[n] for n in range(512, 1024)}) == 17
