"""What test_killed.py runs: ``python killing.py RANKS DATA OUT SEED``.

The recipe is imported once and each run is a fork of this process, one for each rank, so that it can be killed often.
"""

import os
import random
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import datasets  # noqa: F401  here, so that no fork imports it anew
import timm  # noqa: F401
import torch
from runs import TINY

from recipes import engine, segment
from recipes.checkpoints import checkpoints

STEPS = 10


def run(ranks, data, out, to_be_killed=False):
    """Start the ranks of one run. Dropout, augmentation and BatchNorm are on: what a resumed run could get wrong.

    One that is to be killed waits for it before its last step, however busy the machine and late the kill.
    """
    argv = ["--train", data, "--val", data, "--num-classes", "3", *TINY, "--size", "32", "48",
            "--batch-size", "1", "--adapter", "lora", "vit-adapter", "--steps", str(STEPS), "--save-every", "1",
            "--adapter-options", '{"lora": {"lora_dropout": 0.1}, "vit-adapter": {"conv_inplane": 8}}',
            "--ema", "0.9", "--out", str(out), *(["--resume"] if checkpoints(out) else [])]  # fmt: skip
    save = engine.save_checkpoint

    def save_and_wait(accelerator, out, step, *more):
        save(accelerator, out, step, *more)
        if to_be_killed and step == STEPS - 1:
            signal.pause()

    engine.save_checkpoint = save_and_wait
    try:
        return started(ranks, argv)
    finally:
        engine.save_checkpoint = save


def started(ranks, argv):
    """Fork a process for each rank, which runs the recipe."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port}  # fmt: skip
            os.environ.update({k: str(v) for k, v in where.items()} if ranks > 1 else {})
            try:
                segment.main(argv)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        pids.append(pid)
    return pids


def wait(pids):
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * len(pids)


def kill_after(pids, out, step, delay):
    """Kill them some time after the checkpoint of that step; the run may be past it, and have deleted it, when we look."""
    while not any(int(c.name.removeprefix("step-")) >= step for c in checkpoints(out)):
        assert not any(os.waitpid(pid, os.WNOHANG)[0] for pid in pids), f"it ended before checkpoint {step} was there"
        time.sleep(0.002)
    time.sleep(delay)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def main(ranks, data, out, seed):
    whole, cut = Path(out, "whole"), Path(out, "cut")
    wait(run(ranks, data, whole))
    shutil.rmtree(cut, ignore_errors=True)
    chosen = random.Random(seed)
    for step in sorted(chosen.sample(range(1, STEPS - 2), 3)):
        delay = chosen.uniform(0.0, 0.1)
        print(f"seed {seed}: kill {delay:.3f} s after checkpoint {step}", flush=True)
        kill_after(run(ranks, data, cut, to_be_killed=True), cut, step, delay)
        assert not (cut / "adapter").exists(), "it ended before it was killed"
    wait(run(ranks, data, cut))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
