"""Hard decisions with a gradient."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from errors import chance

from adaptkit.ops.gumbel import gumbel_sigmoid


def logits(n=100_000, value=0.7):
    return torch.full((n,), value)


RATE = float(torch.tensor(0.7).sigmoid())


def test_decisions_are_exactly_zero_or_one_and_carry_a_gradient():
    z = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.manual_seed(0)
    keep = gumbel_sigmoid(z, 1.0, 0.6, noise=True)
    assert set(keep.tolist()) == {0.0, 1.0}
    keep.sum().backward()
    assert (z.grad > 0).all()


def test_without_noise_the_threshold_decides():
    z = torch.tensor([-1.0, 0.0, 0.4, 0.41, 3.0])
    assert gumbel_sigmoid(z, 1.0, 0.6, noise=False).tolist() == [0, 0, 0, 1, 1]  # logit(0.6) = 0.405


def test_noise_is_logistic_so_that_the_rate_is_the_sigmoid():
    torch.manual_seed(0)
    rate = gumbel_sigmoid(logits(), 1.0, 0.5, noise=True).mean()
    assert abs(rate - RATE) < chance(RATE, 100_000)


def test_the_temperature_leaves_the_rate_at_one_half_as_it_is():
    torch.manual_seed(0)
    rate = gumbel_sigmoid(logits(), 5.0, 0.5, noise=True).mean()
    assert abs(rate - RATE) < chance(RATE, 100_000)


@pytest.mark.parametrize("noise", [False, True])
def test_forward_mode_has_the_derivative_of_the_sigmoid(noise):
    logits = torch.linspace(-3, 3, 13, dtype=torch.float64)

    def decide(x):
        torch.manual_seed(0)
        return gumbel_sigmoid(x, 1.5, 0.5, noise)

    leaf = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(decide(leaf).sum(), leaf)
    value, tangent = torch.func.jvp(decide, (logits,), (torch.ones_like(logits),))
    assert expected.all()
    torch.testing.assert_close(tangent, expected)
    assert torch.equal(value, decide(logits))
