"""What is said of the data before training: counts that are right, and what is wrong with its remedy."""

import json
from argparse import Namespace

import numpy as np
import pytest
from PIL import Image

import adaptkit
from adaptkit.create import create_backbone
from recipes import classify, depth, detect, panoptic, segment, shapes
from recipes.summary import ROWS, Summary, about, as_json, lines, of_counts

SMALL = ["--backbone", "test_vit", "--random-backbone", "--adapter", "none", "--batch-size", "2", "--size", "32", "48"]


def write(path, masks):
    for kind in ("images", "masks"):
        (path / kind).mkdir(parents=True)
    for i, mask in enumerate(masks):
        Image.new("RGB", mask.shape[::-1]).save(path / "images" / f"{i}.png")
        Image.fromarray(mask).save(path / "masks" / f"{i}.png")
    return path


def rows_of(recipe, argv, task=None):
    args = recipe.parse(argv)
    task = recipe.task(args)
    model = task.build(args)
    return (task.data(args, model, True), task.data(args, model, False)), args


def test_pixels_of_each_class_are_counted_and_ignored_ones_are_not(tmp_path):
    masks = [np.array([[0, 0, 1, 255]], np.uint8).repeat(32, 0).repeat(12, 1), np.full((32, 48), 1, np.uint8)]
    path = write(tmp_path / "a", masks)
    rows, args = rows_of(segment, [f"--train={path}", f"--val={path}", *SMALL, "--num-classes", "2"])
    for one in rows:
        assert one.summary.counts.tolist() == [32 * 24, 32 * 12 + 32 * 48]
        assert one.summary.images_of.tolist() == [1, 2]
        assert one.summary.ignored == pytest.approx(32 * 12 / (2 * 32 * 48))
        assert one.summary.sizes == [(32, 48)] * 2
    said = about(rows, args)
    assert said[0] == "data --train: 2 images; 32 x 48 pixels (height x width); 12.5% of the pixels are ignored"
    assert said[3].split() == ["0", "28.57%", "1", "28.57%", "1"]
    assert said[4].split() == ["1", "71.43%", "2", "71.43%", "2"]
    assert len(said) == 5


def test_a_class_that_is_not_in_the_validation_set_is_said_with_what_to_do(tmp_path):
    train = write(tmp_path / "a", [np.array([[0, 1]], np.uint8).repeat(32, 0).repeat(24, 1)])
    val = write(tmp_path / "b", [np.zeros((32, 48), np.uint8)])
    rows, args = rows_of(
        segment, [f"--train={train}", f"--val={val}", *SMALL, "--num-classes", "2", "--classes", "sky", "pole"]
    )
    said = about(rows, args)
    assert said[-2].split() == ["1", "pole", "50.00%", "1", "never", "0"]
    assert said[-1].startswith(
        "  ! --val: pole occurs in no image that is there; the score says nothing of it: add images"
    )


def test_images_much_larger_than_the_size_and_mostly_ignored_masks_are_said(tmp_path):
    mask = np.full((320, 480), 255, np.uint8)
    mask[:80], mask[80:90] = 0, 1
    path = write(tmp_path / "a", [mask])
    rows, args = rows_of(segment, [f"--train={path}", f"--val={path}", *SMALL, "--num-classes", "2"])
    notes = [line for line in about(rows, args) if "!" in line]
    assert (
        sum("images are 10.0 times the side of --size 32 48" in n and "give a larger --size" in n for n in notes) == 2
    )
    assert sum("72% of the pixels are ignored; check --ignore-index" in n for n in notes) == 2


def test_boxes_segments_depths_and_images_are_counted_alike(tmp_path):
    pytest.importorskip("faster_coco_eval")
    path = shapes.write(tmp_path, 4, 32, 48)
    data = {n: json.loads((path / f"{n}.json").read_text()) for n in ("annotations", "panoptic")}
    more = ["--backbone", "test_vit", "--random-backbone", "--size", "32", "48", "--width", "32"]
    more += ["--adapter-options", '{"conv_inplane": 8}']
    found = {}
    for recipe, name in ((detect, "annotations"), (panoptic, "panoptic")):
        args = recipe.parse([f"--train={path}", f"--val={path}", *more])
        model = Namespace(vit=adaptkit.view(create_backbone("test_vit", pretrained=False)))
        if recipe is panoptic:
            model = recipe.build(
                recipe.parse([f"--train={path}", f"--val={path}", *more, "--queries", "4", "--layers", "1", "1"])
            )
        rows = recipe.data(args, model, True)
        found[name] = rows.summary
        ids = [c["id"] for c in sorted(data[name]["categories"], key=lambda c: c["id"])]
        entries = data[name]["annotations"]
        entries = entries if name == "annotations" else [s for a in entries for s in a["segments_info"]]
        want = [sum(e["category_id"] == k for e in entries) for k in ids]
        assert rows.summary.counts.tolist() == want
    assert "boxes of --train" in "\n".join(lines([found["annotations"]], [32, 48]))
    rows, args = rows_of(depth, ["--train", "drawn:3", "--val", "drawn:2", "--max-depth", "10", *SMALL])
    assert "m, median" in about(rows, args)[1]
    rows, args = rows_of(classify, ["--train", "digits", "--size", "32", "--backbone", "test_vit", "--random-backbone"])
    assert sum(rows[0].summary.counts) == len(rows[0])
    assert len(rows[0].summary.sizes) <= 200


def test_many_classes_stay_one_screen_with_the_rare_ones_shown():
    labels = [[k] * (k + 1) for k in range(1, 150)]
    seen = of_counts("--train", "boxes", labels, [(10, 10)] * 149, [f"c{k}" for k in range(150)])
    said = lines([seen], [8, 8])
    assert len(said) <= ROWS + 5
    assert any("c0 " in line and "never" in line for line in said)
    assert any("c149" in line for line in said)
    assert any("134 more classes" in line for line in said)


def test_a_bounded_look_says_so():
    seen = Summary("--train", "pixels", 5000, 2000)
    assert "5,000 images, 2,000 of them looked at" in lines([seen], 32)[0]
    stream = Summary("--train", "pixels", None, 200)
    assert "a stream, of which the first 200 images were looked at" in lines([stream], 32)[0]
    assert as_json(seen, 32, [])["looked_at"] == 2000
