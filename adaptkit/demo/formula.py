"""Formula-driven pictures with dense labels, drawn in batches at run time on the CPU or on a GPU.

    g = torch.Generator(device).manual_seed(0)
    canvas = draw(64, 256, g)                    # 64 canvases of 256 x 256 pixels: picture, family, depth, instance
    view = crops(canvas, 4 * 64, 224, g)         # 256 crops of them, photographed

Half of the canvases are abstract (shapes.py), half are streets (street.py). Nothing is read from a file or the network:
what a network learns from these pictures, it learned from the code in this folder.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .canvas import Canvas
from .shapes import abstract
from .street import street
from .textures import TEXTURES, coin, uniform
from .things import STREET

FAMILIES = (*TEXTURES, *STREET)  # what the label `family` counts


@torch.no_grad()
def draw(batch: int, size: int, g: torch.Generator, streets: float = 0.5) -> Canvas:
    """Draw canvases.

    Args:
        batch: number of canvases B.
        size: height and width in pixels.
        g: source of every random choice; the canvases are made on its device.
        streets: share of the canvases that are streets.

    Returns:
        A `Canvas` with image (B, 3, size, size) in [0, 1], family (B, size, size) ids into `FAMILIES`, depth in [0, 1]
        (0 the farthest) and instance ids.
    """
    canvas = Canvas.blank(batch, size, g.device)
    order = torch.arange(batch, device=g.device)
    cut = round(batch * streets)
    if cut:
        street(g, canvas, order[:cut])
    if cut < batch:
        abstract(g, canvas, order[cut:])
    return canvas


@torch.no_grad()
def crops(canvas: Canvas, count: int, size: int, g: torch.Generator, scale: tuple[float, float] = (0.4, 1.0)) -> Canvas:
    """Cut random rectangles out of the canvases, mirror half of them, and photograph them.

    Args:
        canvas: B canvases; each is used count / B times.
        count: number of crops.
        size: height and width of a crop in pixels.
        g: source of every random choice.
        scale: range of the side of a crop, as a share of the side of the canvas.

    Returns:
        A `Canvas` of `count` crops of size x size pixels, in random order; labels are taken from the nearest pixel.
    """
    source = torch.randperm(count, generator=g, device=g.device).remainder(len(canvas.image))
    side = uniform(g, count, *scale)[:, 0, 0]
    stretch = torch.exp(uniform(g, count, -0.25, 0.25))[:, 0, 0]
    half = torch.stack((side * stretch, side / stretch), 1).clamp(max=1.0)  # (count, 2) as (x, y)
    centre = (torch.rand(count, 2, generator=g, device=g.device) * 2 - 1) * (1 - half)
    half[:, 0] *= torch.where(coin(g, count, 0.5)[:, 0, 0], 1.0, -1.0)
    steps = (torch.arange(size, device=g.device) + 0.5) / size * 2 - 1
    where = torch.stack(
        (
            (steps * half[:, :1] + centre[:, :1])[:, None].expand(count, size, size),
            (steps * half[:, 1:] + centre[:, 1:])[:, :, None].expand(count, size, size),
        ),
        -1,
    )
    image = F.grid_sample(canvas.image[source], where, padding_mode="border", align_corners=False)
    labels = torch.stack((canvas.family.float(), canvas.depth, canvas.instance.float()), 1)
    labels = F.grid_sample(labels[source], where, mode="nearest", padding_mode="border", align_corners=False)
    return Canvas(photograph(image, g), labels[:, 0].round().long(), labels[:, 1], labels[:, 2].round().long())


@torch.no_grad()
def photograph(image: Tensor, g: torch.Generator) -> Tensor:
    """Expose, tint, blur and add noise to pictures (B, 3, H, W) in [0, 1], each in its own way."""
    n = len(image)
    image = image.clamp(0, 1) ** torch.exp(0.35 * torch.randn(n, 1, 1, 1, generator=g, device=g.device))
    grey = image.mean(1, keepdim=True)
    image = grey + (image - grey) * uniform(g, n, 0.3, 1.3)[:, None]
    tint = 1 + 0.08 * torch.randn(n, 3, 1, 1, generator=g, device=g.device)
    image = image * tint * uniform(g, n, 0.5, 1.15)[:, None]
    share = uniform(g, n, 0, 1)[:, None] * coin(g, n, 0.6)[:, None]  # how much of a 3 x 3 binomial blur
    weights = torch.tensor([1.0, 2.0, 1.0], device=image.device) / 4
    kernel = torch.outer(weights, weights).expand(3, 1, 3, 3)
    image = image + share * (F.conv2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), kernel, groups=3) - image)
    light = uniform(g, n, 0.0, 0.04)[:, None] * torch.randn(image.shape, generator=g, device=g.device)
    return (image + light).clamp(0, 1)


def boundaries(instance: Tensor, family: Tensor) -> Tensor:
    """Label maps (B, H, W) -> (B, H, W) float, 1 where a pixel's right or lower neighbour belongs to something else."""
    key = instance * len(FAMILIES) + family
    key = F.pad(key[:, None].float(), (0, 1, 0, 1), mode="replicate")[:, 0]
    return ((key[:, :-1, :-1] != key[:, :-1, 1:]) | (key[:, :-1, :-1] != key[:, 1:, :-1])).float()
