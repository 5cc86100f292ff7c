"""What two processes do for test_engine.py: ``torchrun --nproc_per_node 2 two_ranks.py DATA OUT``."""

import contextlib
import itertools
import json
import sys
from argparse import Namespace
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from runs import TINY

from recipes import batches, engine, segment, validation
from recipes.order import Rows
from recipes.task import Task


class Numbers(Rows):
    def make(self, row):
        return torch.tensor(float(row["n"])), row["n"]


class Seen:
    """A metric that remembers what it was given."""

    def __init__(self):
        self.images = []

    def update(self, prediction, target):
        assert [int(p) for p in prediction] == [int(t) for t in target]
        self.images += [int(t) for t in target]

    def compute(self):
        return {"count": len(self.images)}


def counted(accelerator, count, batch, streaming, ragged):
    """Which images an evaluation on two ranks counts, and how often."""
    data = datasets.Dataset.from_dict({"n": list(range(count))})
    rows = Numbers(data.to_iterable_dataset(num_shards=2) if streaming else data)
    args = Namespace(batch_size=batch, workers=0, streaming=streaming, shard=False)
    seen = Seen()
    task = Task("t", "t", "count", (), None, None, None, lambda model, batch, args: batch, lambda args: seen, ragged)
    loader = batches.validation_batches(rows, task, accelerator, args)
    validation.evaluate(task, torch.nn.Identity(), loader, accelerator, args)
    return sorted(seen.images)


def run(argv):
    engine.run(segment.TASK, segment.parse(argv), last=False)


class Stopped(Exception):
    """Stands for a kill."""


def main(data, out):
    common = ["--train", data, "--val", data, "--num-classes", "3", *TINY, "--size", "32", "48",
              "--batch-size", "1", "--adapter", "metaformer", "--adapter-options", '{"width": 8}', "--head", "linear",
              "--steps", "3", "--save-every", "1", "--ema", "0.9",
              "--streaming", "--shuffle-buffer", "3"]  # fmt: skip
    run([*common, "--out", f"{out}/whole"])
    run([*common, "--out", f"{out}/sharded", "--shard"])
    calls, loss = [], segment.TASK.loss

    def until(*args):
        calls.append(0)
        if len(calls) == 3:
            raise Stopped
        return loss(*args)

    object.__setattr__(segment.TASK, "loss", until)
    with contextlib.suppress(Stopped):
        run([*common, "--out", f"{out}/cut"])
    object.__setattr__(segment.TASK, "loss", loss)
    assert len(calls) == 3
    run([*common, "--out", f"{out}/cut", "--resume"])
    accelerator = Accelerator()
    cases = {
        f"{n} images, batches of {b}, streaming {s}, ragged {r}": counted(accelerator, n, b, s, r)
        for n, b, s, r in itertools.product((5, 8), (1, 3), (False, True), (False, True))
    }
    Path(out, f"counted-{accelerator.process_index}.json").write_text(json.dumps(cases))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
