import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from errors import rounding

from adaptkit.ops import ms_deform_attn

# The package's attribute of this name is the function; these are the files behind it.
module = importlib.import_module("adaptkit.ops.ms_deform_attn._bag")
backends = importlib.import_module("adaptkit.ops.ms_deform_attn._backends")

# torch says this once per process: an error in whichever test comes first.
pytestmark = pytest.mark.filterwarnings("error:Sparse")

PYRAMID = [(4, 6), (3, 5), (2, 2)]
THIN = [(3, 1), (4, 6), (1, 5), (1, 1), (2, 3)]
SHAPES = [PYRAMID, THIN, [(8, 8)], [(1, 1)], [(1, 7)], [(7, 1)]]

NO_C = backends.why_not("c", torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1))
C = pytest.param("c", marks=pytest.mark.skipif(NO_C is not None, reason=f"no C kernel: {NO_C}"))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # test_ms_deform_attn_backends.py runs this file so
TRITON = ["triton"] if INTERPRETED else []
FAST = ["embedding_bag", "gather", C, *TRITON]
# Sums of 4 corners of 20 points, there and back, and over 28 points; a place is rounded in a map of 8 cells.
FLOAT64 = 8 * rounding(torch.float64, 80, 80, 112)
ORDERED = ["embedding_bag", C]  # the same bits each time
OPERATOR = [*ORDERED, *TRITON]  # inside of the custom operator


def make(shapes=PYRAMID, *, batch=2, queries=7, heads=3, dim=5, points=4, dtype=torch.float64, seed=0, device="cpu"):
    """Value, locations and weights; about a half of the points lie outside of the image."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, dim, generator=generator, dtype=torch.float64)
    cells = (batch, queries, heads, len(shapes), points)
    locations = torch.rand(*cells, 2, generator=generator, dtype=torch.float64) * 2 - 0.5
    weights = torch.randn(cells, generator=generator, dtype=torch.float64)
    return tuple(tensor.to(device, dtype) for tensor in (value, locations, weights))


def run(inputs, shapes, backend):
    value, locations, weights = inputs
    return ms_deform_attn(value, shapes, locations, weights, backend=backend)


def run_backward(inputs, shapes, backend, op=run):
    """The output, and the gradients of a fixed random linear function of it."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = op(leaves, shapes, backend)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return out.detach(), *torch.autograd.grad(out, leaves, direction.to(out))


def assert_near(results, expected, rtol=FLOAT64):
    for result, reference in zip(results, expected, strict=True):
        assert result.shape == reference.shape
        scale = reference.abs().max().item() if reference.numel() else 0.0
        torch.testing.assert_close(result.double(), reference.double(), rtol=0, atol=rtol * max(scale, 1.0))


def at_pixels(xy, size):
    """The location of pixel coordinates in a level `size` wide and high; exact when size is a power of two."""
    return (xy + 0.5) / size


# -------- values


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_output_and_gradients_equal_the_grid_sample_form(shapes, backend):
    inputs = make(shapes)
    assert_near(run_backward(inputs, shapes, backend), run_backward(inputs, shapes, "grid_sample"))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("dim", "heads", "points"), [(1, 1, 1), (7, 2, 3), (64, 1, 4), (16, 2, 6)])
def test_any_number_of_channels_heads_and_points_will_do(dim, heads, points, backend):
    inputs = make(dim=dim, heads=heads, points=points)
    assert_near(run_backward(inputs, PYRAMID, backend), run_backward(inputs, PYRAMID, "grid_sample"))


@pytest.mark.parametrize("backend", FAST)
def test_points_far_outside_read_zeros(backend):
    value, locations, weights = make()
    out, *gradients = run_backward((value, locations + 1e6, weights), PYRAMID, backend)
    assert not out.any()
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("far", [1e30, -1e30, float("inf"), -float("inf")])
@pytest.mark.parametrize("shapes", [PYRAMID, THIN], ids=str)
def test_infinite_points_read_zeros(far, shapes, backend):
    value, locations, weights = make(shapes, dtype=torch.float32)
    locations[..., 0] = far
    out = run((value, locations, weights), shapes, backend)
    assert not out.any()


@pytest.mark.parametrize("shapes", [PYRAMID, THIN], ids=str)
def test_every_row_is_in_range_wherever_the_points_are(shapes):
    value, locations, _ = make(shapes, dtype=torch.float32)
    locations.view(-1)[::5] = float("nan")
    locations.view(-1)[1::7] = float("inf")
    locations.view(-1)[2::7] = -1e38
    sides = [side for shape in shapes for side in shape]
    rows = module._find_cells(locations, sides, value.shape[1], torch.float32).rows
    assert rows.min() >= 0
    assert rows.max() < value.shape[:3].numel()


@pytest.mark.parametrize("backend", FAST)
def test_a_nan_location_spoils_its_own_query_and_head_only(backend):
    value, locations, weights = make()
    expected = run((value, locations, weights), PYRAMID, backend).unflatten(2, (3, 5))
    locations[1, 2, 1, 0, 3, 0] = float("nan")
    out = run((value, locations, weights), PYRAMID, backend).unflatten(2, (3, 5))
    assert out[1, 2, 1].isnan().all()
    out[1, 2, 1] = expected[1, 2, 1]
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", FAST)
def test_inputs_need_not_be_contiguous(backend):
    value, locations, weights = make()
    strided = (
        value.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        locations.permute(5, 3, 1, 0, 4, 2).contiguous().permute(3, 2, 5, 1, 4, 0),
        torch.stack((weights, weights), dim=-1)[..., 0],
    )
    assert not any(tensor.is_contiguous() for tensor in strided)
    leaves = [tensor.detach().requires_grad_() for tensor in strided]
    out = run(leaves, PYRAMID, backend)
    gradients = torch.autograd.grad(out.square().sum(), leaves)
    leaves = [tensor.detach().requires_grad_() for tensor in (value, locations, weights)]
    expected = run(leaves, PYRAMID, "grid_sample")
    assert_near((out, *gradients), (expected, *torch.autograd.grad(expected.square().sum(), leaves)))


@pytest.mark.parametrize("backend", [*FAST, "grid_sample"])
@pytest.mark.parametrize("expand", [False, True], ids=["size-1", "expanded"])
def test_points_and_weights_broadcast(expand, backend):
    value, locations, weights = make()
    inputs = (value, locations[:1, :, :1], weights[:, :1, :, :1])
    full = (value, locations[:1, :, :1].expand_as(locations), weights[:, :1, :, :1].expand_as(weights))
    if expand:
        out = run(full, PYRAMID, backend)
    else:
        out, *gradients = run_backward(inputs, PYRAMID, backend)
        _, *wanted = run_backward([tensor.contiguous() for tensor in full], PYRAMID, "grid_sample")
        summed = [whole.sum_to_size(tensor.shape) for whole, tensor in zip(wanted, inputs)]
        assert_near(gradients, summed)
    assert_near([out], [run([tensor.contiguous() for tensor in full], PYRAMID, "grid_sample")])


@pytest.mark.parametrize("backend", [*FAST, "grid_sample"])
@pytest.mark.parametrize("empty", [{"queries": 0}, {"batch": 0}, {"points": 0}])
def test_an_empty_call_gives_an_empty_or_zero_result(empty, backend):
    inputs = make(**empty)
    out, *gradients = run_backward(inputs, PYRAMID, backend)
    assert out.shape == (inputs[0].shape[0], inputs[1].shape[1], 15)
    assert not out.any()
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in inputs]
    assert not any(gradient.any() for gradient in gradients)


# -------- gradients


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("shapes", [[(3, 4), (2, 2)], [(1, 3), (2, 1), (1, 1)]], ids=str)
def test_gradients_are_those_of_finite_differences(shapes, backend):
    value, locations, weights = make(shapes, batch=1, queries=3, heads=2, dim=3, points=2)
    size = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64)[:, None]
    pixels = locations * size - 0.5
    whole = pixels.floor()
    locations = (whole + (pixels - whole).clamp(0.05, 0.95) + 0.5) / size  # clear of the kinks
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    fast_mode = backend == "triton"  # its interpreter is slow
    assert torch.autograd.gradcheck(lambda *tensors: run(tensors, shapes, backend), leaves, fast_mode=fast_mode)


def on_the_kinks(dtype=torch.float64):
    """One level 4 pixels wide and high, read at all whole coordinates from 2 outside to 2 outside."""
    axis = torch.arange(-2, 6, dtype=dtype)
    xy = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)  # (y, x, 2)
    value, _, _ = make([(4, 4)], batch=1, heads=1, dim=1, dtype=dtype)
    locations = at_pixels(xy, 4).view(1, 64, 1, 1, 1, 2)
    return value, locations, torch.ones(1, 64, 1, 1, 1, dtype=dtype)


@pytest.mark.parametrize("backend", [*FAST, "grid_sample"])
def test_the_output_at_whole_coordinates_is_the_pixel(backend):
    inputs = on_the_kinks()
    image = torch.nn.functional.pad(inputs[0].view(4, 4), (2, 2, 2, 2))
    assert torch.equal(run(inputs, [(4, 4)], backend).view(8, 8), image)


@pytest.mark.parametrize("backend", [*FAST, "grid_sample"])
def test_the_derivative_at_whole_coordinates_is_the_one_to_the_right(backend):
    value, locations, weights = on_the_kinks()
    locations.requires_grad_()
    (gradient,) = torch.autograd.grad(run((value, locations, weights), [(4, 4)], backend).sum(), locations)
    image = torch.nn.functional.pad(value.view(4, 4), (2, 3, 2, 3))
    right, below = image[:-1, 1:] - image[:-1, :-1], image[1:, :-1] - image[:-1, :-1]
    expected = 4 * torch.stack((right, below), dim=-1)
    torch.testing.assert_close(gradient.view(8, 8, 2), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("shapes", [[(4, 4), (2, 2)], [(1, 4), (4, 1), (1, 1)]], ids=str)
def test_all_gradients_at_whole_coordinates_are_those_of_grid_sample(shapes, backend):
    value, locations, weights = make(shapes, queries=40)
    size = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64)[:, None]
    inputs = (value, at_pixels((locations * size - 0.5).round(), size), weights)
    assert_near(run_backward(inputs, shapes, backend), run_backward(inputs, shapes, "grid_sample"))


@pytest.mark.parametrize("backend", ORDERED)
def test_backward_gives_the_same_bits_every_time(backend):
    inputs = make([(16, 16), (8, 8)], queries=300, heads=4, dim=32, dtype=torch.float32)
    first = run_backward(inputs, [(16, 16), (8, 8)], backend)
    for _ in range(4):
        again = run_backward(inputs, [(16, 16), (8, 8)], backend)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.skipif(NO_C is not None, reason=f"no C kernel: {NO_C}")
@pytest.mark.parametrize("dim", [6, 32])
@pytest.mark.parametrize("threads", [2, 3, 11])
def test_the_c_kernel_gives_the_same_bits_with_any_number_of_threads(threads, dim, monkeypatch):
    """With 11 threads and two levels of one head, the gradient of the values is cut into 12 bands."""
    shapes = [(16, 9), (3, 1)]
    inputs = make(shapes, batch=1, queries=200, heads=1, dim=dim, dtype=torch.float32)
    first = run_backward(inputs, shapes, "c")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert all(map(torch.equal, run_backward(inputs, shapes, "c"), first))


# -------- derivatives of derivatives, and transforms

SMALL = [(3, 4), (2, 2)]


def clear_of_the_kinks(dtype=torch.float64):
    """A small call whose points are away from whole coordinates, where a second derivative would not exist."""
    value, locations, weights = make(SMALL, batch=1, queries=3, heads=2, dim=2, points=2, dtype=dtype)
    size = torch.tensor([(w, h) for h, w in SMALL], dtype=dtype)[:, None]
    pixels = locations * size - 0.5
    whole = pixels.floor()
    locations = (whole + (pixels - whole).clamp(0.05, 0.95) + 0.5) / size
    return [tensor.requires_grad_() for tensor in (value, locations, weights)]


@pytest.mark.parametrize("backend", FAST)
def test_second_derivatives_are_those_of_finite_differences(backend):
    leaves = clear_of_the_kinks()
    fast_mode = backend == "triton"  # its interpreter is slow
    assert torch.autograd.gradgradcheck(lambda *t: run(t, SMALL, backend), leaves, fast_mode=fast_mode)


@pytest.mark.parametrize("backend", OPERATOR)
def test_third_derivatives_are_those_of_finite_differences(backend):
    def gradients(*leaves):
        return torch.autograd.grad(run(leaves, SMALL, backend).square().sum(), leaves, create_graph=True)

    assert torch.autograd.gradgradcheck(gradients, clear_of_the_kinks(), fast_mode=True)


@pytest.mark.parametrize("backend", OPERATOR)
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_second_derivatives_equal_those_of_gather(which, backend):
    def penalty(backend):
        """The gradient of a norm of gradients, where some inputs want none and depend on one another."""
        inputs = make(PYRAMID)
        leaf = torch.ones((), dtype=torch.float64, requires_grad=True)
        inputs = [x * leaf if i in which else x for i, x in enumerate(inputs)]
        wanted = [inputs[i] for i in which]
        first = torch.autograd.grad(run(inputs, PYRAMID, backend).sin().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaf)[0]

    torch.testing.assert_close(penalty(backend), penalty("gather"), rtol=1e-12, atol=0)


def of_one_item(value, locations, weights):
    return run((value[None], locations[None], weights[None]), SMALL, "auto")[0].sin()


TRANSFORMS = {
    "grad": lambda f, *args: torch.func.grad(lambda *x: f(*x).sum(), (0, 1, 2))(*args),
    "vjp": lambda f, *args: torch.func.vjp(f, *args)[1](torch.ones_like(f(*args))),
    "jvp": lambda f, *args: torch.func.jvp(f, args, tuple(x.cos() for x in args)),
    "vmap": lambda f, *args: torch.func.vmap(f)(*(torch.stack([x, 2 * x]) for x in args)),
    "hessian": lambda f, *args: torch.func.hessian(lambda w: f(*args[:2], w).sum())(args[2]),
    "per-sample": lambda f, *args: torch.func.vmap(torch.func.grad(lambda *x: f(*x).sum(), (0, 1, 2)))(
        *(torch.stack([x, 2 * x]) for x in args)
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_torch_func_work_and_say_what_gather_says(transform):
    args = [x.detach()[0] for x in clear_of_the_kinks()]

    def plain(value, locations, weights):
        return run((value[None], locations[None], weights[None]), SMALL, "gather")[0].sin()

    found, expected = (torch.utils._pytree.tree_leaves(TRANSFORMS[transform](f, *args)) for f in (of_one_item, plain))
    assert all(map(torch.equal, found, expected))


def test_a_transform_says_what_autograd_says_of_the_fast_backends():
    leaves = [x.detach()[0].requires_grad_() for x in clear_of_the_kinks()]
    expected = torch.autograd.grad(of_one_item(*leaves).sum(), leaves)
    assert_near(TRANSFORMS["grad"](of_one_item, *leaves), expected)


def test_forward_mode_works():
    value, locations, weights = (x.detach() for x in clear_of_the_kinks())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(locations, torch.ones_like(locations))
        _, tangent = torch.autograd.forward_ad.unpack_dual(run((value, dual, weights), SMALL, "auto"))
    step = 1e-6
    ahead, behind = (run((value, locations + s, weights), SMALL, "auto") for s in (step, -step))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("backend", ["c", "embedding_bag"])
def test_a_fast_backend_refuses_a_tangent_and_never_drops_it(backend):
    args, forward_ad = [x.detach() for x in clear_of_the_kinks()], torch.autograd.forward_ad
    leaves = [x.clone().requires_grad_() for x in args]
    before = run(leaves, SMALL, backend)
    said = "no forward-mode derivative; use backend='gather'"
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match=said):
            run([forward_ad.make_dual(x, torch.ones_like(x)) for x in args], SMALL, backend)
        with pytest.raises(RuntimeError, match=said):
            torch.autograd.grad(before, leaves, forward_ad.make_dual(before.detach(), before.detach()))
        torch.autograd.grad(before.sum(), leaves)  # without a tangent it is none of its business
    with pytest.raises(RuntimeError, match=said):
        torch.func.jvp(lambda *x: run(x, SMALL, backend), tuple(args), tuple(args))


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
def test_a_compiler_traces_the_transforms(transform):
    torch._dynamo.reset()
    args = [x.detach()[0] for x in clear_of_the_kinks()]
    compiled = torch.compile(lambda *x: TRANSFORMS[transform](of_one_item, *x), backend="eager", fullgraph=True)
    expected = torch.utils._pytree.tree_leaves(TRANSFORMS[transform](of_one_item, *args))
    assert_near(torch.utils._pytree.tree_leaves(compiled(*args)), expected)


# -------- the same bits


def test_64_bit_indices_give_the_same_bits(monkeypatch):
    inputs = make(THIN)
    expected = run_backward(inputs, THIN, "embedding_bag")
    monkeypatch.setattr(module, "_index_dtype", lambda locations, pixels: torch.int64)
    assert all(map(torch.equal, run_backward(inputs, THIN, "embedding_bag"), expected))


def test_indices_are_64_bit_when_rows_or_points_are_too_many_for_32():
    points = torch.empty((), device="meta").expand(2, 10, 8, 3, 4, 2)
    many_points = points[:, :1].expand(2, 1_000_000, 8, 3, 4, 2)
    assert module._index_dtype(points, 1000) == torch.int32
    assert module._index_dtype(points, 2**27) == torch.int64
    assert module._index_dtype(many_points, 1000) == torch.int64


# -------- dtypes


@pytest.mark.parametrize("backend", [*FAST, "grid_sample"])
def test_float32_is_near_float64(backend):
    inputs = make([(16, 16), (8, 8)], queries=50, heads=2, dim=32)
    # Rounded first, and clear of the kinks, where a rounding of x would change the derivative.
    size = torch.tensor([16.0, 8.0], dtype=torch.float64)[:, None, None]
    locations = at_pixels(((inputs[1] * size).round() + 0.25), size)
    inputs = [tensor.float() for tensor in (inputs[0], locations, inputs[2])]
    expected = run_backward([tensor.double() for tensor in inputs], [(16, 16), (8, 8)], "grid_sample")
    results = run_backward(inputs, [(16, 16), (8, 8)], backend)
    assert all(tensor.dtype == torch.float32 for tensor in results)
    for result, reference in zip(results, expected, strict=True):
        assert (result - reference).abs().max() <= 2e-6 * reference.abs().max()


@pytest.mark.parametrize("backend", [*FAST, "grid_sample"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_half_precision_values_are_read_in_float32(dtype, tolerance, backend):
    value, locations, weights = make(dtype=torch.float32)
    inputs = (value.to(dtype), locations, weights)
    results = run_backward(inputs, PYRAMID, backend)
    assert [tensor.dtype for tensor in results] == [dtype, dtype, torch.float32, torch.float32]
    expected = run_backward([tensor.double() for tensor in inputs], PYRAMID, "grid_sample")
    assert_near(results, expected, tolerance)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_inputs_may_be_half_precision(dtype, backend):
    inputs = make(dtype=dtype)
    results = run_backward(inputs, PYRAMID, backend)
    assert all(tensor.dtype == dtype and tensor.isfinite().all() for tensor in results)
    assert_near(results, run_backward([tensor.float() for tensor in inputs], PYRAMID, backend), 1e-2)


@pytest.mark.parametrize("backend", ORDERED)
def test_autocast_changes_nothing(backend):
    inputs = make(dtype=torch.float32)
    expected = run_backward(inputs, PYRAMID, backend)
    with torch.autocast("cpu", torch.bfloat16):
        results = run_backward(inputs, PYRAMID, backend)
    assert all(map(torch.equal, results, expected))


# -------- compile and export


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("backend", ORDERED)
def test_compile_takes_one_graph_and_gives_the_same_bits(backend, compiler):
    torch._dynamo.reset()
    inputs = make()
    compiled = torch.compile(run, backend=compiler, fullgraph=True)
    expected = run_backward(inputs, PYRAMID, backend)
    assert all(map(torch.equal, run_backward(inputs, PYRAMID, backend, compiled), expected))


def test_compile_does_not_trace_into_the_operator():
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    torch.compile(run, backend=keep, fullgraph=True)(make(), PYRAMID, "auto")
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert any("adaptkit" in name for name in called)
    assert not any("embedding_bag" in name for name in called)


class Attend(torch.nn.Module):
    def forward(self, value, locations, weights):
        return ms_deform_attn(value, THIN, locations, weights)


def test_export_uses_plain_operators_and_any_batch_size():
    batch = torch.export.Dim("batch", min=1, max=64)
    dynamic = [{0: batch}] * 3
    program = torch.export.export(Attend(), make(THIN, batch=2), dynamic_shapes=dynamic)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not any("grid_sample" in name or "adaptkit" in name for name in called)
    inputs = make(THIN, batch=5, seed=3)
    assert_near([program.module()(*inputs)], [run(inputs, THIN, "embedding_bag")])


@pytest.mark.parametrize("backend", OPERATOR)
def test_the_forward_operator_passes_opcheck(backend):
    sides = [side for shape in PYRAMID for side in shape]
    inputs = [tensor.requires_grad_() for tensor in make()]
    torch.library.opcheck(torch.ops.adaptkit.ms_deform_attn.default, (*inputs, sides, backend))


@pytest.mark.parametrize("backend", OPERATOR)
def test_the_backward_operator_passes_opcheck(backend):
    sides = [side for shape in PYRAMID for side in shape]
    grad = run(make(), PYRAMID, backend).requires_grad_()
    inputs = [tensor.requires_grad_() for tensor in make()]
    torch.library.opcheck(torch.ops.adaptkit.ms_deform_attn_backward.default, (grad, *inputs, sides, backend))


def test_meta_tensors_give_the_shape():
    out = run([tensor.to("meta") for tensor in make()], PYRAMID, "embedding_bag")
    assert out.device.type == "meta"
    assert out.shape == (2, 7, 15)


# -------- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, s, p, w: (v[0], s, p, w), r"\(43, 3, 5\), expected \(N, S, H, D\)"),
        (lambda v, s, p, w: (v[:, 1:], s, p, w), r"S=42 pixels.*\[24, 15, 4\].*give the \(h, w\)"),
        (lambda v, s, p, w: (v, [*s, (0, 3)], p, w), r"\(0, 3\)"),
        (lambda v, s, p, w: (v, s, p[..., :1], w), r"4, 1\), expected \(N, Q, H, L, P, 2\)"),
        (lambda v, s, p, w: (v, s, p[0], w), r"expected \(N, Q, H, L, P, 2\)"),
        (lambda v, s, p, w: (v, s, p[:, :, :2], w), r"\(2, 7, 2, 3, 4, 2\).*\(2, 7, 3, 3, 4, 2\); N, Q, H, L"),
        (lambda v, s, p, w: (v, s, p[:, :, :, :2], w), r"sampling_locations.*\(2, 7, 3, 2, 4, 2\)"),
        (lambda v, s, p, w: (v, s, p, w[:, :, :, :2]), r"attention_weights.*\(2, 7, 3, 2, 4\).*\(2, 7, 3, 3, 4\)"),
        (lambda v, s, p, w: (v, s, p, w[:, :5]), r"attention_weights.*\(2, 5, 3, 3, 4\).*\(2, 7, 3, 3, 4\)"),
        (lambda v, s, p, w: (v, s, p, w[..., None]), "attention_weights"),
    ],
)
def test_shapes_that_do_not_fit_are_an_error_that_names_both_sides(change, message):
    value, locations, weights = make()
    with pytest.raises(ValueError, match=message):
        ms_deform_attn(*change(value, PYRAMID, locations, weights))


@pytest.mark.parametrize("backend", ["auto", C, "embedding_bag"])
def test_a_level_that_float32_cannot_count_is_refused(backend):
    wide = 2**24 + 3
    points = torch.ones(1, 1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"16777219 pixels in a row.*up to 16777216; give value in float64"):
        ms_deform_attn(torch.zeros(1, wide, 1, 1), [(1, wide)], *points, backend=backend)


@pytest.mark.skipif(NO_C is not None, reason=f"no C kernel: {NO_C}")
@pytest.mark.parametrize("shape", [(1, 2**24 + 3), (2**24 + 3, 1)])
def test_a_level_wider_than_float32_counts_is_right_in_float64(shape):
    value = torch.arange(2.0**24 + 3, dtype=torch.float64).view(1, -1, 1, 1)
    pixel = torch.tensor([0.0, 1e7 + 0.25, 2**24 + 1.5, 2**24 + 2], dtype=torch.float64)
    along, across = (pixel + 0.5) / (2**24 + 3), torch.full_like(pixel, 0.5)
    points = torch.stack((along, across) if shape[0] == 1 else (across, along), -1).view(1, 4, 1, 1, 1, 2)
    out = ms_deform_attn(value, [shape], points, torch.ones(1, 4, 1, 1, 1, dtype=torch.float64), backend="c")
    torch.testing.assert_close(out.flatten(), pixel, atol=1e-6, rtol=0)


@pytest.mark.skipif(NO_C is not None, reason=f"no C kernel: {NO_C}")
def test_the_kernel_itself_reads_no_pixel_that_a_wide_level_does_not_have():
    """In float32 the last cell, 2^24 + 1, is rounded to a pixel too far: the page after the map must not be read."""
    from adaptkit.ops.ms_deform_attn import _c

    wide, seen = 2**24 + 3, []
    for after in (0.0, torch.nan):  # 0 * NaN is NaN
        memory = torch.full((wide + 64,), after)
        memory[:wide] = 1.0
        points = torch.tensor([1.0, 0.5]).expand(1, 8, 1, 1, 1, 2) + torch.arange(8).view(8, 1, 1, 1, 1) * 2.0**-24
        value = memory[:wide].view(1, wide, 1, 1)
        seen.append(_c.forward(value, points.contiguous(), torch.ones(1, 8, 1, 1, 1), [1, wide]))
    assert torch.equal(*seen)


def test_an_unknown_backend_is_an_error_that_names_the_known_ones():
    with pytest.raises(
        ValueError, match="'cuda' is unknown; choose one of auto, c, triton, embedding_bag, gather, grid"
    ):
        run(make(), PYRAMID, "cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, p, w, s: (v[0], p, w, s), r"value has shape \(43, 3, 5\).*expected \(N, S, H, D\)"),
        (lambda v, p, w, s: (v, p, w, s[:4]), r"S=43 pixels, shapes are \[4, 6, 3, 5\]; give h, w"),
        (lambda v, p, w, s: (v, p, w, s[:5]), r"S=43 pixels, shapes are \[4, 6, 3, 5, 2\]"),
        (lambda v, p, w, s: (v, p, w, [-4, -6, *s[2:]]), r"S=43 pixels, shapes are \[-4, -6"),
        (lambda v, p, w, s: (v, p[:, :5], w, s), r"weights has shape \(2, 7, 3, 3, 4\), expected \(2, 5, 3, 3, 4\)"),
        (lambda v, p, w, s: (v, p[:1], w, s), r"locations has shape \(1, .*expected \(2, 7, 3, 3, 4, 2\)"),
        (lambda v, p, w, s: (v.long(), p, w, s), r"value holds torch\.int64, expected floating-point"),
        (lambda v, p, w, s: (v, p.cfloat(), w, s), r"locations holds torch\.complex64, expected floating-point"),
        (lambda v, p, w, s: (v, p, w > 0, s), r"weights holds torch\.bool, expected floating-point"),
        (lambda v, p, w, s: (v, p, w, [2**62, 4, *s[2:]]), r"S=43 pixels, shapes are \[4611686018427387904, 4"),
        (lambda v, p, w, s: (v, p, w, [0, 0, *s]), r"S=43 pixels, shapes are \[0, 0, 4, 6"),
        (lambda v, p, w, s: (v, p.to("meta"), w, s), "locations is on meta, value on cpu; move them to one device"),
    ],
)
def test_the_operator_itself_refuses_what_would_be_read_out_of_bounds(change, message):
    changed = change(*make(), [side for shape in PYRAMID for side in shape])
    with pytest.raises(ValueError, match=message):
        torch.ops.adaptkit.ms_deform_attn(*changed, "auto")
    with pytest.raises(ValueError, match=message):
        torch.ops.adaptkit.ms_deform_attn_backward(torch.zeros(2, 7, 15), *changed, "auto")


def test_the_operator_refuses_a_gradient_of_another_shape():
    sides = [side for shape in PYRAMID for side in shape]
    with pytest.raises(ValueError, match=r"grad has shape \(2, 7, 14\), expected \(2, 7, 15\)"):
        torch.ops.adaptkit.ms_deform_attn_backward(torch.zeros(2, 7, 14), *make(), sides, "auto")


@pytest.mark.parametrize("name", ["gather", "nonsense", ""])
def test_the_operator_names_its_backends(name):
    sides = [side for shape in PYRAMID for side in shape]
    with pytest.raises(RuntimeError, match="none of the operator's, c, triton, embedding_bag; use backend='auto'"):
        torch.ops.adaptkit.ms_deform_attn(*make(), sides, name)


# -------- Triton, in its interpreter


@pytest.fixture
def triton_kernels():
    if not INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1 from the start of the process")
    return importlib.import_module("adaptkit.ops.ms_deform_attn._triton")


def test_triton_is_right_in_every_configuration(triton_kernels):
    inputs = make(heads=2, dim=40)
    sides = [side for shape in PYRAMID for side in shape]
    grad = torch.ones(2, 7, 80, dtype=torch.float64)
    expected = [module.forward(*inputs, sides), *module.backward(grad, *inputs, sides)]
    for config in triton_kernels.CONFIGS:
        out = triton_kernels.forward(*inputs, sides, config)
        assert_near([out, *triton_kernels.backward(grad, *inputs, sides, config)], expected)


def test_triton_takes_tensors_at_any_address(triton_kernels, monkeypatch):
    inputs = make(dtype=torch.float32)
    shifted = [torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view_as(tensor) for tensor in inputs]
    assert all(tensor.data_ptr() % 16 for tensor in shifted)
    expected, launched, launch = run(inputs, PYRAMID, "triton"), [], triton_kernels._launch

    def keep(kernel, rows, tensors, *others):
        launched.extend(tensors)
        launch(kernel, rows, tensors, *others)

    monkeypatch.setattr(triton_kernels, "_launch", keep)
    assert torch.equal(run(shifted, PYRAMID, "triton"), expected)
    assert not any(tensor.data_ptr() % 16 for tensor in launched)


def test_triton_counts_in_64_bits_where_32_are_too_few(triton_kernels, monkeypatch):
    inputs = make()
    expected = run_backward(inputs, PYRAMID, "triton")
    monkeypatch.setattr(triton_kernels, "_SMALL", 1)
    assert all(map(torch.equal, run_backward(inputs, PYRAMID, "triton"), expected))


# -------- CUDA


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


ON_CUDA = ["embedding_bag", "gather", "triton"]


@needs_cuda
@pytest.mark.parametrize("backend", ON_CUDA)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_cuda_equals_cpu(shapes, backend):
    results = run_backward(make(shapes, device="cuda"), shapes, backend)
    assert_near([tensor.cpu() for tensor in results], run_backward(make(shapes), shapes, "grid_sample"))


@needs_cuda
@pytest.mark.parametrize("backend", ["embedding_bag", "triton"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_cuda_values_of_lower_precision_are_near_float64(dtype, tolerance, backend):
    value, locations, weights = make(dtype=torch.float32, device="cuda")
    inputs = (value.to(dtype), locations, weights)
    expected = run_backward([tensor.double() for tensor in inputs], PYRAMID, "grid_sample")
    assert_near(run_backward(inputs, PYRAMID, backend), expected, tolerance)


@needs_cuda
def test_cuda_backward_gives_the_same_bits_every_time():
    inputs = make([(16, 16), (8, 8)], queries=300, heads=4, dim=32, dtype=torch.float32, device="cuda")
    first = run_backward(inputs, [(16, 16), (8, 8)], "embedding_bag")
    again = run_backward(inputs, [(16, 16), (8, 8)], "embedding_bag")
    assert all(map(torch.equal, first, again))


@needs_cuda
def test_cuda_64_bit_indices_give_the_same_bits(monkeypatch):
    inputs = make(device="cuda")
    expected = run_backward(inputs, PYRAMID, "embedding_bag")
    monkeypatch.setattr(module, "_index_dtype", lambda locations, pixels: torch.int64)
    assert all(map(torch.equal, run_backward(inputs, PYRAMID, "embedding_bag"), expected))
