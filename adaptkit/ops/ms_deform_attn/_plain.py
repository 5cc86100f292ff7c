"""Plain operators: the form that exports, and the form of the papers' code, which is the reference."""

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(value: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic: float32, or float64 if ``value`` is."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def gather(value: Tensor, spatial_shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Four corners with masks, level by level: only operators that ONNX has."""
    batch, pixels, heads, dim = value.shape
    dtype = compute_dtype(value)
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


def grid_sample(value: Tensor, spatial_shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """The form the papers' code has in pure Python: one `grid_sample` per level."""
    batch, _, heads, dim = value.shape
    queries, points, dtype = locations.shape[1], locations.shape[4], compute_dtype(value)
    levels = value.to(dtype).split([h * w for h, w in spatial_shapes], dim=1)
    grid = (2 * locations.to(dtype) - 1).transpose(1, 2)  # (N, H, Q, L, P, 2)
    weights = weights.masked_fill(locations.isnan().any(-1), torch.nan)  # where some devices read zeros
    out = value.new_zeros((batch * heads, dim, queries), dtype=dtype)
    for level, (h, w) in enumerate(spatial_shapes):
        image = levels[level].permute(0, 2, 3, 1).reshape(batch * heads, dim, h, w)
        sampled = F.grid_sample(
            image, grid[:, :, :, level].flatten(0, 1), mode="bilinear", padding_mode="zeros", align_corners=False
        )  # (N H, D, Q, P)
        weight = weights[:, :, :, level].to(dtype).transpose(1, 2).reshape(batch * heads, 1, queries, points)
        out = out + (sampled * weight).sum(-1)
    return out.view(batch, heads * dim, queries).transpose(1, 2).to(value.dtype)
