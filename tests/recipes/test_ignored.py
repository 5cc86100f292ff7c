"""Labels that are not what they seem are said before training; a batch in which all is ignored is no end of a run."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from recipes import classify, depth, detect, panoptic, queries, segment, semantic, shapes
from recipes.coco import read_instances
from recipes.labelled import open_images
from recipes.panoptic_data import read_segments

SMALL = ["--backbone", "test_vit", "--random-backbone", "--batch-size", "2", "--steps", "2", "--size", "32", "48",
         "--save-every", "0"]  # fmt: skip
BOX = ["--adapter-options", '{"conv_inplane": 8}']
QUERY = ["--width", "32", "--queries", "6", "--layers", "1", "1", "--points", "64"]


def write(path, masks):
    """A folder of one picture for each mask, an array or a path."""
    for kind in ("images", "masks"):
        (path / kind).mkdir(parents=True, exist_ok=True)
    for i, mask in enumerate(masks):
        Image.new("RGB", (mask.shape[1], mask.shape[0]), (40 * i, 90, 20)).save(path / "images" / f"{i}.png")
        Image.fromarray(mask).save(path / "masks" / f"{i}.png")
    return path


def filled(*values):
    """A mask of these labels, in stripes."""
    return np.array(values, np.uint8).repeat(48 // len(values))[None].repeat(32, 0)


def opened(path, *more, train=True):
    args = segment.parse([f"--train={path}", f"--val={path}", *SMALL, "--adapter", "none", *more])
    return segment.data(args, segment.build(args), train)


# ---------------------------------------------------------------------------------------------- said before training


MAPPED = ["--label-map", '{"0": 0, "255": 1}']


def test_black_and_white_masks_whose_white_is_ignored_are_an_error_that_says_how_to_map_them(tmp_path):
    path = write(tmp_path, [filled(0, 255), filled(255, 0)])
    for train in (True, False):
        with pytest.raises(
            ValueError, match=r"""2 masks .* hold 0 and 255 alone.*--label-map '\{"0": 0, "255": 1\}'"""
        ):
            opened(path, "--num-classes", "2", train=train)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = opened(path, "--num-classes", "2", *MAPPED)
    assert rows[0, 0][1].unique().tolist() == [0, 1]


def test_white_that_is_said_to_be_ignored_is_taken_so(tmp_path):
    path = write(tmp_path, [filled(0, 255), filled(255, 0)])
    with pytest.warns(UserWarning, match="1 of 2 classes occur in none"):
        rows = opened(path, "--num-classes", "2", "--label-map", '{"0": 0, "255": 255}')
    assert rows[0, 0][1].unique().tolist() == [0, 255]


def test_a_validation_set_of_many_classes_may_happen_to_hold_the_first_alone(tmp_path):
    path = write(tmp_path, [filled(0, 255)])
    with pytest.warns(UserWarning, match="hold 0 and 255 alone"):
        assert opened(path, "--num-classes", "5", train=False)[0][1].unique().tolist() == [0, 255]


def test_training_masks_that_are_all_ignored_are_an_error(tmp_path):
    path = write(tmp_path, [filled(9), filled(9)])
    with pytest.raises(ValueError, match=r"2 of 2 masks .* are ignored as a whole \(label 9\)"):
        opened(path, "--num-classes", "2", "--ignore-index", "9")


def test_black_and_white_masks_with_another_ignore_index_are_an_error_that_says_how_to_map_them(tmp_path):
    path = write(tmp_path, [filled(0, 255)])
    with pytest.raises(
        ValueError, match=r"labels \[255\], outside 0\.\.1 .*masks/0.png.*--label-map '.*' if white is a class"
    ):
        opened(path, "--num-classes", "2", "--ignore-index", "-1")


def test_classes_that_never_occur_are_named_of_training_data_alone(tmp_path):
    path = write(tmp_path, [filled(0, 1, 255), filled(4, 1, 0)])
    with pytest.warns(UserWarning, match=r"--train: 2 of 5 classes occur in none of the 2 masks .*\(2, 3\)"):
        opened(path, "--num-classes", "5")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened(path, "--num-classes", "5", train=False)


def test_an_ignored_class_is_not_missed(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened(write(tmp_path, [filled(0, 1, 2)]), "--num-classes", "3", "--ignore-index", "0")


def test_masks_that_are_ignored_as_a_whole_are_counted(tmp_path):
    path = write(tmp_path, [filled(0, 1), filled(255), filled(255)])
    with pytest.warns(UserWarning, match=r"2 of 3 masks .* are ignored as a whole \(label 255\).*--ignore-index"):
        opened(path, "--num-classes", "2")


def test_a_mask_of_another_size_is_found_before_training_in_validation_too(tmp_path):
    path = write(tmp_path, [filled(0, 1), filled(0, 1)])
    Image.fromarray(filled(0, 1)[:8, :8]).save(path / "masks" / "1.png")
    for train in (True, False):
        with pytest.raises(ValueError, match=r"masks/1.png: a mask is 8 x 8 .*images/1.png is 32 x 48"):
            opened(path, "--num-classes", "2", train=train)


def test_labels_out_of_range_that_the_first_look_missed_name_their_file(tmp_path):
    path = write(tmp_path, [filled(0, 1)])
    rows = opened(path, "--num-classes", "2")
    Image.fromarray(filled(0, 7)).save(path / "masks" / "0.png")
    with pytest.raises(ValueError, match=r"masks/0.png: the mask holds labels \[7\], outside 0\.\.1"):
        rows[0, 0]


def test_labels_of_sixteen_bits_are_not_another_label(tmp_path):
    path = write(tmp_path, [filled(0, 1)])
    Image.fromarray(filled(1, 2).astype(np.uint16) * 300).save(path / "masks" / "0.png")
    with pytest.raises(ValueError, match=r"labels \[299, 599\], outside 0\.\.1"):
        opened(path, "--num-classes", "2", "--reduce-zero-label")
    rows = opened(path, "--num-classes", "2", "--label-map", '{"300": 0, "600": 1}')
    assert rows[0, 0][1].unique().tolist() == [0, 1]
    with pytest.raises(ValueError, match="--label-map: '-1' is no label of a mask"):
        opened(path, "--num-classes", "2", "--label-map", '{"-1": 0}')


def test_a_class_without_an_image_is_a_warning_and_a_secret_label_an_error(tmp_path):
    path = write(tmp_path, [filled(0)])
    (tmp_path / "train.txt").write_text("images/0.png 0\nimages/0.png 2")
    args = classify.parse([f"--train={path / 'train.txt'}", f"--val={path / 'train.txt'}"])
    with pytest.warns(UserWarning, match=r"1 of 3 classes occur in none of the 2 images .*\(1\)"):
        classify.task(args)
    import datasets

    rows = {"image": [str(path / "images" / "0.png")], "label": [-1]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "secret.parquet")
    with pytest.raises(ValueError, match=r"row 0 has the label -1.*kept secret; choose another split"):
        open_images(str(tmp_path / "secret.parquet"), "test")


@pytest.mark.parametrize(("recipe", "more"), [(detect, ["--width", "64"]), (panoptic, QUERY)])
def test_a_category_without_an_instance_is_a_warning(tmp_path, recipe, more):
    path = shapes.write(tmp_path, 2, 32, 48)
    for name in ("annotations", "panoptic"):
        file = path / f"{name}.json"
        data = json.loads(file.read_text())
        data["categories"].append({"id": 99, "name": "unicorn", "isthing": 1})
        file.write_text(json.dumps(data))
    read_instances.cache_clear()
    read_segments.cache_clear()
    args = recipe.parse([f"--train={path}", f"--val={path}", *SMALL, *BOX, *more])
    with pytest.warns(UserWarning, match=r"classes occur in none of the 2 images .*unicorn"):
        recipe.build(args)


def test_a_depth_map_of_another_size_is_found_before_training(tmp_path):
    path = write(tmp_path, [filled(9), filled(9)])
    (path / "masks").rename(path / "depth")
    Image.fromarray(np.full((9, 9), 3000, np.uint16)).save(path / "depth" / "1.png")
    args = depth.parse([f"--train={path}", *SMALL, "--max-depth", "10", "--adapter", "none", "--depth-scale", "1"])
    with pytest.raises(ValueError, match=r"depth/1.png: a depth map is 9 x 9 .*images/1.png is 32 x 48"):
        depth.data(args, depth.build(args), True)


@pytest.mark.parametrize(("mode", "has"), [("RGB", "3 channels"), ("P", "a palette")])
def test_a_picture_of_colours_is_no_depth_map(tmp_path, mode, has):
    path = write(tmp_path, [filled(9)])
    (path / "masks").rename(path / "depth")
    Image.new(mode, (48, 32)).save(path / "depth" / "0.png")
    args = depth.parse([f"--train={path}", *SMALL, "--max-depth", "10", "--adapter", "none"])
    with pytest.raises(ValueError, match=rf"depth/0.png: a depth map has {has}.*16-bit value per pixel"):
        depth.data(args, depth.build(args), True)


# ------------------------------------------------------------------------------------------------- all of it ignored


def trained(recipe, model, batch, args, zero=True):
    """The loss of a batch, finite, that reaches every trained parameter, as DDP expects; zero if it should be."""
    loss = recipe(model, batch, args)
    loss.sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n, g in gradients.items() if g is None] == []
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients.values())
    if zero:
        assert loss.item() == 0
        assert not any(g.any() for g in gradients.values())


def ignored():
    return [torch.randn(2, 3, 32, 48), torch.full((2, 32, 48), 255)]


@pytest.mark.parametrize("head", ["linear", "fpn", "upernet", "mask2former"])
def test_a_batch_of_ignored_pixels_has_a_zero_loss_and_gradient(head):
    if head == "mask2former":
        pytest.importorskip("scipy")
    more = ["--adapter", "none"] if head == "linear" else BOX
    args = segment.parse(["--train=x", *SMALL, *more, *QUERY, "--num-classes", "3", "--head", head])
    task = semantic.task(segment.TASK, head) if head in ("upernet", "mask2former") else segment.TASK
    trained(task.loss, task.build(args), ignored(), args)


@pytest.mark.parametrize("head", ["linear", "fpn", "upernet"])
def test_a_pixel_with_a_label_has_the_loss_of_cross_entropy(head):
    args = segment.parse(["--train=x", *SMALL, *(["--adapter", "none"] if head == "linear" else BOX), *QUERY,
                          "--num-classes", "3", "--head", head])  # fmt: skip
    task = semantic.task(segment.TASK, head) if head == "upernet" else segment.TASK
    model, (image, mask) = task.build(args).eval(), ignored()
    mask[0, :8] = torch.arange(48) % 3
    want = torch.nn.functional.cross_entropy(model(image).logits, mask, ignore_index=255)
    if head == "upernet":
        want = model(image, labels=mask).loss
    assert task.loss(model, [image, mask], args) == want


@pytest.mark.parametrize("bins", ["0", "8"])
def test_a_batch_without_a_measured_depth_has_a_zero_loss_and_gradient(bins):
    args = depth.parse(["--train=x", *SMALL, *BOX, "--max-depth", "10", "--bins", bins])
    trained(depth.loss, depth.build(args), [torch.randn(2, 3, 32, 48), torch.zeros(2, 1, 32, 48)], args)


def test_a_batch_without_a_segment_has_a_zero_loss_and_gradient(tmp_path):
    pytest.importorskip("scipy")
    path = shapes.write(tmp_path, 1, 32, 48)
    args = panoptic.parse([f"--train={path}", f"--val={path}", *SMALL, *BOX, *QUERY])
    with pytest.warns(UserWarning, match="occur in none"):
        model = panoptic.build(args)
    nothing = {"masks": torch.zeros(0, 32, 48), "labels": torch.zeros(0, dtype=torch.int64)}
    trained(panoptic.loss, model, (torch.randn(2, 3, 32, 48), [nothing, nothing]), args)


def test_queries_without_an_object_learn_that_there_is_nothing(tmp_path):
    path = shapes.write(tmp_path, 1, 32, 48)
    few = ["--adapter", "none", "--queries", "6", "--points", "64", "--head-options", '{"num_blocks": 2}']
    args = detect.parse([f"--train={path}", f"--val={path}", *SMALL, *few, "--model", "plain-mask"])
    with pytest.warns(UserWarning, match="occur in none"):
        model = detect.build(args)
    nothing = {"masks": torch.zeros(0, 32, 48), "labels": torch.zeros(0, dtype=torch.int64)}
    trained(queries.object_loss, model, (torch.randn(2, 3, 32, 48), [nothing, nothing]), args, zero=False)


@pytest.mark.parametrize("kind", [kind for kind in detect.MODELS if kind != "plain-mask"])
def test_a_batch_without_a_box_teaches_that_there_is_nothing_and_reaches_every_parameter(tmp_path, kind):
    """An empty image is no ignored one: whatever is found in it is wrong."""
    path = shapes.write(tmp_path, 1, 32, 48)
    args = detect.parse([f"--train={path}", f"--val={path}", *SMALL, *BOX, "--model", kind, "--width", "64"])
    with pytest.warns(UserWarning, match="occur in none"):
        model = detect.build(args)
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "image_id": torch.tensor(1)}
    nothing["masks"] = torch.zeros(0, 32, 48, dtype=torch.uint8)
    batch = ([torch.rand(3, 32, 48)] * 2, [dict(nothing), dict(nothing)])
    trained(detect.loss, model, batch, args, zero=False)


def test_a_run_goes_on_through_batches_that_are_ignored(tmp_path):
    path = write(tmp_path / "set", [filled(255), filled(255), filled(0, 1)])
    argv = [f"--train={path}", f"--val={path}", *SMALL, "--adapter", "none", "--num-classes", "2", "--batch-size", "1",
            "--steps", "3", "--out", str(tmp_path / "run")]  # fmt: skip
    with pytest.warns(UserWarning, match="2 of 3 masks"):
        result = segment.main(argv)
    assert np.isfinite(result["miou"])


def test_a_torn_image_that_a_worker_meets_ends_the_run_with_one_line(tmp_path):
    path = write(tmp_path / "set", [filled(0, 1)] * 3)
    file = path / "images" / "1.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:2000])
    argv = [f"--train={path}", f"--val={path}", *SMALL, "--adapter", "none", "--num-classes", "2", "--workers", "1",
            "--out", str(tmp_path / "run")]  # fmt: skip
    with pytest.raises(
        ValueError, match=r"^\S*images/1.png is not an image that can be read whole: .*or take it out of the set$"
    ):
        segment.main(argv)


def test_labels_that_count_from_one_are_answered_with_the_option_for_them(tmp_path):
    path = write(tmp_path / "set", [filled(1, 2), filled(2, 1)])
    args = segment.parse([f"--train={path}", f"--val={path}", *SMALL, "--adapter", "none", "--num-classes", "2"])
    with pytest.raises(ValueError, match="--reduce-zero-label if labels count from 1, --num-classes 3 or"):
        segment.data(args, segment.build(args), True)
    counted = segment.parse([f"--train={path}", f"--val={path}", *SMALL, "--adapter", "none", "--num-classes", "2",
                             "--reduce-zero-label"])  # fmt: skip
    assert set(segment.data(counted, segment.build(counted), True)[0, 0][1].unique().tolist()) <= {0, 1, 255}
