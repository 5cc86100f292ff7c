"""Windows and mirror images of what was recorded: exactly the tokens that were there, on the patch grid alone."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS

import adaptkit
from adaptkit.features.cached import CachedFeatures

EXTRACTOR = [("vit-adapter", {"conv_inplane": 8, "injector": False})]


def recorded(size, patch=8, prefix=1, batch=2):
    """Tokens that say where they lie: (image, row, column)."""
    h, w = -(-size[0] // patch), -(-size[1] // patch)
    places = (
        torch.cartesian_prod(torch.arange(batch), torch.arange(h), torch.arange(w)).float().reshape(batch, h * w, 3)
    )
    states = tuple(torch.cat([-torch.ones(batch, prefix, 3), places + 100 * k], 1) for k in range(2))
    image = torch.arange(batch * 3 * size[0] * size[1]).float().reshape(batch, 3, *size)
    return CachedFeatures(states, (1, 3), size, patch, image)


def maps(seen, prefix):
    return [s[:, prefix:].unflatten(1, seen.grid) for s in seen.states]


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_a_crop_is_the_tokens_and_the_pixels_of_the_window_and_the_prefix_as_it_was(prefix):
    whole = recorded((40, 64), prefix=prefix)
    part = whole.crop(8, 24, 16, 32)
    assert (part.size, part.grid, part.after) == ((16, 32), (2, 4), (1, 3))
    for cut, full in zip(maps(part, prefix), maps(whole, prefix)):
        assert torch.equal(cut, full[:, 1:3, 3:7])
    for cut, full in zip(part.states, whole.states):
        assert torch.equal(cut[:, :prefix], full[:, :prefix])
    assert torch.equal(part.image, whole.image[:, :, 8:24, 24:56])


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_a_flip_exchanges_left_and_right_and_twice_is_nothing(prefix):
    whole = recorded((40, 64), prefix=prefix)
    mirrored = whole.flip()
    for cut, full in zip(maps(mirrored, prefix), maps(whole, prefix)):
        assert torch.equal(cut, full.flip(2))
    assert torch.equal(mirrored.image, whole.image.flip(-1))
    for a, b in zip([*mirrored.flip().states, mirrored.flip().image], [*whole.states, whole.image]):
        assert torch.equal(a, b)


def test_a_window_may_end_where_a_padded_image_ends():
    whole = recorded((37, 60))  # the last patches are padded to 40 x 64
    assert all(torch.equal(a, b) for a, b in zip(whole.crop(0, 0, 37, 60).states, whole.states))
    part = whole.crop(32, 40, 5, 20)
    assert part.grid == (1, 3)
    assert torch.equal(maps(part, 1)[0], maps(whole, 1)[0][:, 4:, 5:])


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ((4, 0, 8, 8), "from 4 to 12 pixels cuts through patches of 8 pixels .*37 pixels high.*multiples of 8"),
        ((0, 8, 8, 20), "from 8 to 28 pixels cuts through patches of 8 pixels .*60 pixels wide"),
        ((32, 0, 8, 8), "from 32 to 40 pixels lies outside images that are 37 pixels high"),
        ((0, -8, 8, 8), "from -8 to 0 pixels lies outside"),
        ((0, 8, 8, 0), "from 8 to 8 pixels lies outside"),
    ],
)
def test_a_window_off_the_grid_or_outside_is_an_error(window, message):
    with pytest.raises(ValueError, match=message):
        recorded((37, 60)).crop(*window)


def test_a_padded_width_cannot_be_mirrored_before_it_is_cropped():
    whole = recorded((37, 60))
    with pytest.raises(ValueError, match="60 pixels wide and a patch is 8: .*crop to 56 pixels first"):
        whole.flip()
    assert torch.equal(maps(whole.crop(0, 0, 37, 56).flip(), 1)[0], maps(whole, 1)[0][:, :, :7].flip(2))


def test_windows_of_single_images_join_to_a_batch():
    whole = recorded((40, 64))
    cut = CachedFeatures.join([whole.part(0, 1).crop(0, 0, 16, 16), whole.part(1, 2).crop(8, 32, 16, 16).flip()])
    assert torch.equal(maps(cut, 1)[0][0], maps(whole, 1)[0][0, :2, :2])
    assert torch.equal(maps(cut, 1)[0][1], maps(whole, 1)[0][1, 1:3, 4:6].flip(1))
    assert torch.equal(cut.image[1], whole.image[1, :, 8:24, 32:48].flip(-1))
    with pytest.raises(ValueError, match=r"of \(40, 64\) pixels, patch 8, and after .* of \(8, 8\)"):
        CachedFeatures.join([whole, whole.crop(0, 0, 8, 8)])


@torch.no_grad()
@pytest.mark.parametrize("adapters", [[], ["sfp"], EXTRACTOR], ids=["head", "sfp", "extractor"])
@pytest.mark.parametrize("name", ["timm-vit", "timm-siglip", "hf-dinov2-reg"])
def test_adapters_and_head_run_on_a_window(name, adapters):
    if name not in HOSTS:
        pytest.skip("needs transformers")
    model = adaptkit.attach(HOSTS[name].build(), *adapters, head=("linear", {"num_classes": 3})).eval()
    patch = model.spec.patch_size
    images = torch.randn(2, 3, 5 * patch, 6 * patch - 3, generator=torch.Generator().manual_seed(0))
    whole, seen = model(images), model.extract(images)
    features = model(seen.crop(patch, 2 * patch, 3 * patch, 3 * patch).flip())
    assert (features.grid, features.size) == ((3, 3), (3 * patch, 3 * patch))
    assert features.logits.shape == (2, 3, 3 * patch, 3 * patch)
    wanted = whole.tokens.unflatten(1, whole.grid)[:, 1:4, 2:5].flip(2).flatten(1, 2)
    assert torch.equal(features.tokens, wanted)
    assert torch.equal(features.prefix, whole.prefix)
    assert [m.shape[-1] for m in features.maps] == ([-(-3 * patch // s) for s in (4, 8, 16, 32)] if adapters else [])
