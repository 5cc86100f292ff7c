"""``adaptkit eval``: what a saved file scores at the images' own size equals what other people's code counts."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchmetrics.classification import MulticlassJaccardIndex

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import stirred

import adaptkit
from adaptkit.cli import eval as command
from adaptkit.create import create_backbone
from recipes import corruptions, evaluate

CLASSES, SIDE = 5, 48
SIZES = ((80, 90), (80, 90), (63, 101), (48, 64))


def backbone():
    torch.manual_seed(0)
    return create_backbone("test_vit", pretrained=False).eval()


@pytest.fixture(autouse=True)
def fixed_backbone(monkeypatch):
    """A file's recorded backbone would be drawn anew, for no weights can be downloaded."""
    opened = evaluate.from_pretrained
    monkeypatch.setattr(
        evaluate, "from_pretrained", lambda file, backbone=None, **more: opened(file, backbone=backbone_of(), **more)
    )


def backbone_of():
    return backbone()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder of images and masks of several sizes; a tenth of the pixels is ignored."""
    folder, rng = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for i, (height, width) in enumerate(SIZES):
        coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
        picture = coarse.repeat(8, 0).repeat(8, 1)[:height, :width]
        mask = rng.integers(0, CLASSES, (height // 8 + 1, width // 8 + 1), np.uint8).repeat(8, 0).repeat(8, 1)
        mask = np.where(rng.random((height, width)) < 0.1, 255, mask[:height, :width]).astype(np.uint8)
        Image.fromarray(picture).save(folder / "images" / f"{i}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seg") / "seg"
    model = stirred(adaptkit.attach(backbone(), "sfp", head=("fpn", {"num_classes": CLASSES, "channels": 16})))
    model.save(folder, mean=[0.4] * 3, std=[0.25] * 3, size=[SIDE, 64], classes=["a", "b", "c", "d", "e"])
    return folder


def evaluated(*argv):
    return evaluate.main(argv=list(map(str, argv)))


def by_hand(file, scenes, labels=None):
    """Predictions and truth at full size: the image shrunk to a shorter side of 48, logits enlarged, the largest."""
    model = adaptkit.from_pretrained(file, backbone=backbone()).eval()
    for i, (height, width) in enumerate(SIZES):
        image = torch.from_numpy(np.asarray(Image.open(scenes / "images" / f"{i}.png")).copy()).permute(2, 0, 1) / 255
        share = SIDE / min(height, width)
        small = F.interpolate(image[None], (round(height * share), round(width * share)), mode="bilinear",
                              antialias=True)  # fmt: skip
        with torch.no_grad():
            logits = model((small - 0.4) / 0.25).logits
        mask = F.interpolate(logits, (height, width), mode="bilinear").argmax(1)[0]
        truth = torch.from_numpy(np.asarray(Image.open(scenes / "masks" / f"{i}.png")).copy()).long()
        yield mask, truth


def test_segmentation_scores_are_those_of_torchmetrics_on_full_masks(scenes, segmenter, capsys):
    evaluated(segmenter, "--data", scenes, "--json")
    found = json.loads(capsys.readouterr().out)
    by_class = MulticlassJaccardIndex(CLASSES, average="none", ignore_index=255)
    for mask, truth in by_hand(segmenter, scenes):
        by_class.update(mask[None], truth[None])
    expected = by_class.compute()
    torch.testing.assert_close(torch.tensor(found["per_class"]), expected, atol=2e-4, rtol=0)  # ties of two classes
    assert found["miou"] == pytest.approx(float(np.mean(found["per_class"])), abs=1e-12)
    assert (found["size"], found["images"], found["classes"]) == ("native", len(SIZES), ["a", "b", "c", "d", "e"])
    assert np.sum(found["confusion"]) == sum((truth != 255).sum() for _, truth in by_hand(segmenter, scenes))
    low, high = found["interval"]["miou"]
    assert 0 < low <= found["miou"] <= high < 1
    assert len(found["per_image"]) == len(SIZES)


def test_batches_and_worse_pictures_do_not_mix_up_images(scenes, segmenter):
    one = evaluated(segmenter, "--data", scenes, "--batch-size", 1, "--corruptions", "gaussian_noise", "jpeg")
    many = evaluated(segmenter, "--data", scenes, "--batch-size", 3, "--corruptions", "gaussian_noise", "jpeg")
    assert one["per_image"] == pytest.approx(many["per_image"], abs=2e-3)
    assert set(one["corruptions"]["miou"]) == {"gaussian_noise", "jpeg"}
    for name, scores in one["corruptions"]["miou"].items():
        assert len(scores) == corruptions.SEVERITIES
        assert scores == pytest.approx(many["corruptions"]["miou"][name], abs=2e-3)
    assert one["corruptions"]["mean"] == pytest.approx(np.mean(list(one["corruptions"]["miou"].values())))


def test_what_the_training_ignored_and_renamed_is_read_from_the_file(scenes, tmp_path):
    model = stirred(adaptkit.attach(backbone(), "sfp", head=("fpn", {"num_classes": 2, "channels": 16})))
    said = {"mean": [0.4] * 3, "std": [0.25] * 3, "size": [SIDE, 64]}
    model.save(tmp_path / "seg", **said, labels={"label_map": {"0": 0, "1": 0, "2": 1, "3": 255, "4": 1}})
    found = evaluated(tmp_path / "seg", "--data", scenes)
    by_class = MulticlassJaccardIndex(2, average="none", ignore_index=255)
    table = torch.full((256,), 255)
    table[:5] = torch.tensor([0, 0, 1, 255, 1])
    for mask, truth in by_hand(tmp_path / "seg", scenes):
        by_class.update(mask[None], table[truth][None])
    assert found["per_class"] == pytest.approx(by_class.compute().tolist(), abs=2e-4)


def test_data_that_do_not_fit_the_file_are_refused_by_name(scenes, segmenter, tmp_path):
    with pytest.raises(ValueError, match="no_such_folder"):
        evaluated(segmenter, "--data", tmp_path / "no_such_folder")
    model = stirred(adaptkit.attach(backbone(), "sfp", head=("fpn", {"num_classes": 3, "channels": 16})))
    model.save(tmp_path / "three", mean=[0.4] * 3, std=[0.25] * 3, size=[SIDE, 64])
    with pytest.raises(ValueError, match="class|label"):  # masks have labels up to 4
        evaluated(tmp_path / "three", "--data", scenes)


def test_the_protocol_of_the_run_is_followed_unless_another_is_asked_for(scenes, tmp_path):
    model = stirred(adaptkit.attach(backbone(), "sfp", head=("fpn", {"num_classes": CLASSES, "channels": 16})))
    said = {"mean": [0.4] * 3, "std": [0.25] * 3, "size": [SIDE, 64]}
    model.save(tmp_path / "plain", **said)
    model.save(tmp_path / "slides", **said, evaluation={"slide": [32, 48], "stride": [16, 32], "flip": True})
    asked = evaluated(tmp_path / "plain", "--data", scenes, "--slide", 32, 48, "--stride", 16, 32, "--flip")
    found = evaluated(tmp_path / "slides", "--data", scenes)
    assert found["ways"] == asked["ways"]
    assert found["per_class"] == asked["per_class"]
    whole = evaluated(tmp_path / "slides", "--data", scenes, "--resize", SIDE)
    assert whole["per_class"] == pytest.approx(evaluated(tmp_path / "plain", "--data", scenes)["per_class"], abs=1e-3)
    assert whole["per_class"] != found["per_class"]


@pytest.mark.parametrize(
    "said",
    [
        {"labels": [1]},
        {"labels": {"label_map": 3}},
        {"labels": {"ignore_index": "x"}},
        {"labels": {"other": 1}},
        {"evaluation": "slide"},
        {"evaluation": {"slide": 3}},
        {"evaluation": {"slide": [3, "x"]}},
        {"evaluation": {"resize": "big"}},
        {"evaluation": {"scales": [0]}},
    ],
)
def test_what_a_file_says_of_its_evaluation_is_checked(scenes, tmp_path, said):
    model = adaptkit.attach(backbone(), head=("linear", {"num_classes": CLASSES}))
    model.save(tmp_path / "file", mean=[0.4] * 3, std=[0.25] * 3, size=[SIDE, 64], **said)
    with pytest.raises(ValueError, match="the file's (labels|evaluation)"):
        evaluated(tmp_path / "file", "--data", scenes)


def test_classes_scored_as_scikit_learn_counts(tmp_path):
    from sklearn.metrics import confusion_matrix, top_k_accuracy_score

    rng = np.random.default_rng(1)
    for label in range(7):
        (tmp_path / "data" / f"c{label}").mkdir(parents=True)
        for i in range(2 + label % 2):
            picture = rng.integers(0, 256, (5, 5, 3), np.uint8).repeat(8, 0).repeat(8, 1)
            Image.fromarray(picture).save(tmp_path / "data" / f"c{label}" / f"{i}.png")
    model = stirred(adaptkit.attach(backbone(), "lora", head=("classifier", {"num_classes": 7})))
    model.save(tmp_path / "file", mean=[0.5] * 3, std=[0.25] * 3, size=32, framing="squash",
               classes=[f"c{i}" for i in range(7)])  # fmt: skip
    found = evaluated(tmp_path / "file", "--data", tmp_path / "data")
    model = adaptkit.from_pretrained(tmp_path / "file", backbone=backbone())
    paths = sorted((tmp_path / "data").rglob("*.png"))
    true = [int(p.parent.name[1:]) for p in paths]
    shares = np.stack([a.probabilities for a in model.predict(paths)])
    assert found["confusion"] == confusion_matrix(true, shares.argmax(1), labels=range(7)).tolist()
    assert found["top1"] == pytest.approx(np.mean(shares.argmax(1) == true))
    assert found["top5"] == pytest.approx(top_k_accuracy_score(true, shares, k=5, labels=range(7)))
    assert found["images"] == len(paths)


@pytest.mark.parametrize("crop", [None, "eigen"])
def test_depth_scores_by_their_formulas(tmp_path, crop):
    rng = np.random.default_rng(2)
    for name in ("images", "depth"):
        (tmp_path / "data" / name).mkdir(parents=True)
    truth = []
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).save(tmp_path / "data/images" / f"{i}.png")
        values = rng.integers(0, 12_000, (48, 64)).astype(np.uint16)  # millimetres; some beyond the range
        Image.fromarray(values).save(tmp_path / "data/depth" / f"{i}.png")
        truth.append(values / 1000)
    model = stirred(adaptkit.attach(backbone(), "sfp", head=("depth", {"max_depth": 10.0, "bins": 8, "channels": 16})))
    model.save(tmp_path / "file", mean=[0.5] * 3, std=[0.25] * 3, size=[48, 64])
    found = evaluated(tmp_path / "file", "--data", tmp_path / "data", *(["--crop", crop] if crop else []))
    model = adaptkit.from_pretrained(tmp_path / "file", backbone=backbone())
    low = model.head.config.min_depth
    scores = []
    for i, t in enumerate(truth):
        p = model.predict(tmp_path / "data/images" / f"{i}.png").depth.astype(np.float64)
        known = (t >= low) & (t <= 10)
        if crop:  # rows 45..470, columns 41..600 of 480 x 640, a tenth of it
            inside = np.zeros_like(known)
            inside[4:47, 4:60] = True
            known &= inside
        p, t = p[known], t[known]
        ratio, log = np.maximum(p / t, t / p), np.log(p / t)
        scores.append([np.mean(ratio < 1.25), np.mean(np.abs(p - t) / t), np.sqrt(np.mean((p - t) ** 2)),
                       100 * np.sqrt(np.mean(log**2) - np.mean(log) ** 2)])  # fmt: skip
    expected = np.mean(scores, 0)
    assert [found[k] for k in ("delta1", "abs_rel", "rmse", "silog")] == pytest.approx(expected, rel=1e-6)


def test_the_command_offers_what_there_is_and_each_makes_a_picture_worse():
    assert tuple(corruptions.CORRUPTIONS) == command.CORRUPTIONS
    image = torch.rand(3, 40, 52, generator=torch.Generator().manual_seed(3))
    for name in corruptions.CORRUPTIONS:
        far = []
        for severity in range(1, corruptions.SEVERITIES + 1):
            alter = corruptions.corrupted(name, severity)
            before = torch.random.get_rng_state()
            worse = alter(image, 7)
            assert torch.equal(torch.random.get_rng_state(), before)  # nobody else's numbers change
            assert torch.equal(alter(image, 7), worse)
            assert worse.shape == image.shape
            assert worse.min() >= 0
            assert worse.max() <= 1
            far.append(float((worse - image).square().mean()))
        assert far[0] > 0
        assert far == sorted(far), name


def test_the_table_names_the_classes(scenes, segmenter, capsys):
    evaluated(segmenter, "--data", scenes)
    said = capsys.readouterr().out
    assert "miou" in said
    assert "95 %" in said
    assert all(f" {name} " in said for name in "abcde")
