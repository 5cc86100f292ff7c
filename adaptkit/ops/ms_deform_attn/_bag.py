"""The portable backend: cells and hats by plain operators, rows by `embedding_bag`, its transpose and an SDDMM."""

import warnings
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.ops.ms_deform_attn._plain import compute_dtype

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


def forward(value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int]) -> Tensor:
    """(N, Q, H * D), in the dtype of ``value``."""
    batch, pixels, heads, dim = value.shape
    queries, dtype = locations.shape[1], compute_dtype(value)
    cells = _find_cells(locations, shapes, pixels, dtype)
    bags = batch * queries * heads
    out = F.embedding_bag(
        cells.rows.view(bags, -1),
        value.reshape(-1, dim).to(dtype),
        mode="sum",
        per_sample_weights=_corner_weights(cells.hats(), weights).view(bags, -1),
    )
    return out.view(batch, queries, heads * dim).to(value.dtype)


def backward(
    grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``value``, ``locations`` and ``weights``."""
    dim, dtype = value.shape[3], compute_dtype(value)
    cells = _find_cells(locations, shapes, value.shape[1], dtype)
    grad = grad.reshape(-1, dim).to(dtype)  # (bags, D), a bag = one head of one query
    grad_points = _grad_points(cells, grad, value.reshape(-1, dim).to(dtype), locations, weights)
    grad_value = _transposed_bag(cells, weights, grad, value.shape, shapes)
    return grad_value.to(value.dtype), *grad_points


def _grad_points(
    cells: Cells, grad: Tensor, table: Tensor, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of ``locations`` and ``weights``."""
    grad_locations = torch.empty_like(locations, memory_format=torch.contiguous_format)
    grad_weights = torch.empty_like(weights, memory_format=torch.contiguous_format)
    # dots[k] = <grad of the bag, pixel at corner k>; interpolated along x, then along y: the derivative of a weight.
    dots = _corner_dots(cells.rows, grad, table).unflatten(-1, (2, 2)).movedim((-2, -1), (0, 1))
    (x_hats, y_hats), (x_slopes, y_slopes) = cells.hats(), cells.slopes()
    along_x = _dot(dots.unbind(1), x_hats)  # (2 rows, N, Q, H, L, P)
    grad_weights.copy_(_dot(along_x, y_hats))
    grad_x = _dot(_dot(dots.unbind(1), x_slopes), y_hats)
    grad_y = _dot(along_x, y_slopes)
    torch.mul(grad_x.mul_(weights), cells.size[0], out=grad_locations[..., 0])
    torch.mul(grad_y.mul_(weights), cells.size[1], out=grad_locations[..., 1])
    return grad_locations, grad_weights


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


def _transposed_bag(cells: Cells, weights: Tensor, grad: Tensor, value_shape, shapes: list[int]) -> Tensor:
    """(N, S, H, D) for each pixel, the weighted sum of the gradients of the bags that have read it.

    The points are sorted by cell. A pixel is then read by four runs of them: those of the cell that begins at it, and
    of the cells that begin one pixel to the left, above, and both. Laid end to end, pixel by pixel, the runs are bags.
    No atomics: the order of every sum is fixed, so the result is the same bits each time.
    """
    cell, bag, weight = _sort_by_cell(cells, weights, grad.shape[0])
    taken, put = _merge_runs(cell, value_shape, shapes)
    bag, weight = bag.index_select(0, taken), weight.index_select(0, taken)
    del taken
    return F.embedding_bag(bag, grad, put, mode="sum", per_sample_weights=weight).view(value_shape)


def _sort_by_cell(cells: Cells, weights: Tensor, bags: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the points sorted by cell: the first row of the cell, and for each corner the bag and the weight, flat."""
    cell, order = cells.rows.view(-1, 4)[:, 0].contiguous().sort(stable=True)
    bag = (order // (cell.numel() // bags)).to(cell.dtype)[:, None].expand(-1, 4).reshape(-1)
    weight = _corner_weights(cells.hats(), weights).view(-1, 4).index_select(0, order).view(-1)
    return cell, bag, weight


def _merge_runs(cell: Tensor, value_shape, shapes: list[int]) -> tuple[Tensor, Tensor]:
    """For each row of the table, one after another, the corners that read it; and where those of a row begin.

    A corner is a number into the corners of the sorted points, 4 * point + (0 to 3).
    """
    batch, pixels, heads, _ = value_shape
    table_rows = batch * pixels * heads
    begin = torch.searchsorted(cell, _arange(table_rows + 1, cell), out_int32=cell.dtype == torch.int32)
    cell_runs = torch.stack((begin[:-1], begin.diff())).view(2, batch, pixels, heads)  # where, how long
    runs = cell.new_zeros((2, batch, pixels, heads, 4))
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
    put = run_length.cumsum(0, dtype=cell.dtype).sub_(run_length)
    corner = _arange(4, cell).repeat(table_rows)
    shift = (run_begin - put).mul_(4).add_(corner).repeat_interleave(run_length, output_size=total)
    return shift.add_(_arange(total, cell, 4)), put[::4].contiguous()
