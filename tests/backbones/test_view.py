"""The view equals the backbone bitwise, at its own size and at others, and its parts say the same as its blocks."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import DEPTH, DIM, HEADS, HOSTS

from adaptkit.core.registry import view

hosts = pytest.mark.parametrize("name", sorted(HOSTS))


def image(size, batch=2, seed=0):
    height, width = size
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


@hosts
@torch.no_grad()
def test_view_equals_host_bitwise(name):
    host = HOSTS[name]
    model = host.build()
    x = image((host.size, host.size))
    features = view(model).features(x)
    assert torch.equal(torch.cat([features.prefix, features.tokens], 1), host.tokens(model, x))
    assert features.tokens.shape[1] == features.grid[0] * features.grid[1]


@hosts
@torch.no_grad()
def test_view_gives_the_hosts_own_logits(name):
    host = HOSTS[name]
    if host.logits is None:
        pytest.skip("this backbone has no classifier")
    model = host.build()
    x = image((host.size, host.size))
    vit = view(model)
    assert torch.equal(vit.logits(vit.features(x)), host.logits(model, x))


@hosts
@torch.no_grad()
@pytest.mark.parametrize("cells", [(3, 5), (6, 4)])
def test_view_at_another_size_equals_a_host_that_takes_it(name, cells):
    host = HOSTS[name]
    model = host.build()
    patch = view(model).spec.patch_size
    size = (cells[0] * patch, cells[1] * patch)
    other = host.at(*size)
    x = image(size)
    features = view(model).features(x)
    assert features.grid == cells
    assert torch.equal(torch.cat([features.prefix, features.tokens], 1), host.tokens(other, x))


@hosts
@torch.no_grad()
def test_an_odd_size_is_padded_at_the_bottom_right(name):
    host = HOSTS[name]
    vit = view(host.build())
    patch = vit.spec.patch_size
    x = image((2 * patch + 3, 3 * patch + 1))
    padded = torch.nn.functional.pad(x, (0, patch - 1, 0, patch - 3))
    assert torch.equal(vit.features(x).tokens, vit.features(padded).tokens)
    assert vit.features(x).size == tuple(x.shape[-2:])
    assert vit.features(x).grid == (3, 4)


@hosts
@torch.no_grad()
def test_parts_of_a_block_say_the_same_as_the_block(name):
    host = HOSTS[name]
    vit = view(host.build())
    for cells in [(4, 4), (3, 5)]:
        tokens, blocks = vit.begin(image((cells[0] * vit.spec.patch_size, cells[1] * vit.spec.patch_size)))
        for block in blocks:
            torch.testing.assert_close(block.equation(tokens), block(tokens), atol=1e-5, rtol=1e-5)
            h = block.norm1(tokens)
            if not host.splits:
                tokens = block(tokens)
                continue
            torch.testing.assert_close(block.attention(h), block.attn(h), atol=1e-5, rtol=1e-5)
            q, k, v = block.qkv(h)
            assert q.shape == k.shape == v.shape == (2, HEADS, tokens.shape[1], DIM // HEADS)
            tokens = block(tokens)


@hosts
def test_spec_reads_the_host(name):
    spec = view(HOSTS[name].build()).spec
    assert (spec.embed_dim, spec.depth, spec.num_heads) == (DIM, DEPTH, HEADS)


@hosts
def test_fingerprint_tensors_and_source_are_there(name):
    vit = view(HOSTS[name].build())
    assert len(vit.fingerprint_tensors()) >= 3
    assert isinstance(vit.source().id, str)


def test_an_unknown_class_is_a_type_error_that_says_how_to_add_a_family():
    with pytest.raises(
        TypeError, match=r"torch\.nn\.modules\.linear\.Linear; known backbones: .*VisionTransformer.*register_family"
    ):
        view(torch.nn.Linear(2, 2))


def test_the_old_name_of_the_backbone_works_and_warns():
    model = HOSTS["timm-vit"].build()
    with pytest.warns(DeprecationWarning, match="host is called backbone now"):
        assert view(model).host is model
