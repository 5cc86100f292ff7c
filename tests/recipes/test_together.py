"""Two processes without a GPU are one run: of every recipe, under ``torchrun``'s environment and under torchrun itself."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recipes import devices, shapes

ROOT = Path(__file__).parents[2]
ALL = (
    "segment",
    "classify",
    "depth",
    "detect",
    "panoptic",
    "plain_mask",
    "vtab",
    "adavit",
    "mixers",
    "fewshot",
    "pretrain_mae",
)
LOOP = ("segment", "classify", "depth", "detect", "panoptic", "plain_mask")  # recipes of the shared loop


def environment():
    """As a user has it: nothing says that there is no GPU, and nothing that there is one."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE") and k not in ("RANK", "WORLD_SIZE")}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four pictures with masks and with labels; every other mask is ignored as a whole, as is then a rank's batch."""
    path, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for kind in ("set/images", "set/masks", "vtab/eurosat"):
        (path / kind).mkdir(parents=True)
    lines = []
    for i in range(4):
        mask = rng.integers(0, 3, (4, 6), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(np.stack([mask * 80, 255 - mask * 80, mask * 40], -1)).save(
            path / "set" / "images" / f"{i}.png"
        )
        Image.fromarray(mask if i % 2 else np.full_like(mask, 255)).save(path / "set" / "masks" / f"{i}.png")
        lines.append(f"{path}/set/images/{i}.png {i % 2}")
    for file in ("vtab/eurosat/train800val200.txt", "vtab/eurosat/test.txt", "list.txt"):
        (path / file).write_text("\n".join(lines))
    shapes.write(path / "shapes", 4, 32, 48)
    return path


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """All recipes, two ranks each, one after the other: folders of their runs, and what each rank said."""
    out = tmp_path_factory.mktemp("runs")
    small = ["--backbone", "test_vit", "--random-backbone", "--batch-size", "1", "--steps", "2", "--save-every", "1"]
    pairs, drawn, listed = ([f"{flag}={data / name}" for flag in ("--train", "--val")] for name in ("set", "shapes", "list.txt"))  # fmt: skip
    side, box = ["--size", "32", "48"], ["--adapter-options", '{"conv_inplane": 8}']
    query = ["--width", "32", "--queries", "6", "--layers", "1", "1", "--points", "64"]
    jobs = {
        "segment": [*pairs, *small, *side, *box, "--num-classes", "3"],
        "classify": [*listed, *small, "--size", "32", "--adapter", "metaformer", "--adapter-options", '{"width": 8}'],
        "depth": ["--train", "drawn:4", "--val", "drawn:3", *small, *side, "--max-depth", "10", "--bins", "8", *box],
        "detect": [*drawn, *small, *side, *box, "--model", "retinanet", "--width", "64", "--anchor", "4"],
        "panoptic": [*drawn, *small, *side, *box, *query],
        "plain_mask": ["--task", "panoptic", *drawn, *small, *side, "--queries", "6", "--points", "64", "--head-options",
                       '{"num_blocks": 2}'],
        "vtab": ["--data", str(data / "vtab"), "--tasks", "eurosat", *small, "--size", "32", "--adapter", "linear"],
        "adavit": ["--data", str(data / "list.txt"), "--val", str(data / "list.txt"), "--size", "32", "--steps", "2",
                   "--head-steps", "2", "--batch-size", "2"],
        "mixers": [*pairs, "--num-classes", "3", *side, "--steps", "1", "--width", "4", "--batch-size", "2", "--mixers",
                   "pool", "conv", "--ablate", "pool", "--seeds", "0"],
        "fewshot": [*listed, "--random-backbone", "--backbone", "test_vit", "--size", "32", "--shots", "1"],
        "pretrain_mae": ["--steps", "1", "--batch-size", "2", "--image-size", "64", "--canvases", "2", "--reuse", "2"],
    }  # fmt: skip
    jobs = {name: [*argv, "--out", str(out / name)] for name, argv in jobs.items()}
    (out / "jobs.json").write_text(json.dumps(jobs))
    script = str(Path(__file__).with_name("every_recipe.py"))
    command = [sys.executable, script, str(out / "jobs.json"), str(out)]
    subprocess.run(command, cwd=ROOT, env=environment(), check=True)
    return out


def said(out, recipe, rank):
    return (out / f"{recipe}-{rank}.txt").read_text()


LAST = {"adavit": "packed equals masked", "mixers": "**mixer, equal width**", "fewshot": "held out", "vtab": "mean of group means", "pretrain_mae": "demo_backbone.safetensors"}  # fmt: skip


@pytest.mark.parametrize("recipe", ALL)
def test_two_ranks_are_one_run_whose_result_is_said_once(finished, recipe):
    for rank in range(2):
        assert said(finished, recipe, rank).endswith("status 0\n"), said(finished, recipe, rank)[-3000:]
    last = LAST.get(recipe, "attached to a fresh backbone")
    assert [last in said(finished, recipe, rank) for rank in range(2)] == [True, False]


@pytest.mark.parametrize("recipe", LOOP)
def test_the_loop_counts_both_ranks_and_every_step_once(finished, recipe):
    progress = json.loads((finished / recipe / "checkpoints" / "step-00000001" / "progress.json").read_text())
    assert progress["arguments"]["processes"] == 2
    rows = [json.loads(line) for line in (finished / recipe / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 2]  # the last step's loss, and the score
    assert np.isfinite(rows[0]["loss"])


def test_torchrun_starts_one_run(data, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = ["--train", str(data / "set"), "--val", str(data / "set"), "--num-classes", "3", "--backbone", "test_vit",
               "--random-backbone", "--size", "32", "48", "--adapter", "none", "--steps", "1", "--batch-size", "1",
               "--out", str(tmp_path)]  # fmt: skip
    command = [*torchrun, "-m", "adaptkit", "train", "segment", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("attached to a fresh backbone") == 1


def test_no_recipe_is_left_out():
    found = {path.stem for path in (ROOT / "recipes").glob("*.py") if "\ndef main(" in path.read_text()}
    assert found == {*ALL, "shapes", "evaluate", "compare", "ablate"}  # which train nothing by themselves


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="4 processes were started, and this one knows of 1: they would race"):
        devices.together(lambda **_: Namespace(num_processes=1))
