"""VTAB-1k: nineteen tasks in three groups, of which some may be missing."""

import json

import numpy as np
import pytest
from PIL import Image
from runs import TINY

from recipes import vtab
from recipes.labelled import open_images


def write_lists(root, task, classes=3):
    folder = root / task / "images"
    folder.mkdir(parents=True)
    for i in range(6):
        Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
    lines = [f"images/{i}.png {i % classes}" for i in range(6)]
    (root / task / "train800val200.txt").write_text("\n".join(lines[:4]))
    (root / task / "test.txt").write_text("\n".join(lines[2:]))


@pytest.fixture
def root(tmp_path):
    """One task as lists, one as Parquet."""
    root = tmp_path / "vtab"
    write_lists(root, "eurosat")
    (root / "svhn").mkdir()
    for split, file in (("train", "train800val200.txt"), ("test", "test.txt")):
        data = open_images(str(root / "eurosat" / file), split)[0]
        data.to_parquet(str(root / "svhn" / f"{split}.parquet"))
    return root


def command_line(root, out, *more):
    return ["--data", str(root), "--size", "32", *TINY, "--steps", "1", "--batch-size", "2", "--adapter", "linear",
            "--out", str(out), *more]  # fmt: skip


def test_there_are_nineteen_tasks_in_three_groups():
    assert [len(tasks) for tasks in vtab.GROUPS.values()] == [7, 4, 8]
    assert len(vtab.TASKS) == 19


def test_tasks_that_are_there_run_and_the_missing_are_named(root, tmp_path, capsys):
    report = vtab.main(command_line(root, tmp_path / "out", "--tasks", "eurosat", "svhn", "dtd"))
    assert set(report["scores"]) == {"eurosat", "svhn"}
    assert "dtd" in report["missing"]
    assert report["mean"] == pytest.approx((report["scores"]["eurosat"] + report["scores"]["svhn"]) / 2)
    said = capsys.readouterr().out
    assert "dtd: not in" in said
    assert "2 of 19 tasks in 2 of 3 groups; without caltech101" in said
    assert (tmp_path / "out" / "eurosat" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_resumed_run_reads_what_is_done_and_does_the_rest(root, tmp_path):
    first = vtab.main(command_line(root, tmp_path / "out", "--tasks", "eurosat"))
    done = tmp_path / "out" / "eurosat" / "done.json"
    marked = json.loads(done.read_text())
    marked["result"]["top1"] = 12.5
    done.write_text(json.dumps(marked))
    second = vtab.main(command_line(root, tmp_path / "out", "--tasks", "eurosat", "svhn", "--resume"))
    assert second["scores"]["eurosat"] == 12.5  # read, not run
    assert "svhn" in second["scores"]
    third = vtab.main(command_line(root, tmp_path / "out", "--tasks", "eurosat", "--resume", "--lr", "0.5"))
    assert third["scores"]["eurosat"] != 12.5  # other arguments: run
    assert first["scores"].keys() == third["scores"].keys()


def test_the_mean_is_that_of_the_groups_not_of_the_tasks():
    scores = {task: 10.0 for task in vtab.GROUPS["Natural"]}
    scores |= {task: 40.0 for task in vtab.GROUPS["Specialized"]}
    scores |= {task: 70.0 for task in vtab.GROUPS["Structured"]}
    assert vtab.summary(scores) == {
        "groups": {"Natural": 10.0, "Specialized": 40.0, "Structured": 70.0},
        "mean": 40.0,
        "missing": [],
    }
    assert "mean of group means: 40.00 (19 tasks in 3 groups)" in vtab.table(scores)


def test_where_nothing_is_the_layout_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"holds no task: expected e.g. caltech101/train800val200.txt"):
        vtab.main(command_line(tmp_path, tmp_path / "out"))


def test_a_pattern_names_hub_sets():
    assert vtab.find("org/vtab-{task}", "dtd") == ("org/vtab-dtd@train", "org/vtab-dtd@test")


def test_what_an_earlier_run_said_does_not_pass_for_one_that_was_stopped(root, tmp_path, monkeypatch):
    vtab.main(command_line(root, tmp_path / "out", "--tasks", "eurosat"))

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(vtab.classify, "fit", stopped)
    with pytest.raises(KeyboardInterrupt):
        vtab.main(command_line(root, tmp_path / "out", "--tasks", "eurosat", "--overwrite"))
    assert not (tmp_path / "out" / "eurosat" / "done.json").exists()
