"""What did the demonstration backbone learn? A linear head on its frozen tokens, and on the same network untrained.

    python -m recipes.bench.demo_backbone --train camvid-train.parquet --val camvid-val.parquet
    ... --weights runs/mae/demo_backbone.safetensors
    ... --blocks  # what each block is worth

The head is a batch norm without parameters and a 1 x 1 convolution on the patch tokens, its logits brought to the size
of the labels bilinearly. Both backbones get the same head, images, steps and learning rate. The spread is the standard
deviation over the seeds; a seed sets the head, the order of the images and the weights of the untrained network.

--blocks puts the same head on the tokens after every block (the first seed), and says how evenly the block attends (the
entropy of its attention, 1: all tokens alike) and by how much it changes the tokens.
"""

import argparse
import math
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.analysis.attention import Attention, attentions

CLASSES = ("sky", "building", "pole", "road", "sidewalk", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")
IGNORE = 255
LOOKED_AT = 8  #: images whose attention and changes are measured


# Arguments


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="Parquet file with the columns image and label")
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="other weights than those that ship")
    parser.add_argument("--height", type=int, default=240, help="images are resized to height x width pixels")
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    tables = parser.add_mutually_exclusive_group()
    tables.add_argument("--classes", action="store_true", help="print a second table with one row per class")
    tables.add_argument("--blocks", action="store_true", help="print a table with one row per block instead")
    return parser.parse_args()


# Data


def read(path: Path, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Parquet file -> images (K, 3, height, width) uint8 and labels (K, H, W) uint8 at their own size."""
    import datasets
    import numpy as np

    rows = datasets.Dataset.from_parquet(str(path))
    images = [torch.from_numpy(np.array(row["image"].convert("RGB").resize((width, height)))) for row in rows]
    labels = [torch.from_numpy(np.array(row["label"])) for row in rows]
    return torch.stack(images).permute(0, 3, 1, 2), torch.stack(labels)


# Model


def make_backbone(pretrained: bool, seed: int, weights: Path | None) -> nn.Module:
    """Make the demonstration backbone, trained or not."""
    from safetensors.torch import load_file

    from adaptkit.demo.backbone import demo_backbone

    torch.manual_seed(seed)
    backbone = demo_backbone(pretrained=pretrained and weights is None)
    if pretrained and weights is not None:
        backbone.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
    return backbone


@torch.inference_mode()
def features(backbone: nn.Module, images: Tensor, last: int = 1) -> list[Tensor]:
    """Frozen patch tokens of all images after each of the last blocks: maps (K, D, H/16, W/16) in half precision."""
    maps: list[list[Tensor]] = [[] for _ in range(last)]
    for batch in images.split(8):
        found = backbone.get_intermediate_layers(normalised(batch), n=last, reshape=True, norm=True)
        for some, one in zip(maps, found):
            some.append(one.half())
    return [torch.cat(some).clone() for some in maps]


def normalised(images: Tensor) -> Tensor:
    """(B, 3, H, W) bytes as the backbone takes them."""
    return (images / 255 - 0.5) / 0.5


@torch.inference_mode()
def evenness(backbone: nn.Module, images: Tensor) -> list[float]:
    """Entropy of each block's attention as a share of that of even attention, the mean over images and heads."""
    found: dict[int, list[float]] = {}

    def look(attention: Attention) -> None:
        shares = attention.full  # (heads, T, T), rows sum to one
        entropy = -torch.xlogy(shares, shares).sum(-1).mean() / math.log(shares.shape[-1])
        found.setdefault(attention.block, []).append(entropy.item())

    for image in normalised(images):
        attentions(backbone, image[None], look)
    return [statistics.mean(found[block]) for block in sorted(found)]


@torch.inference_mode()
def changes(backbone: nn.Module, images: Tensor) -> list[float]:
    """How much each block adds to the tokens: the norm of what it adds by that of what it was given."""
    x, found = backbone._pos_embed(backbone.patch_embed(normalised(images))), []
    for block in backbone.blocks:
        y = block(x)
        found.append(((y - x).norm(dim=-1) / x.norm(dim=-1)).mean().item())
        x = y
    return found


# Loop


def train(args: argparse.Namespace, maps: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """Train the linear head; the loss is taken at a quarter of the labels' size."""
    torch.manual_seed(seed)
    head = nn.Sequential(nn.BatchNorm2d(maps.shape[1], affine=False), nn.Conv2d(maps.shape[1], len(CLASSES), 1))
    optimizer = torch.optim.AdamW(head.parameters(), lr=args.lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps)
    labels = labels[:, 2::4, 2::4].long()
    for _ in range(args.steps):
        chosen = torch.randint(len(maps), (args.batch_size,))
        logits = F.interpolate(head(maps[chosen].float()), labels.shape[1:], mode="bilinear")
        F.cross_entropy(logits, labels[chosen], ignore_index=IGNORE).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return head.eval()


@torch.inference_mode()
def score(head: nn.Module, maps: Tensor, labels: Tensor) -> Tensor:
    """Intersection over union of each class in per cent (C,), over all pixels of all images."""
    count = len(CLASSES)
    confusion = torch.zeros(count * count)
    for some, truth in zip(maps.split(8), labels.split(8)):
        guess = F.interpolate(head(some.float()), truth.shape[1:], mode="bilinear").argmax(1)
        known = truth != IGNORE
        confusion += torch.bincount(truth[known].long() * count + guess[known], minlength=count * count)
    confusion = confusion.view(count, count)
    hits = confusion.diag()
    return 100 * hits / (confusion.sum(0) + confusion.sum(1) - hits).clamp(min=1)


# Table


def main() -> None:
    """Score both backbones and print the table."""
    args = arguments()
    train_images, train_labels = read(args.train, args.height, args.width)
    val_images, val_labels = read(args.val, args.height, args.width)
    if args.blocks:
        print_blocks(args, (train_images, train_labels), (val_images, val_labels))
        return
    results: dict[str, list[Tensor]] = {"random weights": [], "demo backbone": []}
    for name, scores in results.items():
        for seed in args.seeds:
            if name == "random weights" or not scores:  # the trained one is the same for every seed
                backbone = make_backbone(name == "demo backbone", seed, args.weights)
                (train_maps,), (val_maps,) = features(backbone, train_images), features(backbone, val_images)
            scores.append(score(train(args, train_maps, train_labels, seed), val_maps, val_labels))
    means = {name: [scores.mean().item() for scores in rows] for name, rows in results.items()}

    size = f"{args.height} x {args.width}"
    print(f"Linear head, {args.steps} steps, {len(val_images)} images of {size} pixels, mIoU in per cent:\n")
    print("| frozen backbone | " + " | ".join(f"seed {seed}" for seed in args.seeds) + " | mean | spread |")
    print("|---" * (len(args.seeds) + 3) + "|")
    for name, row in means.items():
        spread = statistics.stdev(row) if len(row) > 1 else 0.0
        cells = [*row, statistics.mean(row)]
        print(f"| {name} | " + " | ".join(f"{cell:.1f}" for cell in cells) + f" | ± {spread:.1f} |")
    gain = [b - a for a, b in zip(means["random weights"], means["demo backbone"])]
    print("| gain | " + " | ".join(f"{cell:+.1f}" for cell in [*gain, statistics.mean(gain)]) + " | |")
    if args.classes:
        print("\n| class | " + " | ".join(results) + " |\n|---|---|---|")
        for i, name in enumerate(CLASSES):
            print(f"| {name} | " + " | ".join(f"{torch.stack(r)[:, i].mean():.1f}" for r in results.values()) + " |")


def print_blocks(args: argparse.Namespace, fit: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor]) -> None:
    """Score the tokens after each block and print the table."""
    backbone, seed, some = make_backbone(True, args.seeds[0], args.weights), args.seeds[0], val[0][:LOOKED_AT]
    even, changed = evenness(backbone, some), changes(backbone, some)
    print(f"Linear head, {args.steps} steps, seed {seed}, {args.height} x {args.width} pixels:\n")
    print("| after block | mIoU | evenness of its attention | what it adds, by what it was given |\n|---|---|---|---|")
    depth = len(backbone.blocks)
    for block, (maps, held) in enumerate(zip(features(backbone, fit[0], depth), features(backbone, val[0], depth))):
        miou = score(train(args, maps, fit[1], seed), held, val[1]).mean()
        print(f"| {block} | {miou:.1f} | {even[block]:.2f} | {changed[block]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
