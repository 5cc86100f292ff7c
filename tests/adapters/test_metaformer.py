"""The MetaFormer adapter: the equation, its switches, its counts, its gradients."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS, stirred

import adaptkit
from adaptkit import MetaFormerConfig, Spec
from adaptkit.adapters.metaformer import MetaFormer, TokenNorm
from adaptkit.mixers import list_mixers

BASE = Spec("timm-vit", 768, 12, 12, 16, 1)
every_mixer = pytest.mark.parametrize("mixer", list_mixers())


def attach(name="timm-dinov2-reg", **options):
    torch.manual_seed(0)
    return adaptkit.attach(HOSTS[name].build(), ("metaformer", {"width": 8, **options}))


def image(cells=(4, 5), patch=14, seed=0):
    return torch.randn(2, 3, cells[0] * patch, cells[1] * patch, generator=torch.Generator().manual_seed(seed))


def randomise(model):
    return stirred(model, seed=3, by=0.3).eval()


def first_block(model, x):
    """Tokens that enter the first block, the frozen block's output, the wrapped block's output, the patch grid."""
    tokens, blocks = model.vit.begin(x)
    grid = model.vit.grid(x)
    from dataclasses import replace

    block = replace(blocks[0], grid=grid)
    return tokens, block(tokens), model.adapters["metaformer"].wrap(block, 0, {})(tokens), grid


@torch.no_grad()
def test_one_block_is_the_equation():
    model = randomise(attach(mixer="pool", mlp_ratio=2.0))
    x, frozen, wrapped, grid = first_block(model, image())
    m = model.adapters["metaformer"].blocks[0]
    z = m.down(F.layer_norm(x, x.shape[-1:]))
    prefix, patches = z[:, :5], z[:, 5:]
    h = F.layer_norm(patches, (8,), m.norm1.weight).mT.unflatten(2, grid)
    pooled = F.avg_pool2d(h, 3, 1, 1, count_include_pad=False) - h
    z = torch.cat([prefix, patches + pooled.flatten(2).mT], 1)
    z = z + m.fc2(F.gelu(m.fc1(F.layer_norm(z, (8,), m.norm2.weight))))
    torch.testing.assert_close(wrapped, frozen + m.up(F.gelu(z)))
    assert m.fc1.out_features == 16


@torch.no_grad()
def test_with_the_identity_it_is_adaptformer():
    options = {"mixer": "identity", "mlp_ratio": 0, "norm": "none", "residual": False, "act": "relu"}
    model = randomise(attach(**options))
    x, frozen, wrapped, _ = first_block(model, image())
    m = model.adapters["metaformer"].blocks[0]
    torch.testing.assert_close(wrapped, frozen + m.up(F.relu(m.down(x))))
    assert sorted(n for n, _ in m.named_parameters()) == ["down.bias", "down.weight", "up.bias", "up.weight"]


@torch.no_grad()
def test_width_zero_is_the_gate_on_the_normed_pool_minus_itself():
    model = randomise(attach(width=0))
    x, frozen, wrapped, grid = first_block(model, image())
    gamma = model.adapters["metaformer"].blocks[0].gamma
    h = F.layer_norm(x, x.shape[-1:])[:, 5:].mT.unflatten(2, grid)
    delta = (F.avg_pool2d(h, 3, 1, 1, count_include_pad=False) - h).flatten(2).mT
    torch.testing.assert_close(wrapped[:, 5:], frozen[:, 5:] + gamma * delta)
    assert torch.equal(wrapped[:, :5], frozen[:, :5])


@every_mixer
@torch.no_grad()
def test_prefix_tokens_never_enter_the_mixer(mixer):
    model = randomise(attach(mixer=mixer))
    x = first_block(model, image())[0]
    beside, other = model.adapters["metaformer"].blocks[0], x.clone()
    other[:, :5] += 1
    grid = model.vit.grid(image())
    a, b = beside(x, grid), beside(other, grid)
    assert torch.equal(a[:, 5:], b[:, 5:])  # patches do not see the prefix
    other = x.clone()
    other[:, 5:] = other[:, 5:].flip(1) * 2
    assert torch.equal(a[:, :5], beside(other, grid)[:, :5])  # nor the prefix the patches


@pytest.mark.parametrize(("options", "count"), [
    ({"width": 0}, 768),
    ({"mixer": "identity", "mlp_ratio": 0, "norm": "none"}, 99_136),
    ({"mixer": "pool", "mlp_ratio": 0}, 99_136 + 64),
    ({"mixer": "conv", "mlp_ratio": 0, "norm": "none"}, 99_136 + 640),
    ({"mixer": "msda", "mlp_ratio": 0, "norm": "none"}, 99_136 + 11_440),
    ({"mixer": "pool", "mlp_ratio": 2.0, "norm": "none"}, 99_136 + 64 * 128 * 2 + 128 + 64),
])  # fmt: skip
def test_parameters_per_block_of_a_vit_base(options, count):
    with torch.device("meta"):
        adapter = MetaFormer(BASE, MetaFormerConfig(**options))
    assert sum(p.numel() for p in adapter.parameters()) == 12 * count


SWITCHES = [
    *({"mixer": m} for m in list_mixers()),
    *({"norm": n} for n in ("group1", "none")),
    *({"act": a} for a in ("relu", "silu", "none")),
    {"residual": False},
    {"mlp_ratio": 0},
    {"width": 0},
    {"width": 0, "mixer": "conv", "norm": "none"},
]


@pytest.mark.parametrize("options", SWITCHES, ids=str)
def test_within_four_sgd_steps_every_tensor_gets_a_gradient_clearly_above_rounding(options):
    model = attach(**options).train()
    x, target = image(), torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(1))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    largest = dict.fromkeys(trained, 0.0)
    for _ in range(4):
        optimizer.zero_grad()
        (model(x).tokens * target).sum().backward()
        for n, p in trained.items():
            largest[n] = max(largest[n], float(p.grad.abs().max()))
        optimizer.step()
    # A gradient that cancels exactly is some 1e-6 of the sums that make it, here of order one.
    assert {n: g for n, g in largest.items() if g < 1e-4} == {}


@pytest.mark.parametrize("options", SWITCHES, ids=str)
def test_the_host_holds_exactly_one_zero_and_the_mixer_no_gate(options):
    for block in attach(**options).adapters["metaformer"].blocks:
        zeros = {n for n, p in block.named_parameters() if not p.any() and not n.startswith("mixer.")}
        assert zeros == ({"gamma"} if options.get("width") == 0 else {"up.weight", "up.bias"})


def test_several_mixers_are_spread_over_the_depth():
    hybrid = MetaFormerConfig(mixer=("pool", "pool", "global", "global"))
    assert hybrid.mixers(BASE) == ["pool"] * 6 + ["global"] * 6
    assert MetaFormerConfig(mixer=("pool", "conv", "global")).mixers(BASE._replace(depth=3))[1] == "conv"
    kinds = [type(b.mixer).__name__ for b in attach(mixer=("pool", "global")).adapters["metaformer"].blocks]
    assert kinds == ["Pool", "Pool", "GlobalAttention", "GlobalAttention"]


def test_each_block_has_a_random_matrix_of_its_own_and_the_seed_is_in_the_config():
    adapter = attach(mixer="random", seed=5).adapters["metaformer"]
    assert [b.mixer.seed for b in adapter.blocks] == [5, 6, 7, 8]
    assert adapter.config.seed == 5


def test_options_reach_their_mixer():
    blocks = attach(mixer=("pool", "conv"), mixer_options={"pool": {"size": 7}}).adapters["metaformer"].blocks
    assert blocks[0].mixer.size == 7
    assert blocks[3].mixer.conv.kernel_size == (3, 3)


@torch.no_grad()
def test_group1_is_group_norm_with_one_group_and_a_prefix_token_is_a_map_of_one():
    norm, x = TokenNorm("group1", 8), torch.randn(2, 5 + 12, 8)
    norm.weight.uniform_(0.5, 2)
    reference = torch.nn.GroupNorm(1, 8)
    reference.weight.copy_(norm.weight)
    y = norm(x, 12)
    torch.testing.assert_close(y[:, 5:], reference(x[:, 5:].mT).mT)
    for i in range(5):
        torch.testing.assert_close(y[:, i], reference(x[:, i, :, None])[..., 0])


def test_a_file_with_hybrid_and_options_comes_back(tmp_path):
    model = randomise(attach(mixer=("pool", "random"), mixer_options={"pool": {"size": 5}}, seed=9))
    model.save(tmp_path)
    again = adaptkit.attach(HOSTS["timm-dinov2-reg"].build(), tmp_path)
    assert again.adapters["metaformer"].config == model.adapters["metaformer"].config
    assert torch.equal(again(image()).tokens, model(image()).tokens)


@pytest.mark.parametrize(("options", "message"), [
    ({"mixer": "fft"}, "mixer='fft' is not a choice; choose one of 'conv'"),
    ({"mixer": ()}, "names no mixer"),
    ({"mixer": ("pool",) * 5}, "names 5 mixers for 4 blocks"),
    ({"norm": "batch"}, "norm='batch' is not a choice"),
    ({"width": 0, "mlp_ratio": 1.0}, "needs a bottleneck"),
    ({"width": -1}, "must not be negative"),
    ({"width": ()}, "gives no width"),
    ({"mixer_options": {"conv": {}}}, "mixer_options are for conv, but mixer='pool'"),
    ({"mixer_options": {"pool": {"kernel": 5}}}, "mixer 'pool' does not take"),
])  # fmt: skip
def test_a_wrong_option_is_a_value_error_that_says_what_to_do(options, message):
    with pytest.raises(ValueError, match=message):
        attach(**options)
