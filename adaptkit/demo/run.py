"""``adaptkit demo``: three ways to read a frozen backbone, trained side by side on drawn scenes.

The linear head, the simple feature pyramid and ViT-Adapter see the same images in the same order for the same number
of steps; the table says what each costs and what it scores, and the picture shows where they differ.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.hub.write import check_writable
from adaptkit.model.adapted import AdaptedModel, attach

__all__ = ["Row", "demo", "picture", "table"]

WAYS = ("linear", "sfp", "vit-adapter")
BATCH = 8
LEARNING_RATE = 2e-3


class Row(NamedTuple):
    """One line of the table."""

    name: str
    trained: int  #: trainable parameters
    file_bytes: int
    seconds: float  #: of training
    miou: float  #: 0..1
    prediction: Tensor  #: (n, H, W) for the first validation images


def demo(
    out: str | Path, steps: int = 100, seed: int = 0, advance: Callable[[str, float], None] | None = None
) -> list[Row]:
    """Train and score the three ways; save each adapter under ``out`` and draw ``out/predictions.png``.

    ``advance(name, loss)`` is called after every step.
    """
    from adaptkit.demo import CLASSES, demo_backbone, scenes

    folder = check_writable(out)
    train, val = (tensors(scenes(split, seed=seed)) for split in ("train", "val"))
    rows = []
    for name in WAYS:
        torch.manual_seed(seed)
        adapters, head = ([], "linear") if name == "linear" else ([name], "fpn")
        model = attach(demo_backbone(), *adapters, head=(head, {"num_classes": len(CLASSES)}))
        started = time.perf_counter()
        for loss in fit(model, *train, steps, seed):
            if advance is not None:
                advance(name, loss)
        seconds = time.perf_counter() - started
        predicted = predict(model, val[0])
        saved = model.save(folder / name, task="semantic-segmentation", classes=list(CLASSES))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        size = (saved / "adapter_model.safetensors").stat().st_size
        rows.append(Row(name, trained, size, seconds, mean_iou(predicted, val[1], len(CLASSES)), predicted[:4]))
    picture(folder / "predictions.png", val[0][:4], val[1][:4], rows, len(CLASSES))
    return rows


def tensors(data: Any) -> tuple[Tensor, Tensor]:
    """Return a data set as images (n, 3, H, W) in -1..1, as the demo backbone wants them, and masks (n, H, W)."""
    images = torch.stack([torch.from_numpy(np.array(row)) for row in data["image"]])
    masks = torch.stack([torch.from_numpy(np.array(row)) for row in data["mask"]])
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1, masks.long()


def fit(model: AdaptedModel, images: Tensor, masks: Tensor, steps: int, seed: int) -> Iterator[float]:
    """AdamW with a cosine schedule on flipped batches; yields the loss of every step."""
    model.train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.01
    )
    warmup = max(1, steps // 10)
    for step in range(steps):
        rise, fall = (step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(rise, fall)
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        image, mask = images[chosen], masks[chosen]
        if torch.rand((), generator=generator) < 0.5:
            image, mask = image.flip(-1), mask.flip(-1)
        loss = F.cross_entropy(model(image).logits, mask)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield loss.item()


@torch.no_grad()
def predict(model: AdaptedModel, images: Tensor) -> Tensor:
    """(n, 3, H, W) -> class ids (n, H, W)."""
    model.eval()
    return torch.cat([model(batch).logits.argmax(1) for batch in images.split(BATCH)])


def mean_iou(predicted: Tensor, masks: Tensor, classes: int) -> float:
    """Mean over classes of intersection over union, counted over the whole set."""
    counts = torch.bincount(masks.flatten() * classes + predicted.flatten(), minlength=classes**2)
    confusion = counts.view(classes, classes).double()
    hit = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - hit
    return float((hit / union.clamp(min=1))[union > 0].mean())


def picture(path: Path, images: Tensor, masks: Tensor, rows: list[Row], classes: int, zoom: int = 2) -> None:
    """Draw one row per image: the image, its mask, and what each way predicts, each titled."""
    from PIL import Image, ImageDraw

    colours = np.array([_colour(i / classes) for i in range(classes)], dtype=np.uint8)
    shown = ((images + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy()
    columns = [("image", shown), ("mask", colours[masks.numpy()])]
    columns += [(f"{r.name}  mIoU {100 * r.miou:.1f}", colours[r.prediction.numpy()]) for r in rows]
    side, gap, title = images.shape[-1] * zoom, 8, 24
    sheet = Image.new("RGB", (len(columns) * (side + gap) + gap, len(images) * (side + gap) + gap + title), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, tiles) in enumerate(columns):
        left = gap + i * (side + gap)
        draw.text((left, 6), name, fill="black", font_size=14)
        for j, tile in enumerate(tiles):
            enlarged = Image.fromarray(tile).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left, title + gap + j * (side + gap)))
    sheet.save(path)


def _colour(hue: float) -> tuple[int, int, int]:
    import colorsys

    r, g, b = colorsys.hsv_to_rgb(hue, 0.55 + 0.3 * (round(hue * 97) % 2), 0.9 - 0.25 * (round(hue * 89) % 2))
    return int(255 * r), int(255 * g), int(255 * b)


def table(rows: list[Row], steps: int) -> Any:
    """Return the result as a rich table."""
    from rich.table import Table

    made = Table(title=f"Frozen demo backbone, {steps} steps each", title_justify="left")
    for column in ("", "trainable", "file", "seconds", "mIoU"):
        made.add_column(column, justify="left" if not column else "right")
    for row in rows:
        megabytes = f"{row.file_bytes / 1e6:.2f} MB"
        made.add_row(row.name, f"{row.trained:,}", megabytes, f"{row.seconds:.0f}", f"{100 * row.miou:.1f}")
    return made
