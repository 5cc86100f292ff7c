"""What test_together.py runs: ``python every_recipe.py JOBS OUT``, JOBS being ``{recipe: arguments}`` in JSON.

The libraries are imported once; each rank of each recipe is a fork of this process in the environment that ``torchrun``
makes. What a rank says goes to ``OUT/<recipe>-<rank>.txt``, its exit status to its last line.
"""

import importlib
import json
import os
import socket
import sys
import time
import traceback
from pathlib import Path

import datasets  # noqa: F401  here, so that no fork imports it anew
import timm  # noqa: F401
import torch
import torchmetrics  # noqa: F401


def rank_of(recipe, argv, rank, port, said):
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}  # fmt: skip
    os.environ.update({k: str(v) for k, v in where.items()})
    handle = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    status = 0
    try:
        module = importlib.import_module(f"recipes.{recipe}")
        if recipe == "pretrain_mae":
            sys.argv = [recipe, *argv]
            module.main()
        else:
            module.main(argv)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(1, f"\nstatus {status}\n".encode())
    # gloo may break off a peer's last barrier where a process ends at once: neither ends before the other is through.
    said.with_suffix(".through").touch()
    other = said.with_name(f"{recipe}-{1 - rank}.through")
    while not other.exists():
        time.sleep(0.01)
    os._exit(status)


def both_ranks(recipe, argv, out):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    pids = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            rank_of(recipe, argv, rank, port, Path(out, f"{recipe}-{rank}.txt"))
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, arguments in json.loads(Path(sys.argv[1]).read_text()).items():
        both_ranks(name, arguments, sys.argv[2])
