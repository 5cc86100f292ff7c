"""Streets by formula: a pinhole camera over a ground plane, walls in perspective, and things that stand on the ground.

With the horizon in row h, the vanishing point in column c, focal length f in pixels and the camera at height k metres,
a point X metres to the right, Y above the ground and Z ahead is seen at

    x = c + f X / Z        y = h + f (k - Y) / Z

so that the ground below the horizon lies at Z = f k / (y - h), and a wall along the street at X = w lies at
Z = f w / (x - c). Everything else is an upright cut-out at one Z. Sizes are in metres. No picture was used for
any of it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .canvas import Canvas, choose, members
from .textures import at, coin, edge, foliage, grain, look_up, noise, to_grid, uniform
from .things import FACADE, FENCE, PAVEMENT, ROAD, SKY, THINGS, TREE, Cut, near

STANDING = 20  # things that stand in one street


class Camera(NamedTuple):
    """One pinhole camera per canvas; each field (N, 1, 1)."""

    f: Tensor
    horizon: Tensor
    centre: Tensor
    height: Tensor


def nearness(z: Tensor) -> Tensor:
    """Distance in metres -> label in [0, 1], logarithmic from 200 m (0) to 2 m (1)."""
    return (1 - (z / 2).clamp(1, 100).log() / 4.605).clamp(0, 1)


def street(g: torch.Generator, canvas: Canvas, part: Tensor) -> None:
    """Paint streets on some canvases."""
    n, size = len(part), canvas.image.shape[-1]
    camera = Camera(
        f=uniform(g, n, 0.6, 1.5) * size,
        horizon=uniform(g, n, 0.3, 0.65) * size,
        centre=uniform(g, n, 0.2, 0.8) * size,
        height=uniform(g, n, 1.1, 2.2),
    )
    x, y = canvas.grid(part)
    _sky(g, canvas, part, x, y)
    left, right = uniform(g, n, 1.5, 6), uniform(g, n, 1.5, 6)  # half-widths of the road
    kerb = uniform(g, n, 1, 6) * coin(g, n, 0.9)
    _ground(g, canvas, part, camera, left, right, kerb)
    for sign, width, order in ((-1, left, 2), (1, right, 3)):
        _walls(g, canvas, part, camera, sign, width + kerb + 0.3, order)
    _standing(g, canvas, part, camera, left, right)


def _sky(g: torch.Generator, canvas: Canvas, part: Tensor, x: Tensor, y: Tensor) -> None:
    """A vertical gradient from blue, grey or white to a paler horizon, with clouds."""
    n, size = len(part), x.shape[-1]
    high = torch.where(coin(g, n, 0.5)[:, None], near(g, n, (0.35, 0.5, 0.8), 0.4), near(g, n, (0.7, 0.72, 0.75), 0.4))
    low = high + (near(g, n, (0.85, 0.86, 0.88), 0.2) - high) * uniform(g, n, 0, 1)[:, None]
    sky = high + (low - high) * (y / size * 1.5).clamp(0, 1)[:, None]
    clouds = noise(g, x * uniform(g, n, 0.1, 0.5), y * uniform(g, n, 0.2, 1), 1.3, 2.0)
    sky = sky + (uniform(g, n, 0, 0.12) * clouds)[:, None]
    canvas.paint(part, torch.ones_like(x), sky.clamp(0, 1), SKY, 0.0, 0)


def _ground(
    g: torch.Generator, canvas: Canvas, part: Tensor, camera: Camera, left: Tensor, right: Tensor, kerb: Tensor
) -> None:
    """Road with lane marks, pavement with slabs, and grass or more pavement beyond."""
    n = len(part)
    x, y = canvas.grid(part)
    z = camera.f * camera.height / (y - camera.horizon).clamp(min=0.3)
    across = (x - camera.centre) * z / camera.f
    pixels = camera.f / z  # per metre: what is finer than a pixel must fade, or it would alias
    below = edge(camera.horizon - y)
    fine, coarse = (look_up(_tile(g, n), across * k, z * k) for k in (12.0, 1.5))
    rough = (0.04 * fine * (pixels / 30).clamp(0, 1) + 0.05 * coarse)[:, None] * uniform(g, n, 0.3, 1.5)[:, None]

    grass = near(g, n, (0.3, 0.4, 0.15), 0.5) * (0.8 + 0.5 * foliage(g, across * 25, z * 25))[:, None]
    canvas.paint(part, below, grass.clamp(0, 1), TREE, nearness(z), 1)
    slab = uniform(g, n, 0.4, 2.5)
    joints = edge((torch.minimum(to_grid(across, slab), to_grid(z, slab)) - 0.03) * pixels)
    joints = joints * (slab * pixels / 8).clamp(0, 1)
    paving = near(g, n, (0.5, 0.48, 0.45), 0.5) * (1 - 0.3 * joints * coin(g, n, 0.6))[:, None] + rough
    beyond = torch.where(coin(g, n, 0.6), 1e4, 0.0)
    walk = edge(torch.maximum(-across - left - kerb, across - right - kerb) * pixels - beyond)
    canvas.paint(part, below * walk, paving.clamp(0, 1), PAVEMENT, nearness(z), 1)

    asphalt = near(g, n, (0.35, 0.35, 0.37), 0.6) + rough
    on_road = torch.maximum(-across - left, across - right)
    lane, dash = uniform(g, n, 2.4, 4), uniform(g, n, 2, 8)
    marks = torch.maximum(to_grid(across - uniform(g, n, -2, 2), lane) - 0.08, dash * 0.25 - to_grid(z, dash))
    edges = (on_road + 0.3).abs() - uniform(g, n, 0.05, 0.12)
    paint = edge(marks * pixels) * coin(g, n, 0.5) + edge(edges * pixels) * coin(g, n, 0.4)
    white = near(g, n, (0.85, 0.85, 0.75), 0.2)
    asphalt = asphalt + (white - asphalt) * (paint.clamp(0, 1) * (pixels * 0.16).clamp(0, 1))[:, None]
    canvas.paint(part, below * edge(on_road * pixels), asphalt.clamp(0, 1), ROAD, nearness(z), 1)
    stone = below * edge(((on_road - 0.1).abs() - 0.1) * pixels) * coin(g, n, 0.6) * (pixels * 0.2).clamp(0, 1)
    canvas.paint(part, 0.99 * stone, near(g, n, (0.6, 0.6, 0.57), 0.3), PAVEMENT, nearness(z), 1)
    shadow = edge(-(coarse + uniform(g, n, -2.0, 0.0)), 0.5) * below * uniform(g, n, 0, 0.5) * coin(g, n, 0.6)
    canvas.image[part] *= (1 - shadow)[:, None]


def _tile(g: torch.Generator, n: int) -> Tensor:
    """Periodic noise tiles (n, 64, 64)."""
    steps = torch.arange(64.0, device=g.device)
    return noise(g, steps.expand(n, 64, 64) * 2, steps[:, None].expand(n, 64, 64) * 2, 0.3, 0.9)


def _walls(
    g: torch.Generator, canvas: Canvas, part: Tensor, camera: Camera, sign: int, width: Tensor, order: int
) -> None:
    """A row of facades, hedges and gaps along one side, and in front of some of them a fence."""
    n = len(part)
    x, y = canvas.grid(part)
    aside = (sign * (x - camera.centre)).clamp(min=0.5)
    z = (camera.f * width / aside).clamp(max=400)
    up = camera.height - (y - camera.horizon) * z / camera.f  # metres above the ground
    along = z + uniform(g, n, 0, 100)
    house = (along / uniform(g, n, 6, 25)).floor()
    kind, light = torch.rand(n, 61, generator=g, device=g.device), uniform(g, n, 0.45, 1.1)
    tall = at(torch.rand(n, 61, generator=g, device=g.device), house) * uniform(g, n, 0, 14) + uniform(g, n, 3, 9)
    gap, hedge = at(kind, house) < uniform(g, n, 0, 0.25), at(kind, house) > 1 - uniform(g, n, 0, 0.4)
    side = edge(0.5 - sign * (x - camera.centre))
    inside = side * edge(torch.maximum(up - tall, -up) * camera.f / z)

    colours = _facade(g, along, up, house, camera.f / z, aside / width) * light[:, None]
    canvas.paint(part, inside * ~(gap | hedge), colours.clamp(0, 1), FACADE, nearness(z), order)
    leaves = foliage(g, along * 12, up * 12)
    ragged = up - tall * 0.6 - 0.8 * look_up(_tile(g, n), along * 3, up * 3)
    green = near(g, n, (0.25, 0.35, 0.15), 0.6) * (0.3 + 1.2 * leaves)[:, None] * light[:, None]
    alpha = side * edge(torch.maximum(ragged, -up) * camera.f / z, 2.0) * hedge
    canvas.paint(part, alpha, green.clamp(0, 1), TREE, nearness(z), order)

    period, top, rail = uniform(g, n, 0.15, 0.6), uniform(g, n, 0.8, 2), uniform(g, n, 0.02, 0.06)
    pixels = camera.f / z
    bars = torch.minimum(to_grid(along, period) * z / width, torch.minimum(up - top, -0.2 + up).abs()) - rail
    bars = torch.where(coin(g, n, 0.3), -1.0, bars)  # a low wall
    alpha = side * edge(torch.maximum(bars, torch.maximum(up - top, -up)) * pixels) * coin(g, n, 0.3)
    canvas.paint(part, alpha, near(g, n, (0.35, 0.33, 0.3), 0.8), FENCE, nearness(z), order + 2)


def _facade(
    g: torch.Generator, along: Tensor, up: Tensor, house: Tensor, pixels: Tensor, foreshortened: Tensor
) -> Tensor:
    """Colours (N, 3, H, W) of house fronts: a wall tone per house, window grids, cornices and a ground floor."""
    n = len(along)
    tone = at(torch.rand(n, 61, generator=g, device=g.device), house)[:, None]
    first, second = near(g, n, (0.55, 0.48, 0.4), 0.6), near(g, n, (0.5, 0.4, 0.33), 0.7)
    wall = first + (second - first) * tone + 0.1 * (grain(g, along * 10, up * 10) - 0.5)[:, None]
    wide, high = uniform(g, n, 1.2, 4), uniform(g, n, 2.4, 4)
    across = to_grid(along + 7 * tone[:, 0], wide) - wide * uniform(g, n, 0.15, 0.42)
    upward = to_grid(up - 1.7, high) - high * uniform(g, n, 0.18, 0.4)
    coarse = (wide * foreshortened / 4).clamp(0, 1) * (high * pixels / 4).clamp(0, 1)  # windows wider than 4 pixels
    pane = edge(across * foreshortened) * edge(upward * pixels) * coarse
    key = (along / wide).round() * 13 + (up / high).round() * 7
    glass = near(g, n, (0.2, 0.23, 0.28), 0.7)
    glass = glass * (0.5 + at(torch.rand(n, 61, generator=g, device=g.device), key))[:, None]
    frame = edge((across.clamp(min=-9).abs() - 0.08) * foreshortened) * edge(upward * pixels) * coarse * coin(g, n, 0.5)
    wall = wall + (glass - wall) * pane[:, None]
    wall = wall + (0.9 - wall) * (0.6 * frame)[:, None]
    cornice = edge((to_grid(up - 3.3, high) - 0.12) * pixels) * coin(g, n, 0.4) * (high * pixels / 8).clamp(0, 1)
    return wall * (1 - 0.35 * cornice)[:, None] * (1 - 0.5 * edge(up - 3) * coin(g, n, 0.4))[:, None]


def _standing(g: torch.Generator, canvas: Canvas, part: Tensor, camera: Camera, left: Tensor, right: Tensor) -> None:
    """Paint STANDING things from the farthest to the nearest."""
    n, kinds = len(part), list(THINGS)
    z = (torch.rand(n, STANDING, generator=g, device=g.device) ** 1.1 * 2.9).exp() * 4.5  # 4.5 to 80 m, logarithmic
    z = z.sort(1, descending=True).values
    few = torch.rand(n, 1, generator=g, device=g.device) * 1.0 + 0.25  # some streets are nearly empty
    weights = [weight for weight, _, _ in THINGS.values()]
    for slot in range(STANDING):
        kind = choose(g, n, weights)
        kind[torch.rand(n, generator=g, device=g.device) > few[:, 0]] = len(kinds)
        for some, draw in zip(members(kind, len(kinds)), kinds):
            if not len(some):
                continue
            m, (_, low, high) = len(some), THINGS[draw]
            far = z[some, slot, None, None]
            # 0 at the left kerb, 1 at the right one; the sides are taken with equal weight
            where = uniform(g, m, low, high)
            where = torch.where(coin(g, m, 0.5), where, 1 - where)
            offset = -left[some] + where * (left + right)[some]
            x, y = canvas.grid(part[some])
            s = camera.f[some] / far
            u = (x - camera.centre[some]) / s - offset
            v = camera.height[some] - (y - camera.horizon[some]) / s
            for alpha, colours, family in draw(g, Cut(u, v, s)):
                canvas.paint(part[some], alpha, colours.clamp(0, 1), family, nearness(far), slot + 6)
