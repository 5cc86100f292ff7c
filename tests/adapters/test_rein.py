"""Rein against a rewrite token by token, around the backbone's own blocks."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS

import adaptkit
from adaptkit.adapters.rein import Rein, ReinConfig
from adaptkit.core.registry import view
from adaptkit.core.view import Spec

SMALL = {"num_tokens": 5, "rank": 2}
FULL = {"num_tokens": 5, "rank": 0}
#: With a class token; with class and register tokens, in two libraries; with none of them.
NAMES = ("timm-vit", "timm-dinov2-reg", "hf-dinov2-reg", "timm-dinov3", "timm-siglip")


def image(name, cells=None, seed=0):
    patch = view(HOSTS[name].build()).spec.patch_size
    size = (HOSTS[name].size,) * 2 if cells is None else (cells[0] * patch, cells[1] * patch)
    return torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def stirred(model):
    """In double precision, with a scale that shows."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=g))
    return model.double().eval()


def refined(f, own, index, scale):
    """One token f (D,) as the paper writes it, the sum over the tokens as a loop."""
    if "learnable_tokens" in own:
        t = own["learnable_tokens"][index]
    else:
        a, b = own["learnable_tokens_a"][index], own["learnable_tokens_b"][index]
        t = torch.stack([sum(a[j, k] * b[k] for k in range(len(b))) for j in range(len(a))])
    weights = [math.exp(float(row.dot(f)) / math.sqrt(len(f))) for row in t]
    d = torch.zeros_like(f)
    for j in range(1, len(t)):
        d += weights[j] / sum(weights) * (own["mlp_token2feat.weight"].mv(t[j]) + own["mlp_token2feat.bias"])
    return f + scale * (own["mlp_delta_f.weight"].mv(d + f) + own["mlp_delta_f.bias"])


@torch.no_grad()
def rewritten(name, x, own, scale):
    """Features of (B, 3, H, W): prefix and patch tokens after the final norm."""
    seen = view(HOSTS[name].build().double())
    tokens, blocks = seen.begin(x)
    first = 1 if seen.spec.num_prefix_tokens else 0
    for i, block in enumerate(blocks):
        tokens = block.run(tokens).clone()
        for row in tokens:
            for n in range(first, len(row)):
                row[n] = refined(row[n].clone(), own, i, scale)
    features = seen.finish(tokens, x)
    return features.prefix, features.tokens


@torch.no_grad()
@pytest.mark.parametrize("options", [SMALL, FULL], ids=["low-rank", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_every_token_but_the_class_token_is_refined_by_the_papers_equations(name, options):
    model = stirred(adaptkit.attach(HOSTS[name].build(), "rein", **options))
    own = model.adapters["rein"].state_dict()
    x = image(name, (2, 3) if name.startswith("timm-dinov3") else None)[:1]
    features = model(x)
    prefix, tokens = rewritten(name, x, own, own["scale"])
    torch.testing.assert_close(features.prefix, prefix, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(features.tokens, tokens, atol=1e-9, rtol=1e-9)
    assert features.aux == {}


@torch.no_grad()
def test_the_first_prefix_token_passes_by_and_registers_do_not():
    host = HOSTS["timm-dinov2-reg"].build()
    model = stirred(adaptkit.attach(host, "rein", **SMALL))
    x = image("timm-dinov2-reg")
    tokens, blocks = model.vit.begin(x)
    block = blocks[0]
    after = model.adapters["rein"].wrap(_on(block, model.vit.grid(x)), 0, {})(tokens)
    before = block.run(tokens)
    changed = (after != before).any(-1)
    assert not changed[:, 0].any()
    assert changed[:, 1:].all()


@torch.no_grad()
def test_where_the_pyramid_drops_the_prefix_no_patch_passes_by():
    adapters = [("rein", SMALL), ("vit-adapter", {"conv_inplane": 8, "prefix": "drop"})]
    model = stirred(adaptkit.attach(HOSTS["timm-vit"].build(), *adapters))
    x = image("timm-vit")
    _, blocks = model.vit.begin(x)
    patches = torch.randn(2, math.prod(model.vit.grid(x)), 32, dtype=torch.float64)
    after = model.adapters["rein"].wrap(_on(blocks[0], model.vit.grid(x)), 0, {})(patches)
    assert (after != blocks[0].run(patches)).any(-1).all()
    assert model(x).prefix.shape[1] == 0


def _on(block, grid):
    """A block as ``attach`` hands it over."""
    return replace(block, grid=grid)


@torch.no_grad()
def test_it_starts_a_thousandth_away_from_the_frozen_model_or_at_it():
    frozen = view(HOSTS["timm-vit"].build()).features(image("timm-vit").float())
    x = image("timm-vit").float()
    torch.manual_seed(0)
    near = adaptkit.attach(HOSTS["timm-vit"].build(), "rein").eval()
    distance = (near(x).tokens - frozen.tokens).abs().max()
    assert 0 < distance < 0.05
    torch.manual_seed(0)
    nearer = adaptkit.attach(HOSTS["timm-vit"].build(), "rein", scale=1e-4).eval()
    ratio = distance / (nearer(x).tokens - frozen.tokens).abs().max()
    assert 9 < ratio < 11  # linear in s, as far as s is small
    at = adaptkit.attach(HOSTS["timm-vit"].build(), "rein", zero_mlp_delta_f=True).eval()
    assert torch.equal(at(x).tokens, frozen.tokens)
    assert torch.equal(at(x).prefix, frozen.prefix)
    assert "scale" not in at.adapters["rein"].state_dict()


def test_from_the_frozen_model_it_learns():
    model = adaptkit.attach(HOSTS["timm-vit"].build(), "rein", **FULL, zero_mlp_delta_f=True)
    own, x = model.adapters["rein"], image("timm-vit").float()
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).tokens.square().mean().backward()
        optimizer.step()
    assert all(p.grad.abs().max() > 0 for p in own.parameters())


def test_sizes_and_starts_are_those_of_the_authors():
    spec = Spec("timm-vit", 1024, 24, 16, 16, 1)
    torch.manual_seed(0)
    low = Rein(spec, ReinConfig())
    queries = (1024 * 256 + 256) + (3 * 256 * 256 + 256)  # transform and merge, which belong to Mask2Former's queries
    assert sum(p.numel() for p in low.parameters()) + queries == 2_990_081  # as published for DINOv2-L
    bound = math.sqrt(6 / (3 * 16**2 + math.sqrt(1024 * 16)))
    for tokens in (low.learnable_tokens_a, low.learnable_tokens_b):
        assert 0.99 * bound < tokens.abs().max() <= bound
    assert low.scale.item() == pytest.approx(0.001)
    for layer in (low.mlp_token2feat, low.mlp_delta_f):  # Kaiming's, uniform, a = sqrt(5): bound 1 / sqrt(D)
        assert 0.99 / 32 < layer.weight.abs().max() <= 1 / 32
    full = Rein(spec._replace(depth=2), ReinConfig(rank=0)).learnable_tokens
    assert full.shape == (2, 100, 1024)
    bound = math.sqrt(6 / (3 * 16**2 + 1024))
    assert 0.99 * bound < full.abs().max() <= bound


@torch.no_grad()
def test_its_file_attaches_again_and_checkpointing_changes_nothing(tmp_path):
    model = stirred(adaptkit.attach(HOSTS["timm-vit"].build(), "rein", **SMALL)).float()
    x = image("timm-vit").float()
    expected = model(x).tokens
    model.save(tmp_path)
    again = adaptkit.attach(HOSTS["timm-vit"].build(), tmp_path)
    assert again.adapters["rein"].config == ReinConfig(**SMALL)
    assert torch.equal(again(x).tokens, expected)
    with torch.enable_grad():
        own = dict(again.adapters["rein"].named_parameters())
        plain = torch.autograd.grad(again(x).tokens.sin().sum(), own.values())
        again.gradient_checkpointing_enable()
        checked = torch.autograd.grad(again(x).tokens.sin().sum(), own.values())
    for name, a, b in zip(own, plain, checked):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * a.abs().max().item(), msg=name)


def test_a_backbone_of_half_precision_keeps_its_dtype():
    model = adaptkit.attach(HOSTS["timm-vit"].build().bfloat16(), "rein", **SMALL).eval()
    assert model.adapters["rein"].scale.dtype == torch.float32
    assert model(image("timm-vit").float()).tokens.dtype == torch.bfloat16


@pytest.mark.parametrize("wrong", [{"num_tokens": 1}, {"rank": -1}, {"scale": 0.0}])
def test_wrong_options_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        adaptkit.attach(HOSTS["timm-vit"].build(), "rein", **wrong)
