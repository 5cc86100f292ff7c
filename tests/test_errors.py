"""The model of rounding lets every order of a sum pass, and no fault."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from errors import assert_rounds_to, chance, one_rounding_off


def product(n, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n)
    a, b = (torch.randn(20, n, generator=generator, dtype=torch.float64) for _ in range(2))
    return a.to(dtype), b.to(dtype), a.to(dtype).double() @ b.to(dtype).double().mT


@pytest.mark.parametrize("n", [1, 5, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_order_of_the_terms_passes(n, dtype):
    a, b, exact = product(n, dtype)
    one_by_one = torch.zeros(20, 20, dtype=dtype)
    for i in torch.randperm(n, generator=torch.Generator().manual_seed(0)):
        one_by_one += a[:, i, None] * b[None, :, i]
    assert_rounds_to(one_by_one, exact, n)
    assert_rounds_to(a @ b.mT, exact, n)
    assert_rounds_to([a @ b.mT, one_by_one], [exact, exact], n)


@pytest.mark.parametrize(
    "fault",
    [
        lambda x: x * 1.0001,
        lambda x: -x,
        lambda x: x.mT,
        lambda x: x.roll(1, 0),
        lambda x: torch.where(x == x.max(), 0.0, x),
        lambda x: torch.where(x == x.max(), float("nan"), x),
        lambda x: x[:1].expand_as(x),
    ],
)
def test_a_fault_does_not(fault):
    a, b, exact = product(64)
    with pytest.raises(AssertionError, match="of what rounding allows"):
        assert_rounds_to(fault(a @ b.mT), exact, 64)


def test_another_shape_does_not():
    with pytest.raises(AssertionError):
        assert_rounds_to(torch.zeros(1, 3), torch.zeros(3), 1)
    with pytest.raises(AssertionError):
        assert_rounds_to([torch.zeros(3)], [], 1)


def test_a_rate_may_be_off_by_six_deviations():
    assert chance(0.5, 100) == pytest.approx(0.3)


def test_what_grows_on_the_way_may_be_off_by_more_and_no_more_than_that():
    a, b, small = torch.rand(3, 50, generator=torch.Generator().manual_seed(0))
    numbers = torch.stack([1 + a, 1 + b, 2 + a + b - 1e-4 * small])
    expected, moved = (1e4 * (x[0] + x[1] - x[2]) for x in (numbers, one_rounding_off(numbers)))
    in_another_order = 1e4 * (numbers[0] - numbers[2] + numbers[1])
    with pytest.raises(AssertionError):
        assert_rounds_to(in_another_order, expected, 3)
    assert_rounds_to([in_another_order], [expected], 3, moved=[moved])
    with pytest.raises(AssertionError):
        assert_rounds_to(in_another_order + 0.1, expected, 3, moved=moved)
