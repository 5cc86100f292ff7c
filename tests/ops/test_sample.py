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


@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_both_forms_have_the_same_derivative_at_the_cells_and_on_the_border(padding):
    cells = torch.stack(torch.meshgrid(torch.arange(-1.0, 5), torch.arange(-1.0, 6), indexing="ij"), -1)
    results = []
    for form in (module._grid_sample, module._gather):
        places = cells.flatten(0, 1).expand(2, -1, -1).double().requires_grad_()
        (grad,) = torch.autograd.grad(form(X[..., :4, :4], places, padding).square().sum(), places)
        results.append(grad)
    assert results[0].any()
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("whole", [False, True], ids=["anywhere", "on the cells"])
def test_transforms_of_torch_func_say_what_autograd_says(padding, whole):
    x = X[..., :4].clone().requires_grad_()  # sides whose halves are exact
    places = (PLACES.round() if whole else PLACES).clone().requires_grad_()

    def loss(x, places):
        return sample(x, places, padding).sin().sum()

    expected = torch.autograd.grad(loss(x, places), (x, places))
    torch.testing.assert_close(torch.func.grad(loss, (0, 1))(x, places), expected)
    _, tangent = torch.func.jvp(loss, (x, places), (x.cos(), places.cos()))
    torch.testing.assert_close(tangent, sum((g * t.cos()).sum() for g, t in zip(expected, (x, places))))
    one_by_one = torch.func.vmap(lambda x, p: sample(x[None], p[None], padding)[0])(x, places)
    torch.testing.assert_close(one_by_one, sample(x, places, padding))


@pytest.mark.parametrize("size", [1, 8, 64])
@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("transformed", [False, True], ids=["eager", "torch.func"])
def test_a_place_that_is_not_a_number_reads_nan_alone_and_is_never_written_to(padding, transformed, size):
    x, places = torch.randn(2, 3, size, size + 1, generator=g), PLACES.float()
    spoiled = places.clone()
    spoiled[:, 3, 0] = spoiled[:, 5, 1] = torch.nan
    spoiled[:, 7] = torch.nan

    def run(x, places):
        return sample(x, places, padding)

    def gradients(places, weight):
        if transformed:
            return torch.func.grad(lambda *a: (run(*a) * weight).sum(), argnums=(0, 1))(x, places)
        leaves = [t.clone().requires_grad_() for t in (x, places)]
        return torch.autograd.grad((run(*leaves) * weight).sum(), leaves)

    weight = torch.randn(2, 3, 60, generator=g)
    bad = spoiled.isnan().any(-1)[:, None].expand(-1, 3, -1)
    out = torch.func.vmap(run)(x[None], spoiled[None])[0] if transformed else run(x, spoiled)
    assert torch.equal(out.isnan(), bad)
    torch.testing.assert_close(out[~bad], run(x, places)[~bad])
    for found, expected in zip(gradients(spoiled, weight * ~bad), gradients(places, weight * ~bad)):
        torch.testing.assert_close(found, expected)
    assert len(gradients(spoiled, weight)) == 2  # with a gradient at what is not a number, too
