"""The panoptic recipe on drawn pictures: COCO's files in, a trained Mask2Former out, and a score that is the paper's."""

import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

pytest.importorskip("transformers")
pytest.importorskip("scipy")
sys.path.insert(0, str(Path(__file__).parents[2]))

from runs import reset

import adaptkit
from adaptkit.create import create_backbone
from recipes import evaluate, network, panoptic, shapes
from recipes.panoptic_data import PanopticData, locate, read_segments, segment_ids, stacked

QUICK = ["--backbone", "test_vit", "--random-backbone", "--adapter-options", '{"conv_inplane": 8}', "--size", "32", "48",
         "--width", "32", "--queries", "8", "--layers", "1", "1", "--points", "64", "--batch-size", "2", "--lr", "3e-3",
         "--clip", "1", "--object-threshold", "0.2"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("shapes")
    shapes.write(path / "train", 4, 32, 48, seed=0)
    shapes.write(path / "val", 3, 32, 48, seed=1)
    return path


def command(folder, out, *more):
    return ["--train", str(folder / "train"), "--val", str(folder / "val"), "--out", str(out), *QUICK, *more]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    argv = command(folder, out, "--steps", "14", "--save-every", "6")
    return argv, out, panoptic.main(argv)


def loss_of(model, args, rows):
    torch.manual_seed(0)
    with torch.no_grad():
        return float(panoptic.loss(model.train(), next(iter(DataLoader(rows, 4, collate_fn=stacked))), args))


def test_training_lowers_the_loss_and_the_file_scores_as_the_run_did(trained):
    argv, out, result = trained
    assert all(0 <= result[k] <= 100 and math.isfinite(result[k]) for k in ("pq", "sq", "rq", "pq_things", "pq_stuff"))
    assert result["pq"] == result["pq_reattached"]
    args = panoptic.parse(argv)
    torch.manual_seed(0)
    fresh = panoptic.build(args)
    rows = panoptic.data(args, fresh, True)
    before = loss_of(fresh, args, rows)
    torch.manual_seed(args.seed)
    after = loss_of(network.load(out / "adapter", create_backbone("test_vit", pretrained=False)), args, rows)
    assert after < 0.9 * before
    stored = adaptkit.load(out / "adapter")
    assert stored.header["head"]["class"].endswith("Mask2FormerForUniversalSegmentation")
    assert not any("attn.qkv" in k for k in stored.tensors)


def test_eval_of_the_file_says_what_the_run_said(trained, folder, monkeypatch):
    argv, out, result = trained

    def opened(file, backbone=None, positions=None):
        torch.manual_seed(panoptic.parse(argv).seed)
        return adaptkit.from_pretrained(file, backbone=create_backbone("test_vit", pretrained=False))

    monkeypatch.setattr(evaluate, "from_pretrained", opened)
    found = evaluate.main(argv=[str(out / "adapter"), "--data", str(folder / "val")])
    assert found["images"] == 3
    known = [v for v in found["per_class"] if v is not None]
    assert found["pq"] == pytest.approx(sum(known) / len(known))
    written = {k: result[k] / 100 for k in ("pq", "sq", "rq")}  # in percent, with two digits behind the point
    assert {k: found[k] for k in written} == pytest.approx(written, abs=5.1e-5)


def test_stopped_and_resumed_is_byte_identical_to_never_stopped(trained, folder, tmp_path, monkeypatch):
    argv = command(folder, tmp_path, "--steps", "14", "--save-every", "6")
    real, calls = panoptic.loss, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 10:  # after the checkpoint of step 6, before that of step 12
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(panoptic, "TASK", dataclasses.replace(panoptic.TASK, loss=dies))
    with pytest.raises(KeyboardInterrupt):
        panoptic.main(argv)
    monkeypatch.undo()
    reset()
    panoptic.main([*argv, "--resume"])
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (trained[1] / name).read_bytes()


# --------------------------------------------------------------------------------------------------------- score


def brute_force(pairs, labels):
    """PQ by its definition, pixel sets and loops; label -1 of the truth counts nowhere."""
    per_class = []
    for label in labels:
        total, tp, fp, fn = 0.0, 0, 0, 0
        for found, true in pairs:
            void = true[..., 0] == -1
            guesses = [(found == s).all(-1) for s in np.unique(found.reshape(-1, 2), axis=0) if s[0] == label]
            segments = [(true == s).all(-1) for s in np.unique(true.reshape(-1, 2), axis=0) if s[0] == label]
            matched = set()
            for guess in guesses:
                ious = [(guess & s).sum() / ((guess & ~void) | s).sum() for s in segments]
                best = max(range(len(ious)), key=ious.__getitem__, default=None)
                if best is not None and ious[best] > 0.5:
                    matched.add(best)
                    total, tp = total + ious[best], tp + 1
                elif (guess & void).sum() <= 0.5 * guess.sum():
                    fp += 1
            fn += len(segments) - len(matched)
        if tp + fp + fn:
            per_class.append(total / (tp + fp / 2 + fn / 2))
    return sum(per_class) / len(per_class)


def metric_for(folder):
    args = panoptic.parse(command(folder, "unused"))
    return panoptic.metric(args), args


def test_panoptic_quality_is_the_definition(folder):
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(6):
        true = np.kron(np.stack([rng.integers(-1, 5, (3, 4)), rng.integers(1, 3, (3, 4))], -1), np.ones((4, 4, 1), int))
        true[true[..., 0] >= 3, 1] = 0
        found = true.copy()
        found[:, :6] = np.roll(true, 1, axis=0)[:, :6]
        found[10:, 10:] = -1
        found[found[..., 0] == -1] = (rng.integers(-1, 3), 3)
        pairs.append((found, true))
    metric, _ = metric_for(folder)
    metric.update(*([torch.from_numpy(p[i]) for p in pairs] for i in (0, 1)))
    expected = brute_force(pairs, range(5))
    assert 0.1 < expected < 0.95
    assert metric.compute()["pq"] == pytest.approx(expected, abs=1e-6)


def test_the_truth_scores_one_and_silence_scores_zero(folder):
    metric, args = metric_for(folder)
    truth = [t["truth"] for _, t in PanopticData(panoptic.segments(args, False), (32, 48), network_source())]
    metric.update(truth, truth)
    assert metric.compute()["pq"] == 1.0
    silent, _ = metric_for(folder)
    silent.update([torch.full_like(t, -1) for t in truth], truth)
    assert silent.compute()["pq"] == 0.0


def network_source():
    return adaptkit.view(create_backbone("test_vit", pretrained=False)).source()


def test_queries_become_one_map():
    """Two things side by side, a stuff class of two queries, one query hidden by another, one unsure, one of nothing."""
    classes = torch.full((6, 4), -9.0)
    for query, label in enumerate((0, 0, 2, 2, 0, 3)):  # label 3 is nothing
        classes[query, label] = 9.0
    classes[4] = torch.tensor([0.0, 0.0, 0.0, 0.0])
    classes = torch.cat([classes, classes[:1] - torch.tensor([1.0, 0, 0, -16.0])])  # less sure than query 0, same place
    masks = torch.full((7, 4, 8), -9.0)
    masks[0, :2, :4] = masks[1, :2, 4:] = masks[2, 2:, :4] = masks[3, 2:, 4:] = 9.0
    masks[4:6] = 20.0
    masks[6, :2, :4] = 9.0
    got = panoptic.merge(classes, masks, (8, 16), {0, 1}, (0.5, 0.8))
    assert got.shape == (8, 16, 2)
    assert {tuple(v) for v in got.flatten(0, 1).unique(dim=0).tolist()} - {(-1, -1)} == {(0, 1), (0, 2), (2, 0)}
    assert (got[1, 2] == torch.tensor([0, 1])).all()
    assert (got[6, 2] == got[6, 13]).all()  # one segment of stuff


# ---------------------------------------------------------------------------------------------------------- data


def read(path):
    read_segments.cache_clear()
    return read_segments(*locate(str(path), None, None, "--val"), "--val")


def test_samples_are_the_segments_that_the_files_say(folder):
    args = panoptic.parse(command(folder, "unused"))
    data = panoptic.segments(args, False)
    _, target = PanopticData(data, (64, 96), network_source())[0]
    ids = torch.from_numpy(segment_ids(data.rows[0]["map"]))
    assert torch.equal(target["truth"][..., 1], ids)  # at the image's own size, whatever the network sees
    for number, (label, _) in data.rows[0]["segments"].items():
        assert (target["truth"][..., 0][ids == number] == label).all()
    image, target = PanopticData(data, (64, 96), network_source(), train=True)[(0, 0)]
    assert image.shape == (3, 64, 96)
    assert target["masks"].shape == (len(target["labels"]), 64, 96)
    assert (target["masks"].sum(0) == 1).all()  # every pixel of these pictures belongs to one segment
    assert target["masks"].flatten(1).sum(1).gt(0).all()


def test_a_crowd_is_no_segment_and_its_category_is_known(tmp_path):
    path = shapes.write(tmp_path, 2, 32, 48, seed=2)
    edit(lambda d: d["annotations"][0]["segments_info"][0].update(iscrowd=1))(path)
    rows = PanopticData(read(path), (32, 48), network_source())
    truth, (label, crowd) = rows[0][1]["truth"], read(path).rows[0]["segments"][1]
    assert crowd
    assert (truth[..., 0][truth[..., 1] == 1] == -2 - label).all()
    rows.train = True
    assert 0 < len(PanopticData(read(path), (32, 48), network_source(), train=True)[(0, 0)][1]["labels"]) < 5


def edit(change):
    def write(path):
        file = path / "panoptic.json"
        data = json.loads(file.read_text())
        change(data)
        file.write_text(json.dumps(data))

    return write


def shrink(path):
    file = path / "panoptic" / "00000.png"
    with Image.open(file) as image:
        small = image.resize((20, 20), Image.NEAREST)
    small.save(file)


BAD = {
    "no file": (lambda p: (p / "panoptic.json").unlink(), "--val: there is no file .*panoptic.json"),
    "no maps": (lambda p: (p / "panoptic").rename(p / "x"), "there is no folder .*panoptic; name it with --val-maps"),
    "one map missing": (lambda p: (p / "panoptic" / "00001.png").unlink(), "1 of 3 panoptic PNG files are missing"),
    "a torn map": (lambda p: (p / "panoptic" / "00001.png").write_bytes(b"x"), "00001.png is not an image"),
    "no image": (lambda p: (p / "images" / "00001.png").unlink(), "1 of 3 images are missing"),
    "another size": (shrink, "is 20 x 20 pixels, its image 32 x 48"),
    "unknown category": (
        edit(lambda d: d["annotations"][0]["segments_info"][0].update(category_id=99)),
        "annotation number 0: category_id 99 is not among the categories",
    ),
    "unknown image": (edit(lambda d: d["annotations"][1].update(image_id=99)), "image_id 99 is not among the images"),
    "a segment more": (
        edit(lambda d: d["annotations"][0]["segments_info"].append({"id": 77, "category_id": 1})),
        r"00000.png does not show \[77\] that the JSON lists",
    ),
    "a segment less": (
        edit(lambda d: d["annotations"][0]["segments_info"].pop(0)),
        r"00000.png shows \[1\] that the JSON does not list",
    ),
    "things unnamed": (edit(lambda d: d["categories"][0].pop("isthing")), "category 1 does not say isthing 0 or 1"),
    "a detection file": (
        lambda p: (p / "panoptic.json").write_text((p / "annotations.json").read_text()),
        "has no file_name or no segments_info; is this a detection file",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_found_before_training(tmp_path, case):
    change, message = BAD[case]
    path = shapes.write(tmp_path, 3, 32, 48, seed=2)
    change(path)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_train_and_val_must_have_the_same_categories(folder, tmp_path):
    path = shapes.write(tmp_path / "val", 3, 32, 48, seed=2)
    edit(lambda d: d["categories"].append({"id": 9, "name": "sky", "isthing": 0}))(path)
    (tmp_path / "train").symlink_to(folder / "train")
    with pytest.raises(ValueError, match="do not have the same categories"):
        panoptic.main(command(tmp_path, tmp_path / "run"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--streaming"], "leave it out"),
        (["--width", "48"], "--width 48: give a multiple of 32"),
        (["--layers", "0", "1"], "must be at least 1"),
    ],
)
def test_bad_arguments_are_found_at_once(folder, capsys, more, message):
    with pytest.raises(SystemExit):
        panoptic.main(command(folder, "unused", *more))
    assert re.search(message, capsys.readouterr().err)
