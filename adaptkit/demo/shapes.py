"""Abstract formula pictures: textured shapes, contours, lines and shaded solids that hide one another.

A shape is a function `shape(g, u, v, radius) -> (distance, shade)` of turned coordinates u and v about its centre,
(N, H, W) in pixels, and of its size `radius`, (N, 1, 1) in pixels: the signed distance to its outline, negative inside,
and the light on its surface.
"""

import math

import torch
from torch import Tensor

from .canvas import Canvas, choose, members
from .textures import TEXTURES, coin, edge, noise, to_grid, turn, uniform

LAYERS = 9
TEXTURE_WEIGHTS = [{"flat": 2.0, "ramp": 1.0, "julia": 0.5, "folded": 0.7}.get(name, 1.0) for name in TEXTURES]


def colour(g: torch.Generator, n: int) -> Tensor:
    """Random colours (n, 3, 1, 1), more of them dull than garish."""
    luma = uniform(g, n, 0.03, 0.97)[:, None]
    hue = torch.rand(n, 3, 1, 1, generator=g, device=g.device) - 0.5
    return (luma + hue * uniform(g, n, 0, 1)[:, None] ** 2 * 1.4).clamp(0, 1)


def fill(g: torch.Generator, u: Tensor, v: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
    """Texture ids (N,) and coordinates -> colours (N, 3, H, W) and amounts (N, H, W)."""
    amount = torch.zeros_like(u)
    for part, texture in zip(members(kinds, len(TEXTURES)), TEXTURES.values()):
        if len(part):
            amount[part] = texture(g, u[part], v[part])
    first, second = colour(g, len(u)), colour(g, len(u))
    close = coin(g, len(u), 0.4)[:, None]  # many real surfaces have one colour and little contrast
    second = torch.where(close, (first + 0.35 * (second - 0.5)).clamp(0, 1), second)
    return first + (second - first) * amount[:, None], amount


def blob(g: torch.Generator, u: Tensor, v: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """An ellipse with two harmonics on its outline."""
    n, angle = len(u), torch.atan2(v, u)
    outline = 1.0
    for _ in range(2):
        lobes = uniform(g, n, 2, 8).floor()
        outline = outline + uniform(g, n, 0, 0.2) * torch.cos(lobes * angle + uniform(g, n, 0, 6.3))
    return torch.hypot(u, v * uniform(g, n, 1, 2.5)) - radius * outline, torch.ones_like(u)


def superformula(g: torch.Generator, u: Tensor, v: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Gielis' superformula: stars, petals and rounded polygons."""
    n = len(u)
    angle = torch.atan2(v, u) * uniform(g, n, 2, 8).floor() / 4
    power, sharp = uniform(g, n, 0.4, 2.0), uniform(g, n, 0.6, 4)
    outline = (angle.cos().abs() ** sharp + angle.sin().abs() ** sharp).clamp(min=1e-3) ** (-power / sharp)
    return torch.hypot(u, v) - radius * outline.clamp(0.1, 2), torch.ones_like(u)


def polygon(g: torch.Generator, u: Tensor, v: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """A regular polygon of 3 to 7 sides, squeezed."""
    n, sides = len(u), uniform(g, len(u), 3, 8).floor()
    v = v * uniform(g, n, 1, 2)
    angle = torch.atan2(v, u)
    return torch.hypot(u, v) * torch.cos(to_grid(angle, 2 * math.pi / sides)) - radius * 0.8, torch.ones_like(u)


def slab(g: torch.Generator, u: Tensor, v: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """A rectangle with round corners."""
    n, corner = len(u), uniform(g, len(u), 0, 0.4) * radius
    a, b = u.abs() - radius + corner, v.abs() - radius * uniform(g, n, 0.2, 1) + corner
    return torch.hypot(a.clamp(min=0), b.clamp(min=0)) + torch.maximum(a, b).clamp(max=0) - corner, torch.ones_like(u)


def stroke(g: torch.Generator, u: Tensor, v: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """A bent line 1 to 8 pixels wide, right across or of limited length."""
    n = len(u)
    bend = uniform(g, n, -0.5, 0.5) / radius * u**2 * coin(g, n, 0.5)
    length = torch.where(coin(g, n, 0.4), 1e4, 2 * radius)
    return torch.maximum((v - bend).abs() - uniform(g, n, 0.5, 4), u.abs() - length), torch.ones_like(u)


def lattice(g: torch.Generator, u: Tensor, v: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """A row of bars, half of the time crossed by others, inside a frame."""
    n, period = len(u), uniform(g, len(u), 5, 24)
    across = torch.where(coin(g, n, 0.5), to_grid(v, period * uniform(g, n, 0.7, 3)), 1e4)
    bars = torch.minimum(to_grid(u, period), across) - uniform(g, n, 0.4, 1.6)
    frame = torch.maximum(u.abs() - 1.5 * radius, v.abs() - radius * uniform(g, n, 0.4, 1))
    return torch.maximum(bars, frame), torch.ones_like(u)


def ring(g: torch.Generator, u: Tensor, v: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """An elliptic ring; what lies behind shows through."""
    r = torch.hypot(u, v * uniform(g, len(u), 1, 2))
    return (r - radius).abs() - uniform(g, len(u), 0.6, 4), torch.ones_like(u)


def ball(g: torch.Generator, u: Tensor, v: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """A sphere under one lamp: Lambert's law on the normal, and some ambient light."""
    x, y = u / radius, v / radius
    z = (1 - x * x - y * y).clamp(min=0).sqrt()
    angle, height = uniform(g, len(u), 0, 6.3), uniform(g, len(u), 0.2, 0.9)
    side = (1 - height**2).sqrt()
    light = (x * angle.cos() + y * angle.sin()) * side + z * height
    return torch.hypot(u, v) - radius, 0.3 + 0.8 * light.clamp(min=0)


def column(g: torch.Generator, u: Tensor, v: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """A cylinder seen from the side."""
    x = u / (radius * uniform(g, len(u), 0.1, 0.6))
    light = (x * uniform(g, len(u), -0.8, 0.8) + 0.7 * (1 - x * x).clamp(min=0).sqrt()).clamp(min=0)
    return torch.maximum((x.abs() - 1) * radius * 0.3, v.abs() - 2 * radius), 0.3 + 0.9 * light


def cuboid(g: torch.Generator, u: Tensor, v: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """A box whose three visible faces have three shades: a hexagon cut by three edges that meet."""
    n, lean = len(u), uniform(g, len(u), 0.2, 0.6)
    corner = uniform(g, n, -0.5, 0.5) * radius
    roof = -0.4 * radius + lean * (u - corner).abs() - lean * radius * 0.3
    shade = torch.where(u < corner, uniform(g, n, 0.3, 1), uniform(g, n, 0.3, 1))
    shade = torch.where(v < roof, uniform(g, n, 0.6, 1.2), shade)
    return torch.maximum(u.abs() - radius, v.abs() - 0.9 * radius), shade


SHAPES = (blob, superformula, polygon, slab, stroke, lattice, ring, ball, column, cuboid)
SHAPE_WEIGHTS = [1.5, 0.8, 1, 1.5, 1.5, 0.8, 0.5, 0.8, 0.8, 0.8]


def backdrop(g: torch.Generator, canvas: Canvas, part: Tensor) -> None:
    """Fill canvases with one texture, and below a horizon with another one on a plane in perspective."""
    n, size = len(part), canvas.image.shape[-1]
    x, y = canvas.grid(part)
    _texture_over(g, canvas, part, torch.ones_like(x), x - size / 2, y - size / 2, 1.0, 0.0, 0)
    horizon = torch.where(coin(g, n, 0.5), uniform(g, n, 0.2, 0.8), 2.0) * size
    below = (y - horizon).clamp(min=1.0)
    far = uniform(g, n, 20, 80) * size / 6 / below
    u, v = (x - uniform(g, n, 0.2, 0.8) * size) * far / size * 2, far * uniform(g, n, 2, 6)
    _texture_over(g, canvas, part, edge(horizon - y), u, v, 1.0, ((y - horizon) / size).clamp(0, 1), 1)


def abstract(g: torch.Generator, canvas: Canvas, part: Tensor) -> None:
    """Paint abstract pictures on some canvases: a backdrop, then LAYERS shapes from back to front."""
    backdrop(g, canvas, part)
    size = canvas.image.shape[-1]
    for layer in range(LAYERS):
        for group, shape in zip(members(choose(g, len(part), SHAPE_WEIGHTS), len(SHAPES)), SHAPES):
            if not len(group):
                continue
            some, n = part[group], len(group)
            x, y = canvas.grid(some)
            u, v = turn(g, x - uniform(g, n, 0, 1) * size, y - uniform(g, n, 0, 1) * size)
            radius = size * 0.03 * (12 ** uniform(g, n, 0, 1))  # from 3 % to 36 % of the side
            distance, shade = shape(g, u, v, radius)
            wobble = noise(g, x * 0.5, y * 0.5) * uniform(g, n, 0, 3) * coin(g, n, 0.25)
            alpha = edge(distance + wobble, uniform(g, n, 0.8, 2.5))
            _texture_over(g, canvas, some, alpha, u, v, shade, 0.3 + 0.7 * layer / LAYERS, layer + 2)


def _texture_over(
    g: torch.Generator,
    canvas: Canvas,
    part: Tensor,
    alpha: Tensor,
    u: Tensor,
    v: Tensor,
    shade: Tensor | float,
    depth: Tensor | float,
    instance: int,
) -> None:
    """Paint with a random texture for each canvas; the label of a pixel is the texture's id."""
    kinds = choose(g, len(part), TEXTURE_WEIGHTS)
    colours, _ = fill(g, u, v, kinds)
    if isinstance(shade, Tensor):
        colours = (colours * shade[:, None]).clamp(0, 1)
    canvas.paint(part, alpha, colours, kinds[:, None, None], depth, instance)
