"""Small files of every kind that is served, on one tiny backbone, written once."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS

import adaptkit
from adaptkit.networks import build

STATISTICS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
KINDS = {
    "seg": ([("vit-adapter", {"conv_inplane": 8, "injector": False})], ("linear", {"num_classes": 7}),
            {"task": "semantic-segmentation", "size": 40, "classes": [f"class {i}" for i in range(7)]}),
    "depth": (["sfp"], ("depth", {"max_depth": 10.0}), {"task": "depth-estimation", "size": 40}),
    "class": ([], ("classifier", {"num_classes": 5}), {"task": "image-classification", "size": 32}),
    "lora": (["lora"], ("linear", {"num_classes": 4}), {"task": "semantic-segmentation", "size": 40}),
}  # fmt: skip
DETECTOR = {"network": "faster-rcnn", "categories": [{"id": 3, "name": "cup"}, {"id": 5, "name": "pen"}], "size": [40, 80],
            "width": 16, "anchor": 4.0, **STATISTICS}  # fmt: skip


def backbone():
    return HOSTS["timm-vit"].build()


def stirred(model, seed):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=g))
    return model.eval()


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Folder of each file, by name."""
    folder = tmp_path_factory.mktemp("served")
    for seed, (name, (adapters, head, said)) in enumerate(KINDS.items()):
        stirred(adaptkit.attach(backbone(), *adapters, head=head), seed).save(folder / name, **STATISTICS, **said)
    stirred(build(adaptkit.attach(backbone(), "sfp"), DETECTOR), 9).save(folder / "detector")
    return {name: folder / name for name in (*KINDS, "detector")}


@pytest.fixture(scope="session")
def alone(files):
    """What each file is without a server."""
    return {name: adaptkit.from_pretrained(file, backbone=backbone()) for name, file in files.items()}


@contextlib.contextmanager
def serving(folder, *words):
    """The command in a process of its own: yields its address. On SIGTERM it must end in order, without a response that
    had to be cut off when the time for a graceful end was over."""
    root = Path(adaptkit.__file__).parents[1]
    command = [sys.executable, "-W", "ignore", "-m", "adaptkit", "serve", *map(str, words), "--port", "0", "--threads", "1",
               "--device", "cpu"]  # fmt: skip
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "GRADIO_TEMP_DIR": str(folder / "gradio"),
    }
    said = folder / "stderr.txt"
    with (
        said.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
    ):
        try:
            line = process.stdout.readline()
            assert " on http://127.0.0.1:" in line, line + said.read_text()
            yield line.split(" on ")[1].split(" ")[0]
            process.send_signal(signal.SIGTERM)
            assert process.wait(120) == 0
        finally:
            process.kill()
    assert "timeout graceful shutdown exceeded" not in said.read_text()
