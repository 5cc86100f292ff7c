"""The segmentation recipe: real files, real processes, exact resume, and errors before hours are lost."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from runs import QUICK, write_folder  # noqa: E402

from recipes.order import Steps  # noqa: E402
from recipes.segment import main  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data")


def command(folder, out, *more):
    return [
        sys.executable,
        "-m",
        "recipes.segment",
        "--train",
        str(folder),
        "--val",
        str(folder),
        "--out",
        str(out),
        *QUICK,
        *more,
    ]


def weights(out):
    return (Path(out) / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_folder_becomes_a_saved_adapter_whose_score_is_the_same_when_attached_again(folder, tmp_path):
    out = tmp_path / "run"
    main(["--train", str(folder), "--val", str(folder), "--out", str(out), *QUICK, "--steps", "3", "--accumulate", "2",
          "--save-every", "2"])  # fmt: skip
    result = json.loads((out / "result.json").read_text())
    assert result["miou"] == result["miou_reattached"]
    assert result["file_bytes"] < 20e6
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 3
    assert "miou" in rows[-1]
    assert all(np.isfinite(r["loss"]) for r in rows if "loss" in r)
    kept = {p.name for p in (out / "checkpoints" / "step-00000002").rglob("*") if p.is_file()}
    assert "adapter_model.safetensors" in kept
    assert not kept & {"model.safetensors", "pytorch_model.bin"}  # the frozen backbone is not in a checkpoint


@pytest.mark.parametrize(("adapter", "head"), [("none", "linear"), ("sfp", "fpn")])
def test_the_baselines_run_from_a_parquet_file(folder, tmp_path, adapter, head):
    from recipes.data import open_dataset

    parquet = tmp_path / "data.parquet"
    open_dataset(str(folder), "train").to_parquet(str(parquet))
    main(["--train", str(parquet), "--val", str(parquet), "--out", str(tmp_path / "run"), *QUICK[:-2], "--adapter", adapter,
          "--head", head, "--steps", "2", "--mixed-precision", "bf16"])  # fmt: skip
    assert json.loads((tmp_path / "run" / "result.json").read_text())["adapter"] == adapter


def test_every_step_sees_its_own_samples_wherever_the_run_starts():
    whole = list(Steps(5, 2, 0, 6, seed=3))
    assert list(Steps(5, 2, 4, 6, seed=3)) == whole[4:]
    seen = [pair for batch in whole for pair in batch]
    assert sorted(i for e, i in seen if e == 0) == [0, 1, 2, 3, 4]
    assert [e for e, _ in seen] == [0] * 5 + [1] * 5 + [2] * 2


def test_resume_with_other_arguments_says_which(folder, tmp_path):
    common = ["--train", str(folder), "--val", str(folder), "--out", str(tmp_path / "run"), *QUICK, "--save-every", "1"]
    main([*common, "--steps", "2"])
    with pytest.raises(ValueError, match=r"was trained with steps=2; now it is steps=3"):
        main([*common, "--steps", "3", "--resume"])


def test_a_head_that_would_leave_the_adapter_untrained_is_refused(folder, capsys):
    with pytest.raises(SystemExit):
        main(["--train", str(folder), *QUICK, "--head", "linear"])
    assert "pyramid would not be trained" in capsys.readouterr().err


def test_one_class_is_refused_for_it_would_always_be_right(folder, capsys):
    with pytest.raises(SystemExit):
        main(["--train", str(folder), *QUICK, "--num-classes", "1"])
    assert "one class alone is always right" in capsys.readouterr().err


def test_labels_out_of_range_are_found_before_training(tmp_path):
    bad = write_folder(tmp_path / "bad", bad=3)
    with pytest.raises(
        ValueError, match=r"--train, row 3: the mask holds labels \[9\], outside 0\.\.2 .*--num-classes 10"
    ):
        main(["--train", str(bad), "--val", str(bad), "--out", str(tmp_path / "run"), *QUICK])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: (p / "images").mkdir(parents=True), "holds no images"),
        (
            lambda p: write_folder(p) and (p / "masks" / "2.png").unlink(),
            "1 files have no partner .* the same name",
        ),
    ],
)
def test_an_empty_or_torn_folder_is_a_clear_error(tmp_path, make, message):
    make(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        main(["--train", str(tmp_path / "data"), "--out", str(tmp_path / "run"), *QUICK])


def test_an_empty_parquet_file_is_a_clear_error(folder, tmp_path):
    from recipes.data import open_dataset

    empty = tmp_path / "empty.parquet"
    open_dataset(str(folder), "train").select([]).to_parquet(str(empty))
    with pytest.raises(ValueError, match="holds no rows"):
        main(["--train", str(empty), "--out", str(tmp_path / "run"), *QUICK])


def test_a_colour_mask_is_a_clear_error(tmp_path):
    path = write_folder(tmp_path / "data")
    Image.new("RGB", (56, 40), (128, 64, 128)).save(path / "masks" / "0.png")
    with pytest.raises(
        ValueError, match="masks/0.png: the mask is colour-coded .*one class id per pixel.*--palette '#804080'"
    ):
        main(["--train", str(path), "--val", str(path), "--out", str(tmp_path / "run"), *QUICK])


def test_an_unwritable_out_is_found_before_anything_is_loaded(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write to"):
        main(["--train", str(folder), "--out", str(tmp_path / "file" / "run"), *QUICK])


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(folder, tmp_path, monkeypatch):
    real, calls = torch.nn.functional.cross_entropy, []

    def third_is_nan(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr("recipes.segment.F.cross_entropy", third_is_nan)
    with pytest.raises(
        SystemExit, match="not finite at step 2: stopped after step 2, .* the last good checkpoint is .*step-00000002"
    ):
        main(
            [
                "--train",
                str(folder),
                "--val",
                str(folder),
                "--out",
                str(tmp_path / "run"),
                *QUICK,
                "--steps",
                "5",
                "--save-every",
                "1",
            ]
        )
    import adaptkit

    kept = adaptkit.load(tmp_path / "run" / "checkpoints" / "step-00000002" / "adapter")
    assert all(t.isfinite().all() for t in kept.tensors.values())
