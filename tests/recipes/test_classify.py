"""Classification: what it says of itself is true, and what would mislead is refused."""

import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from runs import TINY

from recipes import classify
from recipes.labelled import LabelledData, open_images

QUICK = ["--train", "digits", "--size", "32", *TINY, "--batch-size", "4", "--augment", "none"]


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """Eight pictures of four colours as Parquet, their labels plain numbers."""
    path, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    rows = {"image": [], "label": []}
    for i in range(8):
        colour = np.eye(4)[i % 4, :3] * 200
        rows["image"].append(Image.fromarray((colour + rng.integers(0, 30, (20, 24, 3))).astype(np.uint8)))
        rows["label"].append(i % 4)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path / "set.parquet"))
    return str(path / "set.parquet")


def parsed(*argv):
    args = classify.parse([*QUICK, *argv])
    args.num_classes = 10
    return args


def test_a_head_that_starts_at_zero_leaves_every_logit_zero_at_any_resolution():
    model = classify.build(parsed("--zero-head", "--size", "96")).eval()
    assert torch.equal(model(torch.randn(2, 3, 96, 96)).logits, torch.zeros(2, 10))
    assert classify.build(parsed()).eval()(torch.randn(2, 3, 32, 32)).logits.abs().max() > 0


def test_a_higher_resolution_goes_on_from_the_same_frozen_backbone():
    args = parsed("--zero-head", "--size", "48")
    model = classify.build(args)
    assert model.vit.grid(torch.zeros(1, 3, 48, 48)) == (3, 3)
    image, label = torch.randn(4, 3, 48, 48), torch.arange(4)
    before = [p.clone() for p in model.backbone.parameters()]
    loss = classify.loss(model, [image, label], args)
    assert loss.item() == pytest.approx(np.log(10), abs=1e-6)  # logits of zero: every class is as likely
    loss.backward()
    assert model.head.classifier.weight.grad.abs().max() > 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.backbone.parameters()))


@pytest.mark.parametrize(
    ("adapter", "options"),
    [("linear", {}), ("metaformer", {"width": 8}), ("dat", {}), ("adavit", {"bottleneck": 4}), ("lora", {"r": 2})],
)
def test_every_adapter_that_changes_tokens_trains_and_attaches_again(coloured, tmp_path, adapter, options):
    if adapter == "lora":
        pytest.importorskip("peft")
    result = classify.main(["--train", coloured, "--val", coloured, "--size", "32", *TINY, "--batch-size", "4", "--steps", "2",
                            "--adapter", adapter, "--adapter-options", json.dumps(options), "--out", str(tmp_path)])  # fmt: skip
    assert result["top1"] == result["top1_reattached"]
    assert result["top5"] == 100.0  # of four classes
    assert result["trained_parameters"] > 0


def test_top1_and_top5_are_the_shares_counted_by_hand():
    metric = classify.metric(parsed())
    logits = torch.randn(40, 10, generator=torch.Generator().manual_seed(0))
    label = torch.arange(40) % 10
    metric.update(logits[:30], label[:30])
    metric.update(logits[30:], label[30:])
    order = logits.argsort(1, descending=True)
    said = metric.compute()
    assert said["top1"] == pytest.approx((order[:, 0] == label).float().mean().item())
    assert said["top5"] == pytest.approx((order[:, :5] == label[:, None]).any(1).float().mean().item())


def test_a_stream_trains_as_the_file_does(coloured, tmp_path):
    common = [
        "--train",
        coloured,
        "--val",
        coloured,
        "--size",
        "32",
        *TINY,
        "--batch-size",
        "4",
        "--steps",
        "3",
        "--num-classes",
        "4",
    ]
    result = classify.main([*common, "--streaming", "--shuffle-buffer", "0", "--out", str(tmp_path / "s")])
    assert result["top5"] == 100.0
    assert classify.main([*common, "--out", str(tmp_path / "m")])["top5"] == 100.0


def test_adavit_is_held_to_its_budget():
    args = parsed("--adapter", "adavit", "--budget", "0.3")
    model = classify.build(args)
    image, label = torch.randn(4, 3, 32, 32), torch.arange(4)
    torch.manual_seed(0)
    tight = classify.loss(model, [image, label], args)
    args.budget = 1.0
    torch.manual_seed(0)
    assert tight > classify.loss(model, [image, label], args)  # all gates start open


# ----------------------------------------------------------------------------------------------------------- data


def test_a_list_of_images_is_read_with_paths_beside_it(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "images" / f"a {i}.png")
    (tmp_path / "train.txt").write_text("images/a 2.png 1\n\nimages/a 0.png 0\n")
    data, names = open_images(str(tmp_path / "train.txt"), "train")
    assert [(row["image"].getpixel((0, 0))[0], row["label"]) for row in data] == [(2, 1), (0, 0)]
    assert names == ["0", "1"]
    (tmp_path / "bad.txt").write_text("images/a 2.png\n")
    with pytest.raises(ValueError, match=r"bad.txt, line 1: 'images/a 2.png' is no 'path label'"):
        open_images(str(tmp_path / "bad.txt"), "train")


def test_validation_sees_the_centre_and_none_the_whole(coloured):
    data, _ = open_images(coloured, "train")
    source = classify.build(parsed()).vit.source()
    centre = LabelledData(data, 16, source, 0, "crop", train=False)
    whole = LabelledData(data, 16, source, 0, "none", train=True)
    assert centre[0][0].shape == whole[0][0].shape == (3, 16, 16)
    assert torch.equal(whole[3, 0][0], whole[5, 0][0])  # no augmentation: every epoch the same
    crops = LabelledData(data, 16, source, 0, "flip", train=True)
    assert torch.equal(crops[3, 0][0], crops[3, 0][0])
    assert not torch.equal(crops[3, 0][0], crops[5, 0][0])


def test_a_file_is_not_its_own_validation(coloured, tmp_path):
    with pytest.raises(
        ValueError, match=r"set.parquet has no splits, and a score on training data says little; give --val"
    ):
        classify.main(["--train", coloured, "--out", str(tmp_path)])


def test_classes_that_mean_something_else_in_validation_are_refused(tmp_path):
    for split, names in (("train", ("cat", "dog")), ("val", ("bird", "cat"))):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / "a.png")
    with pytest.raises(ValueError, match=r"the classes of --train are cat, dog, ... and of --val bird, cat"):
        classify.main(
            ["--train", str(tmp_path / "train"), "--val", str(tmp_path / "val"), "--out", str(tmp_path / "o")]
        )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--adapter", "sfp"], "sfp makes a pyramid, and a classifier reads the tokens"),
        (["--budget", "2"], "--budget is 2"),
        (["--num-classes", "5", "--out", "OUT"], r"a label is 9, and --num-classes 5 allows 0\.\.4"),
        (["--label-column", "kind", "--out", "OUT"], "no column 'kind'; its columns are image, label"),
    ],
)
def test_what_cannot_be_is_refused_before_training(argv, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        classify.main([*QUICK, *[str(tmp_path) if a == "OUT" else a for a in argv]])


def test_a_folder_of_one_class_says_what_it_needs(tmp_path):
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "cat" / "0.png")
    with pytest.raises(ValueError, match=r"has 1 rows of images .* a folder holds one folder per class, at least two"):
        open_images(str(tmp_path), "train")


def class_folders(path, *files):
    for i, name in enumerate(files):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (i, 0, 0)).save(path / name)
    return str(path)


def test_the_class_of_a_nested_picture_is_the_first_folder_and_no_name_leaves_it_out(tmp_path):
    """``datasets`` would call the classes a, b, c, and leave out what is called test."""
    name = class_folders(tmp_path, "cat/a/1.png", "cat/b/test_2.png", "dog/3-val.png", "dog/c/d/4.png")
    data, names = open_images(name, "train")
    assert names == ["cat", "dog"]
    assert data["label"][:] == [0, 0, 1, 1]


@pytest.mark.parametrize("named", [("train", "val"), ("training", "valid")])
def test_each_split_of_class_folders_is_read_from_its_own(tmp_path, named):
    name = class_folders(tmp_path, *(f"{split}/{c}/{split}.png" for split in named for c in ("cat", "dog")))
    for split, folder in zip(("train", "validation"), named):
        data, names = open_images(name, split)
        assert (names, data["label"][:]) == (["cat", "dog"], [0, 1])
        assert data.cast_column("image", datasets.Image(decode=False))[0]["image"]["path"].endswith(f"{folder}.png")
    args = classify.parse(["--train", name])
    assert classify.task(args).name == "classify"  # --val is not needed


def test_pictures_in_no_class_are_named(tmp_path):
    name = class_folders(tmp_path, "cat/1.png", "dog/2.png", "stray.png")
    with pytest.raises(ValueError, match=r"stray.png lies in no folder of a class \(cat, dog"):
        open_images(name, "train")


def test_an_evaluation_knows_classes_by_their_names():
    from recipes.scores.protocols import same_classes

    assert same_classes([0, 1, 1], ["cat", "emu"], ["cat", "dog", "emu"], "d") == [0, 2, 2]
    assert same_classes([0, 1], ["0", "1"], ["cat", "dog", "emu"], "d") == [0, 1]
    assert same_classes([0, 1], ["cat", "dog"], None, "d") == [0, 1]
    assert same_classes([0, 1], ["2", "9"], None, "d") == [2, 9]  # two of ten folders that are called by numbers
    assert same_classes([0, 1, 1], ["10", "3"], ["1", "10", "2", "3"], "d") == [1, 3, 3]
    assert same_classes([0, 1], ["0", "1"], ["1", "10", "0"], "d") == [2, 0]
    with pytest.raises(ValueError, match="has the class 'fox', and the file knows cat, dog"):
        same_classes([0, 1], ["cat", "fox"], ["cat", "dog"], "d")


def test_folders_called_by_numbers_that_are_not_the_classes_numbers_are_names(tmp_path):
    """Sorted as text, "10" comes before "2": the number of a class is not the number that it is called by."""
    name = class_folders(tmp_path, *(f"{k}/a.png" for k in range(1, 13)))
    args = classify.parse(["--train", name, "--val", name])
    classify.task(args)
    assert args.named["classes"][:4] == ["1", "10", "11", "12"]
    plain = classify.parse(["--train", "digits", "--val", "digits"])
    classify.task(plain)
    assert plain.named == {}
