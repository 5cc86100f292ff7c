"""Hand-written gradients against those that autograd finds by itself, for random sizes, layouts and frozen parts."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

sys.path += [str(Path(__file__).parent), str(Path(__file__).parent / "_cpu")]
import examples_vit_adapter as examples
from examples_vit_adapter import CONFIG, NO_DROP, NO_FFN

import adaptkit._cpu  # noqa: F401  registers the fast paths
from adaptkit import seam
from adaptkit.ops import ms_deform_attn
from adaptkit.ops import sample as sampling

FEW, MANY = 40, 2000  # cases of each, in the default tier and in the full one
STEP = 200
starts = pytest.mark.parametrize(
    ("first", "count"),
    [(0, FEW), *(pytest.param(n, STEP, marks=pytest.mark.full) for n in range(FEW, MANY, STEP))],
)


def leaves(args) -> list[Tensor]:
    """Tensors of a call, parameters among them."""
    found = []
    for arg in tree_leaves(args):
        found += list(arg.parameters()) if isinstance(arg, nn.Module) else [arg] if isinstance(arg, Tensor) else []
    return [t for t in found if t.is_floating_point()]


def freeze(wanted: list[Tensor], g: random.Random) -> None:
    """Freeze some of them, and not all."""
    for t in wanted:
        t.requires_grad_(t.requires_grad and g.random() < 0.7)
    if wanted and not any(t.requires_grad for t in wanted):
        g.choice(wanted).requires_grad_()


def gradients(run, args) -> list[Tensor]:
    torch.manual_seed(1)  # dropped paths
    out = [t for t in tree_leaves(run(*args)) if isinstance(t, Tensor) and t.requires_grad]
    wanted = [t for t in leaves(args) if t.requires_grad]
    grads = [
        torch.randn(t.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64).to(t)
        for i, t in enumerate(out)
    ]
    return list(torch.autograd.grad(out, wanted, grads, materialize_grads=True)) if out else []


def assert_right(found, plain, exact) -> None:
    """Off by no more than autograd's own float32 is, but for the order of sums; a wrong gradient is off by its size."""
    assert len(found) == len(plain) == len(exact)
    largest = max((float(t.norm()) for t in exact), default=0.0)
    for a, b, c in zip(found, plain, exact):
        rounding = float((b - c).norm()) + 1e-5 * float(c.norm()) + 1e-6 * largest
        assert float((a - c).norm()) <= 20 * rounding


# --------------------------------------------------------------------------------------------------------- fast paths


def attention(g, dtype):
    return examples.attention(g.randint(1, 3), g.randint(1, 3), g.random() < 0.5, dtype)


def injector(g, dtype):
    return examples.injector(g.randint(1, 3), g.randint(0, 5), dtype, strided=g.random() < 0.5)


def extractor(g, dtype):
    config, training = g.choice([CONFIG, NO_DROP, NO_FFN]), g.random() < 0.7
    return examples.extractor(g.randint(1, 4), dtype, config, training, g.random() < 0.3, g.random() < 0.5)


def prior(g, dtype):
    size, norm = (32 * g.randint(2, 3), 32 * g.randint(1, 3)), g.choice(["batch", "layer", "group", "sync"])
    return examples.prior(g.randint(1, 2), size, norm, dtype, g.random() < 0.7, g.randint(1, 5))


def finest(g, dtype):
    layout, norm = g.choice([torch.channels_last, torch.contiguous_format]), g.choice(["batch", "layer", "group"])
    options = {"training": g.random() < 0.7, "patch": g.choice([14, 16]), "layout": layout}
    return examples.finest(g.randint(1, 3), norm, g.random() < 0.7, dtype, **options)


def block(g, dtype):
    return examples.block(g.randint(1, 4), dtype, g.random() < 0.7, g.random() < 0.8)


BUILDERS = {
    "adaptkit.mixers.msda.MSDeformAttn.forward": attention,
    "adaptkit.adapters.vit_adapter.network.Injector.forward": injector,
    "adaptkit.adapters.vit_adapter.network.Extractor.forward": extractor,
    "adaptkit.adapters.vit_adapter.network.SpatialPrior.forward": prior,
    "adaptkit.adapters.vit_adapter.network.finest_map": finest,
    "adaptkit.core.block.Block.__call__": block,
}


def test_every_fast_path_with_a_gradient_is_tried():
    differentiated = {name for name, tried in examples.EXAMPLES.items() if any(e.training for e in tried)}
    assert set(BUILDERS) == differentiated


@starts
@pytest.mark.parametrize("text", BUILDERS)
def test_a_fast_path_has_the_gradients_of_its_text(text, first, count):
    path = seam.fast_paths()[text]
    for seed in range(first, first + count):

        def of(run, dtype, seed=seed):
            g = random.Random(seed)
            args = BUILDERS[text](g, dtype)
            freeze([t for t in leaves(args) if t.is_leaf], g)
            return gradients(run, args)

        with seam.reference():
            plain, exact = of(path.text, torch.float32), of(path.text, torch.float64)
        assert_right(of(path.run, torch.float32), plain, exact)


# ---------------------------------------------------------------------------------------------------------- operators


def given(g, dtype, *shape, low=0.0, high=1.0):
    """Random numbers, now and then every other one of a longer tensor, or one for all of an axis."""
    x = torch.rand(shape, generator=torch.Generator().manual_seed(g.randrange(2**31)), dtype=torch.float64)
    x = (x * (high - low) + low).to(dtype)
    if g.random() < 0.3:
        x = torch.stack([x, x + 1], -1).flatten(-2)[..., ::2]
    return x.detach().requires_grad_()


def points(g, dtype):
    shapes = [(g.randint(1, 9), g.randint(1, 9)) for _ in range(g.randint(1, 4))]
    batch, heads, queries, each = g.randint(1, 3), g.randint(1, 4), g.randint(1, 20), g.randint(1, 5)
    value = given(g, dtype, batch, sum(h * w for h, w in shapes), heads, g.choice([1, 3, 8, 16, 32, 40]))
    one = g.random() < 0.2  # broadcast over the batch
    locations = given(g, dtype, 1 if one else batch, queries, heads, len(shapes), each, 2, low=-0.3, high=1.3)
    weights = given(g, dtype, batch, queries, heads, len(shapes), each, low=-1.0)
    return value, shapes, locations, weights


@starts
@pytest.mark.parametrize("backend", ["auto", "embedding_bag", "grid_sample"])
def test_deformable_attention_has_the_gradients_of_plain_operators(backend, first, count):
    for seed in range(first, first + count):

        def of(name, dtype, seed=seed):
            g = random.Random(seed)
            args = points(g, dtype)
            freeze(leaves(args), g)
            return gradients(lambda *a: ms_deform_attn(*a, backend=name), args)

        assert_right(of(backend, torch.float64), of("gather", torch.float64), of("gather", torch.float64))


@starts
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_sampling_has_the_gradients_of_plain_operators(padding, first, count):
    for seed in range(first, first + count):

        def of(run, seed=seed):
            g = random.Random(seed)
            height, width = g.randint(1, 9), g.randint(1, 9)
            x = given(g, torch.float64, g.randint(1, 3), g.randint(1, 9), height, width)
            places = given(g, torch.float64, len(x), g.randint(1, 30), 2, low=-2.0, high=10.0)
            args = (x, places)
            freeze(list(args), g)
            return gradients(lambda *a: run(*a, padding), args)

        exact = of(sampling._gather)
        assert_right(of(sampling.sample), exact, exact)
