"""Bilinear reading at continuous places."""

import pytest
import torch
import torch.nn.functional as F

from adaptkit.ops import sample as module
from adaptkit.ops.sample import sample

g = torch.Generator().manual_seed(0)
X = torch.randn(2, 3, 4, 5, generator=g, dtype=torch.float64)
PLACES = torch.rand(2, 60, 2, generator=g, dtype=torch.float64) * 8 - 2  # some outside


def test_at_the_cells_it_reads_the_cells():
    cells = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij"), -1).flatten(0, 1)
    torch.testing.assert_close(sample(X, cells.expand(2, -1, -1)), X.flatten(2))


@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_it_agrees_with_grid_sample(padding):
    size = torch.tensor([3.0, 4.0], dtype=torch.float64)
    grid = (PLACES / size * 2 - 1).flip(-1)[:, :, None]
    expected = F.grid_sample(X, grid, padding_mode=padding, align_corners=True)[..., 0]
    torch.testing.assert_close(sample(X, PLACES, padding), expected)


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 1), (4, 5)])
def test_both_forms_agree_in_value_and_gradient(padding, shape):
    results = []
    for form in (module._grid_sample, module._gather):
        x = X[..., : shape[0], : shape[1]].clone().requires_grad_()
        places = PLACES.clone().requires_grad_()
        out = form(x, places, padding)
        results.append([out, *torch.autograd.grad(out.square().sum(), (x, places))])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_half_precision_maps_are_read_in_float32():
    x, places = X.bfloat16(), PLACES.float()
    assert sample(x, places).dtype == torch.bfloat16
    assert torch.equal(sample(x, places), sample(x.float(), places).bfloat16())
