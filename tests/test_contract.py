"""The promises, over every adapter and every family. A new adapter or host enters by being registered."""

import copy
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from errors import assert_rounds_to, one_rounding_off, transformer
from families import DEPTH, DIM, HOSTS

import adaptkit
from adaptkit.adapters.base import BlockAdapter
from adaptkit.core.registry import register_adapter, view


@dataclass(frozen=True)
class ToyConfig:
    width: int = 4


@register_adapter("toy-bottleneck", ToyConfig)
class ToyBottleneck(BlockAdapter):
    """A block adapter from outside the package: a zero-initialised bottleneck after each block."""

    def __init__(self, spec, config):
        super().__init__(spec, config)
        self.down = torch.nn.ModuleList(torch.nn.Linear(spec.embed_dim, config.width) for _ in range(spec.depth))
        self.up = torch.nn.ModuleList(torch.nn.Linear(config.width, spec.embed_dim) for _ in range(spec.depth))
        for up in self.up:
            torch.nn.init.zeros_(up.weight)
            torch.nn.init.zeros_(up.bias)

    def wrap(self, block, index, trace):
        def run(x):
            x = block(x)
            delta = self.up[index](torch.relu(self.down[index](x)))
            trace["usage"] = trace.get("usage", 0) + delta.abs().mean()
            return x + delta

        return run


SMALL = {"conv_inplane": 8}
METHODS = {
    "vit-adapter": [("vit-adapter", SMALL)],
    "vit-adapter-extract-only": [("vit-adapter", {**SMALL, "injector": False, "norm": "group"})],
    "vit-split": ["vit-split"],
    "sfp": ["sfp"],
    "adavit": ["adavit"],
    "dat": ["dat"],
    "metaformer": [("metaformer", {"width": 8, "mixer": ("pool", "conv", "global", "msda")})],
    "lora": ["lora"],
    "adapter-plus": ["adapter-plus"],
    "vpt": [("vpt", {"num_tokens": 3})],
    "rein": [("rein", {"num_tokens": 5, "rank": 2})],
    "tome": [("tome", {"r": 3}), "lora"],  # nothing in it is trained, so that by itself it has no gradients to promise
    "toy-bottleneck": ["toy-bottleneck"],
}
# Its other settings, and several at once, meet one backbone of each kind.
SETTINGS = {
    "vit-adapter-light": [("vit-adapter", {**SMALL, "add_vit_feature": None, "extra_extractors": 0, "with_cffn": False,
                                           "checkpoint": True, "norm": "layer"})],
    "vit-adapter-inject-only": [("vit-adapter", {**SMALL, "extractor": False})],
    "vit-adapter-window": [("vit-adapter", {**SMALL, "attention": "window"})],
    "vit-adapter-pool": [("vit-adapter", {**SMALL, "attention": "pool"})],
    "adavit+vit-adapter": ["adavit", ("vit-adapter", SMALL)],
    "dat+vit-adapter": [("dat", {"blocks": 2, "bias": "log-cpb", "stride": 2}), ("vit-adapter", SMALL)],
    "dat-still": [("dat", {"offset_range": 0})],
    "metaformer-gate": [("metaformer", {"width": 0, "norm": "group1"})],
    "metaformer-random+vit-adapter": [("metaformer", {"width": 8, "mixer": ("random", "window", "sepconv", "identity")}),
                                      ("vit-adapter", SMALL)],
    "dora+vit-adapter": [("lora", {"use_dora": True, "target_modules": ["proj", "fc1"], "lora_dropout": 0.1}),
                         ("vit-adapter", SMALL)],
    "adapter-plus-lora-init+vit-adapter": [("adapter-plus", {"init": "lora"}), ("vit-adapter", SMALL)],
    "vpt-shallow+vit-adapter": [("vpt", {"num_tokens": 3, "deep": False}), ("vit-adapter", SMALL)],
    "rein-zero+vit-adapter": [("rein", {"num_tokens": 5, "rank": 0, "zero_mlp_delta_f": True}), ("vit-adapter", SMALL)],
    "metaformer-mona": [("metaformer", {"width": 8, "mixer": "mona", "mlp_ratio": 0, "residual": False})],
    "lora+adavit": ["lora", "adavit"],
    "lora+vit-split": ["lora", ("vit-split", {"select_layers": [1, 3], "out_indices": [0], "checkpoint": True,
                                              "norm": "layer"})],
    "tome+vit-adapter": [("tome", {"r": (2, 0, 3)}), ("vit-adapter", SMALL)],
    "toy-bottleneck+vit-adapter": ["toy-bottleneck", ("vit-adapter", SMALL)],
}  # fmt: skip
ADAPTERS = {**METHODS, **SETTINGS}
SUMS = transformer(2 * DEPTH, DIM, 4 * 4 + 5)  # of the backbone's blocks, and as many again of the adapter
PYRAMIDS = ("vit-adapter", "sfp", "vit-split", "pyramid")  # those that make maps
KINDS = ("timm-vit", "timm-siglip", "timm-dinov2-reg", "timm-dinov3", "timm-beit", "timm-sam", "hf-dinov2", "hf-dinov3")
assert set(adaptkit.list_adapters()) <= {
    a if isinstance(a, str) else a[0] for group in ADAPTERS.values() for a in group
}


#: Those that start elsewhere, as their papers have it: new tokens take part in the attention, or both matrices of the
#: bottleneck are drawn with a deviation of 0.01, or what is added is drawn and scaled by 0.001, or tokens are merged.
NOT_FROZEN_AT_FIRST = ("vpt", "vpt-shallow+vit-adapter", "adapter-plus", "rein", "tome", "tome+vit-adapter")


def fits(adapter, name):
    """AdaViT, DAT-KV, prompts and ToMe step inside the attention, so they need one that comes apart, ToMe one without a
    bias for pairs of places; their tests check the refusal."""
    if adapter.startswith("tome") and "beit" in name:
        return False
    return HOSTS[name].splits or not adapter.startswith(("adavit", "dat", "lora+adavit", "vpt", "tome"))


PROMISES = 5  # those that pairs are dealt out to, below


def every(promise):
    """Every method and setting on a backbone of each kind; the other hosts meet every method in one promise, in turn.

    Of the first, a quarter comes with each run of the tests, in turn, all with ``-m full``. So each promise meets every
    method and every backbone, and each method meets every backbone.
    """
    pairs = []
    for (i, a), (j, h) in product(enumerate(ADAPTERS), enumerate(sorted(HOSTS))):
        turn = a in METHODS and (i + j) % PROMISES == promise
        if fits(a, h) and (h in KINDS or turn):
            now = turn or (i + KINDS.index(h) + promise) % 4 == 0
            pairs.append(pytest.param(a, h, id=f"{a}-{h}", marks=[] if now else pytest.mark.full))
    return pytest.mark.parametrize(("adapter", "name"), pairs)


def test_every_method_meets_every_host_and_every_promise_both():
    dealt = [set(p.values for p in every(promise).args[1] if not p.marks) for promise in range(PROMISES)]
    assert {(a, h) for a in METHODS for h in HOSTS if fits(a, h)} <= set.union(*dealt)
    for pairs in dealt:
        assert {a for a, _ in pairs} == set(ADAPTERS)
        assert {h for _, h in pairs} == set(HOSTS)


def attach(adapter, name, seed=1, **options):
    host = HOSTS[name].build()
    torch.manual_seed(seed)
    return adaptkit.attach(host, *ADAPTERS[adapter], **options)


def attach_short(adapter, name):
    """With two interactions for four: a graph says no more by saying it twice, and is slow to trace."""
    short = {"interaction_indexes": [[0, 1], [2, 3]], "extra_extractors": 1}
    parts = [a if isinstance(a, str) else (a[0], {**a[1], **short}) if a[0] == "vit-adapter" else a
             for a in ADAPTERS[adapter]]  # fmt: skip
    torch.manual_seed(1)
    return adaptkit.attach(HOSTS[name].build(), *parts)


def image(name, batch=2, cells=None, extra=(0, 0), seed=0):
    """A batch at the backbone's own size, or at ``cells`` patches plus some pixels."""
    side = HOSTS[name].size
    size = (side, side)
    if cells is not None:
        patch = view(HOSTS[name].build()).spec.patch_size
        size = (cells[0] * patch + extra[0], cells[1] * patch + extra[1])
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def randomise(model):
    """Move every trainable parameter off its initial value, so that nothing is compared at zero."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=g))
    return model.eval()


def scalar(features):
    outputs = [features.tokens, features.prefix, *features.maps, *features.aux.values()]
    return sum((x.float() * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in outputs)


def same(a, b):
    pairs = [(a.tokens, b.tokens), (a.prefix, b.prefix), *zip(a.maps, b.maps)]
    if a.logits is not None:
        pairs.append((a.logits, b.logits))
    return all(torch.equal(x, y) for x, y in pairs) and len(a.maps) == len(b.maps)


@every(0)
@torch.no_grad()
def test_just_attached_the_output_is_the_frozen_backbones_bitwise(adapter, name):
    x = image(name)
    plain = view(HOSTS[name].build())
    expected = plain.features(x)
    expected = expected._replace(logits=plain.logits(expected))
    features = attach(adapter, name).eval()(x)
    if adapter in NOT_FROZEN_AT_FIRST:
        assert features.prefix.shape == expected.prefix.shape
        assert not torch.equal(features.tokens, expected.tokens)
    else:
        assert same(features._replace(maps=()), expected)


@every(1)
def test_detach_returns_the_very_object_as_it_was(adapter, name):
    host = HOSTS[name].build().train()
    next(host.parameters()).requires_grad_(False)
    some = list(host.modules())[-1]
    some.eval()
    before = copy.deepcopy(host.state_dict())
    modules = [(m, m.training, type(m), set(vars(m))) for m in host.modules()]
    flags = [p.requires_grad for p in host.parameters()]
    model = adaptkit.attach(host, *ADAPTERS[adapter])
    model.train()
    scalar(model(image(name))).backward()
    assert model.detach() is host
    assert [(m, m.training, type(m), set(vars(m))) for m in host.modules()] == modules
    assert [p.requires_grad for p in host.parameters()] == flags
    assert all(p.grad is None for p in host.parameters())
    assert all(torch.equal(v, before[k]) for k, v in host.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.modules())


@every(2)
def test_frozen_means_frozen_and_every_adapter_parameter_gets_a_gradient(adapter, name):
    model = randomise(attach(adapter, name)).train()  # at the start a gradient may be zero: gamma, LoRA's B
    model.sets.apply(lambda m: setattr(m, "p", 0.0) if hasattr(m, "p") else None)  # paths that are dropped have none
    before = copy.deepcopy(model.backbone.state_dict())
    scalar(model(image(name))).backward()
    assert not any(m.training for m in model.backbone.modules())
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert not [n for n, grad in grads.items() if grad is None or not grad.any()]
    assert all(p.grad is None and not p.requires_grad for p in model.backbone.parameters())
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
    assert all(torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items())


@every(3)
@torch.no_grad()
def test_save_load_attach_elsewhere_gives_the_same_output_bitwise(adapter, name, tmp_path):
    model = randomise(attach(adapter, name, head=("fpn", {"num_classes": 3, "channels": 8})))
    x = image(name)
    expected = model(x)
    model.save(tmp_path)
    again = adaptkit.attach(HOSTS[name].build(), tmp_path)
    assert not again.training
    assert same(again(x), expected)


@every(4)
@torch.no_grad()
@pytest.mark.parametrize(
    ("cells", "extra"),
    [
        pytest.param((4, 3), (3, 1), id="odd"),
        pytest.param((3, 5), (0, 0), id="rectangle", marks=pytest.mark.full),
    ],
)
def test_any_input_size_gives_maps_of_the_image_size(adapter, name, cells, extra):
    model = attach(adapter, name, head=("linear", {"num_classes": 3})).eval()
    x = image(name, 1, cells, extra)
    features = model(x)
    height, width = x.shape[-2:]
    pyramid = any(word in adapter for word in PYRAMIDS)
    strides = (4, 8, 16, 32) if pyramid else ()
    assert [m.shape[-2:] for m in features.maps] == [(-(-height // s), -(-width // s)) for s in strides]
    assert features.logits.shape == (1, 3, height, width)
    assert all(m.isfinite().all() for m in features.maps)


# Tracing every pair would take minutes and say little more: the blocks of every family are traced under a block
# adapter, and every method on one backbone of each position scheme. Each method on a plain ViT, compiled or exported by
# turns, and the blocks of every tenth family, come with each run of the tests; the others with `-m full`.
TRACED = [("toy-bottleneck", h) for h in sorted(HOSTS)] + [
    (a, h) for a in ADAPTERS for h in ("timm-vit", "timm-dinov3", "hf-dinov2") if a in METHODS or h == "timm-vit"
]
QUICK = [(a, "timm-vit") for a in METHODS] + [("toy-bottleneck", h) for h in sorted(HOSTS)[::10]]


def traced(turn):
    """Every pair; of the quick ones every other one is not ``full``."""
    quick = QUICK[turn::2]
    return pytest.mark.parametrize(
        ("adapter", "name"),
        [
            pytest.param(a, h, id=f"{a}-{h}", marks=() if (a, h) in quick else pytest.mark.full)
            for a, h in dict.fromkeys(TRACED)
        ],
    )


def assert_same_function(model, image, found, expected):
    """But for rounding; a norm over the one cell of the coarsest map makes much of it."""
    moved = model(one_rounding_off(image))
    assert_rounds_to(*([f.tokens, *f.maps] for f in (found, expected)), *SUMS, moved=[moved.tokens, *moved.maps])


@traced(1)
def test_compiles_as_one_graph(adapter, name):
    torch._dynamo.reset()
    model = randomise(attach_short(adapter, name))
    x = image(name)
    compiled = torch.compile(model, fullgraph=True, backend="eager")(x)
    expected = model(x)
    assert_same_function(model, x, compiled, expected)


@traced(0)
@torch.no_grad()
def test_exports(adapter, name):
    model = randomise(attach_short(adapter, name))
    x = image(name)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), strict=False)
    x = torch.cat([x, x.flip(-1), x[:1].flip(-2)])  # of another batch size
    exported, expected = program.module()(x), model(x)
    assert_same_function(model, x, exported, expected)
    assert not any("grid_sampler" in str(n.target) for n in program.graph.nodes)
