"""Features in eight bits: half a step of their group's scale, whatever the sizes, and zero stays zero."""

import math

import pytest
import torch

from adaptkit.features.int8 import GROUP, dequantise, quantise

HALF = 0.5 + 2 * 127 * 2**-24  # of a step, and the rounding of x / s and of s q in float32


def features(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [1, 48, 64, 65, 192, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_value_is_off_by_more_than_half_a_step_of_its_own_scale(width, dtype):
    x = (features(2, 7, width) * torch.logspace(-6, 3, 7)[:, None]).to(dtype)
    q, scale = quantise(x)
    assert (q.dtype, q.shape, scale.dtype) == (torch.int8, x.shape, torch.bfloat16)
    assert scale.shape == (2, 7, math.ceil(width / GROUP))
    step = scale.double().repeat_interleave(GROUP, -1)[..., :width]
    error = (dequantise(q, scale).double() - x.double()).abs()
    assert (error <= HALF * step).all()
    for group in range(scale.shape[-1]):  # the scale is as small as it can be
        part = x[..., GROUP * group : GROUP * (group + 1)].float().abs().amax(-1)
        torch.testing.assert_close(127 * scale.float()[..., group], part, rtol=2**-8 * 1.01, atol=0)


def test_the_error_is_that_of_a_uniform_one():
    """s / sqrt(12) in quadratic mean; the deviation of that over n values is 0.9 / sqrt(n) of its square."""
    x = features(400, 64)
    q, scale = quantise(x)
    step = scale.float().repeat_interleave(GROUP, -1)
    square = ((dequantise(q, scale) - x) / step).square().mean() * 12
    assert float(square) == pytest.approx(1, abs=6 * 0.9 / math.sqrt(x.numel()))
    relative = float((dequantise(q, scale) - x).norm() / x.norm())
    assert 0.0045 < relative < 0.006


def test_large_channels_take_no_bits_of_other_groups():
    x = features(10, 128)
    x[:, 3] = 1000.0
    q, scale = quantise(x)
    error = (dequantise(q, scale) - x).abs()
    assert error[:, GROUP:].max() <= HALF * (1 + 2**-7) * x[:, GROUP:].abs().max() / 127
    assert error[:, :GROUP].max() > 1
    assert (q[:, 3] == 127).all()


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e6, 1e37])
def test_the_bound_holds_at_every_size_and_for_every_rounding_of_the_scale(size):
    """Largest values of all mantissas, which the scale's eight bits round up and down."""
    x = features(1000, GROUP).clamp(-1, 1) * size
    x[:, 0] = torch.linspace(1, 2, 1000) * size
    q, scale = quantise(x)
    assert ((dequantise(q, scale).double() - x.double()).abs() <= HALF * scale.double()).all()
    assert q.max() == 127


def test_zeros_tiny_values_and_what_is_quantised_already_come_back():
    x = torch.zeros(2, 128)
    assert torch.equal(dequantise(*quantise(x)), x)
    x[0, :] = 1e-44
    assert dequantise(*quantise(x)).abs().max() <= 2e-44
    x = features(5, 100)
    assert torch.equal(quantise(-x)[0], -quantise(x)[0])
    once = dequantise(*quantise(x))  # its largest are 126.5 to 127 steps: the scale may round otherwise, by one bit
    torch.testing.assert_close(dequantise(*quantise(once)), once, rtol=0, atol=float(x.abs().max()) / 127)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_refused(bad):
    x = features(2, 64)
    x[1, 5] = bad
    with pytest.raises(ValueError, match="not finite, which eight bits cannot hold"):
        quantise(x)
