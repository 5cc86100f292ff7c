"""Prompt tokens and Adapter+, each against a rewrite that runs the backbone's own blocks."""

import copy
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS

import adaptkit
from adaptkit.core.registry import view

M = 3
#: A fused and a rotary backbone of timm, whose own blocks take more prefix tokens where they are told their number.
PLAIN = ("timm-vit", "timm-siglip", "timm-dinov2-reg", "timm-distilled", "timm-dinov3", "timm-eva02", "timm-rope-mixed")


def host(name):
    return HOSTS[name].build().double()


def image(name, cells=None, seed=0):
    patch = view(HOSTS[name].build()).spec.patch_size
    size = (HOSTS[name].size,) * 2 if cells is None else (cells[0] * patch, cells[1] * patch)
    return torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def stirred(model):
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=g))
    return model.double().eval()


def rewritten(name, x, prompts, deep):
    """Prompts after the prefix tokens, as the paper writes them, through the backbone's own blocks."""
    backbone = host(name)
    seen = view(backbone)
    before = seen.spec.num_prefix_tokens
    for blk in backbone.blocks:  # rotary attention leaves the first tokens unturned
        if hasattr(blk.attn, "num_prefix_tokens"):
            blk.attn.num_prefix_tokens = before + M
    grid = seen.grid(x)
    tokens = seen.embed(x, grid)
    for i, block in enumerate(seen.blocks(x, grid)):
        if i == 0 or deep:
            ours = prompts[i].expand(len(x), -1, -1)
            rest = tokens[:, before + (M if i else 0) :]
            tokens = torch.cat([tokens[:, :before], ours, rest], dim=1)
        tokens = block.run(tokens)
    tokens = seen.norm(tokens)
    return tokens[:, :before], tokens[:, before + M :]


@torch.no_grad()
@pytest.mark.parametrize("cells", [None, (3, 5)], ids=["native", "rectangle"])
@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
@pytest.mark.parametrize("name", PLAIN)
def test_prompts_are_tokens_that_the_backbones_own_blocks_see(name, deep, cells):
    if cells and not name.startswith(("timm-dinov3", "timm-rope")):
        pytest.skip("timm's own blocks and positions at another grid are other tests' claim")
    model = stirred(adaptkit.attach(HOSTS[name].build(), "vpt", num_tokens=M, deep=deep))
    x = image(name, cells)
    features = model(x)
    prefix, tokens = rewritten(name, x, model.adapters["vpt"].prompts, deep)
    torch.testing.assert_close(features.prefix, prefix, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(features.tokens, tokens, atol=1e-6, rtol=1e-6)
    assert features.aux == {}


@torch.no_grad()
@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
@pytest.mark.parametrize("name", [n for n in sorted(HOSTS) if HOSTS[n].splits])
def test_prompts_that_are_one_token_of_no_weight_change_nothing(name, deep):
    """Keys far below all others get no attention: then prompts pass by, on every backbone and with every bias."""
    backbone = host(name)
    model = stirred(adaptkit.attach(backbone, "vpt", num_tokens=M, deep=deep))
    x = image(name)
    expected = view(host(name)).features(x)

    def hidden(q, k, v, attn_mask=None, scale=None, **_):
        n = k.shape[2] - M
        mask = torch.zeros(q.shape[2], k.shape[2], dtype=q.dtype)
        mask[:, n:] = -math.inf
        return attention(q, k, v, attn_mask=mask if attn_mask is None else attn_mask + mask, scale=scale)

    attention = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = hidden
    try:
        features = model(x)
    finally:
        F.scaled_dot_product_attention = attention
    torch.testing.assert_close(features.tokens, expected.tokens, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_the_gradient_of_the_prompts_is_that_of_finite_differences_also_when_checkpointed(deep):
    model = stirred(adaptkit.attach(HOSTS["timm-dinov3"].build(), "vpt", num_tokens=M, deep=deep))
    x, prompts = image("timm-dinov3")[:1], model.adapters["vpt"].prompts
    weights = torch.randn(model(x).tokens.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def value():
        return (model(x).tokens * weights).sum()

    (grad,) = torch.autograd.grad(value(), prompts)
    direction = torch.randn(prompts.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        prompts.add_(1e-6 * direction)
        up = value()
        prompts.sub_(2e-6 * direction)
        down = value()
        prompts.add_(1e-6 * direction)
    torch.testing.assert_close((up - down) / 2e-6, (grad * direction).sum(), rtol=1e-6, atol=1e-6)
    model.gradient_checkpointing_enable()
    (again,) = torch.autograd.grad(value(), prompts)
    torch.testing.assert_close(again, grad, rtol=1e-9, atol=1e-9)


def test_prompts_start_as_the_patch_embedding_would_and_need_an_attention_that_comes_apart():
    spec = view(HOSTS["timm-vit"].build()).spec
    bound = math.sqrt(6 / (3 * spec.patch_size**2 + spec.embed_dim))
    prompts = adaptkit.attach(HOSTS["timm-vit"].build(), "vpt", num_tokens=50).adapters["vpt"].prompts
    assert prompts.shape == (spec.depth, 50, spec.embed_dim)
    assert bound * 0.98 < prompts.abs().max() <= bound
    with pytest.raises(TypeError, match="does not come apart"):
        adaptkit.attach(HOSTS["timm-sam"].build(), "vpt")
    for wrong in ({"num_tokens": 0}, {"num_tokens": 2.5}, {"dropout": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            adaptkit.attach(HOSTS["timm-vit"].build(), "vpt", **wrong)


@torch.no_grad()
@pytest.mark.parametrize("name", ["timm-vit", "timm-dinov3", "hf-dinov2"])
def test_adapter_plus_is_a_scaled_bottleneck_after_each_block(name):
    model = stirred(adaptkit.attach(HOSTS[name].build(), "adapter-plus", rank=4))
    x, own = image(name), dict(model.adapters["adapter-plus"].named_parameters())
    seen = view(host(name))
    tokens, blocks = seen.begin(x)
    for i, block in enumerate(blocks):
        tokens = block.run(tokens)
        hidden = F.gelu(tokens @ own[f"blocks.{i}.down.weight"].T + own[f"blocks.{i}.down.bias"])
        change = hidden @ own[f"blocks.{i}.up.weight"].T + own[f"blocks.{i}.up.bias"]
        tokens = tokens + own[f"blocks.{i}.scale"] * change
    expected = seen.norm(tokens)[:, seen.spec.num_prefix_tokens :]
    torch.testing.assert_close(model(x).tokens, expected, atol=1e-6, rtol=1e-6)


def test_adapter_plus_starts_by_the_papers_rule_or_at_the_frozen_model():
    spec = view(HOSTS["timm-vit"].build()).spec
    model = adaptkit.attach(HOSTS["timm-vit"].build(), "adapter-plus")
    one = model.adapters["adapter-plus"].blocks[0]
    assert sum(p.numel() for p in model.adapters.parameters()) == spec.depth * (
        2 * spec.embed_dim * 8 + 8 + 2 * spec.embed_dim
    )
    assert 0.005 < one.down.weight.std() < 0.01
    assert one.down.weight.abs().max() <= 0.02
    assert torch.equal(one.scale, torch.ones(spec.embed_dim))
    x = image("timm-vit").float()
    frozen = adaptkit.attach(HOSTS["timm-vit"].build(), "adapter-plus", init="lora").eval()
    assert torch.equal(frozen(x).tokens, view(HOSTS["timm-vit"].build()).features(x).tokens)


def test_the_branch_of_adapter_plus_is_dropped_for_whole_images_in_training():
    model = stirred(adaptkit.attach(HOSTS["timm-vit"].build(), "adapter-plus", drop_path=0.5))
    branch = copy.deepcopy(model.adapters["adapter-plus"].blocks[0])
    y = torch.randn(64, 5, 32, dtype=torch.float64)
    whole = branch.eval()(y)
    torch.manual_seed(0)
    some = branch.train()(y)
    dropped = (some == 0).flatten(1).all(1)
    assert 10 < dropped.sum() < 54
    torch.testing.assert_close(some[~dropped], 2 * whole[~dropped])
