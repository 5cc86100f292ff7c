"""A batch of canvases: pictures together with the labels that drawing them gives for nothing."""

from typing import NamedTuple

import torch
from torch import Tensor


class Canvas(NamedTuple):
    """B pictures of H x W pixels with dense labels; painting changes the tensors in place."""

    image: Tensor  # (B, 3, H, W) in [0, 1]
    family: Tensor  # (B, H, W) int64: the formula that drew the pixel
    depth: Tensor  # (B, H, W) in [0, 1]: 0 the farthest, 1 the nearest
    instance: Tensor  # (B, H, W) int64: the order in which it was painted

    @staticmethod
    def blank(batch: int, size: int, device: torch.device) -> "Canvas":
        """Make black canvases (batch, size, size)."""
        image = torch.zeros(batch, 3, size, size, device=device)
        family, instance = torch.zeros(2, batch, size, size, dtype=torch.int64, device=device)
        return Canvas(image, family, torch.zeros_like(image[:, 0]), instance)

    def grid(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """Pixel coordinates (x, y) for the canvases in part, each (N, H, W)."""
        size = self.image.shape[-1]
        steps = torch.arange(size, device=self.image.device, dtype=torch.float)
        return steps.expand(len(part), size, size), steps[:, None].expand(len(part), size, size)

    def paint(
        self, part: Tensor, alpha: Tensor, colour: Tensor, family: Tensor | int, depth: Tensor | float, instance: int
    ) -> None:
        """Lay colour over some canvases; a pixel takes the labels of what covers more than half of it.

        Args:
            part: indices of the canvases, (N,).
            alpha: coverage (N, H, W) in [0, 1].
            colour: (N, 3, H, W), or broadcastable to it.
            family, depth, instance: labels; depth may be (N, 1, 1) or (N, H, W).
        """
        image = self.image[part]
        self.image[part] = image + alpha[:, None] * (colour - image)
        over = alpha > 0.5
        self.family[part] = torch.where(over, family, self.family[part])
        self.depth[part] = torch.where(over, torch.as_tensor(depth, device=over.device), self.depth[part])
        self.instance[part] = self.instance[part].masked_fill(over, instance)


def members(choice: Tensor, kinds: int) -> list[Tensor]:
    """Split a batch by what each of its members chose: (B,) ids -> for each kind the indices that chose it."""
    return [(choice == kind).nonzero()[:, 0] for kind in range(kinds)]


def choose(g: torch.Generator, n: int, weights: list[float]) -> Tensor:
    """Draw n kinds (n,) with the given weights."""
    return torch.multinomial(torch.tensor(weights, device=g.device), n, replacement=True, generator=g)
