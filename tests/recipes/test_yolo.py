"""YOLO's boxes and polygons: the same rows and scores as COCO's, and errors that name file and line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("faster_coco_eval")

from recipes import detect, shapes
from recipes.coco import read_instances
from recipes.detection_data import Detection, open_instances
from recipes.scores.average_precision import average_precision
from recipes.yolo import has_splits, labels_of, read_yolo

QUICK = ["--backbone", "test_vit", "--random-backbone", "--adapter-options", '{"conv_inplane": 8}', "--size", "32", "48",
         "--width", "64", "--anchor", "4", "--batch-size", "2", "--steps", "2", "--save-every", "0", "--model", "fcos"]  # fmt: skip


@pytest.fixture(autouse=True)
def fresh():
    for reader in (read_instances, read_yolo):
        reader.cache_clear()


def write_yolo(root, split, coco, polygons=True):
    """The same set in YOLO's format."""
    data = json.loads((coco / "annotations.json").read_text())
    for one in data[
        "annotations"
    ]:  # drawn things are partly hidden, and coded as pixels; here a triangle stands for each
        x, y, w, h = one["bbox"]
        one["segmentation"] = [[x, y, x + w, y, x + w, y + h]]
    (coco / "annotations.json").write_text(json.dumps(data))
    things = data["categories"]
    number = {c["id"]: k for k, c in enumerate(things)}
    for entry in data["images"]:
        image, text = root / split / "images" / entry["file_name"], root / split / "labels" / entry["file_name"]
        for file in (image, text):
            file.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes((coco / "images" / entry["file_name"]).read_bytes())
        w, h, lines = entry["width"], entry["height"], []
        for one in data["annotations"]:
            if one["image_id"] == entry["id"]:
                x, y, bw, bh = one["bbox"]
                values = [(x + bw / 2) / w, (y + bh / 2) / h, bw / w, bh / h]
                if polygons:
                    points = one["segmentation"][0]
                    values = [v / (h if i % 2 else w) for i, v in enumerate(points)]
                lines.append(" ".join(map(str, [number[one["category_id"]], *values])))
        text.with_suffix(".txt").write_text("\n".join(lines))
    (root / "data.yaml").write_text(
        json.dumps({"train": "train/images", "val": "val/images", "names": [c["name"] for c in things]})
    )
    return things


@pytest.fixture
def both(tmp_path):
    """A set in COCO's format and in YOLO's."""
    for split, seed in (("train", 0), ("val", 1)):
        write_yolo(tmp_path / "yolo", split, shapes.write(tmp_path / "coco" / split, 3, 32, 48, seed=seed))
    return tmp_path


def samples(data):
    return [Detection(data, masks=True)[i] for i in range(len(data.rows))]


@pytest.mark.parametrize("place", ["", "data.yaml", "train"])
def test_polygons_are_those_of_the_same_set_in_cocos_format(both, place):
    coco = open_instances(str(both / "coco" / "train"), None, "train", True, "--train")
    yolo = open_instances(str(both / "yolo" / place), None, "train", True, "--train")
    assert [c["name"] for c in yolo.categories] == [c["name"] for c in coco.categories]
    for (image, target), (same, found) in zip(samples(coco), samples(yolo), strict=True):
        assert torch.equal(image, same)
        assert target["labels"].tolist() == found["labels"].tolist()
        assert (target["masks"] != found["masks"]).float().mean() < 0.01  # numbers of the text are rounded
    assert len(yolo.rows) == 3


def test_boxes_are_those_of_the_same_set_in_cocos_format(both):
    write_yolo(both / "yolo", "train", both / "coco" / "train", polygons=False)
    coco = open_instances(str(both / "coco" / "train"), None, "train", False, "--train")
    yolo = open_instances(str(both / "yolo"), None, "train", False, "--train")
    for row, same in zip(coco.rows, yolo.rows, strict=True):
        assert (row["height"], row["width"], row["path"].name) == (same["height"], same["width"], same["path"].name)
        assert [i["label"] for i in row["instances"]] == [i["label"] for i in same["instances"]]
        theirs = torch.tensor([i["box"] for i in row["instances"]], dtype=torch.float32)
        assert torch.allclose(theirs, torch.tensor([i["box"] for i in same["instances"]]), atol=1e-3)
    truth = [
        {"image_id": row["id"], "label": i["label"], "score": 1.0,
         "bbox": [i["box"][0], i["box"][1], i["box"][2] - i["box"][0], i["box"][3] - i["box"][1]]}
        for row in yolo.rows for i in row["instances"]
    ]  # fmt: skip
    assert average_precision(yolo, truth, False)["box_ap"] == 1.0
    with pytest.raises(ValueError, match=r"labels/\S+.txt, line 1 has no segmentation.*faster-rcnn"):
        open_instances(str(both / "yolo"), None, "train", True, "--train")


def test_one_name_trains_and_validates_each_on_its_own_split(both, tmp_path):
    assert has_splits(str(both / "yolo"))
    args = detect.parse(["--train", str(both / "yolo"), *QUICK, "--out", str(tmp_path / "run")])
    train, val = (detect.instances(args, t).rows for t in (True, False))
    assert {r["path"] for r in train}.isdisjoint(r["path"] for r in val)
    result = detect.main(["--train", str(both / "yolo"), *QUICK, "--out", str(tmp_path / "run")])
    assert result["box_ap"] == result["box_ap_reattached"]


def test_images_lie_where_the_yaml_says(tmp_path):
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / "set" / kind / split).mkdir(parents=True)
        Image.new("RGB", (20, 10)).save(tmp_path / "set" / "images" / split / "a.png")
        (tmp_path / "set" / "labels" / split / "a.txt").write_text("1 0.5 0.5 0.5 1.0\n")
    file = tmp_path / "my.yaml"
    file.write_text("path: set\ntrain: images/train\nval: [images/val]\nnc: 2\nnames: {0: a, 1: b}\n")
    data = read_yolo(str(file), "validation", False, "--val")
    assert data.rows[0]["instances"] == [{"box": [5.0, 0.0, 15.0, 10.0], "label": 2, "shape": None}]
    (tmp_path / "set" / "some.txt").write_text("./images/train/a.png\n")
    file.write_text("path: set\ntrain: some.txt\nnames: [a, b]\n")
    assert len(read_yolo(str(file), "train", False, "--train").rows) == 1
    read_yolo.cache_clear()
    with pytest.raises(ValueError, match="names no images for the split 'validation'"):
        read_yolo(str(file), "validation", False, "--val")


def test_the_last_folder_of_images_becomes_labels():
    assert labels_of(Path("/images/set/images/train/a.jpg")) == Path("/images/set/labels/train/a.txt")
    assert labels_of(Path("/set/images.jpg")) == Path("/set/images.txt")


def test_a_picture_that_exif_turns_has_the_boxes_of_what_is_seen(tmp_path):
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "images" / "a.jpg", exif=exif)
    (tmp_path / "labels" / "a.txt").write_text("0 0.5 0.25 1 0.5")
    (tmp_path / "data.yaml").write_text("train: images\nnames: [a]\n")
    data = read_yolo(str(tmp_path), "train", False, "--train")
    assert (data.rows[0]["height"], data.rows[0]["width"]) == (20, 10)
    assert data.rows[0]["instances"][0]["box"] == [0.0, 0.0, 10.0, 10.0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.1", r"a.txt, line 2 has 3 numbers after the class: a box has 4"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "has 7 numbers after the class"),
        ("2 0.5 0.5 0.1 0.1", r"a.txt, line 2: class 2 is outside 0..1"),
        ("0.5 0.5 0.5 0.1 0.1", "class 0.5 is outside"),
        ("0 12 20 8 8", r"a.txt, line 2: 8..24 is outside of the image, 0..1; divide pixels"),
        ("0 0.9 0.5 0.4 0.1", "0.45..1.1 is outside of the image"),
        ("0 nan 0.5 0.4 0.1", "the numbers are not finite"),
        ("car 0.5 0.5 0.1 0.1", "'car 0.5 0.5 0.1 0.1' is not numbers"),
        ("0 0.5 0.5 0 0.1", "line 2 has no area inside its image"),
    ],
)
def test_what_is_wrong_names_file_and_line(tmp_path, line, message):
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    Image.new("RGB", (20, 10)).save(tmp_path / "images" / "a.png")
    (tmp_path / "labels" / "a.txt").write_text(f"0 0.5 0.5 0.1 0.1\n{line}\n")
    (tmp_path / "data.yaml").write_text("train: images\nnames: [a, b]\n")
    with pytest.raises(ValueError, match=message):
        read_yolo(str(tmp_path), "train", False, "--train")


def test_an_image_without_a_text_has_no_object_and_a_text_without_an_image_is_named(both):
    (both / "yolo" / "train" / "labels" / "00001.txt").unlink()
    names = sorted(p.stem for p in (both / "yolo" / "train" / "images").iterdir())
    assert "00001" in names
    data = read_yolo(str(both / "yolo"), "train", True, "--train")
    assert [len(r["instances"]) > 0 for r in data.rows] == [n != "00001" for n in names]
    read_yolo.cache_clear()
    (both / "yolo" / "train" / "labels" / "lost.txt").write_text("0 0.5 0.5 0.1 0.1")
    with pytest.raises(ValueError, match=r"1 text files have no image, e.g. \S+lost.txt"):
        read_yolo(str(both / "yolo"), "train", True, "--train")


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("train: train/images\n", "has no names of classes"),
        ("train: train/images\nnames: [a]\nnc: 2\n", "nc is 2, and there are 1 names"),
        ("train: train/images\nnames: {1: a}\n", r"the numbers of names are \[1\]; give 0..0"),
        ("train: nowhere\nnames: [a]\n", "names .*nowhere for the split 'train', and there is no such folder"),
        ("train: train/images\nnames: [a]\nkpt_shape: [17, 3]\n", "keypoints"),
    ],
)
def test_a_yaml_that_says_too_little_is_refused(both, yaml, message):
    (both / "yolo" / "data.yaml").write_text(yaml)
    with pytest.raises(ValueError, match=message):
        read_yolo(str(both / "yolo"), "train", True, "--train")


def test_categories_of_the_same_ids_and_other_names_are_not_the_same(both):
    file = both / "coco" / "val" / "annotations.json"
    said = json.loads(file.read_text())
    said["categories"][0]["name"] = "ring"
    file.write_text(json.dumps(said))
    args = detect.parse(["--train", str(both / "coco" / "train"), "--val", str(both / "coco" / "val"), *QUICK])
    with pytest.raises(ValueError, match="they must be the same"):
        detect.build(args)


def test_an_evaluation_reads_the_same_set(both, tmp_path):
    from recipes import evaluate

    demo = [
        "--backbone",
        "demo",
        "--adapter-options",
        '{"conv_inplane": 8}',
        *QUICK[5:],
        "--out",
        str(tmp_path / "run"),
    ]
    detect.main(["--train", str(both / "yolo"), *demo])
    file = str(tmp_path / "run" / "adapter")
    found = evaluate.evaluate(evaluate.parse([file, "--data", str(both / "yolo")]))
    assert (found["images"], found["classes"][:2]) == (3, ["disc", "square"])
    fewer = Path(shutil.copytree(both / "yolo", tmp_path / "fewer"))
    for path in fewer.glob("train/*/00000.*"):
        path.unlink()
    train = evaluate.evaluate(evaluate.parse([file, "--data", str(fewer), "--split", "train"]))
    assert train["images"] == 2
    with pytest.raises(
        ValueError, match=r"the first that differs has id and name \(1, 'disc'\) in --data, \(0, 'disc'\)"
    ):
        evaluate.evaluate(evaluate.parse([file, "--data", str(both / "coco" / "val")]))
