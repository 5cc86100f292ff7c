"""Maps made a band of rows at a time are the maps made whole."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from adaptkit.predict import rows
from adaptkit.predict.rows import places, rebanded, resized_rows, slid_rows


def literal(forward, image, window, stride):
    """Sliding inference as mmsegmentation writes it: sums and counts of the whole picture, tile by tile."""
    height, width = image.shape[-2:]
    total, count = 0, torch.zeros(height, width)
    for i in range(max(height - window[0] + stride[0] - 1, 0) // stride[0] + 1):
        for j in range(max(width - window[1] + stride[1] - 1, 0) // stride[1] + 1):
            bottom, right = min(i * stride[0] + window[0], height), min(j * stride[1] + window[1], width)
            top, left = max(bottom - window[0], 0), max(right - window[1], 0)
            made = forward(image[None, :, top:bottom, left:right])[0]
            total = total + F.pad(made, (left, width - right, top, height - bottom))
            count[top:bottom, left:right] += 1
    return total / count


def forward(batch):
    """Something that depends on where a tile is cut."""
    mean = batch.mean((-2, -1), keepdim=True)
    return torch.cat([batch - mean, batch.cumsum(-1) / batch.shape[-1]], 1)


@pytest.mark.parametrize(
    ("size", "window", "stride"),
    [
        ((50, 70), (16, 24), (11, 13)),
        ((50, 70), (64, 64), (42, 42)),
        ((17, 33), (17, 8), (5, 8)),
        ((40, 40), (13, 13), (13, 13)),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_sliding_is_the_literal_loop(size, window, stride, batch):
    torch.manual_seed(0)
    image = torch.randn(3, *size, dtype=torch.float64)
    bands = list(slid_rows(forward, image, window, stride, batch))
    torch.testing.assert_close(torch.cat(bands, 1), literal(forward, image, window, stride), rtol=1e-6, atol=1e-6)


def test_a_hann_window_leaves_a_constant_map_constant_and_weighs_the_middle_more():
    image = torch.zeros(1, 40, 40)
    tiles = iter(range(100))

    def numbered(batch):
        return torch.stack([torch.full((1, *x.shape[-2:]), float(next(tiles))) for x in batch])

    constant = torch.cat(list(slid_rows(lambda b: torch.ones_like(b), image, (16, 16), (12, 12), 2, "hann")), 1)
    torch.testing.assert_close(constant, torch.ones(1, 40, 40))
    seen = torch.cat(list(slid_rows(numbered, image, (40, 24), (40, 16), 1, "hann")), 1)[0, 20]
    assert seen[8] == 0
    assert seen[32] == 1
    assert (seen[16:24].diff() > 0).all()  # from the first tile to the second


def test_windows_cover_every_pixel_and_stay_inside():
    for length in range(1, 60):
        for window in (1, 7, 16):
            for stride in range(1, window + 1):
                found = places(length, window, stride)
                assert found[0] == 0
                assert max(found) + min(window, length) == length
                assert all(b - a <= window for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("to", [(90, 101), (13, 9), (37, 23), (1, 1), (37, 60)])
def test_interpolating_bands_is_interpolating_the_whole(to, monkeypatch):
    monkeypatch.setattr(rows, "BUDGET", 4 * 3 * to[1] * 5)  # five rows at a time
    torch.manual_seed(0)
    image = torch.randn(3, 37, 23)
    bands = image.split([1, 4, 10, 3, 19], 1)
    found = list(resized_rows(bands, (37, 23), to))
    assert max(band.shape[1] for band in found) <= (37 if to == (37, 23) else 5)
    whole = F.interpolate(image[None], to, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=0, atol=1e-5)


def test_bands_can_be_cut_anew():
    image = torch.arange(30.0).view(1, 10, 3)
    found = list(rebanded(image.split([3, 1, 6], 1), [4, 4, 2]))
    assert [band.shape[1] for band in found] == [4, 4, 2]
    assert torch.equal(torch.cat(found, 1), image)
