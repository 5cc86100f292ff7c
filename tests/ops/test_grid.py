"""Grids keep pixels where they are."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from adaptkit.ops.grid import cells, map_to_tokens, pad_to_multiple, pair, pairs, resample_map, tokens_to_map


def ramp(size, stride):
    """A map whose value is the pixel position of its cell centre, (x, y)."""
    y = (torch.arange(size[0], dtype=torch.float64) + 0.5) * stride
    x = (torch.arange(size[1], dtype=torch.float64) + 0.5) * stride
    return torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1])[None]


@pytest.mark.parametrize(
    ("stride", "to_stride"), [(14, 4), (14, 8), (14, 16), (14, 32), (16, 4), (8, 32), (3.5, 4), (32, 16)]
)
def test_resampling_keeps_every_pixel_where_it_is(stride, to_stride):
    source = ramp((9, 11), stride)
    size = (int(9 * stride // to_stride), int(11 * stride // to_stride))
    moved, expected = resample_map(source, stride, to_stride, size), ramp(size, to_stride)
    inner = (expected > stride / 2).all(1) & (expected[:, 0] < 10.5 * stride) & (expected[:, 1] < 8.5 * stride)
    assert inner.any()
    torch.testing.assert_close(moved.movedim(1, -1)[inner], expected.movedim(1, -1)[inner])


def test_where_the_grids_cover_the_same_it_is_plain_interpolation():
    x = torch.randn(2, 3, 4, 6)
    for scale in (4, 2, 0.5):
        expected = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
        assert torch.equal(resample_map(x, 16, 16 / scale, tuple(expected.shape[-2:])), expected)


def test_beyond_the_last_cell_the_border_is_repeated():
    x = torch.arange(4.0).view(1, 1, 2, 2)
    out = resample_map(x, 8, 8, (4, 3))
    assert torch.equal(out[0, 0], torch.tensor([[0.0, 1, 1], [2, 3, 3], [2, 3, 3], [2, 3, 3]]))


def test_the_same_grid_is_returned_as_it_is():
    x = torch.randn(1, 1, 3, 5)
    assert resample_map(x, 16, 16, (3, 5)) is x


def test_padding_is_at_the_bottom_right_and_none_is_a_copy():
    x = torch.randn(1, 2, 5, 7)
    padded = pad_to_multiple(x, 4)
    assert padded.shape == (1, 2, 8, 8)
    assert torch.equal(padded[..., :5, :7], x)
    assert padded[..., 5:, :].abs().sum() == 0
    assert pad_to_multiple(padded, 4) is padded
    assert [cells(n, 4) for n in (1, 4, 5, 8)] == [1, 1, 2, 2]


def test_tokens_and_maps_are_inverse():
    tokens = torch.randn(2, 15, 4)
    x = tokens_to_map(tokens, (3, 5))
    assert x.shape == (2, 4, 3, 5)
    assert torch.equal(x[0, :, 1, 2], tokens[0, 7])
    assert torch.equal(map_to_tokens(x), tokens)


def test_numbers_of_the_host_have_the_dtype_and_the_device_of_a_tensor():
    x = torch.ones(1, dtype=torch.float64)
    assert torch.equal(pair(3, 0.5, x), torch.tensor([3, 0.5], dtype=torch.float64))
    assert torch.equal(pairs([(3, 4), (5, 6)], x), torch.tensor([[3, 4], [5, 6]], dtype=torch.float64))
    with FakeTensorMode():
        y = torch.empty(1, device="cuda", dtype=torch.bfloat16)
        for made, shape in ((pair(3, 4, y), (2,)), (pairs([(3, 4), (5, 6), (7, 8)], y), (3, 2))):
            assert (made.shape, made.device, made.dtype) == (shape, y.device, y.dtype)
