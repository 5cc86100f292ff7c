"""Images with one class each: a Parquet file, a Hub data set, a folder of class folders, scikit-learn's digits, or
crops of a segmentation set."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from adaptkit.vit import Source

from .data import IMAGENET, open_dataset

LABEL_NAMES = ("label", "labels", "fine_label", "class", "target")
PURE = 0.6  # least share of a crop that its class must cover


class Labelled(NamedTuple):
    """A whole set in memory, which suits the small sets that a frozen backbone is adapted to."""

    images: Tensor  # (K, 3, H, W) uint8
    labels: Tensor  # (K,) int64
    classes: list[str]

    def batches(self, order: Tensor, size: int, source: Source, device: torch.device) -> Any:
        """Yield (images (B, 3, H, W) normalised as the backbone wants them, labels (B,))."""
        mean, std = source_statistics(source, device)
        for chosen in order.split(size):
            yield (self.images[chosen].to(device) / 255 - mean) / std, self.labels[chosen].to(device)


def source_statistics(source: Source, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (3, 1, 1) of the images that the backbone was trained on."""
    mean, std = (source.mean, source.std) if source.mean else IMAGENET
    return torch.tensor(mean, device=device)[:, None, None], torch.tensor(std, device=device)[:, None, None]


def open_labelled(name: str, split: str, size: int) -> Labelled:
    """Read a set at ``size`` x ``size`` pixels.

    Args:
        name: ``digits`` (scikit-learn's, every fourth image for validation), ``crops:FILE`` (crops of a segmentation
            set, labelled by the class that covers most), a Parquet file, a folder of class folders, or a Hub id.
        split: ``train`` or ``validation``; of a file or folder everything is read.
        size: side in pixels.

    Raises ``ValueError`` where nothing is found, or images and labels are not.
    """
    if name == "digits":
        return _digits(split, size)
    if name.startswith("crops:"):
        return _crops(name.removeprefix("crops:"), size)
    data = _dataset(name, split)
    image, label = _columns(data, name)
    resize = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size), v2.PILToTensor()])
    images = torch.stack([resize(row.convert("RGB")) for row in data[image]])
    labels = torch.tensor(data[label])
    names = getattr(data.features[label], "names", None) or [str(i) for i in range(int(labels.max()) + 1)]
    return Labelled(images, labels, list(names))


def _digits(split: str, size: int) -> Labelled:
    """1797 handwritten digits of 8 x 8 pixels, brought to size bilinearly."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError('the digits are in scikit-learn: pip install "adaptkit[recipes]"') from error
    pixels, labels = load_digits(return_X_y=True)
    held = np.arange(len(labels)) % 4 == 3
    chosen = held if split == "validation" else ~held
    small = torch.from_numpy(pixels[chosen].reshape(-1, 1, 8, 8) / 16 * 255).float()
    images = torch.nn.functional.interpolate(small, (size, size), mode="bilinear").round().byte()
    return Labelled(images.expand(-1, 3, -1, -1), torch.from_numpy(labels[chosen]), [str(i) for i in range(10)])


def _crops(name: str, size: int) -> Labelled:
    """Square crops side by side, of which one class covers most."""
    data = open_dataset(name, "train")
    images, labels = [], []
    for row in data:
        image, mask = np.asarray(row["image"].convert("RGB")), np.asarray(row["mask"])
        for top in range(0, mask.shape[0] - size + 1, size):
            for left in range(0, mask.shape[1] - size + 1, size):
                counts = np.bincount(mask[top : top + size, left : left + size].ravel(), minlength=256)[:255]
                if counts.max() >= PURE * size * size:
                    images.append(image[top : top + size, left : left + size])
                    labels.append(int(counts.argmax()))
    if not images:
        raise ValueError(
            f"{name} has no crop of {size} pixels that one class covers by {PURE:.0%}; try a smaller --size"
        )
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return Labelled(stacked, torch.tensor(labels), [str(i) for i in range(max(labels) + 1)])


def _dataset(name: str, split: str) -> Any:
    import datasets

    path = Path(name)
    if path.is_dir():
        return datasets.load_dataset("imagefolder", data_dir=name, split="train")
    if path.suffix == ".parquet":
        if not path.is_file():
            raise ValueError(f"there is no file {name}")
        return datasets.load_dataset("parquet", data_files=name, split="train")
    if path.exists():
        raise ValueError(f"{name} is neither a Parquet file nor a folder with one folder per class")
    return datasets.load_dataset(name, split=split)


def _columns(data: Any, name: str) -> tuple[str, str]:
    import datasets

    image = next((k for k, f in data.features.items() if isinstance(f, datasets.Image)), None)
    label = next((k for k in LABEL_NAMES if k in data.features and k != image), None)
    if image is None or label is None or len(data) == 0:
        raise ValueError(
            f"{name} has {len(data)} rows with the columns {', '.join(data.features)}; it needs images and a label "
            f"column ({', '.join(LABEL_NAMES)})"
        )
    return image, label
