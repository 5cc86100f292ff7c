"""The command in a process of its own: it answers, and on SIGTERM it ends in order."""

import json
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import adaptkit
from adaptkit.cli import main

sys.path.insert(0, str(Path(__file__).parent))
from conftest import backbone, serving, stirred

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")


def test_the_command_answers_and_ends_on_sigterm(tmp_path):
    model = adaptkit.attach(adaptkit.demo_backbone(), "sfp", head=("linear", {"num_classes": 5}))
    stirred(model, 0).save(tmp_path / "seg", task="semantic-segmentation", size=32)
    noise = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    with serving(tmp_path, "--backbone", "demo", f"seg={tmp_path / 'seg'}") as where:
        body = (tmp_path / "photo.png").read_bytes()
        asked = urllib.request.Request(f"{where}/predict/seg", body, {"Accept": "image/png"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            mask = np.asarray(Image.open(answer))
        with urllib.request.urlopen(f"{where}/healthz", timeout=60) as answer:
            assert json.load(answer)["status"] == "ok"
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
        (["a=x", "--max-megapixels", "inf"], "--max-megapixels inf"),
        (["a=x", "--threads", "0"], "--threads 0: give at least 1"),
        (["a=x", "--port", "99999"], "--port 99999: give 0 to 65535"),
        (["a=x", "--host", "no.such.host.invalid"], "check --host"),
        (
            ["--allow-mount", ".", "--backbone", "demo", "--device", "nonsense"],
            "the device 'nonsense' is not to be had",
        ),
        (["--allow-mount", "seg=x"], "that is a task; put it first"),
    ],
)
def test_a_mistake_is_one_line(words, why, capsys):
    assert main(["serve", "--port", "0", *words]) == 2
    said = capsys.readouterr().err
    assert why in said
    assert said.count("\n") == 1


def test_the_page_is_at_ui_beside_the_routes(files):
    pytest.importorskip("gradio")
    from fastapi.testclient import TestClient

    from adaptkit.serve import Mounts, Worker
    from adaptkit.serve.app import create_app
    from adaptkit.serve.service import Service
    from adaptkit.serve.ui import with_page

    mounts = Mounts(backbone())
    mounts.mount("seg", str(files["seg"]))
    service = Service(mounts, Worker(mounts))
    with TestClient(with_page(create_app(service), service)) as client:
        assert "adaptkit" in client.get("/ui/").text
        assert client.get("/healthz").status_code == 200
    assert not service.worker.is_ready  # the page keeps the application's own end
