"""The command in a process of its own: it answers, and on SIGTERM it ends in order."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import adaptkit
from adaptkit.cli import main

sys.path.insert(0, str(Path(__file__).parent))
from conftest import stirred

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
ROOT = Path(adaptkit.__file__).parents[1]


def test_the_command_answers_and_ends_on_sigterm(tmp_path):
    model = adaptkit.attach(adaptkit.demo_backbone(), "sfp", head=("linear", {"num_classes": 5}))
    stirred(model, 0).save(tmp_path / "seg", task="semantic-segmentation", size=32)
    noise = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    command = [sys.executable, "-W", "ignore", "-m", "adaptkit", "serve", "--backbone", "demo", f"seg={tmp_path / 'seg'}",
               "--port", "0", "--threads", "1", "--device", "cpu"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            said = process.stdout.readline()
            assert said.startswith("adaptkit: seg on http://127.0.0.1:"), said
            where = said.split(" on ")[1].split(" ")[0]
            body = (tmp_path / "photo.png").read_bytes()
            asked = urllib.request.Request(f"{where}/predict/seg", body, {"Accept": "image/png"})
            with urllib.request.urlopen(asked, timeout=60) as answer:
                mask = np.asarray(Image.open(answer))
            with urllib.request.urlopen(f"{where}/healthz", timeout=60) as answer:
                assert json.load(answer)["status"] == "ok"
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
    alone = adaptkit.from_pretrained(tmp_path / "seg", backbone="demo")
    assert np.array_equal(mask, alone.predict(tmp_path / "photo.png").mask)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["runs/seg"], "'runs/seg': give the task a name, e.g. seg=runs/seg"),
        (["a=x", "a=y"], "two files are named 'a': x and y"),
        (["a.b=x"], "a task cannot be served as 'a.b'"),
        ([], "nothing to serve"),
        (["a=x", "--max-megapixels", "0"], "limit pixels=0"),
        (["--allow-mount", "seg=x"], "that is a task; put it first"),
    ],
)
def test_a_mistake_is_one_line(words, why, capsys):
    assert main(["serve", "--port", "0", *words]) == 2
    said = capsys.readouterr().err
    assert why in said
    assert said.count("\n") == 1
