"""A run says what it was made of: config.yaml trains the same again, metrics.jsonl and result.json say how it went."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import yaml

import adaptkit
from recipes import classify, detect, record, segment

sys.path.insert(0, str(Path(__file__).parent))
from runs import argv, write_folder


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    """A run that scores after every step."""
    out = tmp_path_factory.mktemp("run") / "one"
    more = [
        "--steps",
        "3",
        "--eval-every",
        "1",
        "--save-every",
        "2",
        "--ema",
        "0.5",
        "--label-map",
        '{"0": 0, "1": 1, "2": 2}',
    ]
    return out, segment.main(argv(pictures, out, *more))


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_folder_holds_the_record(run):
    there = {p.name for p in run[0].iterdir() if not p.name.startswith(".")}
    made = {"config.yaml", "metrics.jsonl", "run.json", "result.json", "evaluation.json"}
    assert there == made | {"adapter", "best", "checkpoints", "pictures"}


def test_the_configuration_names_data_backbone_versions_and_machine(run, pictures):
    said = yaml.safe_load((run[0] / "config.yaml").read_text())
    assert said["run"]["recipe"] == "segment"
    assert said["run"]["processes"] == 1
    assert said["run"]["device"].startswith("cpu")
    assert said["versions"]["torch"]
    assert said["versions"]["adaptkit"] == adaptkit.__version__
    assert said["data"]["train"]["files"] == 10
    assert said["data"]["train"]["samples"] == 5
    assert said["data"]["train"] == record.identity(pictures, None) | {"samples": 5}
    assert len(said["backbone"]["sha256_of_layers"]) == 64


def test_another_pixel_is_another_digest(tmp_path):
    path = write_folder(tmp_path / "data", count=1)
    before = record.identity(str(path), None)
    (path / "masks" / "0.png").write_bytes(b"x" * (path / "masks" / "0.png").stat().st_size)
    after = record.identity(str(path), None)
    assert before["bytes"] == after["bytes"]
    assert before["sha256_of_files"] != after["sha256_of_files"]


def test_of_a_single_file_it_is_what_sha256sum_says(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"abc")
    said = record.identity(str(tmp_path / "a.parquet"), None)
    assert said["sha256"] == hashlib.sha256(b"abc").hexdigest()


def test_a_hub_set_is_known_by_its_revision():
    from argparse import Namespace

    address = f"hf://datasets/org/set@{'a1' * 20}/data/train.parquet"
    rows = Namespace(data=Namespace(info=Namespace(download_checksums={address: {}})))
    assert record.identity("org/set", rows) == {"name": "org/set", "revision": "a1" * 20}


def test_the_configuration_is_read_back_and_trains_the_same_file(run, tmp_path):
    config = str(run[0] / "config.yaml")
    args = segment.parse(["--config", config, "--out", str(tmp_path / "again")])
    first = yaml.safe_load(Path(config).read_text())["options"]
    mine = json.loads(json.dumps(record.options(args)))
    assert {k for k in first if first[k] != mine[k]} == {"out"}
    segment.main(["--config", config, "--out", str(tmp_path / "again")])
    for kept in ("adapter", "best"):
        files = [out / kept / "adapter_model.safetensors" for out in (run[0], tmp_path / "again")]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        (segment, ["--num-classes", "3", "--ignore-index", "-1", "--class-weights", "1", "2", "0.5", "--compile"]),
        (classify, ["--mean", "0.5", "--std", "0.5", "--zero-head"]),
        (detect, ["--val", "v", "--model", "fcos", "--size", "32", "64"]),
    ],
)
def test_options_of_every_kind_survive_the_file(recipe, more, tmp_path):
    args = recipe.parse(["--train", "t", *more])
    text = yaml.safe_dump({"options": json.loads(json.dumps(record.options(args)))})
    (tmp_path / "c.yaml").write_text(text)
    again = recipe.parse(["--config", str(tmp_path / "c.yaml")])
    assert json.dumps(record.options(again)) == json.dumps(record.options(args))


def test_the_result_has_the_digest_of_the_file(run):
    file = run[0] / "adapter" / "adapter_model.safetensors"
    assert run[1]["file_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert run[1]["steps"] == 3


def test_rows_of_training_and_validation(run):
    train = [row for row in rows(run[0]) if "loss" in row]
    scored = [row for row in rows(run[0]) if "miou" in row]
    assert [row["step"] for row in train] == [3]
    assert {"step", "loss", "lr", "images_per_s", "epoch", "epoch_seconds", "seconds", "memory_mib"} == train[0].keys()
    assert train[0]["epoch"] == pytest.approx(3 * 2 / 5)
    assert [row["step"] for row in scored] == [1, 2, 3]
    assert all({"step", "miou", "seconds_to_score"} <= row.keys() for row in scored)


def test_the_best_is_kept_with_its_step_and_value(run):
    scores = {row["step"]: row["miou"] for row in rows(run[0]) if "miou" in row}
    best = max(scores, key=lambda step: (scores[step], -step))  # of equal ones the first
    assert run[1]["best"] == {"metric": "miou", "step": best, "value": scores[best]}
    said = adaptkit.load(run[0] / "best").header["metadata"]
    assert (said["step"], said["miou"]) == (best, scores[best])
