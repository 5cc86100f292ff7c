"""Augmentation by name: what moves in the image moves in the mask, and a sample depends on its number alone."""

import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from recipes import augment


def sample(name, seed, size=(32, 48)):
    """An image whose first channel is its mask, both through the transforms of a name."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.randint(0, 3, (5, 7), generator=generator).repeat_interleave(8, 0).repeat_interleave(8, 1)
    image = torch.stack([mask / 2, mask / 2, mask / 2]).float()
    torch.manual_seed(seed)
    return v2.Compose(augment.of_pixels(name, size, 255))(tv_tensors.Image(image), tv_tensors.Mask(mask))


@pytest.mark.parametrize("name", augment.NAMES)
def test_every_name_gives_samples_of_the_size_that_depend_on_the_random_state_alone(name):
    for seed in range(3):
        image, mask = sample(name, seed)
        assert image.shape == (3, 32, 48)
        assert mask.shape == (32, 48)
        assert mask.dtype == torch.int64
        assert set(mask.unique().tolist()) <= {0, 1, 2, 255}
        again = sample(name, seed)
        assert torch.equal(image, again[0])
        assert torch.equal(mask, again[1])


class OnlyMoves(augment.Trivial):
    """A policy that shears, shifts or turns in each sample."""

    _AUGMENTATION_SPACE = {k: v for k, v in v2.TrivialAugmentWide._AUGMENTATION_SPACE.items() if k in augment.MOVES}


def test_the_mask_moves_with_the_image_and_what_comes_in_is_ignored():
    both, outside = augment.Both(OnlyMoves(), 255), 0
    for seed in range(20):
        mask = torch.randint(1, 3, (32, 48), generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)
        image, moved = both(tv_tensors.Image(mask.expand(3, -1, -1) / 2.0), tv_tensors.Mask(mask))
        assert torch.equal((2 * image[0]).long(), torch.where(moved == 255, 0, moved))  # nearest: the same pixels
        outside += (moved == 255).sum().item()
    assert outside


@pytest.mark.parametrize("name", augment.NAMES[1:])
def test_images_alone_have_the_size_too(name):
    transform = v2.Compose(augment.of_images(name, 32, 0.5))
    assert transform(tv_tensors.Image(torch.rand(3, 40, 56))).shape == (3, 32, 32)


def test_the_default_is_what_it_was():
    """Caches of features know a transform by this text."""
    then = [
        v2.RandomResizedCrop((32, 48), scale=(0.4, 1.0), ratio=(0.8 * 1.5, 1.25 * 1.5), antialias=True),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(0.3, 0.3, 0.2, 0.05),
    ]
    assert repr(augment.of_pixels("medium", (32, 48), 255)) == repr(then)
