r"""Deformable attention (DAT, Xia et al., CVPR 2022, section 3): all queries share a few moved keys.

    q = x W_q
    points = reference + offset(q)                                              one set per group of channels
    x~ = sample(x, points),     k = x~ W_k,     v = x~ W_v
    z = softmax(q k^T / sqrt(d) + B(q - points)) v W_o                          (eq. 2-7)

Points are (y, x) in -1..1, top left to bottom right. Three conventions say where a cell lies in that range:

=========  ======================  =================  ========================  ===========================
name       reference of cell j     place of query i   cell index of a point p   beyond the map
=========  ======================  =================  ========================  ===========================
``v1``     (2j + 1) / n - 1        as the reference   (p + 1) / 2 * (n - 1)     zeros
``v2``     (2j + 1) / (n - 1) - 1  2i / (n - 1) - 1   (p + 1) / 2 * (n - 1)     zeros
``exact``  (2j + 1) / n - 1        as the reference   ((p + 1) n - 1) / 2       clamped; the border goes on
=========  ======================  =================  ========================  ===========================

``v1`` is the paper's code and ``v2`` that of DAT++; weights of one read elsewhere under the other. Both read up to
half a cell beside the cells when every offset is zero. ``exact``, ours, then reads the cells themselves.
"""

from __future__ import annotations

import warnings
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.core.layers import check_choice
from adaptkit.ops.grid import pair
from adaptkit.ops.sample import coordinate_dtype, sample

__all__ = ["Convention", "DeformableAttention", "Read"]

Convention = Literal["v1", "v2", "exact"]
Bias = Literal["table", "log-cpb"]
Grid = tuple[int, int]


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of a map; the authors' key is ``norm``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


# ---- where the keys are


def offset_net(channels: int, kernel: int, stride: int, convention: Convention = "v1") -> nn.Sequential:
    """Build the offset network of one group (figure 2b): (B, C, H, W) -> (B, 2, Hk, Wk), order (dy, dx)."""
    padding = _padding(kernel, stride, convention)
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel, stride, padding, groups=channels),
        ChannelNorm(channels),
        nn.GELU(),
        nn.Conv2d(channels, 2, 1, bias=False),
    )


def _padding(kernel: int, stride: int, convention: Convention) -> int:
    return 0 if kernel == stride and convention != "v1" else kernel // 2


def key_side(side: int, kernel: int, stride: int, convention: Convention = "exact") -> int:
    """Return how many keys the offset network makes of ``side`` cells; ``ValueError`` where there are none."""
    if kernel == stride and side < kernel:
        raise ValueError(f"kernel_size={kernel} and stride={stride} make no key of {side} cells; choose smaller ones")
    return (side + 2 * _padding(kernel, stride, convention) - kernel) // stride + 1


def reference_points(grid: Grid, convention: Convention, like: Tensor) -> Tensor:
    """Return the points (h, w, 2) of keys that have not moved."""
    sides = [max(n - 1, 1) if convention == "v2" else n for n in grid]
    return _lattice([(2 * _arange(n, like) + 1) / side - 1 for n, side in zip(grid, sides)])


def query_points(grid: Grid, convention: Convention, like: Tensor) -> Tensor:
    """Return where the queries are (h, w, 2), for the position bias."""
    if convention != "v2":
        return reference_points(grid, convention, like)
    return _lattice([2 * _arange(n, like) / max(n - 1, 1) - 1 for n in grid])


def _arange(n: int, like: Tensor) -> Tensor:
    return torch.arange(n, device=like.device, dtype=coordinate_dtype(like))


def _lattice(axes: list[Tensor]) -> Tensor:
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def move(offset: Tensor, reference: Tensor, factor: float | None, convention: Convention) -> Tensor:
    """Return the points (B, Hk, Wk, 2) for raw offsets (B, 2, Hk, Wk) around ``reference`` (Hk, Wk, 2).

    A ``factor`` s bounds an offset to s/2 key cells on each axis (section 3.2). Without one (None or negative) it is
    free and the point itself is kept in the map: by tanh in ``v1``, by clamping otherwise.
    """
    factor = -1.0 if factor is None else factor
    sides = [max(n - 1, 1) if convention == "v2" else n for n in reference.shape[:2]]
    offset = offset.movedim(1, -1).to(reference.dtype)
    # A factor of 0 is free and unclamped in v1, and no movement at all in v2.
    if factor > 0 or (factor == 0 and convention != "v1"):
        offset = offset.tanh() * factor / pair(sides[0], sides[1], offset)
    points = reference + offset
    if factor < 0 and convention == "v1":
        return points.tanh()
    return points.clamp(-1, 1) if factor < 0 or convention == "exact" else points


def to_cells(points: Tensor, grid: Grid, convention: Convention) -> Tensor:
    """Points (..., 2) -> places in the cells of a map ``grid``, 0 at the centre of the first cell."""
    size = pair(*grid, points)
    return ((points + 1) * size - 1) / 2 if convention == "exact" else (points + 1) / 2 * (size - 1)


def read(x: Tensor, points: Tensor, convention: Convention) -> Tensor:
    """Read ``x`` (B, C, H, W) at ``points`` (B, ..., 2) -> (B, C, n), n of them in row-major order."""
    places = to_cells(points, (x.shape[2], x.shape[3]), convention).flatten(1, -2)
    return sample(x, places, "border" if convention == "exact" else "zeros")


# ---- what their position adds to the logits


def resize_table(table: Tensor, size: Grid) -> Tensor:
    """Bicubic, corners not aligned, as the authors resize their tables: (h, H, W) -> (h, *size)."""
    if tuple(table.shape[-2:]) == tuple(size):
        return table
    resized = F.interpolate(table[None].to(coordinate_dtype(table)), size, mode="bicubic", align_corners=False)
    return resized[0].to(table.dtype)


def resized(table: Tensor, size: Grid) -> Tensor:
    """``resize_table``, and say so: for a table of another size that is being loaded."""
    if tuple(table.shape[-2:]) == tuple(size):
        return table
    old, new = ("x".join(map(str, shape)) for shape in (table.shape[-2:], size))
    warnings.warn(f"bias tables of {old} were resized to {new} (bicubic), the size of this model", stacklevel=2)
    return resize_table(table, size)


def table_bias(table: Tensor, grid: Grid, points: Tensor, convention: Convention) -> Tensor:
    """Deformable relative position bias (eq. 7), read from a table by displacement.

    table: (heads, 2h-1, 2w-1) of the query map ``grid``, or of another one: it is then resized. points: (B, g, n, 2).
    Returns (B, heads, h*w, n).
    """
    batch, groups, n, _ = points.shape
    table = resize_table(table, (2 * grid[0] - 1, 2 * grid[1] - 1))
    table = table.unflatten(0, (groups, -1)).expand(batch, -1, -1, -1, -1).flatten(0, 1)  # (B*g, h_g, 2h-1, 2w-1)
    size = pair(*grid, points)
    displacement = _displacement(grid, points, convention) / 2  # (B*g, h*w, n, 2), in -1..1
    # One cell of displacement is one cell of the table; in v1 it is (n-1)/n of one.
    places = displacement * (size if convention == "exact" else size - 1) + (size - 1)
    bias = sample(table, places.flatten(1, 2), "border" if convention == "exact" else "zeros")
    return bias.unflatten(2, (-1, n)).unflatten(0, (batch, groups)).flatten(1, 2)


def log_cpb(heads: int) -> nn.Sequential:
    """Build DAT++'s continuous position bias: displacement on a log scale -> one value per head of a group."""
    return nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, heads, bias=False))


def log_cpb_bias(net: nn.Module, grid: Grid, points: Tensor, convention: Convention) -> Tensor:
    """Position bias from a network instead of a table, shared by the groups: (B, g, n, 2) -> (B, heads, h*w, n)."""
    batch, groups = points.shape[:2]
    d = 4 * _displacement(grid, points, convention)  # -8..8
    d = d.sign() * (d.abs() + 1).log2() / 3  # log2(8) = 3
    bias = net(d.to(next(net.parameters()).dtype))  # (B*g, h*w, n, h_g)
    return bias.movedim(-1, 1).unflatten(0, (batch, groups)).flatten(1, 2)


def _displacement(grid: Grid, points: Tensor, convention: Convention) -> Tensor:
    """Query minus key: (B, g, n, 2) -> (B*g, h*w, n, 2)."""
    queries = query_points(grid, convention, points).flatten(0, 1)
    return queries[None, :, None] - points.flatten(0, 1)[:, None]


# ---- the mixer


class Keys(NamedTuple):
    """Queries, and the keys and values that they share."""

    q: Tensor  #: (B, heads, N, E)
    k: Tensor  #: (B, heads, n, E)
    v: Tensor  #: (B, heads, n, E)
    bias: Tensor | None  #: of the logits, broadcast to (B, heads, N, n)
    points: Tensor  #: (B, g, Hk, Wk, 2) where they were read


class Read(NamedTuple):
    """What one deformable attention did."""

    output: Tensor  #: (B, C, H, W)
    points: Tensor  #: (B, g, Hk, Wk, 2) where the keys were read
    reference: Tensor  #: (B, g, Hk, Wk, 2) where they would be read without offsets
    weights: Tensor | None  #: (B, heads, H*W, Hk*Wk) the attention, where asked for


class DeformableAttention(nn.Module):
    """Deformable multi-head attention; loads the tensors of the authors' ``DAttentionBaseline`` as they are.

    Args:
        dim: channels C.
        heads: None takes heads of 32 channels, or one.
        groups: sets of points; must divide ``heads``.
        size: (H, W) that the bias table is made for, or one number. Another map resizes the table.
        kernel, stride: of the offset network. The keys are a grid of H/stride x W/stride.
        offset_range_factor: s bounds an offset to s/2 key cells; negative or None leaves it free.
        bias: ``"table"``, ``"log-cpb"`` (any map, no table) or None.
        convention: ``"v1"`` (the paper), ``"v2"`` (DAT++) or ``"exact"``.

    Raises ``ValueError`` where heads do not divide the channels or groups the heads.
    """

    def __init__(
        self,
        dim: int,
        heads: int | None = None,
        groups: int = 1,
        size: int | Grid = 14,
        kernel: int = 5,
        stride: int = 1,
        offset_range_factor: float | None = 2.0,
        bias: Bias | None = "table",
        convention: Convention = "v1",
    ) -> None:
        super().__init__()
        heads = heads or (dim // 32 if dim >= 32 and dim % 32 == 0 else 1)
        check_heads(dim, heads, groups)
        check_choice("convention", convention, get_args(Convention))
        check_choice("bias", bias, (*get_args(Bias), None))
        height, width = (size, size) if isinstance(size, int) else size
        self.heads, self.groups, self.factor, self.convention = heads, groups, offset_range_factor, convention
        self.proj_q, self.proj_k, self.proj_v, self.proj_out = (nn.Conv2d(dim, dim, 1) for _ in range(4))
        self.conv_offset = offset_net(dim // groups, kernel, stride, convention)
        self.rpe_table: nn.Parameter | nn.Module | None = None
        if bias == "table":
            self.rpe_table = nn.Parameter(torch.zeros(heads, 2 * height - 1, 2 * width - 1))
            nn.init.trunc_normal_(self.rpe_table, std=0.01)
        elif bias == "log-cpb":
            self.rpe_table = log_cpb(heads // groups)
        self.register_load_state_dict_pre_hook(_fit)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        q, k, v, bias, _ = self.keys(x)
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # (B, heads, H*W, E)
        return self.proj_out(z.transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:]))

    def keys(self, x: Tensor) -> Keys:
        """Map (B, C, H, W) -> queries of all its H*W cells, and the n = Hk*Wk keys and values that were read there."""
        q = self.proj_q(x)
        points = self._points(_fold(q, self.groups))  # (B*g, Hk, Wk, 2)
        sampled = read(_fold(x, self.groups), points, self.convention)  # (B*g, C/g, n)
        sampled = sampled.unflatten(0, (-1, self.groups)).flatten(1, 2)[..., None]  # (B, C, n, 1)
        points = points.unflatten(0, (-1, self.groups))  # (B, g, Hk, Wk, 2)
        q, k, v = (self._split(t) for t in (q, self.proj_k(sampled), self.proj_v(sampled)))
        bias = self._bias((x.shape[2], x.shape[3]), points.flatten(2, 3))
        return Keys(q, k, v, None if bias is None else bias.to(q.dtype), points)

    def read(self, x: Tensor, weights: bool = False) -> Read:
        """Run ``forward`` and tell the points; with ``weights`` also the attention, which is then materialised."""
        q, k, _, bias, points = self.keys(x)
        reference = reference_points((points.shape[2], points.shape[3]), self.convention, points)
        attention = attention_weights(q, k, bias) if weights else None
        return Read(self(x), points, reference.expand_as(points), attention)

    def _points(self, q: Tensor) -> Tensor:
        """Queries of a group (B*g, C/g, H, W) -> where its keys are read (B*g, Hk, Wk, 2)."""
        offset = self.conv_offset(q)  # (B*g, 2, Hk, Wk)
        reference = reference_points((offset.shape[2], offset.shape[3]), self.convention, offset)
        return move(offset, reference, self.factor, self.convention)

    def _bias(self, grid: Grid, points: Tensor) -> Tensor | None:
        """B for points (B, g, n, 2): (B, heads, H*W, n)."""
        if self.rpe_table is None:
            return None
        if isinstance(self.rpe_table, nn.Module):
            return log_cpb_bias(self.rpe_table, grid, points, self.convention)
        return table_bias(self.rpe_table, grid, points, self.convention)

    def _split(self, x: Tensor) -> Tensor:
        """(B, C, ., .) -> (B, heads, n, C/heads)."""
        return x.flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3)


def _fit(module: DeformableAttention, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Before loading: resize the table of another map."""
    key = prefix + "rpe_table"
    if isinstance(module.rpe_table, nn.Parameter) and key in state_dict:
        state_dict[key] = resized(state_dict[key], (module.rpe_table.shape[1], module.rpe_table.shape[2]))


def _fold(x: Tensor, groups: int) -> Tensor:
    """(B, C, H, W) -> (B*g, C/g, H, W)."""
    return x.unflatten(1, (groups, -1)).flatten(0, 1)


def attention_weights(q: Tensor, k: Tensor, bias: Tensor | None, scale: float | None = None) -> Tensor:
    """softmax(q k^T * scale + bias), as ``scaled_dot_product_attention`` has it inside: (B, heads, Q, K)."""
    logits = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (logits if bias is None else logits + bias).softmax(-1)


def check_heads(dim: int, heads: int, groups: int) -> None:
    """Raise ``ValueError`` where channels, heads and groups do not nest."""
    if dim % heads:
        raise ValueError(f"heads={heads} does not divide dim={dim}; choose a divisor of {dim}")
    if groups < 1 or heads % groups:
        raise ValueError(f"groups={groups} does not divide heads={heads}; choose a divisor of {heads}")
