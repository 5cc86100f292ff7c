"""Features of a frozen backbone on the disk: computed once, read in every epoch after.

A cache is a folder of safetensors shards, read by memory map. ``cache.json`` says what it was made of (backbone,
transform, size, ...); opened for anything else it is an error, so that no stale feature is ever read.

Each file is written whole or not at all. While a shard is being made, its samples are also kept in parts, a file for
each call of :meth:`FeatureCache.keep`; the shard replaces them. So a run that is killed loses one call's samples, the
files stay few, and the bytes at the end are those of a run that was never killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from adaptkit.hub.digest import stored
from adaptkit.hub.write import check_writable, write_atomic

__all__ = ["FeatureCache", "checksum"]

FORMAT = 1
DIGEST = re.compile("[0-9a-f]{32,}")


def checksum(module: nn.Module) -> str:
    """Return a hash of every parameter and buffer: two backbones of one hash give the same features."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in stored(tensor):  # of a quantised one, several
            digest.update(part.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class FeatureCache:
    """``samples`` samples, each a dictionary of tensors, in shards of ``shard``."""

    def __init__(self, folder: str | os.PathLike[str], samples: int, key: Mapping[str, Any], shard: int = 64) -> None:
        """Open a folder, or begin one.

        Args:
            folder: where the shards are.
            samples: how many there will be.
            key: JSON values that say what the features were made of.
            shard: samples in one file.

        Raises ``ValueError`` where the folder was made of something else, naming what differs.
        """
        self.folder, self.samples, self.shard = check_writable(folder), samples, shard
        said = json.loads(json.dumps({"format": FORMAT, "samples": samples, "shard": shard, **key}))
        path = self.folder / "cache.json"
        if path.is_file():
            found = json.loads(path.read_text())
            for name in sorted(said.keys() | found.keys()):
                if said.get(name) != found.get(name):
                    raise ValueError(
                        f"the features in {self.folder} were made with {_difference(name, found, said)}: "
                        "choose another folder, or delete this one"
                    )
        else:
            write_atomic(path, (json.dumps(said, indent=2, sort_keys=True) + "\n").encode())
        self._drop_parts()  # of a run that was killed when it had written the shard
        self._open: dict[int, Any] = {}

    def shards(self) -> list[range]:
        """Return the samples of each shard."""
        return [range(i, min(i + self.shard, self.samples)) for i in range(0, self.samples, self.shard)]

    def is_whole(self, shard: int) -> bool:
        """Whether this shard is written."""
        return self._path(shard).is_file()

    def missing(self) -> list[int]:
        """Return the shards that are still to be written."""
        return [i for i in range(len(self.shards())) if not self.is_whole(i)]

    def keep(self, shard: int, first: int, samples: Sequence[Mapping[str, Tensor]]) -> None:
        """Write some samples of an unfinished shard, from its ``first`` on, for :meth:`begun` to find after a kill.

        A shard that they complete is left to :meth:`write`.
        """
        if first + len(samples) < len(self.shards()[shard]):
            write_atomic(self.folder / f"{self._name(shard)}-{first:05d}.part", to_bytes(_stacked(samples)))

    def begun(self, shard: int) -> list[dict[str, Tensor]]:
        """Return the first samples of an unfinished shard, as far as they were kept without a gap."""
        samples: list[dict[str, Tensor]] = []
        while True:
            try:
                part = load_file(self.folder / f"{self._name(shard)}-{len(samples):05d}.part")
            except FileNotFoundError:
                return samples
            samples += [dict(zip(part, rows)) for rows in zip(*part.values())]

    def write(self, shard: int, samples: Sequence[Mapping[str, Tensor]]) -> None:
        """Write one shard, in place of what was kept of it; ``ValueError`` for another number of samples."""
        if len(samples) != len(self.shards()[shard]):
            raise ValueError(f"shard {shard} has {len(self.shards()[shard])} samples, {len(samples)} were given")
        write_atomic(self._path(shard), to_bytes(_stacked(samples)))
        self._drop_parts()

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Read one sample."""
        return self.read(index)

    def read(self, index: int, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Read one sample, or these of its tensors alone."""
        shard, row = divmod(index, self.shard)
        if shard not in self._open:
            if not self._path(shard).is_file():
                raise IndexError(
                    f"sample {index} is not in {self.folder} yet: {len(self.missing())} shards are missing"
                )
            self._open[shard] = safe_open(self._path(shard), "pt")
        file = self._open[shard]
        return {name: file.get_slice(name)[row] for name in file.keys() if names is None or name in names}  # noqa: SIM118

    def bytes(self) -> int:
        """Return the size on the disk."""
        return sum(f.stat().st_size for f in self.folder.glob("*.safetensors"))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a worker process opens its own

    def _drop_parts(self) -> None:
        """Delete the parts of shards that are whole."""
        for part in self.folder.glob("features-*.part"):
            if part.with_name(part.name.rpartition("-")[0] + ".safetensors").is_file():
                part.unlink(missing_ok=True)

    def _name(self, shard: int) -> str:
        return f"features-{shard:05d}"

    def _path(self, shard: int) -> Path:
        return self.folder / f"{self._name(shard)}.safetensors"


def _difference(name: str, found: Mapping[str, Any], said: Mapping[str, Any]) -> str:
    """What was so then and is not so now; a reader can tell two checksums apart by their first digits."""
    if name not in found:
        return f"an earlier version, which did not record {name}"
    then, now = found[name], said.get(name)
    if isinstance(then, str) and isinstance(now, str) and DIGEST.fullmatch(then) and DIGEST.fullmatch(now):
        return f"{name} whose checksum was {then[:8]}, now it is {now[:8]}"
    return f"{name}={then!r}, now it is {name}={now!r}"


def _stacked(samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Samples -> tensors of all of them; where their types differ, of the wider one."""
    return {name: torch.stack([s[name].detach().cpu() for s in samples]) for name in samples[0]}
