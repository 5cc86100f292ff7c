"""Deformable attention: parity with the authors' module, the conventions, other maps."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from adaptkit.mixers.dat import (
    DeformableAttention,
    move,
    read,
    reference_points,
    resize_table,
    table_bias,
    to_cells,
)

GOLDEN = "../shared/golden/dat_attention_a.safetensors"
CONVENTIONS = ["v1", "v2", "exact"]


def golden(dtype):
    from pathlib import Path

    path = Path(__file__).parents[2] / GOLDEN
    if not path.is_file():
        pytest.skip("golden vectors are not beside this checkout")
    with safe_open(path, "pt") as f:
        c = json.loads(f.metadata()["config"])
        tensors = {k: f.get_tensor(k).to(dtype) for k in f.keys()}  # noqa: SIM118
    mixer = DeformableAttention(
        c["heads"] * c["head_dim"],
        heads=c["heads"],
        groups=c["groups"],
        size=c["hw"],
        kernel=c["kernel"],
        stride=c["stride"],
        offset_range_factor=c["offset_range_factor"],
        convention="v1",
    ).to(dtype)
    mixer.load_state_dict({k.removeprefix("official."): v for k, v in tensors.items() if k.startswith("official.")})
    return mixer, tensors


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 2e-4)])
def test_v1_agrees_with_the_authors_module(dtype, tolerance):
    mixer, tensors = golden(dtype)
    got = mixer.read(tensors["input"])
    for name, tensor in (("output", got.output), ("pos", got.points), ("ref", got.reference)):
        torch.testing.assert_close(tensor, tensors[name], atol=tolerance, rtol=tolerance, msg=name)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 2e-4)])
def test_v1_has_the_gradients_of_the_authors_module(dtype, tolerance):
    mixer, tensors = golden(dtype)
    x = tensors["input"].requires_grad_()
    y = mixer(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)).sum().backward()
    grads = {"input": x.grad, **{n: p.grad for n, p in mixer.named_parameters()}}
    for key in (k for k in tensors if k.startswith("grad.")):
        torch.testing.assert_close(grads[key[5:]], tensors[key], atol=tolerance, rtol=tolerance, msg=key)


def in_plain_steps(mixer, x, factor):
    """v1 step by step, one group and one head at a time, with torch's own sampling operator."""
    batch, dim, height, width = x.shape
    g, h = mixer.groups, mixer.heads
    q = mixer.proj_q(x)
    sampled, points = [], []
    for group in range(g):
        own = slice(group * dim // g, (group + 1) * dim // g)
        offset = mixer.conv_offset(q[:, own]).permute(0, 2, 3, 1)
        rows, columns = offset.shape[1:3]
        if factor > 0:
            offset = offset.tanh() * torch.tensor([factor / rows, factor / columns], dtype=x.dtype)
        y, column = torch.meshgrid(
            (torch.arange(rows, dtype=x.dtype) + 0.5) / rows * 2 - 1,
            (torch.arange(columns, dtype=x.dtype) + 0.5) / columns * 2 - 1,
            indexing="ij",
        )
        pos = torch.stack([y, column], -1) + offset
        pos = pos if factor >= 0 else pos.tanh()
        points.append(pos.flatten(1, 2))
        sampled.append(F.grid_sample(x[:, own], pos.flip(-1), align_corners=True).flatten(2))
    sampled = torch.cat(sampled, 1)[..., None]
    k, v = mixer.proj_k(sampled)[..., 0], mixer.proj_v(sampled)[..., 0]
    y, column = torch.meshgrid(
        (torch.arange(height, dtype=x.dtype) + 0.5) / height * 2 - 1,
        (torch.arange(width, dtype=x.dtype) + 0.5) / width * 2 - 1,
        indexing="ij",
    )
    queries = torch.stack([y, column], -1).flatten(0, 1)
    out = []
    for head in range(h):
        own = slice(head * dim // h, (head + 1) * dim // h)
        logits = q[:, own].flatten(2).transpose(1, 2) @ k[:, own] * (dim // h) ** -0.5
        displacement = (queries[None, :, None] - points[head * g // h][:, None]) / 2
        table = mixer.rpe_table[None, head : head + 1].expand(batch, -1, -1, -1)
        logits = logits + F.grid_sample(table, displacement.flip(-1), align_corners=True)[:, 0]
        out.append(v[:, own] @ logits.softmax(-1).transpose(1, 2))
    return mixer.proj_out(torch.cat(out, 1).unflatten(2, (height, width)))


@torch.no_grad()
@pytest.mark.parametrize("factor", [2, 5.5, 0, -1])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [3, 4, 9])
@pytest.mark.parametrize(("heads", "groups", "grid"), [(4, 2, (6, 9)), (4, 1, (1, 7)), (6, 6, (8, 5))])
def test_v1_is_the_paper_step_by_step(factor, stride, kernel, heads, groups, grid):
    torch.manual_seed(0)
    mixer = DeformableAttention(24, heads, groups, grid, kernel, stride, factor).double()
    for p in mixer.parameters():
        p.add_(0.2 * torch.randn_like(p))
    x = torch.randn(2, 24, *grid, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), in_plain_steps(mixer, x, factor))


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (4, 1), (4, 6)])
def test_exact_points_that_do_not_move_read_the_cells_themselves(grid):
    x = torch.randn(2, 3, *grid)
    points = reference_points(grid, "exact", x).expand(2, -1, -1, -1)
    torch.testing.assert_close(read(x, points, "exact"), x.flatten(2))


@pytest.mark.parametrize(("convention", "first", "last"), [("v1", 0.5 - 0.5 / 14, 12.5 + 0.5 / 14), ("v2", 0.5, 13.5)])
def test_the_authors_points_that_do_not_move_lie_beside_the_cells(convention, first, last):
    # v1: 0.46 of a cell at both ends and none in the middle; v2: half a cell everywhere.
    cells = to_cells(reference_points((14, 14), convention, torch.zeros(1)), (14, 14), convention)
    torch.testing.assert_close(cells[[0, -1], 0, 0], torch.tensor([first, last]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("convention", "most"), [("v1", 2 * 13 / 14 / 2), ("v2", 1.0), ("exact", 1.0)])
def test_a_factor_of_two_moves_a_key_by_at_most_one_cell(convention, most):
    reference = reference_points((14, 14), convention, torch.zeros(1))
    far = move(torch.full((1, 2, 14, 14), 50.0), reference, 2.0, convention)
    moved = to_cells(far[0], (14, 14), convention) - to_cells(reference, (14, 14), convention)
    torch.testing.assert_close(moved[:13, :13].amax(), torch.tensor(most), atol=1e-5, rtol=0)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("factor", [None, -1.0])
def test_without_a_factor_points_stay_in_the_map_wherever_they_go(convention, factor):
    reference = reference_points((4, 4), convention, torch.zeros(1))
    for far in (-50.0, 50.0):
        assert move(torch.full((1, 2, 4, 4), far), reference, factor, convention).abs().max() <= 1


def test_a_factor_of_zero_means_free_in_v1_and_still_in_v2():
    offset, reference = torch.full((1, 2, 4, 4), 0.3), reference_points((4, 4), "v1", torch.zeros(1))
    torch.testing.assert_close(move(offset, reference, 0, "v1")[0], reference + 0.3)
    assert torch.equal(move(offset, reference, 0, "v2")[0], reference)


@pytest.mark.parametrize("bias", ["table", "log-cpb", None])
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (5, 1), (6, 9)])
def test_any_map_gives_finite_values_and_gradients(bias, convention, grid):
    torch.manual_seed(0)
    mixer = DeformableAttention(8, heads=4, groups=2, size=3, stride=2, bias=bias, convention=convention)
    x = torch.randn(2, 8, *grid, requires_grad=True)
    y = mixer(x)
    y.sum().backward()
    assert y.shape == x.shape
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize("convention", ["v2", "exact"])
def test_one_cell_of_displacement_is_one_cell_of_the_table(convention):
    grid, table = (3, 4), torch.randn(2, 5, 7)
    places = torch.stack(torch.meshgrid(torch.arange(3.0), torch.arange(4.0), indexing="ij"), -1)  # of whole cells
    size = torch.tensor([3.0, 4.0])
    points = (2 * places + 1) / size - 1 if convention == "exact" else 2 * places / (size - 1) - 1
    bias = table_bias(table, grid, points.flatten(0, 1)[None, None], convention)
    for q in range(12):
        for k in range(12):
            dy, dx = q // 4 - k // 4, q % 4 - k % 4
            torch.testing.assert_close(bias[0, :, q, k], table[:, dy + 2, dx + 3])


def test_a_map_of_another_size_uses_the_table_resized_as_the_authors_do():
    torch.manual_seed(0)
    mixer = DeformableAttention(8, heads=2, size=(4, 4))
    other = DeformableAttention(8, heads=2, size=(6, 5))
    tensors = mixer.state_dict()
    other.load_state_dict({**tensors, "rpe_table": resize_table(tensors["rpe_table"], (11, 9))})
    x = torch.randn(1, 8, 6, 5)
    torch.testing.assert_close(mixer(x), other(x))


def test_every_head_of_a_group_reads_the_points_of_its_group():
    torch.manual_seed(0)
    mixer = DeformableAttention(8, heads=4, groups=2, size=4, bias=None)
    points = mixer.read(torch.randn(1, 8, 4, 4)).points
    assert points.shape == (1, 2, 4, 4, 2)
    assert not torch.equal(points[:, 0], points[:, 1])


def test_attention_weights_are_those_that_made_the_output():
    torch.manual_seed(0)
    mixer = DeformableAttention(8, heads=1, size=4, stride=2)
    x = torch.randn(1, 8, 4, 4)
    got = mixer.read(x, weights=True)
    sampled = read(x, got.points[:, 0], "v1")[..., None]
    z = mixer.proj_v(sampled)[..., 0] @ got.weights[:, 0].transpose(1, 2)
    torch.testing.assert_close(mixer.proj_out(z.unflatten(2, (4, 4))), got.output)
    torch.testing.assert_close(got.weights.sum(-1), torch.ones(1, 1, 16))


def test_coordinates_stay_in_float32_in_a_bfloat16_model():
    mixer = DeformableAttention(8, heads=2, size=4).bfloat16()
    got = mixer.read(torch.randn(1, 8, 4, 4).bfloat16())
    assert got.points.dtype == torch.float32
    assert got.output.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": 3}, "heads=3 does not divide dim=8"),
        ({"heads": 4, "groups": 3}, "groups=3 does not divide heads=4"),
        ({"convention": "v3"}, "convention='v3' is not a choice"),
        ({"bias": "lepe"}, "bias='lepe' is not a choice"),
    ],
)
def test_options_that_do_not_fit_say_so(options, words):
    with pytest.raises(ValueError, match=words):
        DeformableAttention(8, **options)


@torch.no_grad()
def test_it_exports_without_a_sampling_operator():
    torch.manual_seed(0)
    mixer, x = DeformableAttention(8, heads=2, size=4).eval(), torch.randn(1, 8, 4, 4)
    program = torch.export.export(mixer, (x,), strict=False)
    torch.testing.assert_close(program.module()(x), mixer(x), atol=1e-5, rtol=1e-5)
    assert not any("grid_sampler" in str(n.target) for n in program.graph.nodes)
