"""Features of the frozen backbone in a cache: it runs once for each image and view, not in every epoch.

``--views K`` makes K views of each training image, the same ones again and again; ``--cache-features DIR`` keeps what
the backbone gave for them. Both see the same samples in the same order, so they train the same adapter.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data import default_collate as stacked

from adaptkit.features import int8
from adaptkit.features.cache import FeatureCache, checksum
from adaptkit.features.cached import CachedFeatures
from adaptkit.model.offloading import extract_each

from . import content
from .devices import on_device, sent
from .order import Rows
from .windows import Windows, check_recordable

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOGETHER = 64  #: images for which each block of an offloaded backbone is copied once
SCALE = "_scale"  #: behind the name of what is kept in eight bits


def name_of(block: int) -> str:
    """What the tokens after this block are called in a cache."""
    return f"after_{block}"


def packed(name: str, tokens: Tensor, dtype: str) -> dict[str, Tensor]:
    """Tokens (..., D) -> what is kept of them, by name."""
    if dtype != "int8":
        return {name: tokens.to(DTYPES[dtype])}
    q, scale = int8.quantise(tokens)
    return {name: q, name + SCALE: scale}


def unpacked(name: str, kept: Mapping[str, Tensor]) -> Tensor:
    """Undo :func:`packed`, but for its rounding."""
    scale = kept.get(name + SCALE)
    return kept[name] if scale is None else int8.dequantise(kept[name], scale)


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
    """The same views, the backbone's part of them read from the cache: (features of one image, target)."""

    def __init__(self, rows: Rows, views: int, cache: FeatureCache, model: Any, windows: Windows | None = None) -> None:
        self.rows, self.views, self.cache, self.windows = rows, views, cache, windows
        (self.after, self.reads_image), self.patch = model.reads(), model.spec.patch_size
        self.names = {"target", *(name + end for name in map(name_of, self.after) for end in ("", SCALE))}
        height, width = rows[0, 0][0].shape[-2:]
        self.size, self.pad = (height, width), model.pad

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> tuple[CachedFeatures, Tensor]:
        epoch, index = key
        kept = self.cache.read(epoch % self.views * len(self.rows) + index, self.names)
        states = tuple(unpacked(name_of(i), kept)[None] for i in self.after)
        # The image is made anew where the adapter reads it: it takes more room than features, and less time.
        image = self.rows[epoch % self.views, index][0][None] if self.reads_image else None
        seen = CachedFeatures(states, self.after, self.size, self.patch, image, self.pad)
        target = kept["target"].long() if kept["target"].dtype == torch.uint8 else kept["target"]
        if self.windows is None:
            return seen, target
        place = self.windows.draw(epoch, index)
        return self.windows.cut(seen, place), self.windows.cut_target(target, place)

    def collate(self, samples: list[tuple[CachedFeatures, Tensor]]) -> tuple[CachedFeatures, Tensor]:
        """Samples -> (what the model takes in place of images, targets)."""
        return CachedFeatures.join([seen for seen, _ in samples]), stacked([target for _, target in samples])


def compact(samples: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Class ids take one byte each where they fit."""
    targets = [s["target"] for s in samples]
    if all(t.dtype == torch.int64 and t.numel() and t.min() >= 0 and t.max() < 256 for t in targets):
        return [{**s, "target": s["target"].to(torch.uint8)} for s in samples]
    return samples


def key_of(rows: Any, size: tuple[int, ...], model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """What the features are made of: any other value makes other features."""
    return {
        "backbone": checksum(model.vit.backbone),
        "data": content.digest(rows.data),
        "reading": rows.reading(),
        "transform": repr(rows.transform),
        "size": list(size),
        "seed": args.seed,
        "views": args.views,
        "after": list(model.reads()[0]),
        "dtype": args.cache_dtype,
        **({"group": int8.GROUP} if args.cache_dtype == "int8" else {}),
        "pad": model.pad,
    }


def opened(folder: str, samples: int, key: dict[str, Any]) -> FeatureCache:
    """Open the cache of this key, or a whole one that is like it and holds more blocks than are asked for."""
    path = Path(folder) / "cache.json"
    after = json.loads(path.read_text()).get("after") if path.is_file() else None
    if after and set(after) > set(key["after"]):
        larger = FeatureCache(folder, samples, {**key, "after": after})
        if not larger.missing():
            return larger
    return FeatureCache(folder, samples, key)


def kept_of(seen: CachedFeatures, dtype: str) -> dict[str, Tensor]:
    """Features of a batch -> what is kept of them, on the CPU."""
    each = (packed(name_of(i), tokens, dtype) for i, tokens in zip(seen.after, seen.states))
    return {name: tensor.cpu() for kept in each for name, tensor in kept.items()}


def extracted(
    wanted: range, rows: Rows, model: Any, accelerator: Accelerator, args: argparse.Namespace
) -> Iterator[tuple[list[Any], CachedFeatures]]:
    """Run the backbone on the next of the ``wanted`` samples; yields batches of them, and their features.

    One batch, or with ``--offload`` several, the same ones, so that each block is copied to the device once.
    """
    size = args.batch_size
    wanted = wanted[: size * batches_at_once(size) if args.offload else size]
    batches = [[rows[divmod(i, len(rows))] for i in wanted[k : k + size]] for k in range(0, len(wanted), size)]
    images = [sent(torch.stack([image for image, _ in batch]), accelerator.device) for batch in batches]
    yield from zip(batches, extract_each(model, images), strict=True)


def batches_at_once(size: int) -> int:
    """Return how many batches of this size share a pass of an offloaded backbone."""
    return max(1, TOGETHER // size)


def fill(cache: FeatureCache, rows: Rows, model: Any, accelerator: Accelerator, args: argparse.Namespace) -> int:
    """Make what is missing and return how many samples that were, on all processes.

    The number of a shard says whose it is, so that processes need not know how far the others are.
    """
    made, shards = 0, cache.shards()
    for number in range(accelerator.process_index, len(shards), accelerator.num_processes):
        if cache.is_whole(number):
            continue
        samples = cache.begun(number)
        while len(samples) < len(shards[number]):
            for batch, seen in extracted(shards[number][len(samples) :], rows, model, accelerator, args):
                first, states = len(samples), kept_of(seen, args.cache_dtype)
                for row, (_, target) in enumerate(batch):
                    own = {name: tokens[row].clone() for name, tokens in states.items()}
                    samples.append({**own, "target": torch.as_tensor(target)})
                samples[first:] = compact(samples[first:])
                made += len(batch)
                cache.keep(number, first, samples[first:])
        cache.write(number, samples)
    return sum(gather_object([made]))


def cached(rows: Rows, model: Any, accelerator: Accelerator, args: argparse.Namespace, windows: Any = None) -> Cached:
    """Fill the cache, or what is missing of it, and return the rows that read it, cut to ``windows`` if given.

    Raises ``ValueError`` where an adapter needs the backbone to run, or the cache is of another backbone, set,
    transform or size.
    """
    image, _ = check_recordable("--cache-features is", rows, model)
    if getattr(rows, "transform", None) is None:
        raise ValueError("--cache-features is for data whose transform can be told: segment, classify, depth")
    model = on_device(model, accelerator, args)
    key = key_of(rows, tuple(image.shape[-2:]), model, args)
    cache = opened(args.cache_features, args.views * len(rows), key)
    started = time.time()
    made = fill(cache, rows, model, accelerator, args)
    accelerator.wait_for_everyone()
    seconds, found = time.time() - started, cache.samples - made
    rate = f"{seconds:.1f} s for {made} of them, " if made else ""
    accelerator.print(
        f"features of {len(rows)} images x {args.views} views in {args.cache_features}: {rate}{found} were there, "
        f"{cache.bytes() / 2**20:.0f} MiB"
    )
    saved = args.steps * args.accumulate * args.batch_size * accelerator.num_processes - made
    if made and saved > 0:
        accelerator.print(f"so the backbone need not run for {saved} samples, about {saved * seconds / made:.0f} s")
    return Cached(rows, args.views, cache, model, windows)
