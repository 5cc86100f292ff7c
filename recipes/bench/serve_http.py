"""Requests over HTTP on loopback: throughput and latency of ``adaptkit serve``, with and without shared passes.

    python -m recipes.bench.serve_http                      # demo backbone, 8 clients, 2 tasks
    python -m recipes.bench.serve_http --backbone vit_small_patch16_224 --size 224 --clients 16

Each row is a server in a process of its own. Clients ask one after the other for a task of their own turn, from a few
images of one size; before anything is timed every image is asked for once from all clients, so that what is tried only
once per shape is done. The answers are compared with those of the first row: they are the same bytes.
"""

from __future__ import annotations

import argparse
import http.client
import io
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import adaptkit
from adaptkit.create import create_backbone

from .measure import machine

TASKS = {"seg": (("sfp",), ("fpn", {"num_classes": 9})), "depth": (("sfp",), ("depth", {"max_depth": 10.0}))}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="demo", help="demo, a timm name or a folder; timm's come with weights")
    parser.add_argument("--size", type=int, default=128, help="of the images, and of what the backbone sees")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=25, help="of each client")
    parser.add_argument("--images", type=int, default=16, help="different ones")
    parser.add_argument("--batching", nargs="+", default=["off", "exact"], choices=["off", "exact", "close"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args(argv)


def files(args: argparse.Namespace, folder: Path) -> list[str]:
    """Write an adapter for each task; returns the words that name them."""
    torch.manual_seed(0)
    for name, (adapters, head) in TASKS.items():
        model = adaptkit.attach(create_backbone(args.backbone), *adapters, head=head)
        task = {"seg": "semantic-segmentation", "depth": "depth-estimation"}[name]
        model.eval().save(folder / name, task=task, size=args.size)
    return [f"{name}={folder / name}" for name in TASKS]


def pictures(args: argparse.Namespace) -> list[bytes]:
    """Noise is as dear as a photograph."""
    random, made = np.random.default_rng(0), []
    for _ in range(args.images):
        out = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (args.size, args.size, 3), dtype=np.uint8)).save(out, "PNG")
        made.append(out.getvalue())
    return made


def client(port: int, asked: list[tuple[str, bytes]]) -> tuple[list[float], list[bytes]]:
    """Ask one after the other; returns seconds and answers."""
    seconds, answers = [], []
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    for task, body in asked:
        began = time.perf_counter()
        connection.request("POST", f"/predict/{task}", body, {"Accept": "image/png", "Content-Type": "image/png"})
        response = connection.getresponse()
        answers.append(response.read())
        seconds.append(time.perf_counter() - began)
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {answers[-1][:200]!r}")
    connection.close()
    return seconds, answers


def measured(args: argparse.Namespace, words: list[str], batching: str, images: list[bytes]) -> tuple[str, list[bytes]]:
    """Start a server, ask, stop it; returns a row and the answers."""
    command = [sys.executable, "-W", "ignore", "-m", "adaptkit", "serve", *words, "--backbone", args.backbone, "--port",
               "0", "--batching", batching, "--threads", str(args.threads), "--device", "cpu"]  # fmt: skip
    names = list(TASKS)
    turns = [
        [(names[(c + i) % len(names)], images[(c * 5 + i) % len(images)]) for i in range(args.requests)]
        for c in range(args.clients)
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            said = server.stdout.readline()
            if " on http://" not in said:
                raise RuntimeError(f"the server did not start: {said}")
            port = int(said.split(" on ")[1].split(" ")[0].rpartition(":")[2])
            with ThreadPoolExecutor(args.clients) as pool:
                list(pool.map(lambda turn: client(port, turn), turns))  # warm: every shape of a batch is tried
                before, began = counted(port), time.perf_counter()
                done = list(pool.map(lambda turn: client(port, turn), turns))
                took, after = time.perf_counter() - began, counted(port)
            server.send_signal(signal.SIGTERM)
            server.wait(60)
        finally:
            server.kill()
    seconds = sorted(s for times, _ in done for s in times)
    p50, p95 = statistics.median(seconds), seconds[int(0.95 * (len(seconds) - 1))]
    cells = (
        batching,
        f"{len(seconds) / took:.1f}",
        f"{1e3 * p50:.0f}",
        f"{1e3 * p95:.0f}",
        after - before,
        len(seconds),
    )
    return "| " + " | ".join(map(str, cells)) + " |", [a for _, answers in done for a in answers]


def counted(port: int) -> int:
    """Return how often the backbone has run."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    return round(sum(float(line.split()[-1]) for line in lines if line.startswith("adaptkit_passes_total{")))


def main(argv: list[str] | None = None) -> None:
    """Print one table."""
    args = arguments(argv)
    images, rows, first = pictures(args), [], None
    with tempfile.TemporaryDirectory() as folder:
        words = files(args, Path(folder))
        for batching in args.batching:
            row, answers = measured(args, words, batching, images)
            first = first or answers
            if batching != "close" and answers != first:
                raise RuntimeError(f"--batching {batching} gives other bytes than {args.batching[0]}")
            rows.append(row)
    print(
        f"{args.backbone}, {' and '.join(TASKS)}, {args.size} pixels, {args.clients} clients; "
        f"{machine(args.threads, 'cpu')}\n"
    )
    print("| batching | requests per second | p50, ms | p95, ms | passes of the backbone | requests |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
