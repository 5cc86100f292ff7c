"""Which sample comes when: position alone decides, so that a resumed run is the run that was never stopped."""

from __future__ import annotations

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import count
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from adaptkit.pictures import CHANNELS, read_row

from .summary import Summary


class Rows(Dataset, ABC):
    """Rows of a ``datasets.Dataset`` or ``IterableDataset``, made into samples.

    What is random in a sample depends on seed, epoch and index: not on workers, ranks or the steps of this run.
    """

    summary: Summary | None = None  #: what the look before training found
    channels: int = CHANNELS  #: of an image

    def __init__(self, data: Any, seed: int = 0, name: str = "") -> None:
        self.data, self.seed, self.name = undecoded(data), seed, name

    @abstractmethod
    def make(self, row: dict[str, Any]) -> Any:
        """Row, pictures read (``pictures.Picture``) -> sample, e.g. (image (3, H, W), target).

        Random numbers come from torch's state.
        """

    def reading(self) -> dict[str, Any]:
        """Say what :meth:`make` does to a row beside its ``transform``, as JSON: another value makes other samples."""
        return {}

    def read(self, row: dict[str, Any], index: int, pixels: bool = True) -> dict[str, Any]:
        """Read the pictures of the row, or their sizes alone; an error names the set, the row and the column."""
        if not isinstance(row, dict):
            return row
        return read_row(row, f"{self.name}: row {index}" if self.name else f"row {index}", pixels, self.channels)

    def sample(self, row: dict[str, Any], epoch: int, index: int) -> Any:
        """Make the sample that is at this index in this epoch."""
        row = self.read(row, index)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(folded((self.seed * 1_000_003 + epoch) * 1_000_003 + index))
            return self.make(row)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: int | tuple[int, int]) -> Any:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        return self.sample(self.data[index], epoch, index)


class Steps(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index): shuffled epochs laid end to end, starting at any step. Position decides everything."""

    def __init__(self, samples: int, batch: int, start: int, stop: int, seed: int) -> None:
        self.samples, self.batch, self.start, self.stop, self.seed = samples, batch, start, stop, seed
        self.batch_size, self.drop_last = batch, False  # accelerate reads both when it shares batches over ranks

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, torch.empty(0)
        for step in range(self.start, self.stop):
            batch = []
            for position in range(step * self.batch, (step + 1) * self.batch):
                if position // self.samples != epoch:
                    epoch = position // self.samples
                    generator = torch.Generator().manual_seed(folded(self.seed * 1_000_003 + epoch))
                    order = torch.randperm(self.samples, generator=generator)
                batch.append((epoch, int(order[position % self.samples])))
            yield batch


class Stream(IterableDataset):
    """Samples of an ``IterableDataset``, read as they come: for data that is larger than the disk.

    The stream is split over ``ranks`` times ``workers`` readers by ``datasets.split_dataset_by_node``: whole shards
    where their number divides, else every reader keeps its rows out of all. A resumed run skips what was read,
    without decoding it; batch ``b`` of a rank always comes from its reader ``b % workers``.

    Args:
        rows: over an ``IterableDataset``, :func:`undecoded`, and :func:`shuffled` if it is to be.
        batch: samples per batch, as the ``DataLoader`` has it.
        start: the first batch of this rank.
        rank, ranks, workers: who reads; 0 workers (the main process) count as one.
        endless: epoch after epoch, for training; else one pass.
    """

    def __init__(
        self,
        rows: Rows,
        batch: int,
        start: int = 0,
        rank: int = 0,
        ranks: int = 1,
        workers: int = 0,
        endless: bool = True,
    ) -> None:
        self.rows, self.batch, self.start, self.endless = rows, batch, start, endless
        self.rank, self.ranks, self.workers = rank, ranks, max(1, workers)

    def __iter__(self) -> Iterator[Any]:
        from datasets.distributed import split_dataset_by_node

        info = get_worker_info()
        reader = ((info.id if info else 0) + self.start) % self.workers
        node, nodes = self.rank * self.workers + reader, self.ranks * self.workers
        skip = -(-(self.start - reader) // self.workers) * self.batch  # of this reader's batches before the start
        data = split_dataset_by_node(self.rows.data, node, nodes)
        for epoch in count() if self.endless else range(1):
            data.set_epoch(epoch)
            index = -1
            # iter(), for a plain loop in a worker would split the shards once more
            for index, rows in enumerate(data.iter(batch_size=1)):
                if skip > 0:
                    skip -= 1
                    continue
                yield self.rows.sample({k: v[0] for k, v in rows.items()}, epoch, index * nodes + node)
            if index < 0 and self.endless:
                raise ValueError(f"the stream has no row for reader {node} of {nodes}; use fewer processes or workers")


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Say what a worker of a ``DataLoader`` could not read as the main process says it: without its traceback."""
    try:
        yield
    except ValueError as error:
        wrapped, _, message = str(error).rpartition("\nValueError: ")
        if "DataLoader worker" not in wrapped:
            raise
        raise ValueError(message.strip()) from error


def folded(number: int, bits: int = 63) -> int:
    """Return a seed of so many bits: the number itself where it has no more, else a hash of it.

    torch takes 64 bits and numpy 32; a product of a large ``--seed`` has more.
    """
    if 0 <= number < 2**bits:
        return number
    return int.from_bytes(hashlib.sha256(str(number).encode()).digest()[:8], "big") % 2**bits


def undecoded(data: Any) -> Any:
    """Return the data with their images as they are stored.

    ``pictures`` reads them, for ``datasets`` does not say which row was torn; and skipping and renaming cost nothing.
    """
    import datasets

    for column, feature in (getattr(data, "features", None) or {}).items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(column, datasets.Image(decode=False))
    return data


def shuffled(data: Any, seed: int, buffer: int) -> Any:
    """Return the stream with its shards in another order each epoch, and its rows drawn from a buffer; 0: as it is."""
    return data.shuffle(seed=seed, buffer_size=buffer) if buffer else data
