"""What is recomputed is computed again, once, and gives the same gradients."""

import weakref

import torch
import torch.nn.functional as F

from adaptkit._cpu.recompute import recomputed


def run(c, weight, other, forget):
    """Two layers on relu(c), which is the only tensor in between; and how often it was made again."""
    made = []

    def again():
        made.append(1)
        return c.relu()

    y = c.relu()
    if forget:
        with recomputed((y, again)):
            out = F.linear(y, weight) + F.linear(y.flatten(0, 1), other).view(*y.shape[:2], -1)
    else:
        out = F.linear(y, weight) + F.linear(y, other)
    return out, made, weakref.ref(y)


def test_gradients_are_the_same_and_the_tensor_is_gone():
    torch.manual_seed(0)
    leaves = [torch.randn(s, requires_grad=True) for s in ((2, 7, 5), (4, 5), (4, 5))]
    grads = []
    for forget in (True, False):
        out, made, y = run(*leaves, forget)
        assert (y() is None) == forget
        grads.append(torch.autograd.grad(out.square().sum(), leaves))
        assert len(made) == (1 if forget else 0)
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_a_second_backward_makes_it_anew():
    c, weight = torch.randn(1, 3, 2, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    out, made, _ = run(c, weight, weight, forget=True)
    first = torch.autograd.grad(out.sum(), weight, retain_graph=True)
    second = torch.autograd.grad(out.sum(), weight)
    assert torch.equal(first[0], second[0])
    assert len(made) == 2


def test_a_second_derivative_goes_through_what_was_made_again():
    c, weight = torch.randn(1, 3, 2, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    found = []
    for forget in (True, False):
        out, _, _ = run(c, weight, weight, forget)
        (g,) = torch.autograd.grad(out.square().sum(), weight, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), (c, weight)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_without_gradients_nothing_happens():
    with torch.no_grad():
        _, made, _ = run(torch.randn(1, 3, 2), torch.randn(4, 2), torch.randn(4, 2), forget=True)
    assert not made
