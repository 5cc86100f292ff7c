"""Linear layers by the faster of two libraries: the same sum, the same count, and the plain one wherever it must be."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from adaptkit.ops import linear as ops
from adaptkit.ops.linear import exact_rows, linear, onednn_wins, rounded


@pytest.fixture
def faster(monkeypatch):
    """Make oneDNN the faster one, whatever this machine says."""
    if ops._ONEDNN is None:
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(ops, "onednn_wins", lambda threads: True)


@pytest.fixture
def calls(monkeypatch, faster):
    """Count the calls of oneDNN."""
    seen = []
    real = ops._ONEDNN
    monkeypatch.setattr(ops, "_ONEDNN", lambda *a: seen.append(a[3]) or real(*a))
    return seen


def layer(rows=96, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(n, generator=g).to(dtype) for n in ((rows, 24), (40, 24), (40,)))


@pytest.mark.parametrize("lead", [(), (1,)])
@pytest.mark.parametrize("act", [None, nn.GELU(), nn.GELU("tanh"), nn.ReLU()])
@torch.no_grad()
def test_it_is_the_same_sum(calls, act, lead):
    x, w, b = layer()
    for bias in (b, None):
        expected = F.linear(x, w, bias)
        found = linear(x.view(*lead, *x.shape), w, bias, act)
        torch.testing.assert_close(found.view(96, 40), expected if act is None else act(expected), atol=1e-5, rtol=1e-5)
    assert len(calls) == 2


def test_what_records_a_gradient_rounds_or_is_counted_goes_the_plain_way(calls):
    x, w, b = layer()
    linear(x, w.requires_grad_(), b).sum().backward()
    assert w.grad is not None
    with torch.no_grad():
        assert torch.equal(linear(x[:95], w, b), F.linear(x[:95], w, b))
        assert linear(x[:0], w, b).shape == (0, 40)
        linear(*layer(dtype=torch.float64))
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x, w, b).dtype == torch.bfloat16
        with exact_rows():
            linear(x, w, b)
    assert calls == []


@torch.no_grad()
def test_the_numbers_of_rows_are_few_and_hardly_too_many(faster):
    x = torch.zeros(1, 1)
    wide = {n: rounded(n, x) for n in range(1, 1025)}
    assert all(n <= m <= n + n / 16 and wide.get(m, m) == m for n, m in wide.items())
    assert len({wide[n] for n in range(512, 1024)}) == 17
    assert rounded(97, x.double()) == 97
    with exact_rows():
        assert rounded(97, x) == 97


@torch.no_grad()
def test_torchs_counter_sees_it(faster):
    x, w, b = layer()
    with FlopCounterMode(display=False) as counter:
        linear(x, w, b)
    assert counter.get_total_flops() == 2 * 96 * 24 * 40


def test_one_that_is_wrong_does_not_win(monkeypatch):
    monkeypatch.setattr(ops, "_onednn", lambda x, w, b: F.linear(x, w, b) + 1)
    assert not ops._trial()
    monkeypatch.setattr(ops, "_ONEDNN", None)
    assert not onednn_wins.__wrapped__(1)
