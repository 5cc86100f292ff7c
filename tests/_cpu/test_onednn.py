"""Products in oneDNN's tensors: the same sums, and the plain way wherever it must be."""

import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from errors import assert_rounds_to

from adaptkit._cpu import onednn
from adaptkit.adapters.adavit.layouts import Layouts


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
    assert_rounds_to(onednn.linear(x, layer.weight, layer.bias), layer(x), 25)
    assert calls == [(96, 24)]


@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU("tanh"), nn.ReLU(), F.silu])
@torch.no_grad()
def test_it_is_the_same_mlp(calls, act):
    torch.manual_seed(0)
    x, fc1, fc2 = torch.randn(96, 24), nn.Linear(24, 40), nn.Linear(40, 24)
    assert_rounds_to(onednn.mlp(x, fc1, act, fc2), fc2(act(fc1(x))), 25, 41)
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


def test_the_numbers_of_rows_are_few_and_hardly_too_many():
    wide = {n: onednn.rounded(n) for n in range(1, 1025)}
    assert all(n <= m <= n + n / 16 and wide.get(m, m) == m for n, m in wide.items())
    assert len({wide[n] for n in range(512, 1024)}) == 17


@pytest.fixture
def prepacked():
    if not onednn._prepacks():
        pytest.skip("this torch does not lay weights out")
    return onednn.Prepacked(Layouts())


@pytest.mark.parametrize("rows", [1, 96, 200])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_weight_that_is_laid_out_gives_the_same_product(prepacked, rows, bias):
    torch.manual_seed(0)
    x, layer = torch.randn(rows, 24), nn.Linear(24, 40, bias=bias)
    for _ in range(2):
        assert_rounds_to(prepacked.linear(x, layer.weight, layer.bias), layer(x), 25)
    assert len(prepacked._held) == 1


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_heads_are_chosen_one_by_one(prepacked, bias):
    torch.manual_seed(0)
    x, weight, b = torch.randn(9, 24), torch.randn(3, 5, 4, 24), torch.randn(3, 5, 4) if bias else None
    want = torch.einsum("rd,nhed->rnhe", x, weight[:, [0, 3, 4]]) + (0 if b is None else b[:, [0, 3, 4]])
    for products in (prepacked, onednn):
        found = products.linear_of_heads(x, weight, b, [0, 3, 4])
        assert_rounds_to(found, want, 25)


@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU("tanh"), nn.ReLU(), F.silu])
@torch.no_grad()
def test_an_mlp_that_is_laid_out_is_the_same(prepacked, act):
    torch.manual_seed(0)
    x, fc1, fc2 = torch.randn(96, 24), nn.Linear(24, 40), nn.Linear(40, 24)
    assert_rounds_to(prepacked.mlp(x, fc1, act, fc2), fc2(act(fc1(x))), 25, 41)


@torch.no_grad()
def test_a_changed_weight_is_laid_out_anew_and_another_kind_never(prepacked):
    torch.manual_seed(0)
    x, layer = torch.randn(8, 24), nn.Linear(24, 40)
    prepacked.linear(x, layer.weight, layer.bias)
    layer.load_state_dict(nn.Linear(24, 40).state_dict())
    assert_rounds_to(prepacked.linear(x, layer.weight, layer.bias), layer(x), 25)
    assert len(prepacked._held) == 1
    wide = layer.double()
    assert torch.equal(prepacked.linear(x.double(), wide.weight, wide.bias), wide(x.double()))
    assert len(prepacked._held) == 1


@torch.no_grad()
def test_layouts_are_not_copied_nor_saved(prepacked):
    layouts = Layouts()
    onednn.Prepacked(layouts).linear(torch.randn(8, 24), torch.randn(40, 24), None)
    assert layouts.held
    assert not copy.deepcopy(layouts).held
    assert not pickle.loads(pickle.dumps(layouts)).held


@torch.no_grad()
def test_a_torch_without_these_operators_goes_the_plain_way(monkeypatch):
    monkeypatch.setattr(onednn, "_OPS", object())
    onednn._prepacks.cache_clear()
    try:
        prepacked, x, fc1, fc2 = onednn.Prepacked(Layouts()), torch.randn(8, 24), nn.Linear(24, 40), nn.Linear(40, 24)
        assert not onednn._prepacks()
        assert torch.equal(prepacked.linear(x, fc1.weight, fc1.bias), fc1(x))
        assert torch.equal(prepacked.mlp(x, fc1, nn.GELU(), fc2), fc2(F.gelu(fc1(x))))
        assert prepacked.linear_of_heads(x, torch.randn(3, 5, 4, 24), None, [1]).shape == (8, 3, 1, 4)
    finally:
        onednn._prepacks.cache_clear()
