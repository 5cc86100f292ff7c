"""Formula pictures: any mixture of streets and abstract canvases, with labels, all from one generator."""

import pytest
import torch

from adaptkit.demo.formula import FAMILIES, boundaries, crops, draw
from adaptkit.demo.shapes import SHAPES
from adaptkit.demo.textures import TEXTURES
from adaptkit.demo.things import STREET, THINGS, Cut


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def canvas():
    """Six canvases of 64 x 64 pixels, three of them streets."""
    return draw(6, 64, generator())


def test_pictures_are_finite_and_in_range(canvas):
    assert canvas.image.shape == (6, 3, 64, 64)
    assert canvas.image.isfinite().all()
    assert canvas.image.min() >= 0
    assert canvas.image.max() <= 1


def test_streets_have_street_labels_and_abstract_canvases_have_textures(canvas):
    assert (canvas.family[:3] >= len(TEXTURES)).all()
    assert (canvas.family[3:] < len(TEXTURES)).all()
    assert canvas.family.max() < len(FAMILIES) == len(TEXTURES) + len(STREET)


def test_depth_lies_between_far_and_near(canvas):
    assert canvas.depth.min() >= 0
    assert canvas.depth.max() <= 1


def test_the_same_seed_draws_the_same_and_another_seed_another_picture(canvas):
    again, other = draw(6, 64, generator()), draw(6, 64, generator(1))
    assert all(torch.equal(a, b) for a, b in zip(canvas, again))
    assert not torch.equal(canvas.image, other.image)


def test_one_canvas_is_enough():
    assert draw(1, 48, generator()).image.shape == (1, 3, 48, 48)


def test_crops_keep_pictures_and_labels_together():
    """A picture that shows its own depth still shows it after cropping, up to what the photograph does to tones."""
    canvas = draw(2, 64, generator(), streets=1.0)
    canvas = canvas._replace(image=canvas.depth[:, None].expand(-1, 3, -1, -1).contiguous())
    view = crops(canvas, 8, 48, generator())
    for image, depth in zip(view.image.mean(1), view.depth):
        if depth.std() > 0.05:
            assert torch.corrcoef(torch.stack((image.flatten(), depth.flatten())))[0, 1] > 0.8


def test_crops_come_in_the_size_and_number_asked_for(canvas):
    view = crops(canvas, 10, 32, generator())
    assert view.image.shape == (10, 3, 32, 32)
    assert view.family.shape == view.depth.shape == view.instance.shape == (10, 32, 32)
    assert set(view.family.unique().tolist()) <= set(canvas.family.unique().tolist())


def test_boundaries_are_where_labels_change():
    family = torch.zeros(1, 4, 4, dtype=torch.long)
    family[:, :, 2:] = 1
    border = boundaries(torch.zeros_like(family), family)
    assert torch.equal(border[0], torch.tensor([0.0, 1.0, 0.0, 0.0]).expand(4, 4))


@pytest.mark.parametrize("name", TEXTURES)
def test_textures_give_amounts_between_zero_and_one(name):
    u, v = torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij")
    amount = TEXTURES[name](generator(), u.expand(3, 40, 40) - 20, v.expand(3, 40, 40) - 20)
    assert amount.shape == (3, 40, 40)
    assert amount.isfinite().all()
    assert amount.min() >= 0
    assert amount.max() <= 1


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_have_an_inside_and_an_outside(shape):
    u, v = torch.meshgrid(torch.arange(-60.0, 60), torch.arange(-60.0, 60), indexing="ij")
    distance, shade = shape(generator(), u.expand(4, 120, 120), v.expand(4, 120, 120), torch.full((4, 1, 1), 20.0))
    assert (distance < 0).flatten(1).any(1).all()
    assert (distance > 0).flatten(1).any(1).all()
    assert distance.isfinite().all()
    assert shade.isfinite().all()
    assert shade.min() >= 0


@pytest.mark.parametrize("thing", THINGS)
def test_things_cover_a_part_of_the_view_and_stand_on_the_ground(thing):
    """Nothing reaches far below the ground, where v is negative."""
    v, u = torch.meshgrid(torch.linspace(12, -4, 64), torch.linspace(-8, 8, 64), indexing="ij")
    cut = Cut(u.expand(5, 64, 64), v.expand(5, 64, 64), torch.full((5, 1, 1), 4.0))
    layers = thing(generator(), cut)
    covered = torch.stack([alpha for alpha, _, _ in layers]).amax(0)
    assert 0 < covered.mean() < 0.9
    assert (covered[(cut.v < -0.5)] < 0.5).all()
