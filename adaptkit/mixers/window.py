"""Local attention in windows, as Swin (Liu et al., ICCV 2021) and the first two stages of DAT have it.

    z = softmax(q k^T / sqrt(d) + B + mask) v W_o      inside every window of w x w cells, B by relative position

A shifted one moves the map by s cells to the top left before, and back after; the mask keeps cells apart that only
the shift has brought together. A map that is no multiple of the window is padded, and padding is nobody's key.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.mixers.dat import check_heads, resized
from adaptkit.ops.grid import cells, pad_to_multiple

__all__ = ["ShiftedWindowAttention"]

APART = -100.0  # added to the logits, as in the official code


class ShiftedWindowAttention(nn.Module):
    """Window attention on maps; loads the tensors of DAT's ``LocalAttention`` and ``ShiftWindowAttention``.

    Args:
        dim: channels C.
        heads: attention heads.
        window: side of a window, in cells.
        shift: cells to shift by; 0 does not.
        size: (H, W) of the usual map, whose mask is kept; another map makes its own.
    """

    relative_position_index: Tensor
    attn_mask: Tensor

    def __init__(self, dim: int, heads: int, window: int = 7, shift: int = 0, size: tuple[int, int] = (7, 7)) -> None:
        super().__init__()
        check_heads(dim, heads, 1)
        if not 0 <= shift < max(window, 1):
            raise ValueError(f"shift={shift} is not inside a window of {window} cells; choose 0..{window - 1}")
        self.heads, self.window, self.shift, self.size = heads, window, shift, tuple(size)
        self.proj_qkv = nn.Linear(dim, 3 * dim)
        self.proj_out = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.01)
        # Both follow from the shapes; they are buffers so that our state dict is the authors'.
        self.register_buffer("relative_position_index", _relative_position_index(window))
        if shift:
            self.register_buffer("attn_mask", _mask(size, window, shift))
        self.register_load_state_dict_pre_hook(_fit)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        (height, width), w, s = x.shape[2:], self.window, self.shift
        padded = pad_to_multiple(x, w)
        if s:
            padded = padded.roll((-s, -s), (2, 3))
        windows = padded.unflatten(2, (-1, w)).unflatten(4, (-1, w))  # (B, C, rows, w, columns, w)
        rows, columns = windows.shape[2], windows.shape[4]
        tokens = windows.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)  # (B*windows, w*w, C)
        q, k, v = self.proj_qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias(x, q))
        z = self.proj_out(z.transpose(1, 2).flatten(2)).unflatten(1, (w, w)).unflatten(0, (-1, rows, columns))
        z = z.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, H', W')
        if s:
            z = z.roll((s, s), (2, 3))
        return z[:, :, :height, :width]

    def bias(self, x: Tensor, q: Tensor) -> Tensor:
        """Relative position and mask: (1, heads, w*w, w*w), or (B*windows, heads, w*w, w*w) where there is a mask.

        ``x`` is the map (B, C, H, W), ``q`` its queries (B*windows, heads, w*w, E).
        """
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        bias = bias.T.unflatten(1, self.relative_position_index.shape)[None]
        size = (x.shape[2], x.shape[3])
        if not self.shift and not any(n % self.window for n in size):
            return bias.to(q.dtype)
        windows = cells(size[0], self.window) * cells(size[1], self.window)
        kept = self.shift and size == self.size
        mask = self.attn_mask if kept else _mask(size, self.window, self.shift, q.device)
        return (bias + mask[:, None].to(bias.dtype)).repeat(q.shape[0] // windows, 1, 1, 1).to(q.dtype)


def _relative_position_index(window: int) -> Tensor:
    """Which row of the table a pair of cells reads: (w*w, w*w)."""
    cells = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij"), -1).flatten(0, 1)
    dy, dx = (cells[:, None] - cells[None] + window - 1).unbind(-1)
    return dy * (2 * window - 1) + dx


def _mask(size: tuple[int, int], window: int, shift: int, device: torch.device | None = None) -> Tensor:
    """0 where two cells of a window belong together, else -100, -inf to padding: (windows, w*w, w*w)."""
    height, width = (cells(n, window) * window for n in size)
    # Three bands per axis after the shift: never wrapped, the last window's own part, and its wrapped part.
    bands = []
    for side, real in zip((height, width), size):
        i = torch.arange(side, device=device)
        band = (i >= side - window).long() + (i >= side - shift).long() if shift else torch.zeros_like(i)
        padding = (i >= real).roll(-shift)
        bands.append(torch.where(padding, 3, band))
    y, x = torch.meshgrid(*bands, indexing="ij")
    region = torch.where((y == 3) | (x == 3), 9, 3 * y + x)  # all padding is one region
    region = region.unflatten(0, (-1, window)).unflatten(2, (-1, window)).transpose(1, 2).flatten(2).flatten(0, 1)
    apart = (region[:, :, None] != region[:, None]).float() * APART
    padding = region == 9
    return apart.masked_fill(padding[:, :, None] != padding[:, None], -torch.inf)


def _fit(module: ShiftedWindowAttention, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Before loading: resize the table of another window, and keep our own buffers, which follow from the shapes."""
    for name, buffer in module.named_buffers():
        if prefix + name in state_dict:
            state_dict[prefix + name] = buffer
    key, rows = prefix + "relative_position_bias_table", 2 * module.window - 1
    if key in state_dict and len(state_dict[key]) != rows**2:
        side = math.isqrt(len(state_dict[key]))
        table = state_dict[key].T.unflatten(1, (side, side))
        state_dict[key] = resized(table, (rows, rows)).flatten(1).T
