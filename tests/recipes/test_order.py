"""Which sample comes when: streams give what files give, once each, however many read them and wherever they start."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from adaptkit.core.view import Source
from recipes.data import SegmentationData, open_dataset
from recipes.order import Rows, Stream, shuffled

HALF = Source(mean=(0.5,) * 3, std=(0.5,) * 3)


class Numbers(Rows):
    """The number in a row, and a random one that belongs to its place."""

    def make(self, row):
        return row["n"], torch.rand(())


def numbers(count, shards):
    data = datasets.Dataset.from_dict({"n": list(range(count))})
    return data.to_iterable_dataset(num_shards=shards)


def read(count, shards, batches, batch=2, **where):
    """The first ``batches`` batches of a reader, as lists of numbers."""
    stream = Stream(Numbers(numbers(count, shards), seed=1), batch, **where)
    loader = iter(DataLoader(stream, batch, num_workers=where.get("workers", 0)))
    return [next(loader)[0].tolist() for _ in range(batches)]


@pytest.fixture
def pictures(tmp_path):
    """Three Parquet files of two pictures with masks each."""
    rng = np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    for part in range(3):
        rows = {"image": [], "mask": []}
        for _ in range(2):
            rows["image"].append(Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)))
            rows["mask"].append(Image.fromarray(rng.integers(0, 3, (24, 32), dtype=np.uint8)))
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / f"part-{part}.parquet"))
    return str(tmp_path / "part-*.parquet")


def test_a_stream_without_shuffling_gives_the_samples_of_the_file_augmentation_included(pictures):
    mapped = SegmentationData(open_dataset(pictures, "train"), (16, 16), HALF, seed=3, train=True)
    streamed = SegmentationData(open_dataset(pictures, "train", streaming=True), (16, 16), HALF, 3, train=True)
    seen = iter(Stream(streamed, 1))
    for epoch in range(2):
        for index in range(6):
            for a, b in zip(next(seen), mapped[epoch, index], strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize(("shards", "workers"), [(4, 1), (3, 1), (8, 2), (3, 2)])
def test_ranks_and_workers_share_a_stream_without_a_row_twice(shards, workers):
    """Dividing into whole shards or not: each epoch is every row once."""
    seen = []
    for rank in range(2):
        for worker in range(workers):
            stream = Stream(
                Numbers(numbers(24, shards)), 1, start=worker, rank=rank, ranks=2, workers=workers, endless=False
            )
            seen += [n for n, _ in stream]
    assert sorted(seen) == list(range(24))


@pytest.mark.parametrize("start", [1, 2, 5])
def test_a_resumed_stream_goes_on_where_it_was_with_workers_too(start):
    for workers in (0, 2):
        whole = read(10, 4, 8, rank=1, ranks=2, workers=workers)
        assert read(10, 4, 8 - start, rank=1, ranks=2, workers=workers, start=start) == whole[start:]


def test_a_shuffled_stream_has_its_own_order_each_epoch_and_repeats_it():
    data = shuffled(numbers(12, 3), seed=5, buffer=4)
    first = iter(Stream(Numbers(data), 1))
    epochs = [[next(first)[0] for _ in range(12)] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert list(range(12)) != epochs[0] != epochs[1]
    second = iter(Stream(Numbers(shuffled(numbers(12, 3), seed=5, buffer=4)), 1, start=7))
    assert [next(second)[0] for _ in range(5)] == epochs[0][7:]


def test_a_stream_too_short_for_its_readers_says_so():
    with pytest.raises(ValueError, match=r"no row for reader 3 of 4; use fewer processes or workers"):
        next(iter(Stream(Numbers(numbers(2, 1)), 1, rank=3, ranks=4)))
