r"""Multi-scale deformable attention.

Every head of every query reads P points in each of L feature levels and adds them up by weight:

    out[n, q, h] = sum_{l, p}  A[n, q, h, l, p] * V_l[n, h](x, y),      x = loc_x W_l - 1/2,  y = loc_y H_l - 1/2

where V_l(x, y) is the bilinear value between the four pixels around (x, y), and zero outside the level.
Let b = clamp(floor(x), 0, W - 2) be the *cell* of a point, r = x - b, and t(r) = max(0, 1 - |r|) the hat. Then

    V(x) = t(r) V[b] + t(r - 1) V[b + 1]

for every real x, zero padding included: both pixels exist always, and both hats vanish for a point outside. (A level
one pixel wide has no second pixel; there its hat is zero.) So the operator is a sum of 4 L P weighted rows of the value
table, which is what `embedding_bag` computes. Its derivatives are the dot products of an output gradient with those
same rows (a sampled dense-dense product, SDDMM), and the transposed bag: for each pixel, the weighted sum of the output
gradients that read it.

Source: Deformable DETR (Zhu et al., ICLR 2021), eq. 2-3; ViT-Adapter (Chen et al., ICLR 2023) uses it in its injectors
and extractors.
"""

from collections.abc import Sequence

from torch import Tensor

from adaptkit.ops.ms_deform_attn._backends import choose, set_backend, use_backend
from adaptkit.ops.ms_deform_attn._operator import operator
from adaptkit.ops.ms_deform_attn._plain import gather, grid_sample

__all__ = ["ms_deform_attn", "set_backend", "use_backend"]


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
        backend: "c" (CPU, compiled on first use), "triton" (CUDA) and "embedding_bag" (both) are the fast ones; their
            second derivatives are those of "gather", which is made of plain operators that export and transform.
            "grid_sample" is the reference form, for every device, differentiable once. "auto" takes "gather" under
            `torch.export`, `torch.func` and forward-mode differentiation; then what `set_backend`, `use_backend` or the
            environment variable ADAPTKIT_OPS say; then "c" on CPU, "triton" on CUDA (unless torch was asked for
            deterministic algorithms), "embedding_bag" where these cannot run ("grid_sample" if the call is tiny), and
            "grid_sample" on other devices.

    Returns:
        (N, Q, H * D) in the dtype of `value`. The arithmetic is float32, or float64 if `value` is.

    Raises:
        ValueError: if the shapes do not fit together, or the backend is unknown.
        RuntimeError: if a backend that was asked for by name cannot run here; the text says why.

    At whole coordinates, where bilinear interpolation has a kink, all backends take the derivative to the right. All
    but "triton" give the same bits each time, "c" with any number of threads.
    """
    locations, weights = _checked(value, spatial_shapes, sampling_locations, attention_weights)
    backend = choose(backend, value, weights)
    if backend == "gather":
        return gather(value, spatial_shapes, locations, weights)
    if backend == "grid_sample":
        return grid_sample(value, spatial_shapes, locations, weights)
    return operator(value, locations, weights, [side for shape in spatial_shapes for side in shape], backend)


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
