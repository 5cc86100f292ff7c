"""Texture formulas, in batches: coordinates in, a grey value per pixel out.

Every texture is a function `texture(g, u, v) -> amount` of coordinates u and v, (N, H, W) in pixels (or in whatever
unit a perspective plane gives them), and of a `torch.Generator` g that draws the parameters of each of the N textures.
The amount, (N, H, W) in [0, 1], is how much of the second colour is mixed into the first.
"""

import math

import torch
from torch import Tensor

TILE = 128  # side of a periodic noise tile in samples


def uniform(g: torch.Generator, n: int, low: float, high: float) -> Tensor:
    """One uniform number for each of n images, (n, 1, 1)."""
    return torch.rand(n, 1, 1, generator=g, device=g.device) * (high - low) + low


def coin(g: torch.Generator, n: int, probability: float) -> Tensor:
    """One biased coin for each of n images, (n, 1, 1) bool."""
    return torch.rand(n, 1, 1, generator=g, device=g.device) < probability


def turn(g: torch.Generator, u: Tensor, v: Tensor, spread: float = math.pi) -> tuple[Tensor, Tensor]:
    """Turn coordinates by a random angle in [-spread, spread] radians."""
    angle = uniform(g, len(u), -spread, spread)
    return u * angle.cos() + v * angle.sin(), v * angle.cos() - u * angle.sin()


def to_grid(u: Tensor, period: Tensor | float) -> Tensor:
    """Distance to the nearest multiple of the period."""
    return (u - period * (u / period).round()).abs()


def edge(distance: Tensor, softness: Tensor | float = 1.0) -> Tensor:
    """Signed distance, negative inside -> coverage in [0, 1]; the softness is the width of the slope."""
    return (0.5 - distance / softness).clamp(0, 1)


def noise(g: torch.Generator, u: Tensor, v: Tensor, low: float = 0.8, high: float = 1.6) -> Tensor:
    """1/f^beta noise with unit variance, beta drawn from [low, high]: looked up in a periodic tile made by FFT."""
    n = len(u)
    frequency = torch.hypot(
        torch.fft.fftfreq(TILE, device=u.device)[:, None], torch.fft.rfftfreq(TILE, device=u.device)[None]
    )
    frequency[0, 0] = math.inf  # no mean
    white = torch.randn(n, TILE, TILE, generator=g, device=u.device)
    tile = torch.fft.irfft2(torch.fft.rfft2(white) / frequency ** uniform(g, n, low, high), s=(TILE, TILE))
    tile = tile / tile.std((1, 2), keepdim=True)
    return look_up(tile, u, v)


def look_up(tile: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Bilinear look-up of periodic tiles (N, T, T) at coordinates (N, H, W) in samples."""
    size = tile.shape[-1]
    tile = torch.nn.functional.pad(tile[:, None], (0, 1, 0, 1), mode="circular")  # the seam: sample T is sample 0
    where = torch.stack((u, v), -1).remainder(size) * (2 / size) - 1
    return torch.nn.functional.grid_sample(tile, where, align_corners=True)[:, 0]


def at(table: Tensor, index: Tensor) -> Tensor:
    """Read tables (N, T) at integer indices (N, H, W), modulo T: a random number for each cell of a pattern."""
    n, size = table.shape
    return table.gather(1, index.long().remainder(size).reshape(n, -1)).reshape(index.shape)


def flat(g: torch.Generator, u: Tensor, v: Tensor) -> Tensor:
    """One colour."""
    return torch.zeros_like(u)


def ramp(g: torch.Generator, u: Tensor, v: Tensor) -> Tensor:
    """A straight gradient."""
    u, _ = turn(g, u, v)
    return (0.5 + u / uniform(g, len(u), 60, 300)).clamp(0, 1)


def grain(g: torch.Generator, u: Tensor, v: Tensor) -> Tensor:
    """1/f noise: plaster, asphalt, clouds, gravel."""
    scale = uniform(g, len(u), 0.3, 1.5)
    return (0.5 + 0.25 * noise(g, u * scale, v * scale, 0.4, 1.8)).clamp(0, 1)


def foliage(g: torch.Generator, u: Tensor, v: Tensor) -> Tensor:
    """Leaves: fine noise, lit and darkened in clumps by coarse noise."""
    n, scale = len(u), uniform(g, len(u), 0.5, 1.6)
    clumps = noise(g, u * scale * 0.4, v * scale * 0.4, 1.0, 1.6)
    leaves = noise(g, u * scale, v * scale, 0.2, 0.9)
    return (0.4 + 0.18 * clumps + uniform(g, n, 0.15, 0.35) * leaves).clamp(0, 1)


def marble(g: torch.Generator, u: Tensor, v: Tensor) -> Tensor:
    """A grating bent by noise: marble, wood, water."""
    u, v = turn(g, u, v)
    bend = uniform(g, len(u), 0.5, 3) * noise(g, u * 0.5, v * 0.5, 1.2, 2.0)
    return 0.5 + 0.5 * torch.sin(u * (2 * math.pi / uniform(g, len(u), 8, 40)) + bend)


def stripes(g: torch.Generator, u: Tensor, v: Tensor) -> Tensor:
    """A grating, from a sine to hard stripes."""
    u, v = turn(g, u, v)
    wave = torch.sin(u * (2 * math.pi / uniform(g, len(u), 4, 24)))
    return 0.5 + 0.5 * torch.tanh(uniform(g, len(u), 0.8, 6) * (wave + uniform(g, len(u), -0.7, 0.7)))


def checks(g: torch.Generator, u: Tensor, v: Tensor) -> Tensor:
    """A chessboard, or with half of the weight a tartan."""
    u, v = turn(g, u, v)
    period = uniform(g, len(u), 6, 30)
    a = torch.tanh(4 * torch.sin(u * (2 * math.pi / period)))
    b = torch.tanh(4 * torch.sin(v * (2 * math.pi / (period * uniform(g, len(u), 0.6, 1.6)))))
    return torch.where(coin(g, len(u), 0.5), 0.5 + 0.5 * a * b, 0.5 + 0.25 * (a + b))


def dots(g: torch.Generator, u: Tensor, v: Tensor) -> Tensor:
    """Discs on a grid."""
    u, v = turn(g, u, v)
    period = uniform(g, len(u), 6, 24)
    r = torch.hypot(to_grid(u, period), to_grid(v, period))
    return edge(r - period * uniform(g, len(u), 0.15, 0.42))


def bricks(g: torch.Generator, u: Tensor, v: Tensor) -> Tensor:
    """Rows of bricks or tiles with joints, each brick in its own shade."""
    u, v = turn(g, u, v, 0.4)
    n, height = len(u), uniform(g, len(u), 5, 20)
    width = height * uniform(g, n, 0.9, 3)
    row = (v / height).round()
    u = u + 0.5 * width * row.remainder(2) * coin(g, n, 0.7)
    inside = torch.minimum(height / 2 - to_grid(v, height), width / 2 - to_grid(u, width))
    joint = edge(inside - uniform(g, n, 0.4, 1.3))
    shade = at(torch.rand(n, 997, generator=g, device=u.device), (u / width).round() * 31 + row * 17)
    return (0.3 * shade + 0.7 * joint).clamp(0, 1)


def windows(g: torch.Generator, u: Tensor, v: Tensor) -> Tensor:
    """A regular grid of rectangles, as a facade has it; some panes are lit."""
    n, period = len(u), uniform(g, len(u), 8, 36)
    height = period * uniform(g, n, 0.8, 1.8)
    pane_u = to_grid(u, period) - period * uniform(g, n, 0.18, 0.4)
    pane_v = to_grid(v, height) - height * uniform(g, n, 0.18, 0.4)
    shade = at(torch.rand(n, 997, generator=g, device=u.device), (u / period).round() * 31 + (v / height).round() * 17)
    return edge(torch.maximum(pane_u, pane_v)) * (0.6 + 0.4 * shade)


def cells(g: torch.Generator, u: Tensor, v: Tensor) -> Tensor:
    """Voronoi cells around jittered grid points, as distances (pebbles) or as flat cells."""
    n, pitch = len(u), uniform(g, len(u), 6, 24)
    u, v = u / pitch, v / pitch
    i, j = u.floor(), v.floor()
    tables = torch.rand(3, n, 997, generator=g, device=u.device)
    nearest, tone = torch.full_like(u, 9.0), torch.zeros_like(u)
    for di in (-1, 0, 1):
        for dj in (-1, 0, 1):
            key = (i + di) * 31 + (j + dj) * 17
            distance = torch.hypot(u - i - di - at(tables[0], key), v - j - dj - at(tables[1], key))
            tone = torch.where(distance < nearest, at(tables[2], key), tone)
            nearest = torch.minimum(nearest, distance)
    return torch.where(coin(g, n, 0.5), tone, (1 - nearest).clamp(0, 1))


def julia(g: torch.Generator, u: Tensor, v: Tensor) -> Tensor:
    """Escape time of z -> z^2 + c with c near the edge of the Mandelbrot set."""
    u, v = turn(g, u, v)
    n, angle = len(u), uniform(g, len(u), 0, 2 * math.pi)
    a = 0.5 * angle.cos() - 0.25 * (2 * angle).cos()  # the main cardioid
    b = 0.5 * angle.sin() - 0.25 * (2 * angle).sin()
    zoom, push = uniform(g, n, 60, 200), uniform(g, n, 1.0, 1.12)
    x, y, count = u / zoom, v / zoom, torch.zeros_like(u)
    for _ in range(16):
        x, y = (x * x - y * y + push * a).clamp(-9, 9), (2 * x * y + push * b).clamp(-9, 9)
        count = count + (x * x + y * y < 4)
    return count / 16


def folded(g: torch.Generator, u: Tensor, v: Tensor) -> Tensor:
    """An iterated function system, run backwards: fold, turn, scale, and ask how far the point lies from a line."""
    n, zoom = len(u), uniform(g, len(u), 80, 250)
    x, y = u / zoom, v / zoom
    angle, scale = uniform(g, n, 0.2, 1.4), uniform(g, n, 1.4, 2.0)
    shift = uniform(g, n, 0.2, 0.8)
    for _ in range(6):
        x, y = x.abs() - shift, y.abs() - 0.5 * shift
        x, y = scale * (x * angle.cos() - y * angle.sin()), scale * (x * angle.sin() + y * angle.cos())
    return torch.exp(-x.abs() * uniform(g, n, 0.5, 2))


TEXTURES = {
    texture.__name__: texture
    for texture in (
        flat, ramp, grain, foliage, marble, stripes, checks, dots, bricks, windows, cells, julia, folded
    )
}  # fmt: skip
