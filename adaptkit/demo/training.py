"""How the demo trains: on features of the frozen backbone that were computed once, every way by the same rule.

The backbone sees every image once, and its mirror image; a step costs the small modules alone. For every way the
batches, their order, the number of steps, the loss, the optimiser and its learning rates are the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.demo.scenes import CLASSES
from adaptkit.features import CachedFeatures
from adaptkit.model.adapted import AdaptedModel

__all__ = ["Examples", "examples", "fit", "kept_bytes", "loss", "predict", "tensors", "weights"]

BATCH = 2  #: few images and many steps: a thin thing is learnt by steps, and a batch of 2 already has 51,200 labels
LEARNING_RATE = 2e-3
PART = 16  #: images in one pass of the backbone, or of a prediction


class Examples(NamedTuple):
    """Images as the backbone saw them, with the class of each pixel."""

    seen: CachedFeatures  #: of n images (3, H, W)
    masks: Tensor  #: (n, H, W) class ids

    def batch(self, chosen: Tensor) -> Examples:
        """Return those of the indices ``chosen`` (B,)."""
        image = None if self.seen.image is None else self.seen.image[chosen]
        states = tuple(state[chosen] for state in self.seen.states)
        return Examples(self.seen._replace(states=states, image=image), self.masks[chosen])


def tensors(data: Any) -> tuple[Tensor, Tensor]:
    """Return a data set as images (n, 3, H, W) in -1..1, as the demo backbone wants them, and masks (n, H, W)."""
    images = torch.stack([torch.from_numpy(np.array(row)) for row in data["image"]])
    masks = torch.stack([torch.from_numpy(np.array(row)) for row in data["mask"]])
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1, masks.long()


def examples(model: AdaptedModel, images: Tensor, masks: Tensor, mirrored: bool = False) -> Examples:
    """Run the backbone once on images (n, 3, H, W), and once on their mirror images where ``mirrored``.

    ``model`` reads the most of all ways, so that its features do for the others too.
    """
    if mirrored:
        images, masks = torch.cat([images, images.flip(-1)]), torch.cat([masks, masks.flip(-1)])
    return Examples(CachedFeatures.join([model.extract(part) for part in images.split(PART)]), masks)


def weights(masks: Tensor, classes: int) -> Tensor:
    """Return a weight (classes,) for each class: one over its share of the pixels, so that all classes weigh alike.

    Counted pixel by pixel a ring weighs a twentieth of a wall, and is learnt last or never.
    """
    share = torch.bincount(masks.flatten(), minlength=classes).clamp(min=1) / masks.numel()
    return 1 / (classes * share)


def loss(logits: Tensor, masks: Tensor, weight: Tensor) -> Tensor:
    """Weighted cross-entropy plus Dice (Milletari et al. 2016, section 3), the mean over the classes of the batch.

    Of a class k, with probabilities p and labels t in {0, 1} of all pixels::

        dice_k  =  1 - (2 sum(p_k t_k) + 1) / (sum(p_k) + sum(t_k) + 1)

    A ring of one hundred pixels then counts as much as a wall of ten thousand.

    Args:
        logits: (B, classes, H, W).
        masks: (B, H, W) class ids.
        weight: (classes,) of the cross-entropy.
    """
    target = F.one_hot(masks, logits.shape[1]).movedim(-1, 1).to(logits.dtype)
    share = logits.softmax(1)
    both, total = (share * target).sum((0, 2, 3)), (share + target).sum((0, 2, 3))
    dice = 1 - (2 * both + 1) / (total + 1)
    return F.cross_entropy(logits, masks, weight) + dice[target.sum((0, 2, 3)) > 0].mean()


def fit(model: AdaptedModel, data: Examples, steps: int, seed: int) -> Iterator[float]:
    """AdamW with a warm-up and a cosine schedule; yields the loss of every step."""
    model.train()
    generator = torch.Generator().manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.01)
    weight = weights(data.masks, len(CLASSES))
    warmup = max(1, steps // 10)
    for step in range(steps):
        rise, fall = (step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(rise, fall)
        seen, masks = data.batch(torch.randint(len(data.masks), (BATCH,), generator=generator))
        value = loss(model(seen).logits, masks, weight)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        yield value.item()


@torch.no_grad()
def predict(model: AdaptedModel, data: Examples) -> Tensor:
    """Return the class ids (n, H, W) that the model gives to every pixel."""
    model.eval()
    parts = (data.seen.part(i, i + PART) for i in range(0, len(data.masks), PART))
    return torch.cat([model(part).logits.argmax(1) for part in parts])


def kept_bytes(model: AdaptedModel, data: Examples) -> int:
    """Return the bytes that a training step keeps for its backward pass, beside the weights and the batch.

    Tensors that share their memory count once. The model is left as it was: nothing is trained, and the statistics of
    its BatchNorms and the random numbers that it drew are put back.
    """
    seen, masks = data.batch(torch.arange(BATCH) % len(data.masks))
    weight = weights(masks, len(CLASSES))
    given = [*model.parameters(), *model.buffers(), *seen.states, masks, weight]
    given += [] if seen.image is None else [seen.image]
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    was_training = model.training
    model.train()
    with torch.random.fork_rng(devices=[]), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        value = loss(model(seen).logits, masks, weight)  # held until all is counted: no memory is used twice
    size = sum(kept.values())
    del value
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    model.train(was_training)
    return size
