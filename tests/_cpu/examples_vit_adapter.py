"""What the fast paths of ViT-Adapter are tried on."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from fast_paths import Example
from reference import stirred

from adaptkit import Spec, ViTAdapterConfig
from adaptkit.adapters.vit_adapter import Extractor, Grids, Injector, SpatialPrior
from adaptkit.core.layers import norm2d
from adaptkit.mixers import Layout
from adaptkit.mixers.msda import MSDeformAttn
from adaptkit.ops.grid import cell_centres

DIM = 32
CONFIG = ViTAdapterConfig(gamma_init=0.5, drop_path=0.4).resolve(Spec("timm-vit", DIM, 4, 2, 14, 1))
ATTENTION = (DIM, DIM, DIM, DIM)  # a norm, values, logits, the projection
STEM = (27, 72, 72, 64)  # terms of its convolutions


def normal(*shape, seed=0, grad=True, layout=None):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x if layout is None else x.contiguous(memory_format=layout), grad


def given(pair, dtype, strided=False):
    x, grad = pair
    x = x.to(dtype)
    if strided:  # every other token of a longer sequence
        x = torch.stack([x, x + 1], dim=2).flatten(1, 2)[:, ::2]
    return x.detach().requires_grad_(grad)


def grids(dtype, tokens=(3, 5), prior=(48, 96)):
    levels = [(prior[0] // s, prior[1] // s) for s in (8, 16, 32)]
    levels[-1] = (-(-prior[0] // 32), -(-prior[1] // 32))
    return Grids.of(tokens, 14, levels, torch.zeros(1, 3, 1, 1, dtype=dtype))


def cells(sizes):
    return sum(h * w for h, w in sizes)


def module(build, dtype, training=True, frozen=False):
    torch.manual_seed(0)
    built = build().double()
    built.load_state_dict(stirred(built.state_dict(), 0))
    return built.to(dtype).train(training).requires_grad_(not frozen)


# ---- attention, injector, extractor


def attention(batch, levels, strided, dtype):
    values = ((4, 6), (2, 3), (1, 2))[:levels]
    points = cell_centres((3, 5), 1, torch.device("cpu"), dtype) / 5
    layout = Layout(((3, 5),), values, points)
    feat = given(normal(batch, cells(values), DIM, seed=2), dtype)
    query = given(normal(batch, 15, DIM, seed=1), dtype, strided)
    return module(lambda: MSDeformAttn(DIM, levels, 4, 3, 0.5), dtype), query, feat, layout


def injector(batch, prefix, dtype, config=CONFIG, strided=False):
    g = grids(dtype)
    x = given(normal(batch, prefix + 15, DIM, seed=1), dtype, strided)
    c = given(normal(batch, cells(g.levels), DIM, seed=2), dtype)
    return module(lambda: Injector(DIM, config), dtype), x, c, g


def extractor(batch, dtype, config=CONFIG, training=True, frozen=False, strided=False):
    g = grids(dtype)
    c = given(normal(batch, cells(g.levels), DIM, seed=1), dtype, strided)
    x = given(normal(batch, 15, DIM, seed=2, grad=not frozen), dtype)
    return module(lambda: Extractor(DIM, config), dtype, training), c, x, g


NO_FFN, NO_DROP = replace(CONFIG, with_cffn=False), replace(CONFIG, drop_path=0.0)

# ---- spatial prior and pyramid


def prior(batch, size, norm, dtype, training=True, channels=3):
    image = given(normal(batch, channels, *size, seed=1, grad=False), dtype)
    return module(lambda: SpatialPrior(24, 8, norm, channels=channels), dtype, training), image


def finest(batch, norm, tokens, dtype, training=True, patch=14, layout=torch.channels_last):
    fc1, up, norm = (
        module(build, dtype, training)
        for build in (lambda: nn.Conv2d(8, 24, 1), lambda: nn.ConvTranspose2d(24, 24, 2, 2), lambda: norm2d(norm, 24))
    )
    c1 = given(normal(batch, 8, 12, 24, seed=1, layout=layout), dtype)
    c2 = given(normal(batch, 24, 6, 12, seed=2, layout=layout), dtype)
    x = given(normal(batch, 24, 4, 7, seed=3), dtype) if tokens else None
    return fc1, up, norm, c1, c2, x, patch


def examples(call, sums, cases, **more):
    return [Example(name, partial(call, **options), sums, **more) for name, options in cases.items()]


PRIOR = {
    f"{norm}-{batch}-{height}x{width}": dict(batch=batch, size=(height, width), norm=norm)
    for norm, batch, height, width in (
        ("batch", 2, 64, 96), ("batch", 1, 160, 64), ("layer", 2, 64, 32), ("layer", 1, 96, 160), ("group", 2, 64, 64),
        ("sync", 2, 64, 64),
    )
}  # fmt: skip
STEM_BACK = (*STEM, *STEM, *STEM, 2 * 80 * 32)  # terms of the statistics, and pixels that a kernel is summed over
FINEST = {
    "batch": dict(batch=2, norm="batch", tokens=True),
    "one": dict(batch=1, norm="batch", tokens=True, patch=16),
    "contiguous": dict(batch=2, norm="batch", tokens=True, layout=torch.contiguous_format),
    "no-tokens": dict(batch=3, norm="batch", tokens=False),
    "layer": dict(batch=2, norm="layer", tokens=True),
    "group": dict(batch=2, norm="group", tokens=True),
    "eval": dict(batch=2, norm="batch", tokens=True, training=False),
}

EXAMPLES = {
    "adaptkit.mixers.msda.MSDeformAttn.forward": examples(attention, ATTENTION, {
        f"{batch}-{levels}-{'strided' if strided else 'dense'}": dict(batch=batch, levels=levels, strided=strided)
        for batch, levels, strided in ((1, 1, False), (3, 3, False), (2, 3, True))
    }),
    "adaptkit.adapters.vit_adapter.network.Injector.forward": examples(injector, ATTENTION, {
        "prefix": dict(batch=2, prefix=5), "no-prefix": dict(batch=1, prefix=0),
        "strided": dict(batch=2, prefix=1, strided=True),
    }),
    "adaptkit.adapters.vit_adapter.network.Extractor.forward": [
        *examples(extractor, (*ATTENTION, *ATTENTION), {
            "drop-path": dict(batch=4), "one": dict(batch=1, config=NO_DROP), "no-ffn": dict(batch=2, config=NO_FFN),
            "eval": dict(batch=2, training=False), "frozen-tokens": dict(batch=2, frozen=True),
            "strided": dict(batch=2, strided=True),
        }),
        *examples(extractor, (*ATTENTION, *ATTENTION), {"inference": dict(batch=2, training=False)}, training=False),
    ],
    "adaptkit.adapters.vit_adapter.network.SpatialPrior.forward": [
        *examples(prior, (*STEM, 600), PRIOR, backward=STEM_BACK),
        *examples(prior, (*STEM, 600), {f"{k}-eval": {**v, "training": False} for k, v in PRIOR.items()}, backward=STEM_BACK),
        *examples(prior, STEM, {"inference": dict(batch=3, size=(416, 64), norm="batch", training=False, channels=5)}, training=False),
    ],
    "adaptkit.adapters.vit_adapter.network.finest_map": [
        *examples(finest, (8, 24, 24, 600), FINEST, backward=(8, 24, 24, 600, 8, 24, 24, 600, 600)),
        *examples(finest, (8, 24, 24), {f"{k}-inference": {**v, "training": False} for k, v in FINEST.items()}, training=False),
    ],
}  # fmt: skip


# ---- a frozen block


def block(batch, dtype, bias=True, attention=True):
    from adaptkit.core.block import Block, identity

    torch.manual_seed(0)
    qkv, proj = nn.Linear(DIM, 3 * DIM, bias=bias), nn.Linear(DIM, DIM, bias=bias)
    fc1, fc2 = nn.Linear(DIM, 64, bias=bias), nn.Linear(64, DIM, bias=bias)
    nn.ModuleList([qkv, proj, fc1, fc2]).to(dtype).requires_grad_(False)

    def split(h):
        return tuple(t.unflatten(2, (4, -1)).transpose(1, 2) for t in qkv(h).chunk(3, dim=2))

    def attn(h):
        return proj(nn.functional.scaled_dot_product_attention(*split(h)).transpose(1, 2).flatten(2))

    def mlp(h):
        return fc2(fc1(h).relu())

    def run(x):
        x = x + attn(x) if attention else x
        return x + mlp(x)

    x = given(normal(batch, 19, DIM, seed=1), dtype)
    return Block(run, identity, attn, identity, identity, mlp, identity, split, proj), x


EXAMPLES["adaptkit.core.block.Block.__call__"] = examples(
    block, (DIM, DIM, 8, 19, DIM, DIM, 64),
    {"one": dict(batch=1), "two": dict(batch=2), "no-bias": dict(batch=2, bias=False), "mlp": dict(batch=2, attention=False)},
)  # fmt: skip
