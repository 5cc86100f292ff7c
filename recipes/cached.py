"""Features of the frozen backbone in a cache: it runs once for each image and view, not in every epoch.

``--views K`` makes K views of each training image, the same ones again and again; ``--cache-features DIR`` keeps what
the backbone gave for them. Both see the same samples in the same order, so they train the same adapter.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data import default_collate as stacked

from adaptkit.cache import FeatureCache, checksum
from adaptkit.recorded import Recorded

from .order import Rows

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Views(Dataset):
    """Rows of which each has K views: epoch e sees view e modulo K."""

    def __init__(self, rows: Rows, views: int) -> None:
        self.rows, self.views = rows, views

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        return self.rows[epoch % self.views, index]


class Cached(Dataset):
    """The same views, the backbone's part of them read from the cache: (states, image or nothing, target)."""

    def __init__(self, rows: Rows, views: int, cache: FeatureCache, model: Any) -> None:
        self.rows, self.views, self.cache = rows, views, cache
        (self.after, self.reads_image), self.patch = model.reads(), model.spec.patch
        height, width = rows[0, 0][0].shape[-2:]
        self.size = (height, width)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[Tensor], Tensor | None, Tensor]:
        epoch, index = key
        kept = self.cache[epoch % self.views * len(self.rows) + index]
        # The image is made anew where the adapter reads it: it takes more room than features, and less time.
        image = self.rows[epoch % self.views, index][0] if self.reads_image else None
        target = kept["target"]
        return [kept[f"after_{i}"] for i in self.after], image, target.long() if target.dtype == torch.uint8 else target

    def collate(self, samples: list[Any]) -> tuple[Recorded, Tensor]:
        """Samples -> (what the model takes in place of images, targets)."""
        states = tuple(torch.stack(parts) for parts in zip(*(s[0] for s in samples)))
        image = stacked([s[1] for s in samples]) if self.reads_image else None
        return Recorded(states, self.after, self.size, self.patch, image), stacked([s[2] for s in samples])


def compact(samples: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Class ids take one byte each where they fit."""
    targets = [s["target"] for s in samples]
    if all(t.dtype == torch.int64 and t.numel() and t.min() >= 0 and t.max() < 256 for t in targets):
        return [{**s, "target": s["target"].to(torch.uint8)} for s in samples]
    return samples


def cached(rows: Rows, model: Any, accelerator: Accelerator, args: argparse.Namespace) -> Cached:
    """Fill the cache, or what is missing of it, and return the rows that read it.

    Raises ``ValueError`` where an adapter needs the backbone to run, or the cache is of another backbone, set,
    transform or size.
    """
    after, _ = model.reads()
    sample, transform = rows[0, 0], getattr(rows, "transform", None)
    if transform is None or len(sample) != 2 or not isinstance(sample[1], Tensor | int):
        raise ValueError("--cache-features is for samples of one image and one tensor: segment, classify, depth")
    kept = DTYPES[args.cache_dtype]
    key = {
        "backbone": checksum(model.vit.host),
        "data": getattr(rows.data, "_fingerprint", args.train),
        "transform": repr(transform),
        "size": list(sample[0].shape[-2:]),
        "seed": args.seed,
        "views": args.views,
        "after": list(after),
        "dtype": args.cache_dtype,
    }
    cache = FeatureCache(args.cache_features, args.views * len(rows), key)
    todo, shards = cache.missing(), cache.shards()
    started, made = time.time(), 0
    for number in todo[accelerator.process_index :: accelerator.num_processes]:
        samples: list[dict[str, Tensor]] = []
        for first in range(0, len(shards[number]), args.batch_size):
            chosen = shards[number][first : first + args.batch_size]
            batch = [rows[divmod(i, len(rows))] for i in chosen]
            seen = model.record(torch.stack([image for image, _ in batch]).to(accelerator.device))
            for row, (_, target) in enumerate(batch):
                states = {f"after_{i}": s[row].to(kept) for i, s in zip(after, seen.states)}
                samples.append({**states, "target": torch.as_tensor(target)})
        cache.write(number, compact(samples))
        made += len(samples)
    accelerator.wait_for_everyone()
    seconds = time.time() - started
    found = cache.samples - sum(len(shards[i]) for i in todo)
    rate = f"{seconds:.1f} s for {made} of them, " if made else ""
    accelerator.print(
        f"features of {len(rows)} images x {args.views} views in {args.cache_features}: {rate}{found} were there, "
        f"{cache.bytes() / 2**20:.0f} MiB"
    )
    saved = args.steps * args.accumulate * args.batch_size * accelerator.num_processes - made
    if made and saved > 0:
        accelerator.print(f"so the backbone need not run for {saved} samples, about {saved * seconds / made:.0f} s")
    return Cached(rows, args.views, cache, model)
