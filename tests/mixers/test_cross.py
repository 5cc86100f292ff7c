"""The cross forms: queries on one or several grids, values of one or several levels."""

import pytest
import torch

from adaptkit.mixers import Layout, cross_mixer, list_mixers
from adaptkit.mixers.cross import resample_levels
from adaptkit.ops.grid import cell_centres

every = pytest.mark.parametrize("name", list_mixers())
SHAPES = [
    (((3, 4),), ((6, 8), (3, 4), (2, 2))),  # injector
    (((6, 8), (3, 4), (2, 2)), ((3, 4),)),  # extractor
    (((1, 1),), ((1, 1),)),
    (((1, 5),), ((2, 10), (1, 5))),
]


def build(name, levels, dim=16, ratio=1.0):
    torch.manual_seed(0)
    return cross_mixer(name, dim, levels=levels, heads=2, points=4, ratio=ratio)


def layout(queries, values):
    points = [cell_centres(g, 1, torch.device("cpu"), torch.float32) / torch.tensor([g[1], g[0]]) for g in queries]
    return Layout(queries, values, torch.cat(points))


def tokens(grids, dim=16, seed=0):
    return torch.randn(2, sum(h * w for h, w in grids), dim, generator=torch.Generator().manual_seed(seed))


@every
@pytest.mark.parametrize(("queries", "values"), SHAPES, ids=["injector", "extractor", "1x1", "1xN"])
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_every_mixer_crosses_between_any_grids(name, queries, values, ratio):
    m = build(name, len(values), ratio=ratio)
    y = m(tokens(queries), tokens(values, seed=1), layout(queries, values))
    assert y.shape == tokens(queries).shape
    assert y.isfinite().all()


@every
def test_the_values_reach_the_queries(name):
    queries, values = SHAPES[0]
    feat = tokens(values, seed=1).requires_grad_()
    build(name, 3)(tokens(queries), feat, layout(queries, values)).square().sum().backward()
    assert feat.grad.abs().max() > 1e-6


def test_levels_on_the_grid_of_the_queries_are_averaged_as_they_are():
    grids = ((3, 4), (3, 4))
    feat = tokens(grids)
    expected = (feat[:, :12] + feat[:, 12:]) / 2
    torch.testing.assert_close(resample_levels(feat, layout(((3, 4),), grids)), expected)


def test_a_finer_level_is_resampled_bilinearly():
    feat = tokens(((6, 8),))
    m = feat.transpose(1, 2).unflatten(2, (6, 8))
    expected = torch.nn.functional.interpolate(m, size=(3, 4), mode="bilinear").flatten(2).transpose(1, 2)
    torch.testing.assert_close(resample_levels(feat, layout(((3, 4),), ((6, 8),))), expected)


def test_windows_as_large_as_the_image_are_global_attention():
    queries, values = SHAPES[1]
    window, full = build("window", 1), build("global", 1)
    full.load_state_dict(window.state_dict())
    q, feat, where = tokens(queries), tokens(values, seed=1), layout(queries, values)
    torch.testing.assert_close(window(q, feat, where), full(q, feat, where))


def test_a_query_reads_only_cells_of_its_own_part_of_the_image():
    queries, values = ((14, 14),), ((28, 28), (14, 14), (7, 7))
    feat = tokens(values).requires_grad_()
    y = build("window", 3)(tokens(queries), feat, layout(queries, values))
    y[0, 0].sum().backward()  # the query of the top left corner: windows cover a quarter of the image
    seen = feat.grad[0].abs().sum(-1) > 0
    fine, middle, coarse = seen.split([784, 196, 49])
    assert torch.equal(fine.view(28, 28).nonzero().amax(0), torch.tensor([13, 13]))
    assert torch.equal(middle.view(14, 14).nonzero().amax(0), torch.tensor([6, 6]))
    assert torch.equal(coarse.view(7, 7).nonzero().amax(0), torch.tensor([3, 3]))


def test_the_cross_form_of_pool_is_the_mean_alone():
    assert not build("pool", 1).mixer.minus


@torch.no_grad()
def test_dat_without_offsets_reads_its_values_where_the_queries_stand():
    m, grids = build("dat", 1), ((3, 4),)
    m.offset_proj.weight.zero_()
    m.query_proj.weight.zero_()
    m.query_proj.bias.zero_()  # all keys weigh the same
    feat = tokens(grids, seed=1)
    y = m(tokens(grids), feat, layout(grids, grids))
    torch.testing.assert_close(y, m.output_proj(m.value_proj(feat)).mean(1, keepdim=True).expand_as(y))


@every
def test_an_option_that_a_cross_mixer_does_not_take_is_a_value_error(name):
    with pytest.raises(ValueError, match=rf"mixer '{name}' does not take .*nonsense"):
        cross_mixer(name, 16, levels=1, heads=2, points=4, ratio=1.0, nonsense=3)


@pytest.mark.parametrize(
    ("options", "message"), [({"heads": 5}, "heads=5 do not divide the 16 channels"), ({"points": 0}, "points=0")]
)
def test_deformable_attention_refuses_heads_and_points_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        cross_mixer("msda", 16, **{"levels": 1, "heads": 2, "points": 4, "ratio": 1.0, **options})
