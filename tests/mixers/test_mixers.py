"""The mixers: each on any grid, and what each is by its formula."""

import pytest
import torch
import torch.nn.functional as F

from adaptkit.mixers import Mixer, list_mixers, mixer, register_mixer

GRIDS = [(1, 1), (1, 5), (7, 1), (3, 8), (9, 9)]
every = pytest.mark.parametrize("name", list_mixers())


def build(name, dim=16, **options):
    torch.manual_seed(0)
    return mixer(name, dim, **options)


def maps(grid, batch=2, dim=16, seed=0):
    return torch.randn(batch, dim, *grid, generator=torch.Generator().manual_seed(seed))


@every
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_mixer_keeps_the_shape_of_every_grid(name, grid):
    y = build(name)(maps(grid))
    assert y.shape == (2, 16, *grid)
    assert y.isfinite().all()


@every
def test_no_mixer_lets_images_of_a_batch_see_each_other(name):
    m, x = build(name).eval(), maps((4, 5))
    torch.testing.assert_close(m(x)[:1], m(x[:1]))


@every
def test_every_parameter_of_a_mixer_gets_a_gradient_above_rounding(name):
    m = build(name)
    (m(maps((4, 5)).requires_grad_()) * maps((4, 5), seed=1)).sum().backward()
    trained = {n: p for n, p in m.named_parameters() if p.requires_grad}
    small = {n: float(p.grad.abs().max()) for n, p in trained.items() if p.grad.abs().max() < 1e-4}
    assert not small


@every
@torch.no_grad()
def test_every_mixer_computes_in_the_dtype_it_is_cast_to(name):
    y = build(name).bfloat16()(maps((4, 5)).bfloat16())
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("size", [3, 5])
def test_pool_is_the_uniform_depthwise_convolution_over_true_counts_minus_the_identity(grid, size):
    x = maps(grid)
    ones = torch.ones(1, 1, size, size)
    total = F.conv2d(x, ones.expand(16, 1, -1, -1), padding=size // 2, groups=16)
    counts = F.conv2d(torch.ones(1, 1, *grid), ones, padding=size // 2)
    torch.testing.assert_close(build("pool", size=size)(x), total / counts - x)


def test_pool_of_a_constant_map_is_zero_to_the_border():
    assert build("pool")(torch.full((1, 16, 4, 6), 3.0)).abs().max() < 1e-6


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_fourier_is_the_real_part_of_the_transform_over_the_places(grid):
    x = maps(grid)
    torch.testing.assert_close(build("fourier")(x), torch.fft.fft2(x, norm="ortho").real, atol=1e-5, rtol=1e-5)
    assert not list(build("fourier").parameters())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rows_of_random_sum_to_one(grid):
    matrix = build("random").matrix(grid)
    n = grid[0] * grid[1]
    assert matrix.shape == (n, n)
    torch.testing.assert_close(matrix.sum(1), torch.ones(n))


def test_random_is_the_same_from_the_same_seed_and_another_from_another():
    x = maps((4, 5))
    assert torch.equal(build("random", seed=3)(x), mixer("random", 16, seed=3)(x))
    assert not torch.allclose(build("random", seed=3)(x), build("random", seed=4)(x))
    assert not list(build("random").parameters())


def test_random_keeps_the_number_of_a_pair_of_cells_on_another_grid():
    m = build("random")
    small, large = m.matrix((2, 3)).log(), m.matrix((4, 5)).log()
    cells = torch.tensor([0, 1, 2, 5, 6, 7])  # the 2x3 cells of the corner, among 4x5
    part = large[cells][:, cells]
    torch.testing.assert_close(part - part[:, :1], small - small[:, :1])  # the logits, up to the softmax's constant


def test_random_numbers_are_uniform():
    from adaptkit.mixers.plain import _hash, _uniform

    n = _uniform(_hash(torch.arange(40_000))).double()
    assert abs(float(n.mean()) - 0.5) < 5e-3
    assert abs(float(n.var()) - 1 / 12) < 1e-3
    assert abs(float(torch.corrcoef(torch.stack([n[:-1], n[1:]]))[0, 1])) < 0.02


def test_multi_conv_is_the_mean_of_its_kernels():
    m, x = build("multi-conv"), maps((6, 5))
    torch.testing.assert_close(m(x), torch.stack([c(x) for c in m.convs]).mean(0))
    assert [c.kernel_size for c in m.convs] == [(3, 3), (5, 5), (7, 7)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_mona_is_the_mean_of_three_filters_and_a_projection_each_with_its_residual(grid):
    m, x = build("mona"), maps(grid)
    own = dict(m.named_parameters())
    filters = [
        F.conv2d(x, own[f"convs.{i}.weight"], own[f"convs.{i}.bias"], padding=k // 2, groups=16)
        for i, k in enumerate((3, 5, 7))
    ]
    z = (filters[0] + filters[1] + filters[2]) / 3 + x
    expected = (
        z + torch.einsum("bchw,dc->bdhw", z, own["projector.weight"][:, :, 0, 0]) + own["projector.bias"][:, None, None]
    )
    torch.testing.assert_close(m(x), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_msda_at_zero_offsets_reads_the_cell_centres(grid):
    m, x = build("msda"), maps(grid)
    torch.nn.init.zeros_(m.attn.sampling_offsets.bias)
    expected = m.attn.output_proj(m.attn.value_proj(x.movedim(1, -1))).movedim(-1, 1)
    torch.testing.assert_close(m(x), expected)


def test_window_attention_with_one_window_is_global_attention():
    window, full, x = build("window", window=9), build("global"), maps((6, 9))
    full.load_state_dict(window.state_dict())
    torch.testing.assert_close(window(x), full(x))


def test_window_attention_does_not_see_beyond_its_window():
    m, x = build("window", window=4), maps((8, 6)).requires_grad_()
    m(x)[0, :, 0, 0].sum().backward()
    seen = x.grad[0].abs().sum(0) > 0
    assert seen[:4, :3].all()
    assert seen.sum() == 12


PARAMETERS = {"identity": 0, "random": 0, "pool": 0, "conv": 640, "sepconv": 22656, "global": 16448, "msda": 11440}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_at_64_channels(name):
    assert sum(p.numel() for p in mixer(name, 64).parameters()) == PARAMETERS[name]


def test_an_unknown_mixer_or_option_is_a_value_error_that_names_it():
    with pytest.raises(ValueError, match="no mixer is named 'fft'; the mixers are conv, .*global, identity"):
        mixer("fft", 8)
    with pytest.raises(ValueError, match=r"mixer 'pool' does not take \{'kernel': 5\}"):
        mixer("pool", 8, kernel=5)
    with pytest.raises(ValueError, match="size=4 has no centre"):
        mixer("pool", 8, size=4)
    with pytest.raises(ValueError, match="heads=3 do not divide the width 8"):
        mixer("global", 8, heads=3)
    with pytest.raises(ValueError, match="heads=0 do not divide the width 8"):
        mixer("global", 8, heads=0)
    with pytest.raises(ValueError, match="window=0 must be at least 1"):
        mixer("window", 8, window=0)
    with pytest.raises(ValueError, match="leaves nothing to convolve with"):
        mixer("multi-conv", 8, kernels=())


def test_a_mixer_from_outside_is_found_by_its_name():
    @register_mixer("test-flip")
    class Flip(Mixer):
        def __init__(self, dim):
            super().__init__()

        def forward(self, x):
            return x.flip(-1)

    try:
        assert "test-flip" in list_mixers()
        x = maps((2, 3))
        assert torch.equal(mixer("test-flip", 16)(x), x.flip(-1))
    finally:
        from adaptkit import mixers

        del mixers._REGISTERED["test-flip"]
