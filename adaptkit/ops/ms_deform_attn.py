r"""Multi-scale deformable attention.

Every head of every query reads P points in each of L feature levels and adds them up by weight:

    out[n, q, h] = sum_{l, p}  A[n, q, h, l, p] * V_l[n, h](x, y),      x = loc_x W_l - 1/2,  y = loc_y H_l - 1/2

where V_l(x, y) is the bilinear value between the four pixels around (x, y), and zero outside the level.
Let b = clamp(floor(x), 0, W - 2) be the *cell* of a point, r = x - b, and t(r) = max(0, 1 - |r|) the hat. Then

    V(x) = t(r) V[b] + t(r - 1) V[b + 1]

for every real x, zero padding included: both pixels exist always, and both hats vanish for a point outside. So the
operator is a sum of 4 L P weighted rows of the value table, which is what `embedding_bag` computes. Its derivatives are
the dot products of an output gradient with those same rows (a sampled dense-dense product, SDDMM), and the
transposed bag: for each pixel, the weighted sum of the output gradients that read it.

Source: Deformable DETR (Zhu et al., ICLR 2021), eq. 2-3; ViT-Adapter (Chen et al., ICLR 2023) uses it in its injectors
and extractors.
"""

import warnings
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Multi-scale deformable attention (Deformable DETR, eq. 3, between its two linear layers).

    Args:
        value: (N, S, H, D) the levels one after another, each row by row, so that S = sum of h * w.
        spatial_shapes: [(h, w), ...] of the L levels, in pixels.
        sampling_locations: (N, Q, H, L, P, 2) as (x, y); [0, 1] spans a level from edge to edge, and a point outside
            reads zeros. N, H and L may be 1: they broadcast.
        attention_weights: (N, Q, H, L, P), used as they are (no softmax here). Any size may be 1: it broadcasts.
        backend: "embedding_bag" is the fast one, for CPU and CUDA, differentiable once. "gather" is made of plain
            operators that export. "grid_sample" is the reference form, for every device. "auto" takes "gather" under
            `torch.export`, else "embedding_bag" on CPU and CUDA and "grid_sample" elsewhere.

    Returns:
        (N, Q, H * D) in the dtype of `value`. The arithmetic is float32, or float64 if `value` is.

    Raises:
        ValueError: if the shapes do not fit together, or the backend is unknown.

    At whole coordinates, where bilinear interpolation has a kink, all backends take the derivative to the right.
    """
    locations, weights = _checked(value, spatial_shapes, sampling_locations, attention_weights)
    if backend == "auto":
        fast = "embedding_bag" if value.device.type in ("cpu", "cuda") else "grid_sample"
        backend = "gather" if torch.compiler.is_exporting() else fast
    if backend == "embedding_bag":
        return _bag(value, locations, weights, [side for shape in spatial_shapes for side in shape])
    if backend == "gather":
        return _gather(value, spatial_shapes, locations, weights)
    if backend == "grid_sample":
        return _grid_sample(value, spatial_shapes, locations, weights)
    raise ValueError(f"backend={backend!r} is unknown; choose one of auto, embedding_bag, gather, grid_sample")


def _checked(value, spatial_shapes, locations, weights) -> tuple[Tensor, Tensor]:
    """The points, broadcast to (N, Q, H, L, P, 2) and (N, Q, H, L, P)."""
    if value.ndim != 4:
        raise ValueError(f"value has shape {tuple(value.shape)}, expected (N, S, H, D); split its last axis into heads")
    batch, pixels, heads, _ = value.shape
    if any(h < 1 or w < 1 for h, w in spatial_shapes) or pixels != sum(h * w for h, w in spatial_shapes):
        raise ValueError(
            f"value has S={pixels} pixels, spatial_shapes {list(spatial_shapes)} have "
            f"{[h * w for h, w in spatial_shapes]}; give the (h, w) of each level that value is made of"
        )
    if locations.ndim != 6 or locations.shape[-1] != 2:
        raise ValueError(
            f"sampling_locations has shape {tuple(locations.shape)}, expected (N, Q, H, L, P, 2); "
            "give one (x, y) for each batch item, query, head, level and point"
        )
    points = (batch, locations.shape[1], heads, len(spatial_shapes), locations.shape[4])
    return _expand("sampling_locations", locations, (*points, 2)), _expand("attention_weights", weights, points)


def _expand(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tensor.ndim != len(shape) or any(n not in (1, want) for n, want in zip(tensor.shape, shape, strict=True)):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, but value, spatial_shapes and sampling_locations ask for "
            f"{shape}; N, Q, H, L and P must agree or be 1"
        )
    return tensor.expand(shape)


def _compute_dtype(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


# -------- cells and hats


class Cells(NamedTuple):
    """The 2 x 2 pixels around every point: corners (y, x) = 00, 01, 10, 11 from the cell's first pixel."""

    rows: Tensor  # (N, Q, H, L, P, 4) rows of the value table (N S H, D)
    r: Tensor  # (2, N, Q, H, L, P) x and y from the cell's first pixel, in pixels
    size: Tensor  # (2, 1, 1, H, L, P) width and height of the level
    step: Tensor  # (2, 1, 1, H, L, P) pixels from the first to the second corner: 1, or 0 where the level is 1 wide

    def hats(self) -> Tensor:
        """(2 axes, 2 corners, N, Q, H, L, P) bilinear weights; a step of 0 leaves the second corner none."""
        near = (1 - self.r.abs()).clamp_min_(0)
        far = (self.step - (self.r - 1).abs_()).clamp_min_(0)
        return torch.stack((near, far), dim=1)

    def slopes(self) -> Tensor:
        """The right-hand derivative of `hats`: (-1, +1) for r in [0, 1), (+1, 0) in [-1, 0), (0, -1) in [1, 2)."""
        whole = self.r.floor()
        before, inside, after = (torch.eq(whole, n, out=torch.empty_like(whole)) for n in (-1, 0, 1))
        return torch.stack((before - inside, (inside - after).mul_(self.step)), dim=1)


def _find_cells(locations: Tensor, shapes: list[int], pixels: int, dtype: torch.dtype) -> Cells:
    batch, _, heads, levels, points, _ = locations.shape
    # Constants of a level are spread over (H, L, P): a long inner axis keeps the arithmetic below vectorised. They are
    # filled, not copied from the host, so that a GPU does not wait.
    size = locations.new_empty((2, 1, 1, heads, levels, points), dtype=dtype)
    first = locations.new_empty((1, 1, heads, levels, points), dtype=_index_dtype(locations, pixels))
    start = 0
    for level, (h, w) in enumerate(zip(shapes[::2], shapes[1::2], strict=True)):
        size[0, ..., level, :], size[1, ..., level, :] = w, h
        first[..., level, :] = start
        start += h * w
    step = (size - 1).clamp_(0, 1)

    # x and y in planes, for the same reason: (2, N, Q, H, L, P)
    r = torch.mul(locations.movedim(-1, 0), size, out=size.new_empty((2, *locations.shape[:-1]))).sub_(0.5)
    cell = r.floor().nan_to_num_().clamp_min_(0)  # finite and in range before it becomes an integer
    torch.minimum(cell, (size - 2).clamp_min_(0), out=cell)
    r.sub_(cell)

    # row of pixel (y, x) in head h = ((n S + start + y W + x) H + h)
    first = first.mul_(heads).add_(_arange(heads, first).view(heads, 1, 1))
    first = first + (_arange(batch, first) * (pixels * heads)).view(batch, 1, 1, 1, 1)
    width = size[0].to(first.dtype)
    right, below = step.to(first.dtype).mul_(heads)
    below = below * width
    x, y = cell.to(first.dtype)
    rows = first.new_empty((*x.shape, 4))
    row = y.mul_(width).add_(x).mul_(heads).add_(first)
    rows[..., 0] = row
    torch.add(row, right, out=rows[..., 1])
    torch.add(row, below, out=rows[..., 2])
    torch.add(row, right + below, out=rows[..., 3])
    return Cells(rows, r, size, step)


def _index_dtype(locations: Tensor, pixels: int) -> torch.dtype:
    """32 bits, which are faster, if they can count the table's rows and `_transposed_bag`'s numbers, 16 a point."""
    batch, _, heads = locations.shape[:3]
    counted = max(batch * pixels * heads, 8 * locations.numel())
    return torch.int32 if counted < torch.iinfo(torch.int32).max else torch.int64


def _arange(end: int, like: Tensor, step: int = 1) -> Tensor:
    return torch.arange(0, (end - 1) * step + 1, step, dtype=like.dtype, device=like.device)


def _corner_weights(hats: Tensor, weights: Tensor) -> Tensor:
    """(N, Q, H, L, P, 4) attention weight times bilinear weight of each corner."""
    (left, right), (above, below) = hats
    corners = left.new_empty((*left.shape, 4))
    for corner, y in ((0, above), (2, below)):
        y = y * weights
        torch.mul(y, left, out=corners[..., corner])
        torch.mul(y, right, out=corners[..., corner + 1])
    return corners


# -------- embedding_bag


@torch.library.custom_op(
    "adaptkit::ms_deform_attn",
    mutates_args=(),
    schema="(Tensor value, Tensor locations, Tensor weights, SymInt[] shapes) -> Tensor",
)
def _bag(value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int]) -> Tensor:
    batch, pixels, heads, dim = value.shape
    queries, dtype = locations.shape[1], _compute_dtype(value)
    if value.numel() == 0 or weights.numel() == 0:
        return value.new_zeros((batch, queries, heads * dim))
    cells = _find_cells(locations, shapes, pixels, dtype)
    bags = batch * queries * heads
    out = F.embedding_bag(
        cells.rows.view(bags, -1),
        value.reshape(-1, dim).to(dtype),
        mode="sum",
        per_sample_weights=_corner_weights(cells.hats(), weights).view(bags, -1),
    )
    return out.view(batch, queries, heads * dim).to(value.dtype)


@_bag.register_fake
def _(value, locations, weights, shapes):
    batch, _, heads, dim = value.shape
    return value.new_empty((batch, locations.shape[1], heads * dim))


@torch.library.custom_op(
    "adaptkit::ms_deform_attn_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor value, Tensor locations, Tensor weights, SymInt[] shapes) -> (Tensor, Tensor, Tensor)",
)
def _bag_backward(
    grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    dim, dtype = value.shape[3], _compute_dtype(value)
    grad_locations = torch.empty_like(locations, memory_format=torch.contiguous_format)
    grad_weights = torch.empty_like(weights, memory_format=torch.contiguous_format)
    if value.numel() == 0 or weights.numel() == 0:
        return value.new_zeros(value.shape), grad_locations.zero_(), grad_weights.zero_()

    cells = _find_cells(locations, shapes, value.shape[1], dtype)
    hats = cells.hats()
    grad = grad.reshape(-1, dim).to(dtype)  # (bags, D), a bag = one head of one query
    table = value.reshape(-1, dim).to(dtype)

    # dots[k] = <grad of the bag, pixel at corner k>; interpolated along x, then along y: the derivative of a weight.
    dots = _corner_dots(cells.rows, grad, table).unflatten(-1, (2, 2)).movedim((-2, -1), (0, 1))
    (x_hats, y_hats), (x_slopes, y_slopes) = hats, cells.slopes()
    along_x = _dot(dots.unbind(1), x_hats)  # (2 rows, N, Q, H, L, P)
    grad_weights.copy_(_dot(along_x, y_hats))
    grad_x = _dot(_dot(dots.unbind(1), x_slopes), y_hats)
    grad_y = _dot(along_x, y_slopes)
    torch.mul(grad_x.mul_(weights), cells.size[0], out=grad_locations[..., 0])
    torch.mul(grad_y.mul_(weights), cells.size[1], out=grad_locations[..., 1])

    grad_value = _transposed_bag(cells.rows, _corner_weights(hats, weights), grad, value.shape, shapes)
    return grad_value.to(value.dtype), grad_locations, grad_weights


@_bag_backward.register_fake
def _(grad, value, locations, weights, shapes):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (value, locations, weights))


def _dot(pair, weights: Tensor) -> Tensor:
    return torch.addcmul(pair[0] * weights[0], pair[1], weights[1])


def _corner_dots(rows: Tensor, grad: Tensor, table: Tensor) -> Tensor:
    """(N, Q, H, L, P, 4) product of each bag's gradient with each row the bag has read: an SDDMM."""
    bags, each = grad.shape[0], rows.numel() // grad.shape[0]
    if table.device.type != "cpu" or each > table.shape[0]:  # a CSR row holds no more entries than it has columns
        bag = _arange(bags, rows).repeat_interleave(each, output_size=rows.numel())
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad, table, rows.view(-1), _arange(bags, rows, each), bag, mode=0
        ).view(rows.shape)
    _warn_of_sparse_csr_once()
    dots = grad.new_zeros(rows.numel())  # zeros, because 0 * what memory held may be NaN
    pattern = torch.sparse_csr_tensor(
        _arange(bags + 1, rows, each), rows.view(-1), dots, (bags, table.shape[0]), check_invariants=False
    )
    torch.sparse.sampled_addmm(pattern, grad, table.t(), beta=0, out=pattern)
    return dots.view(rows.shape)


@cache
def _warn_of_sparse_csr_once() -> None:
    """torch says once per process that CSR is in beta: let it say so here, unheard."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)


def _transposed_bag(rows: Tensor, corner_weights: Tensor, grad: Tensor, value_shape, shapes: list[int]) -> Tensor:
    """(N, S, H, D) for each pixel, the weighted sum of the gradients of the bags that have read it.

    The points are sorted by cell. A pixel is then read by four runs of them: those of the cell that begins at it, and
    of the cells that begin one pixel to the left, above, and both. Laid end to end, pixel by pixel, the runs are bags.
    No atomics: the order of every sum is fixed, so the result is the same bits each time.
    """
    batch, pixels, heads, dim = value_shape
    cell, order = rows.view(-1, 4)[:, 0].contiguous().sort(stable=True)
    each = cell.numel() // grad.shape[0]
    bag = (order // each).to(rows.dtype)[:, None].expand(-1, 4).reshape(-1)
    weight = corner_weights.view(-1, 4).index_select(0, order).view(-1)

    table_rows = batch * pixels * heads
    begin = torch.searchsorted(cell, _arange(table_rows + 1, rows), out_int32=rows.dtype == torch.int32)
    cell_runs = torch.stack((begin[:-1], begin.diff())).view(2, batch, pixels, heads)  # where, how long
    runs = rows.new_zeros((2, batch, pixels, heads, 4))
    start, corners = 0, 0
    for h, w in zip(shapes[::2], shapes[1::2], strict=True):
        level = slice(start, start + h * w)
        source, target = cell_runs[:, :, level].unflatten(2, (h, w)), runs[:, :, level].unflatten(2, (h, w))
        for y in range(min(h, 2)):
            for x in range(min(w, 2)):
                target[:, :, y:, x:, :, 2 * y + x] = source[:, :, : h - y, : w - x]
                corners += 1
        start += h * w
    run_begin, run_length = runs.view(2, -1)

    # slot i of the merged list takes corner k of sorted point i + (where its run begins - where it is put)
    total = corners * (cell.numel() // (len(shapes) // 2))
    put = run_length.cumsum(0, dtype=rows.dtype).sub_(run_length)
    corner = _arange(4, rows).repeat(table_rows)
    shift = (run_begin - put).mul_(4).add_(corner).repeat_interleave(run_length, output_size=total)
    taken = shift.add_(_arange(total, rows, 4))
    bag, weight = bag.index_select(0, taken), weight.index_select(0, taken)
    out = F.embedding_bag(bag, grad, put[::4].contiguous(), mode="sum", per_sample_weights=weight)
    return out.view(batch, pixels, heads, dim)


def _save_inputs(ctx, inputs, output):
    *tensors, ctx.shapes = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    return *_bag_backward(grad, *ctx.saved_tensors, ctx.shapes), None


def _backward_twice(ctx, *grads):
    raise RuntimeError(
        "ms_deform_attn with backend='embedding_bag' is differentiable once and this backward asks for a second "
        "derivative; use backend='gather'"
    )


_bag.register_autograd(_backward, setup_context=_save_inputs)
_bag_backward.register_autograd(_backward_twice)


# -------- plain operators, and the reference


def _gather(value: Tensor, spatial_shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Four corners with masks, level by level: only operators that ONNX has."""
    batch, pixels, heads, dim = value.shape
    dtype = _compute_dtype(value)
    table = value.reshape(-1, dim).to(dtype)
    item = torch.arange(batch, device=value.device).view(-1, 1, 1, 1) * pixels
    head = torch.arange(heads, device=value.device).view(-1, 1)
    out, start = table.new_zeros((batch, locations.shape[1], heads, dim)), 0
    for level, (h, w) in enumerate(spatial_shapes):
        x, y = locations[:, :, :, level].to(dtype).unbind(-1)  # (N, Q, H, P) each
        rows, columns = _neighbours(y * h - 0.5, h), _neighbours(x * w - 0.5, w)
        for row, y_weight in rows:
            for column, x_weight in columns:
                pixel = F.embedding((item + start + row * w + column) * heads + head, table)  # (N, Q, H, P, D)
                weight = weights[:, :, :, level].to(dtype) * y_weight * x_weight
                out = out + (weight[..., None] * pixel).sum(3)
        start += h * w
    return out.flatten(2).to(value.dtype)


def _neighbours(x: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """The two pixels around x on an axis, and their weights: zero for a pixel that the axis does not have."""
    x = x.clamp(-2, size + 1)  # far outside is as good as outside; infinity has no fraction
    whole = x.detach().floor()
    fraction = x - whole
    pixels = []
    for pixel, weight in ((whole, 1 - fraction), (whole + 1, fraction)):
        inside = (pixel >= 0) & (pixel <= size - 1)
        pixels.append((pixel.long().clamp(0, size - 1), weight * inside.to(weight.dtype)))
    return pixels


def _grid_sample(value: Tensor, spatial_shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """The form the papers' code has in pure Python: one `grid_sample` per level."""
    batch, _, heads, dim = value.shape
    queries, points, dtype = locations.shape[1], locations.shape[4], _compute_dtype(value)
    levels = value.to(dtype).split([h * w for h, w in spatial_shapes], dim=1)
    grid = (2 * locations.to(dtype) - 1).transpose(1, 2)  # (N, H, Q, L, P, 2)
    out = value.new_zeros((batch * heads, dim, queries), dtype=dtype)
    for level, (h, w) in enumerate(spatial_shapes):
        image = levels[level].permute(0, 2, 3, 1).reshape(batch * heads, dim, h, w)
        sampled = F.grid_sample(
            image, grid[:, :, :, level].flatten(0, 1), mode="bilinear", padding_mode="zeros", align_corners=False
        )  # (N H, D, Q, P)
        weight = weights[:, :, :, level].to(dtype).transpose(1, 2).reshape(batch * heads, 1, queries, points)
        out = out + (sampled * weight).sum(-1)
    return out.view(batch, heads * dim, queries).transpose(1, 2).to(value.dtype)
