"""Large results in memory that is used again: never while anybody can read it."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from errors import assert_rounds_to

from adaptkit._cpu import linear
from adaptkit.ops import pool

NUMBERS = pool.LARGE // 4


@pytest.fixture(autouse=True)
def clean():
    pool.release()
    yield
    pool.release()


def test_memory_is_used_again_when_nobody_holds_the_last_result():
    first = pool.empty((2, NUMBERS // 2), torch.float32)
    place = first.data_ptr()
    assert place % pool.ALIGNMENT == 0
    assert first.shape == (2, NUMBERS // 2)
    second = pool.empty((NUMBERS,), torch.float32)
    assert second.data_ptr() != place
    del first
    assert pool.empty((NUMBERS,), torch.float32).data_ptr() == place


@pytest.mark.parametrize(
    "keep", [lambda t: t[1:], lambda t: t.view(2, -1).t(), lambda t: t.numpy(), lambda t: t.detach()[None]]
)
def test_a_view_or_an_array_keeps_its_memory(keep):
    first = pool.empty((NUMBERS,), torch.float32).fill_(3.0)
    place, held = first.data_ptr(), keep(first)
    del first
    other = pool.empty((NUMBERS,), torch.float32).zero_()
    assert other.data_ptr() != place
    assert (held == 3.0).all()
    del held
    assert pool.empty((NUMBERS,), torch.float32).data_ptr() == place


def test_no_more_is_kept_than_was_alive_at_once():
    for factor in (1, 2, 3, 4, 6, 9):
        pool.empty((factor * NUMBERS,), torch.float32)
        assert pool.held() <= factor * pool.LARGE + pool.ALIGNMENT  # of one at a time, the largest
    several = [pool.empty((NUMBERS,), torch.float32) for _ in range(4)]
    assert len({t.data_ptr() for t in several}) == 4
    del several
    pool.release()
    assert pool.held() == 0


def test_small_and_huge_results_are_not_kept(monkeypatch):
    pool.empty((8,), torch.float32)
    monkeypatch.setattr(pool, "MOST", pool.LARGE + 1000)
    held = [pool.empty((NUMBERS,), torch.float32) for _ in range(3)]
    pool.empty((2 * NUMBERS,), torch.float32)
    assert pool.held() == pool.LARGE + pool.ALIGNMENT
    assert len({t.data_ptr() for t in held}) == 3


def test_it_is_laid_out_as_asked_and_may_be_changed_in_place():
    class Made(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return pool.empty_like(x).fill_(2.0)

        @staticmethod
        def backward(ctx, grad):
            return grad

    x = torch.randn(2, NUMBERS // 8, 2, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    out = Made.apply(x).mul_(3.0)
    assert pool.held() > 0
    assert out.stride() == x.stride()
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.full_like(x, 3.0))
    again = pool.empty(x.shape, torch.float32, torch.channels_last)
    assert again.stride() == x.stride()
    assert pool.empty((2, 3), torch.float32).is_contiguous()


def test_a_larger_free_buffer_serves():
    place = pool.empty((4 * NUMBERS,), torch.float32).data_ptr()
    held = pool.held()
    smaller = pool.empty((NUMBERS + 100,), torch.float32)
    assert smaller.data_ptr() == place
    assert smaller.untyped_storage().nbytes() == 4 * (NUMBERS + 100)  # no more is saved
    assert pool.held() == held


@pytest.mark.parametrize("bias", [True, False])
def test_a_wide_product_is_the_same_with_and_without_gradients(monkeypatch, bias):
    monkeypatch.setattr(pool, "LARGE", 1)
    monkeypatch.setattr(linear, "NUMBERS", 64)
    torch.manual_seed(0)
    x, weight, b = torch.randn(2, 3, 5, 8), torch.randn(16, 8), torch.randn(16) if bias else None
    want = torch.nn.functional.linear(x, weight, b)
    assert_rounds_to(linear.wide_linear(x.requires_grad_(), weight, b), want, 9)
    assert pool.held() == 0
    with torch.no_grad():
        assert_rounds_to(linear.wide_linear(x, weight, b), want, 9)
        assert pool.held() > 0
        assert linear.wide_linear(x.double(), weight.double(), None).dtype == torch.float64
