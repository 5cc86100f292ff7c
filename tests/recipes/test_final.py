"""What a run leaves when it ends is what `adaptkit eval` finds in its file, and pictures of the images that it names."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import adaptkit
from adaptkit.analysis.accounting import counted
from adaptkit.create import create_backbone
from recipes import classify, depth, evaluate, final, segment
from recipes.scores.calibration import BINS, calibration_sums, ece, reliability
from recipes.scores.classification import ClassificationScores
from recipes.scores.detection import image_f1
from recipes.scores.segmentation import boundary

sys.path.insert(0, str(Path(__file__).parent))
from runs import write_folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    base = tmp_path_factory.mktemp("final")
    data, out = str(write_folder(base / "data", count=7)), base / "out"
    # one size of pictures, whose shorter side is that of the training: what eval looks at by itself
    result = segment.main(["--train", data, "--val", data, "--num-classes", "3", "--size", "32", "48", "--batch-size", "3",
                           "--adapter", "none", "--steps", "2", "--save-every", "0", "--out", str(out)])  # fmt: skip
    return data, out, result


def test_the_record_is_what_eval_says_of_the_file(run):
    data, out, result = run
    mine = json.loads((out / "evaluation.json").read_text())
    theirs = evaluate.evaluate(evaluate.parse([str(out / "adapter"), "--data", data]))
    assert mine["miou"] == pytest.approx(result["miou"] / 100, abs=1e-4)
    for key in set(theirs) - {"file", "data"}:
        if key == "calibration":  # sums of float32 probabilities, of batches of 3 and of 8
            for name, values in theirs[key].items():
                assert [v is None for v in mine[key][name]] == [v is None for v in values]
                assert [v or 0 for v in mine[key][name]] == pytest.approx([v or 0 for v in values], abs=1e-6)
        elif key == "ece":
            assert mine[key] == pytest.approx(theirs[key], abs=1e-6)
        else:
            assert json.dumps(mine[key]) == json.dumps(theirs[key]), key
    assert set(mine) - set(theirs) == {"pictures"}


def test_pictures_are_of_the_images_that_they_name(run):
    data, out, _ = run
    said = json.loads((out / "evaluation.json").read_text())
    scores = said["per_image"]
    by = {why: [p["index"] for p in said["pictures"] if p["why"] == why] for why in ("even", "worst", "best")}
    assert by["even"] == [1, 3, 5]
    order = sorted(range(7), key=scores.__getitem__)
    assert by["worst"] == order[:3]
    assert by["best"] == order[::-1][:3]
    for entry in said["pictures"]:
        assert entry["score"] == scores[entry["index"]]
        shown = np.asarray(Image.open(out / entry["image"]), float)
        true = np.asarray(Image.open(Path(data) / "images" / f"{entry['index']}.jpg"), float)
        assert np.abs(shown - true).mean() < 8  # of 255: WebP
        assert {Image.open(out / entry[panel]).size for panel in ("truth", "prediction")} == {(56, 40)}


def test_cost_is_that_of_the_model(run):
    _, out, result = run
    model = adaptkit.attach(create_backbone("demo"), out / "adapter")
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    with torch.no_grad(), adaptkit.reference():
        assert result["macs"] == counted(lambda: model(torch.zeros(1, 3, 32, 48)))


def test_without_details_a_run_leaves_none(run, tmp_path):
    data, _, result = run
    plain = segment.main(["--train", data, "--val", data, "--num-classes", "3", "--size", "32", "48", "--batch-size", "3",
                          "--adapter", "none", "--steps", "2", "--save-every", "0", "--out", str(tmp_path), "--no-details"])  # fmt: skip
    assert not (tmp_path / "evaluation.json").exists()
    assert not (tmp_path / "pictures").exists()
    assert "macs" not in plain
    assert (plain["miou"], plain["file_sha256"]) == (result["miou"], result["file_sha256"])


def test_of_classes_and_depths_too(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(tmp_path / "data" / name / f"{i}.png")
    data = str(tmp_path / "data")
    classify.main(["--train", data, "--val", data, "--size", "32", "--batch-size", "4", "--steps", "1",
                   "--random-backbone", "--out", str(tmp_path / "c")])  # fmt: skip
    said = json.loads((tmp_path / "c" / "evaluation.json").read_text())
    assert said["classes"] == ["a", "b"]
    assert np.trace(said["confusion"]) / 6 == pytest.approx(said["top1"])
    assert {p["true"] for p in said["pictures"]} == {"a", "b"}
    depth.main(["--train", "drawn:3", "--val", "drawn:3", "--max-depth", "10", "--size", "32", "48", "--batch-size", "2",
                "--random-backbone", "--steps", "1", "--adapter", "none", "--out", str(tmp_path / "d")])  # fmt: skip
    said = json.loads((tmp_path / "d" / "evaluation.json").read_text())
    assert said["delta1"] == pytest.approx(np.mean(said["per_image"]))
    assert all((tmp_path / "d" / p["truth"]).is_file() for p in said["pictures"])


# ------------------------------------------------------------------------------------------------------- pieces


def test_chosen_images_are_spread_worst_and_best_and_unscored_ones_only_by_place():
    scores = [0.5, None, 0.1, 0.9, 0.3, 0.7]
    assert final.chosen(scores, 2) == [("even", 1), ("even", 4), ("worst", 2), ("worst", 4), ("best", 3), ("best", 5)]
    assert final.chosen([0.5], 3) == [("even", 0), ("best", 0)]
    assert final.chosen([], 3) == []


def slow_rim(mask, reach):
    padded = np.pad(mask, reach)
    inside = np.ones_like(mask)
    for dy in range(2 * reach + 1):
        for dx in range(2 * reach + 1):
            inside &= padded[dy : dy + mask.shape[0], dx : dx + mask.shape[1]]
    return mask & ~inside


@pytest.mark.parametrize("size", [(40, 56), (7, 90), (3, 4)])
def test_boundaries_are_those_of_each_mask_by_itself(size):
    rng = np.random.default_rng(0)
    true, found = (rng.integers(0, 4, (20, 20)).repeat(6, 0).repeat(5, 1)[: size[0], : size[1]] for _ in range(2))
    true = true.copy()
    true[1:3, 2:9] = 255
    reach = max(1, round(0.02 * float(np.hypot(*size))))
    known = true != 255
    expected = []
    for k in range(5):
        one, other = slow_rim(found == k, reach) & known, slow_rim(true == k, reach) & known
        expected.append([(one & other).sum(), (one | other).sum()])
    got = boundary(torch.from_numpy(found.astype(np.uint8)), torch.from_numpy(true), 5, 255)
    assert got.T.tolist() == expected


def test_a_reliability_diagram_adds_up_to_the_calibration_error():
    sure, right = torch.rand(500), torch.rand(500) > 0.4
    sums = calibration_sums(sure, right)
    said = reliability(sums)
    assert sum(said["count"]) == 500
    parts = zip(said["count"], said["confidence"], said["accuracy"])
    assert sum(n * abs(a - c) for n, c, a in parts if n) / 500 == pytest.approx(float(ece(sums)))
    empty = reliability(torch.zeros(3, BINS))
    assert set(empty["confidence"]) == {None}


def test_scores_of_classes_are_those_counted_one_by_one():
    scores, labels = torch.randn(50, 7), torch.randint(0, 7, (50,))
    metric = ClassificationScores(7)
    metric.update(scores[:20], labels[:20])
    metric.update(scores[20:], labels[20:])
    said, found = metric.details(), scores.argmax(1)
    assert said["top1"] == pytest.approx((found == labels).double().mean().item())
    expected = [[int(((labels == i) & (found == j)).sum()) for j in range(7)] for i in range(7)]
    assert said["confusion"] == expected
    sure = scores.softmax(1)
    assert said["ece"] == pytest.approx(float(ece(calibration_sums(sure.amax(1), found == labels))))
    assert said["per_image_confidence"] == pytest.approx(sure[torch.arange(50), labels].tolist())


def test_f1_of_an_image_counts_each_true_box_once():
    true = [{"box": [0, 0, 10, 10], "label": 1}, {"box": [20, 20, 30, 30], "label": 2}]
    hit = {"bbox": [0, 0, 10, 9], "label": 1, "score": 0.9}
    again = {"bbox": [0, 0, 10, 10], "label": 1, "score": 0.6}
    other = {"bbox": [20, 20, 10, 10], "label": 1, "score": 0.8}
    unsure = {"bbox": [20, 20, 10, 10], "label": 2, "score": 0.4}
    assert image_f1([hit], true) == pytest.approx(2 / 3)
    assert image_f1([hit, again, other, unsure], true) == pytest.approx(2 / 5)
    assert image_f1([], true) == 0.0
    assert image_f1([], []) is None
    assert image_f1([hit], []) == 0.0
