"""What stands in a street, as upright cut-outs in metres: houses, trees, poles, signs, fences, vehicles, people.

A thing is a function `thing(g, cut)` of local coordinates; it returns layers to paint one after the other, each an
alpha (N, H, W), colours (N, 3, H, W) and the family that labels them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .shapes import colour
from .textures import TEXTURES, at, coin, edge, foliage, grain, noise, to_grid, uniform

STREET = ("sky", "facade", "road", "pavement", "tree", "pole", "sign", "fence", "vehicle", "person", "cyclist")
SKY, FACADE, ROAD, PAVEMENT, TREE, POLE, SIGN, FENCE, VEHICLE, PERSON, CYCLIST = range(
    len(TEXTURES), len(TEXTURES) + len(STREET)
)


class Cut(NamedTuple):
    """Coordinates of cut-outs: u metres to the right, v metres above the ground, (N, H, W); s pixels per metre."""

    u: Tensor
    v: Tensor
    s: Tensor

    def cover(self, distance: Tensor) -> Tensor:
        """Signed distance in metres -> coverage in [0, 1]."""
        return edge(distance * self.s)


Layers = list[tuple[Tensor, Tensor, int]]


def near(g: torch.Generator, n: int, rgb: tuple[float, float, float], spread: float, wild: float = 0.12) -> Tensor:
    """Colours (n, 3, 1, 1) about rgb: brighter or darker by the factor of spread, tinted; some of them wild."""
    base = torch.tensor(rgb, device=g.device)[None, :, None, None] * (1 + uniform(g, n, -spread, spread)[:, None])
    base = base + 0.04 * torch.randn(n, 3, 1, 1, generator=g, device=g.device)
    return torch.where(coin(g, n, wild)[:, None], colour(g, n), base).clamp(0.01, 1)


def box(u: Tensor, v: Tensor, half: Tensor | float, bottom: Tensor | float, top: Tensor | float) -> Tensor:
    """Signed distance to the rectangle |u| < half, bottom < v < top."""
    return torch.maximum(u.abs() - half, torch.maximum(v - top, bottom - v))


def limb(u: Tensor, v: Tensor, foot: Tensor | float, low: float, hip: Tensor | float, high: float) -> Tensor:
    """Distance to the segment from (foot, low) to (hip, high): an arm or a leg without its thickness."""
    along, rise = hip - foot, high - low
    t = (((u - foot) * along + (v - low) * rise) / (along * along + rise * rise)).clamp(0, 1)
    return torch.hypot(u - foot - t * along, v - low - t * rise)


def house(g: torch.Generator, cut: Cut) -> Layers:
    """A front that faces the camera: rows of windows, a flat or a pitched roof."""
    u, v, s = cut
    n, half, top = len(u), uniform(g, len(u), 3, 12), uniform(g, len(u), 5, 18)
    pitch = uniform(g, n, 0.2, 1.0) * coin(g, n, 0.4)
    wide, high = uniform(g, n, 1.2, 3.5), uniform(g, n, 2.4, 4)
    wall = near(g, n, (0.55, 0.47, 0.4), 0.6) + 0.1 * (grain(g, u * 10, v * 10) - 0.5)[:, None]
    pane = torch.maximum(to_grid(u, wide) - wide * uniform(g, n, 0.15, 0.4), to_grid(v - 1.7, high) - 0.3 * high)
    key = (u / wide).round() * 13 + (v / high).round() * 7
    glass = near(g, n, (0.2, 0.23, 0.28), 0.7)
    glass = glass * (0.5 + at(torch.rand(n, 61, generator=g, device=g.device), key))[:, None]
    shown = cut.cover(torch.maximum(pane, v - top + 0.4)) * (wide * s / 4).clamp(0, 1)
    wall = wall + (glass - wall) * shown[:, None]
    roof = near(g, n, (0.35, 0.25, 0.22), 0.6).expand_as(wall)
    wall = torch.where((v > top)[:, None], roof, wall)
    return [(cut.cover(box(u, v, half, 0, top + pitch * (half - u.abs()).clamp(min=0))), wall, FACADE)]


def tree(g: torch.Generator, cut: Cut) -> Layers:
    """A trunk with a ragged crown of leaves that the sky shines through, or a bush on the ground."""
    u, v, _ = cut
    n, radius = len(u), uniform(g, len(u), 1, 4)
    rise = torch.where(coin(g, n, 0.25), 0.0, radius + uniform(g, n, 0.5, 3))
    bark = near(g, n, (0.22, 0.18, 0.14), 0.5) * (0.7 + 0.6 * grain(g, u * 20, v * 5))[:, None]
    trunk = torch.maximum(u.abs() - uniform(g, n, 0.08, 0.3), torch.maximum(v - rise, -v))
    clumps = noise(g, u * 4 + 50 * radius, v * 4, 0.6, 1.4)
    crown = torch.hypot(u, (v - rise) * uniform(g, n, 0.6, 1.2)) - radius + uniform(g, n, 0.2, 0.9) * clumps
    holes = noise(g, u * 16, v * 16, 0.4, 0.9) - uniform(g, n, 0.2, 2.5)  # bare in winter, dense in summer
    leaves = (0.35 + 1.1 * foliage(g, u * 16, v * 16)) * (0.9 + 0.25 * (v - rise) / radius).clamp(0.4, 1.3)
    green = near(g, n, (0.24, 0.33, 0.13), 0.6) * leaves[:, None]
    alpha = cut.cover(torch.maximum(crown, -v)) * edge(holes, 0.6)
    return [(cut.cover(trunk), bark, TREE), (alpha, green, TREE)]


def pole(g: torch.Generator, cut: Cut) -> Layers:
    """A lamp post, a post, or a traffic light."""
    u, v, s = cut
    n, top, half = len(u), uniform(g, len(u), 2, 9), uniform(g, len(u), 0.03, 0.14)
    half = half + 0.4 / s * coin(g, n, 0.5)  # half of them stay visible far away
    tone = near(g, n, (0.3, 0.3, 0.3), 0.9)
    round_shade = (1 - 0.4 * (u / half).clamp(-1, 1) * uniform(g, n, -1, 1))[:, None]
    reach = uniform(g, n, -2.0, 2.0) * coin(g, n, 0.5)
    arm = box(u - reach / 2, v, reach.abs() / 2, top - 0.1, top)
    shaft = torch.minimum(box(u, v, half, 0, top), arm)
    layers = [(cut.cover(shaft), tone * round_shade, POLE)]
    lit = coin(g, n, 0.25)
    lamp = torch.hypot(u, (v - top + uniform(g, n, 0.1, 0.8)).abs()) - 0.13
    case = near(g, n, (0.1, 0.1, 0.1), 0.5).expand(-1, -1, *u.shape[1:])
    case = case + (colour(g, n) - case) * cut.cover(lamp)[:, None]
    return [*layers, (cut.cover(box(u, v, 0.2, top - 0.9, top)) * lit, case, SIGN)]


def sign(g: torch.Generator, cut: Cut) -> Layers:
    """A plate on a post: disc, triangle or rectangle with a rim and a simple inner figure."""
    u, v, _ = cut
    n, rise, radius = len(u), uniform(g, len(u), 1.8, 4), uniform(g, len(u), 0.3, 1.0)
    w, up = u, v - rise
    disc = torch.hypot(w, up) - radius
    triangle = torch.maximum(w.abs() * 0.87 + up * 0.5, -up) - 0.6 * radius
    plate = torch.maximum(w.abs() - radius * uniform(g, n, 0.6, 1.8), up.abs() - radius)
    kind = torch.rand(n, 1, 1, generator=g, device=g.device)
    distance = torch.where(kind < 0.4, disc, torch.where(kind < 0.6, triangle, plate))
    rim, face = colour(g, n), near(g, n, (0.85, 0.85, 0.8), 0.3, wild=0.5)
    figure = torch.sin(w * uniform(g, n, 2, 14) / radius) * torch.sin(up * uniform(g, n, 2, 14) / radius)
    face = face + (colour(g, n) - face) * (edge(-figure, 0.3) * edge(distance + 0.3 * radius, 0.05))[:, None]
    face = torch.where((distance > -0.15 * radius)[:, None], rim, face)
    post = box(u, v, 0.04, 0, rise)
    return [(cut.cover(post), near(g, n, (0.4, 0.4, 0.4), 0.5), POLE), (cut.cover(distance), face, SIGN)]


def fence(g: torch.Generator, cut: Cut) -> Layers:
    """Bars between two rails, a net, or a low wall, across the view."""
    u, v, _ = cut
    n, half, top = len(u), uniform(g, len(u), 1.5, 7), uniform(g, len(u), 0.7, 2)
    period, bar = uniform(g, n, 0.1, 0.5), uniform(g, n, 0.01, 0.05)
    rails = torch.minimum((v - top + bar).abs(), (v - 0.25).abs()) - 0.03
    bars = torch.minimum(to_grid(u, period) - bar, torch.where(coin(g, n, 0.3), to_grid(v, period) - bar, rails))
    bars = torch.where(coin(g, n, 0.25), -1.0, bars)
    tone = near(g, n, (0.35, 0.33, 0.3), 0.9) * (0.8 + 0.4 * grain(g, u * 15, v * 15))[:, None]
    return [(cut.cover(torch.maximum(bars, box(u, v, half, 0, top))), tone, FENCE)]


def vehicle(g: torch.Generator, cut: Cut) -> Layers:
    """A car, van or bus, from the side or from an end: shadow, wheels, body, cabin with glass, lights."""
    u, v, _ = cut
    n, side = len(u), coin(g, len(u), 0.35)
    large = coin(g, n, 0.2)
    half = torch.where(side, uniform(g, n, 1.7, 2.4), uniform(g, n, 0.75, 0.95))
    half = half * torch.where(large, uniform(g, n, 1.1, 1.8), 1.0)
    waist = uniform(g, n, 0.75, 1.05) * torch.where(large, 1.3, 1.0)
    top = waist + uniform(g, n, 0.4, 0.7) * torch.where(large, 2.5, 1.0)
    lean = torch.where(large, 0.05, uniform(g, n, 0.2, 0.6)) * half / (top - waist)
    cabin_half = 0.95 * half - lean * (v - waist).clamp(min=0)
    body = box(u, v, half - 0.15, 0.4, waist - 0.12) - 0.13
    cabin = torch.maximum(u.abs() - cabin_half, torch.maximum(v - top, waist - 0.3 - v))
    glass = torch.maximum(u.abs() - cabin_half + 0.12, torch.maximum(v - top + 0.1, waist + 0.03 - v))
    glass = torch.where(side, torch.maximum(glass, 0.05 - to_grid(u - half * 0.3, half)), glass)
    axle = torch.where(side, 0.62, 0.82) * half
    wheel = torch.where(side, torch.hypot(u.abs() - axle, v - 0.32) - 0.33, box(u.abs() - axle, v, 0.12, 0, 0.5))
    paint = near(g, n, (0.45, 0.45, 0.47), 0.95, wild=0.5)
    paint = paint * (0.75 + 0.35 * v / top + 0.2 * torch.tanh((v - 0.7 * waist) * 12))[:, None].clamp(0.3, 1.5)
    pane = near(g, n, (0.15, 0.18, 0.2), 0.8) * (0.6 + uniform(g, n, 0, 2) * ((v - waist) / top))[:, None].clamp(0.3, 3)
    paint = paint + (pane - paint) * cut.cover(glass)[:, None]
    lamp = torch.hypot((u.abs() - 0.8 * half) * 0.7, v - 0.8 * waist) - uniform(g, n, 0.06, 0.16)
    glow = torch.where(coin(g, n, 0.5)[:, None], near(g, n, (0.8, 0.1, 0.08), 0.3), near(g, n, (0.95, 0.95, 0.85), 0.1))
    paint = paint + (glow - paint) * (cut.cover(lamp) * ~side)[:, None]
    dark = near(g, n, (0.07, 0.07, 0.07), 0.6, wild=0)
    shadow = 0.49 * edge(torch.hypot(u / half, v / 0.25) - 1.1, 0.4)  # under one half: the road keeps its label
    layers = [(shadow, 0.2 * dark, ROAD), (cut.cover(wheel), dark, VEHICLE)]
    return [*layers, (cut.cover(torch.minimum(body, cabin)), paint, VEHICLE)]


def person(g: torch.Generator, cut: Cut, family: int | None = None, lift: float = 0.0) -> Layers:
    """Head, trunk, two arms and two legs in mid-step."""
    n, height = len(cut.u), uniform(g, len(cut.u), 0.75, 1.1)
    u, v, cut = cut.u / height, cut.v / height - lift, cut._replace(s=cut.s * height)
    stout, step = uniform(g, n, 0.8, 1.3), uniform(g, n, -0.3, 0.3)
    legs = torch.minimum(limb(u, v, step, 0.05, -0.07, 0.85), limb(u, v, -step, 0.05, 0.07, 0.85)) - 0.085 * stout
    trunk = torch.hypot(u / stout, (v - 1.15).abs().sub(0.2).clamp(min=0)) - 0.2
    swing = uniform(g, n, -0.25, 0.25)
    arms = torch.minimum(limb(u, v, -0.24 + swing, 0.8, -0.2, 1.38), limb(u, v, 0.24 + swing, 0.8, 0.2, 1.38)) - 0.06
    head = torch.hypot(u, (v - 1.62) * 0.8) - 0.11
    family = PERSON if family is None else family
    shade = (1 + uniform(g, n, -0.5, 0.5) * (u * 4).clamp(-1, 1))[:, None]
    coat = near(g, n, (0.25, 0.25, 0.28), 0.9, wild=0.5) * shade
    return [
        (cut.cover(legs), near(g, n, (0.15, 0.16, 0.22), 0.8, wild=0.2) * shade, family),
        (cut.cover(torch.minimum(trunk, arms)), coat, family),
        (cut.cover(head), near(g, n, (0.6, 0.45, 0.37), 0.6, wild=0.15) * shade, family),
    ]


def cyclist(g: torch.Generator, cut: Cut) -> Layers:
    """A bicycle, from the side or nearly from an end, usually with somebody on it."""
    u, v, _ = cut
    n = len(u)
    narrow = torch.where(coin(g, n, 0.5), 1.0, uniform(g, n, 0.1, 0.5))
    w = u / narrow
    tyre = (torch.hypot(w.abs() - 0.52, v - 0.34) - 0.33).abs() - 0.03
    frame = torch.minimum(limb(w, v, -0.52, 0.34, 0.1, 0.85), limb(w, v, 0.0, 0.34, 0.4, 0.95)) - 0.03
    frame = torch.minimum(frame, limb(w, v, 0.52, 0.34, 0.38, 1.0) - 0.03)
    tone = near(g, n, (0.12, 0.12, 0.12), 0.9, wild=0.3)
    bicycle = (cut.cover(torch.minimum(tyre, frame)), tone, CYCLIST)
    ridden = coin(g, n, 0.75)
    rider = [(alpha * ridden, shade, family) for alpha, shade, family in person(g, cut, CYCLIST, lift=0.25)]
    return [bicycle, *rider]


# thing -> weight, and where it stands: 0 at one kerb, 1 at the other, in widths of the road
THINGS: dict[Callable[[torch.Generator, Cut], Layers], tuple[float, float, float]] = {
    house: (1.0, -2.5, -0.6),
    tree: (2.2, -1.5, -0.1),
    pole: (2.2, -0.6, 0.0),
    sign: (1.3, -0.5, 0.1),
    fence: (1.0, -1.0, 0.0),
    vehicle: (2.2, -0.1, 0.9),
    person: (2.6, -0.6, 0.2),
    cyclist: (1.6, -0.3, 0.5),
}
