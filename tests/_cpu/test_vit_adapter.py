"""ViT-Adapter on a CPU: the stem in strips, and what is computed again."""

import contextlib
import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from errors import assert_rounds_to
from families import HOSTS

import adaptkit
from adaptkit._cpu import vit_adapter as fast
from adaptkit.adapters.vit_adapter import SpatialPrior

STEM = (27, 72, 72, 64)  # terms of its convolutions


def test_what_is_not_kept_changes_no_bit(monkeypatch):
    @contextlib.contextmanager
    def kept(*made):
        yield

    found = []
    for forget in (True, False):
        if not forget:
            monkeypatch.setattr(fast, "recomputed", kept)
        torch.manual_seed(0)
        options = {"conv_inplane": 8, "gamma_init": 0.5}
        model = adaptkit.attach(HOSTS["timm-vit"].at(64, 64), ("vit-adapter", options)).train()
        sum(m.square().mean() for m in model(torch.randn(2, 3, 64, 64)).maps).backward()
        found.append([p.grad for p in model.adapters.parameters()] + list(model.adapters.buffers()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("size", [(32, 32), (160, 96), (416, 64)])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_the_stem_in_strips_is_the_stem(monkeypatch, size, norm):
    torch.manual_seed(0)
    layers = SpatialPrior(24, 8, norm).stem
    x = torch.randn(2, 3, *size)
    layers(x)  # running statistics
    layers.eval()
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    for strip in (1, 8192):
        monkeypatch.setattr(fast, "STRIP", strip)
        whole, strips = layers(x), fast.stem_by_strips(layers, x)
        assert_rounds_to(strips, whole, *STEM)
        for a, b in zip(*(torch.autograd.grad(y.square().sum(), x) for y in (strips, whole)), strict=True):
            assert_rounds_to(a, b, *STEM, *STEM)


@pytest.mark.parametrize("in_eval", [(), (0,), (1,), (1, 2), (0, 1, 2)])
def test_each_norm_of_the_stem_has_its_own_mode(in_eval):
    torch.manual_seed(0)
    layers = SpatialPrior(24, 8, "batch").stem.double().train()
    for i in in_eval:
        layers[(1, 4, 7)[i]].eval()
    plain, x = copy.deepcopy(layers), torch.randn(2, 3, 64, 32).double()
    found, expected = fast.stem(layers, x), plain(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(layers.state_dict(), plain.state_dict())
    grads = (torch.autograd.grad(y.square().sum(), [*m.parameters()]) for y, m in ((found, layers), (expected, plain)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
