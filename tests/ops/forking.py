"""What test_forks.py runs: ``python forking.py CHILDREN SECONDS`` forks while threads infer, and prints who hung.

A child has one thread, for OpenMP's own do not survive a fork. A child that has not ended after so many seconds hangs.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback

import torch

import adaptkit
from adaptkit.create import create_backbone
from adaptkit.ops import pool

TOGETHER = 10


def main(children, seconds):
    torch.set_num_threads(1)
    pool.LARGE = 2**10  # so that small results take the lock too
    model = adaptkit.attach(create_backbone("demo", pretrained=False), "vit-adapter").eval()
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def infer():
        return model(image).maps[0]

    expected, stop = infer().clone(), threading.Event()

    def serve():
        while not stop.is_set():
            infer()
            for _ in range(100):
                pool.empty((2**12,), torch.float32)

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    hung = failed = 0
    for _ in range(children // TOGETHER):
        pids = [child(infer, expected) for _ in range(TOGETHER)]
        deadline = time.monotonic() + seconds
        for pid in pids:
            while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < deadline:
                time.sleep(0.01)
            if not ended[0]:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                hung += 1
            failed += bool(ended[0] and ended[1])
    stop.set()
    for thread in threads:
        thread.join()
    print(json.dumps({"hung": hung, "failed": failed}))


def child(infer, expected):
    pid = os.fork()
    if pid:
        return pid
    try:
        torch.set_num_threads(1)
        torch.testing.assert_close(infer(), expected)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
