"""The detection recipe on drawn pictures: COCO's files in, a trained detector out, and errors before hours are lost."""

import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("faster_coco_eval")
sys.path.insert(0, str(Path(__file__).parents[2]))

from runs import reset

import adaptkit
from adaptkit.create import create_backbone
from adaptkit.pretrained import from_pretrained
from recipes import coco, detect, evaluate, network, shapes
from recipes.coco import read_instances
from recipes.detection_data import Detection, as_lists
from recipes.scores.average_precision import average_precision, average_precisions

QUICK = ["--backbone", "test_vit", "--random-backbone", "--adapter-options", '{"conv_inplane": 8}', "--size", "32", "48",
         "--width", "16", "--anchor", "4", "--batch-size", "2", "--lr", "3e-3"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("shapes")
    shapes.write(path / "train", 4, 32, 48, seed=0)
    shapes.write(path / "val", 3, 32, 48, seed=1)
    return path


FCOS = ["--model", "fcos", "--width", "64", "--steps", "12", "--save-every", "5"]


def command(folder, out, *more):
    return ["--train", str(folder / "train"), "--val", str(folder / "val"), "--out", str(out), *QUICK, *more]


def loss_of(model, args, rows):
    """On the training images as they are, with the same random choices each time."""
    torch.manual_seed(0)
    with torch.no_grad():
        return float(detect.loss(model.train(), next(iter(DataLoader(rows, 4, collate_fn=as_lists))), args))


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """One short run of FCOS: its arguments, folder and result."""
    out = tmp_path_factory.mktemp("run")
    argv = command(folder, out, *FCOS)
    return argv, out, detect.main(argv)


def test_training_lowers_the_loss_and_the_file_scores_as_the_run_did(trained, folder):
    argv, out, result = trained
    assert math.isfinite(result["box_ap"])
    assert 0 <= result["box_ap"] == result["box_ap_reattached"]
    args = detect.parse(argv)
    rows = Detection(detect.instances(args, True), masks=False)
    torch.manual_seed(0)
    before = loss_of(detect.build(args), args, rows)
    torch.manual_seed(args.seed)
    after = loss_of(network.load(out / "adapter", create_backbone("test_vit", pretrained=False)), args, rows)
    assert after < 0.8 * before
    stored = adaptkit.load(out / "adapter")
    assert [c["name"] for c in stored.header["metadata"]["recipe"]["categories"]] == ["disc", "square", "triangle"]
    assert stored.header["head"]["class"].endswith("FCOS")


def test_a_checkpoint_holds_no_backbone(trained):
    files = sorted((trained[1] / "checkpoints").rglob("*.safetensors"))
    assert [f.name for f in files] == ["adapter_model.safetensors"] * 2
    keys = adaptkit.load(files[0]).tensors.keys()
    assert any(k.startswith("head.backbone.fpn.") for k in keys)
    assert not any("attn.qkv" in k for k in keys)


def test_stopped_and_resumed_is_byte_identical_to_never_stopped(trained, folder, tmp_path, monkeypatch):
    argv = command(folder, tmp_path, *FCOS)
    real, calls = detect.loss, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 8:  # after the checkpoint of step 5, before that of step 10
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(detect, "TASK", dataclasses.replace(detect.TASK, loss=dies))
    with pytest.raises(KeyboardInterrupt):
        detect.main(argv)
    assert not (tmp_path / "adapter").exists()
    monkeypatch.undo()
    reset()
    detect.main([*argv, "--resume"])
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (trained[1] / name).read_bytes()


@pytest.mark.parametrize("model", ["mask-rcnn", "faster-rcnn", "retinanet"])
def test_every_detector_trains_and_comes_back_from_its_file(folder, tmp_path, model):
    argv = command(folder, tmp_path, "--model", model, "--steps", "1", "--save-every", "0")
    result = detect.main(argv)
    assert ("mask_ap" in result) == (model == "mask-rcnn")
    assert result["box_ap"] == result["box_ap_reattached"]


def test_a_network_is_loaded_to_be_asked_and_other_files_are_refused(trained, tmp_path):
    _, out, _ = trained
    torch.manual_seed(0)
    model = network.load(out / "adapter", create_backbone("test_vit", pretrained=False))
    assert not model.training
    assert {"boxes", "labels", "scores"} == model([torch.rand(3, 30, 41)])[0].keys()
    adaptkit.attach(create_backbone("test_vit", pretrained=False), "sfp").save(tmp_path)
    with pytest.raises(ValueError, match=r"holds no network of mask-rcnn, .*attach it with adaptkit.attach"):
        network.load(tmp_path, create_backbone("test_vit", pretrained=False))


# ---------------------------------------------------------------------------------------------------------- data


def truth(folder, split="val", masks=True):
    path = folder / split
    return read_instances(path / "images", path / "annotations.json", masks, "--val")


def test_boxes_fit_their_masks_after_the_flip(folder):
    rows = Detection(truth(folder, "train"), masks=True, seed=3, train=True)
    plain = Detection(truth(folder, "train"), masks=True)
    flipped = 0
    for i in range(len(rows)):
        image, target = rows[(0, i)]
        assert image.shape[-2:] == target["masks"].shape[-2:] == (32, 48)
        flipped += not torch.equal(target["boxes"], plain[i][1]["boxes"])
        for box, mask in zip(target["boxes"], target["masks"]):
            y, x = mask.nonzero(as_tuple=True)
            around = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1])
            assert (box - around).abs().max() <= 1.0  # a polygon is drawn half a pixel differently
    assert 0 < flipped < len(rows)


def test_the_truth_scores_one_and_nothing_scores_zero(folder):
    data = truth(folder)
    found = []
    for row in data.rows:
        for one in row["instances"]:
            x1, y1, x2, y2 = one["box"]
            entry = {"image_id": row["id"], "label": one["label"], "score": 0.9, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            found.append({**entry, "segmentation": coco.rle(one["shape"], row)})
    assert average_precision(data, found, masks=True) == dict.fromkeys(
        ("box_ap", "box_ap50", "box_ap75", "box_ap_small", "mask_ap", "mask_ap50", "mask_ap75", "mask_ap_small"),
        pytest.approx(1.0),
    )
    assert set(average_precision(data, [], masks=True).values()) == {0.0}
    for entry in data.truth["annotations"]:
        entry.pop("area")  # files made by hand often lack it
        entry.pop("iscrowd")
    assert average_precision(data, found, masks=True)["mask_ap"] == pytest.approx(1.0)


def test_by_size_each_score_is_that_of_the_objects_of_the_size(folder):
    """One box of each size of COCO's: small ones are found, medium ones missed by half, of large ones one in two."""
    sides = {"small": [20, 31], "medium": [33, 95], "large": [97, 150]}
    entries, found = [], []
    for k, (size, (a, b)) in enumerate(sides.items()):
        for n, side in enumerate((a, b)):
            x, y = 200 * k, 200 * n
            entries.append({"id": len(entries) + 1, "image_id": 1, "category_id": 1, "bbox": [x, y, side, side]})
            if size == "large" and n == 1:
                continue
            off = side // 2 if size == "medium" else 0
            found.append({"image_id": 1, "label": 1, "score": 0.9, "bbox": [x + off, y, side, side]})
    known = truth(folder)
    images = [{"id": 1, "width": 600, "height": 400, "file_name": "it.png"}]
    data = known._replace(rows=[{"id": 1}], truth={**known.truth, "images": images, "annotations": entries})
    scores = average_precision(data, found, masks=False)
    assert scores["box_ap_small"] == pytest.approx(1.0)
    assert scores["box_ap_medium"] == 0.0
    assert scores["box_ap_large"] == pytest.approx(51 / 101)  # recall 0.5 at precision 1, at 101 recalls
    only = data._replace(truth={**data.truth, "annotations": entries[:2]})
    assert set(average_precision(only, found[:2], masks=False)) == {"box_ap", "box_ap50", "box_ap75", "box_ap_small"}


def test_a_mask_that_is_found_has_the_size_of_the_mask_and_not_of_its_box():
    """A thin diagonal: of a wrong one the mask is small and its box large, so it counts against small objects."""
    import numpy as np
    from faster_coco_eval import mask

    def drawn(pixels):
        return mask.encode(np.asfortranarray(pixels.astype(np.uint8)))

    small, line = np.zeros((200, 200)), np.eye(200)
    small[:20, -20:] = 1
    entry = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [180, 0, 20, 20], "area": 400, "iscrowd": 0,
             "segmentation": drawn(small)}  # fmt: skip
    images, categories = [{"id": 1, "width": 200, "height": 200}], [{"id": 1, "name": "it"}]
    data = coco.Instances([{"id": 1}], categories, {"images": images, "categories": categories, "annotations": [entry]})
    found = [{"image_id": 1, "label": 1, "score": 0.9, "bbox": [0, 0, 200, 200], "segmentation": drawn(line)},
             {"image_id": 1, "label": 1, "score": 0.8, "bbox": [180, 0, 20, 20], "segmentation": drawn(small)}]  # fmt: skip
    scores = average_precision(data, found, masks=True)
    assert scores["mask_ap_small"] == pytest.approx(0.5)  # the line, surer, is small as well, and wrong
    assert scores["box_ap_small"] == pytest.approx(1.0)  # its box is large


def test_by_class_is_the_score_of_each_class_alone(folder):
    data, found = truth(folder), []
    for i, row in enumerate(data.rows):
        for k, one in enumerate(row["instances"]):
            x1, y1, x2, y2 = one["box"]
            off = 3 * one["label"] if (i + k) % 2 else 0  # classes are missed by different distances
            box = [x1 + off, y1, x2 - x1, y2 - y1]
            found.append({"image_id": row["id"], "label": one["label"], "score": 0.5 + 0.1 * k, "bbox": box})
    means, by_class = average_precisions(data, found, masks=False)
    for label in range(1, 4):
        only = {**data.truth, "annotations": [a for a in data.truth["annotations"]
                                              if a["category_id"] == data.categories[label - 1]["id"]]}  # fmt: skip
        alone = data._replace(truth=only)
        expected = average_precision(alone, [f for f in found if f["label"] == label], masks=False)["box_ap"]
        occurs = bool(only["annotations"])
        assert by_class["box"][label - 1] == (pytest.approx(expected) if occurs else None)
    known = [v for v in by_class["box"] if v is not None]
    assert 1 < len(known) < 3  # one class does not occur here
    assert means["box_ap"] == pytest.approx(sum(known) / len(known))
    assert 0 < means["box_ap"] < 1


def test_eval_of_the_file_says_what_the_run_said(trained, folder, monkeypatch):
    argv, out, result = trained

    def opened(file, backbone=None, positions=None):
        torch.manual_seed(detect.parse(argv).seed)
        return from_pretrained(file, backbone=create_backbone("test_vit", pretrained=False))

    monkeypatch.setattr(evaluate, "from_pretrained", opened)
    found = evaluate.main(argv=[str(out / "adapter"), "--data", str(folder / "val")])
    assert 100 * found["box_ap"] == pytest.approx(result["box_ap"], abs=0.006)  # two digits of per cent
    assert (found["images"], found["classes"]) == (3, ["disc", "square", "triangle"])
    assert len(found["per_class"]) == 3


def test_an_image_that_two_ranks_saw_counts_once(folder):
    args = detect.parse(command(folder, "unused", "--model", "faster-rcnn"))
    row = detect.instances(args, False).rows[0]
    x1, y1, x2, y2 = row["instances"][0]["box"]
    found = [
        {"image_id": row["id"], "label": row["instances"][0]["label"], "score": 0.9, "bbox": [x1, y1, x2 - x1, y2 - y1]}
    ]
    once, twice = detect.AveragePrecision(args), detect.AveragePrecision(args)
    once.update([found], [row["id"]])
    twice.update([found, found], [row["id"], row["id"]])
    assert twice.compute() == once.compute()


def edit(change):
    def write(path):
        file = path / "annotations.json"
        data = json.loads(file.read_text())
        change(data)
        file.write_text(json.dumps(data))

    return write


def first(**values):
    return edit(lambda d: d["annotations"][0].update(values))


BAD = {
    "no file": (lambda p: (p / "annotations.json").unlink(), "--val: there is no file .*annotations.json"),
    "no JSON": (lambda p: (p / "annotations.json").write_text("{"), "is not JSON"),
    "another format": (
        lambda p: (p / "annotations.json").write_text("[]"),
        "has no list images, annotations, categories",
    ),
    "no image": (lambda p: (p / "images" / "00001.png").unlink(), "1 of 3 images are missing, e.g. .*00001.png"),
    "a torn image": (lambda p: (p / "images" / "00001.png").write_bytes(b"x"), "00001.png is not an image"),
    "another size": (edit(lambda d: d["images"][0].update(width=90)), "is 32 x 48 pixels .*its entry says 32 x 90"),
    "a size in words": (edit(lambda d: d["images"][0].update(width="48")), "width '48' is no whole number of pixels"),
    "half a pixel": (edit(lambda d: d["images"][0].update(width=48.5)), "width 48.5 is no whole number of pixels"),
    "an image's id in words": (edit(lambda d: d["images"][0].update(id="im0")), "images have the id 'im0'"),
    "a category's id in words": (edit(lambda d: d["categories"][0].update(id="1")), "categories have the id '1'"),
    "a crowd of nothing": (
        edit(
            lambda d: (
                d["annotations"][0].update(iscrowd=1),
                d["annotations"][0].pop("bbox"),
                d["annotations"][0].pop("segmentation"),
            )
        ),
        "annotation 1 has no segmentation",
    ),
    "no annotations": (edit(lambda d: d["annotations"].clear()), "holds no annotations"),
    "only crowds": (
        edit(lambda d: [a.update(iscrowd=1) for a in d["annotations"]]),
        "no instance that can be trained on",
    ),
    "unknown image": (first(image_id=99), "annotation 1: image_id 99 is not among the images"),
    "unknown category": (first(category_id=9), "annotation 1: category_id 9 is not among the categories"),
    "three numbers": (first(bbox=[1, 2, 3]), r"bbox \[1, 2, 3\] is not four numbers"),
    "no number": (first(bbox=[1, 2, 3, float("nan")]), r"is not finite"),
    "no area": (first(bbox=[1, 2, 0, 5]), r"annotation 1 has no area .*1 such annotations.*--skip-degenerate"),
    "outside": (first(bbox=[100, 2, 5, 5]), "annotation 1 has no area inside its image"),
    "no segmentation": (first(segmentation=[]), r"annotation 1 has no segmentation.*--model faster-rcnn"),
    "a line": (first(segmentation=[[1, 1, 4, 4]]), "a polygon needs three points"),
    "a flat polygon": (first(segmentation=[[1, 1, 4, 1, 8, 1]]), "annotation 1 has no area"),
    "another code": (
        first(segmentation={"size": [9, 9], "counts": "x"}),
        r"coded for size \[9, 9\], its image is 32 x 48",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_found_before_training(tmp_path, case):
    change, message = BAD[case]
    path = shapes.write(tmp_path, 3, 32, 48, seed=2)
    change(path)
    with pytest.raises(ValueError, match=message):
        truth(tmp_path.parent, tmp_path.name)


def test_degenerate_boxes_can_be_left_out(tmp_path):
    path = shapes.write(tmp_path, 3, 32, 48, seed=2)
    whole = sum(len(r["instances"]) for r in truth(tmp_path.parent, tmp_path.name).rows)
    read_instances.cache_clear()
    first(bbox=[1, 2, 0, 5])(path)
    left = read_instances(path / "images", path / "annotations.json", True, "--val", skip=True)
    assert sum(len(r["instances"]) for r in left.rows) == whole - 1


def test_what_is_left_out_of_training_is_left_out_of_the_truth(tmp_path):
    path = shapes.write(tmp_path, 3, 32, 48, seed=2)
    flat = {"image_id": 1, "category_id": 1, "iscrowd": 0, "area": 0}
    boxes = [[3, 3, 0, 5], [100, 2, 5, 5]]  # flat, and outside
    edit(lambda d: d["annotations"].extend({**flat, "id": 900 + i, "bbox": b} for i, b in enumerate(boxes)))(path)
    data = read_instances(path / "images", path / "annotations.json", False, "--val", skip=True)
    assert average_precision(data, perfect(data), masks=False)["box_ap"] == pytest.approx(1.0)


@pytest.mark.parametrize("boxed", [True, False])
def test_a_crowd_without_a_box_has_that_of_its_mask(tmp_path, boxed):
    """A region of many: what is found in it is not held against a detector."""
    path = shapes.write(tmp_path, 3, 32, 48, seed=2)
    crowd = {"id": 999, "image_id": 1, "category_id": 1, "iscrowd": 1,
             "segmentation": {"size": [32, 48], "counts": [0, 32 * 48]}}  # fmt: skip
    edit(lambda d: d["annotations"].append({**crowd, **({"bbox": [0, 0, 48, 32]} if boxed else {})}))(path)
    data = read_instances(path / "images", path / "annotations.json", False, "--val")
    inside = {"image_id": 1, "label": 1, "score": 0.99, "bbox": [1, 1, 3, 3]}
    assert average_precision(data, [*perfect(data), inside], masks=False)["box_ap"] == pytest.approx(1.0)


def perfect(data):
    found = []
    for row in data.rows:
        for one in row["instances"]:
            x1, y1, x2, y2 = one["box"]
            found.append(
                {"image_id": row["id"], "label": one["label"], "score": 0.9, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            )
    return found


def test_whole_numbers_may_be_written_with_a_point(tmp_path):
    path = shapes.write(tmp_path, 3, 32, 48, seed=2)
    edit(lambda d: [i.update(height=32.0, width=48.0) for i in d["images"]])(path)
    data = read_instances(path / "images", path / "annotations.json", True, "--val")
    assert {coco.size_of(row) for row in data.rows} == {(32, 48)}
    assert all(isinstance(row["height"], int) for row in data.rows)


def test_an_image_without_instances_is_a_sample_too(tmp_path):
    path = shapes.write(tmp_path, 3, 32, 48, seed=2)
    edit(lambda d: d.update(annotations=[a for a in d["annotations"] if a["image_id"] != 1]))(path)
    _, target = Detection(truth(tmp_path.parent, tmp_path.name), masks=True, train=True)[(0, 0)]
    assert target["boxes"].shape == (0, 4)
    assert target["masks"].shape == (0, 32, 48)


def test_train_and_val_must_have_the_same_categories(folder, tmp_path):
    path = shapes.write(tmp_path / "val", 3, 32, 48, seed=2)
    edit(lambda d: d["categories"].append({"id": 9, "name": "star"}))(path)
    (tmp_path / "train").symlink_to(folder / "train")
    with pytest.raises(ValueError, match="--val has categories .*9 star, --train has .*must be the same"):
        detect.main(command(tmp_path, tmp_path / "run"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--streaming"], "leave it out"),
        (["--model", "fcos"], "--width 16: fcos norms in 32 groups"),
        (["--size", "64", "32"], "the shorter side first"),
        (["--anchor", "0"], "--anchor 0.0 must be larger than 0"),
        (["--steps", "0"], "must be at least 1"),
    ],
)
def test_bad_arguments_are_found_at_once(folder, capsys, more, message):
    with pytest.raises(SystemExit):
        detect.main(command(folder, "unused", *more))
    assert re.search(message, capsys.readouterr().err)


def test_a_folder_without_images_says_which_option_names_it(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match="--train: there is no folder .*images; name the folder .*--train-images"):
        coco.locate(str(tmp_path / "a.json"), None, "--train")
