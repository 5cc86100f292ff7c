"""What test_killed.py runs for the cache of features: ``python killing_cache.py DATA OUT SEED``.

A run is killed while it fills its cache: by itself before a chosen batch, so that what must be kept is known, and from
outside at a random moment. One rank, then two.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch
from killing import started, wait
from runs import TINY

from adaptkit import AdaptedModel
from recipes import engine

BATCH, SHARD, VIEWS = 2, 64, 14  # of 5 images: 70 samples, shards of 64 and 6


def run(ranks, data, out, cache, last_calls=None):
    """Start the ranks of one run, which ends where training would begin.

    Rank r kills itself when it asks the backbone for the ``last_calls[r]``-th time.
    """
    argv = ["--train", data, "--val", data, "--num-classes", "3", *TINY, "--size", "32", "48", "--adapter",
            "none", "--head", "linear", "--batch-size", str(BATCH), "--steps", "1", "--save-every", "0", "--views",
            str(VIEWS), "--cache-features", str(cache), "--overwrite", "--out", str(out)]  # fmt: skip
    record, train, calls = AdaptedModel.extract, engine.train, []

    def counted(self, image):
        calls.append(1)
        if len(calls) == (last_calls or {}).get(int(os.environ.get("RANK", 0))):
            os.kill(os.getpid(), signal.SIGKILL)
        return record(self, image)

    def ended(*_):
        sys.stdout.flush()
        os._exit(0)

    AdaptedModel.extract, engine.train = counted, ended
    try:
        return started(ranks, argv)
    finally:
        AdaptedModel.extract, engine.train = record, train


def kept(cache):
    """Samples on the disk, in whole shards and in parts of others."""
    whole = {f.stem for f in cache.glob("features-*.safetensors")}
    parts = [f for f in cache.glob("*.part") if f.name[:14] not in whole]
    return sum(min(SHARD, 5 * VIEWS - SHARD * int(name[-5:])) for name in whole) + BATCH * len(parts)


def killed(pids):
    """Kill what is left of a run after one of its ranks is dead."""
    assert os.WIFSIGNALED(os.wait()[1])
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def main(data, out, seed):
    out, chosen = Path(out), random.Random(seed)
    wait(run(1, data, out / "run", out / "whole"))

    cut = out / "cut"
    killed(run(1, data, out / "run", cut, {0: 20}))
    assert kept(cut) == 19 * BATCH, f"{kept(cut)} samples are kept of 19 batches"
    pids = run(1, data, out / "run", cut, {0: 16})  # at the latest before its last batch
    while kept(cut) == 19 * BATCH:
        ended = os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT)  # looked at, not yet waited for
        assert not ended or kept(cut) > 19 * BATCH, "it ended before it kept anything"
        time.sleep(0.002)
    delay = chosen.uniform(0.0, 0.1)
    time.sleep(delay)
    os.kill(pids[0], signal.SIGKILL)  # it may have killed itself by now, which is as good
    assert os.WIFSIGNALED(os.waitpid(pids[0], 0)[1])
    print(f"seed {seed}: killed {delay:.3f} s after sample {19 * BATCH}; {kept(cut)} kept", flush=True)
    wait(run(1, data, out / "run", cut))

    two = out / "two"
    killed(run(2, data, out / "run", two, {0: 20, 1: 3}))
    assert 2 * BATCH <= kept(two) <= (19 + 2) * BATCH
    print(f"two ranks killed; {kept(two)} kept", flush=True)
    wait(run(2, data, out / "run", two))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
