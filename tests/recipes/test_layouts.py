"""The layouts in which folders keep images and masks: each pairs what belongs together, or names the file."""

import numpy as np
import pytest
from PIL import Image

from recipes import depth, layouts
from recipes.data import open_dataset
from recipes.options import validation


def draw(path, *files):
    """Pictures of 4 x 4 pixels; the number in the name is their grey."""
    for name in files:
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        grey = int("".join(c for c in file.stem if c.isdigit())[:2] or 0)
        Image.new("L" if file.suffix == ".png" else "RGB", (4, 4), grey if file.suffix == ".png" else (grey,) * 3).save(
            file
        )
    return path


def read(path, split="train", **more):
    """The pairs, by file names relative to the folder."""
    import datasets

    data = open_dataset(str(path), split, **more)
    for column in ("image", "mask"):
        data = data.cast_column(column, datasets.Image(decode=False))
    rel = [tuple(r[c]["path"].removeprefix(f"{path}/") for c in ("image", "mask")) for r in data]
    return rel


def test_nested_folders_pair_by_relative_path_and_stem(tmp_path):
    draw(
        tmp_path,
        "images/a/1.jpg",
        "images/a/b/1.jpg",
        "images/2.jpg",
        "masks/a/1.png",
        "masks/a/b/1.png",
        "masks/2.png",
    )
    assert read(tmp_path) == [
        ("images/2.jpg", "masks/2.png"),
        ("images/a/1.jpg", "masks/a/1.png"),
        ("images/a/b/1.jpg", "masks/a/b/1.png"),
    ]


def test_a_nested_mask_of_another_folder_is_no_partner(tmp_path):
    draw(tmp_path, "images/a/1.jpg", "images/b/2.jpg", "masks/a/1.png", "masks/a/2.png")
    with pytest.raises(ValueError, match=r"2 files have no partner .2 images, 2 masks., e.g. .*masks/a/2.png"):
        read(tmp_path)


@pytest.mark.parametrize("end", ["_mask", "_gt", "_gtFine_labelIds", "-labels", "_seg"])
@pytest.mark.parametrize("folders", [("images/", "masks/"), ("", ""), ("deep/er/", "deep/er/"), ("images/", "images/")])
def test_masks_whose_name_has_an_end_of_its_own_are_found(tmp_path, end, folders):
    image, mask = folders
    draw(tmp_path, f"{image}1.jpg", f"{image}2.jpg", f"{mask}1{end}.png", f"{mask}2{end}.png")
    assert read(tmp_path) == [(f"{image}{i}.jpg", f"{mask}{i}{end}.png") for i in (1, 2)]


def test_an_end_of_the_users_own_chooses_between_several(tmp_path):
    draw(tmp_path, "1.jpg", "1_gt.png", "1_gt_colour.png")
    with pytest.raises(ValueError, match=r"1_gt.png and 1_gt_colour.png are maps of one image.*--mask-suffix _gt"):
        read(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "1_gt_colour.png")
    (tmp_path / "1_gt_colour.png").unlink()
    draw(tmp_path, "1_cells.png")
    with pytest.raises(ValueError, match="have no partner"):
        read(tmp_path)
    (tmp_path / "1_gt.png").unlink()
    assert read(tmp_path, suffix="_cells") == [("1.jpg", "1_cells.png")]


def test_an_image_whose_name_has_an_end_too(tmp_path):
    draw(tmp_path, "1_sat.jpg", "1_mask.png", "2_sat.jpg", "2_mask.png")
    assert read(tmp_path) == [("1_sat.jpg", "1_mask.png"), ("2_sat.jpg", "2_mask.png")]


def test_images_that_end_like_masks_still_pair_by_their_own_names(tmp_path):
    draw(tmp_path, "images/1_gt.jpg", "images/2.jpg", "masks/1_gt.png", "masks/2.png")
    assert read(tmp_path) == [("images/1_gt.jpg", "masks/1_gt.png"), ("images/2.jpg", "masks/2.png")]


def test_a_folder_without_masks_says_where_they_may_lie(tmp_path):
    draw(tmp_path, "1.jpg", "2.jpg")
    with pytest.raises(ValueError, match=r"holds 2 pictures and no maps of them.*a.jpg and a_mask.png"):
        read(tmp_path)


@pytest.mark.parametrize("inside", ["images/{}/{}.jpg masks/{}/{}.png", "{}/images/{}.jpg {}/masks/{}.png"])
@pytest.mark.parametrize("named", [("train", "val"), ("training", "validation"), ("train2017", "val2017")])
def test_each_split_is_read_from_its_own_folder_so_that_no_score_is_of_training_data(tmp_path, inside, named):
    image, mask = inside.split()
    for split, i in zip(named, (1, 2)):
        draw(tmp_path, image.format(split, i), mask.format(split, i))
    for split, name, i in zip(("train", "validation"), named, (1, 2)):
        assert read(tmp_path, split) == [(image.format(name, i), mask.format(name, i))]
    from types import SimpleNamespace

    assert validation(SimpleNamespace(train=str(tmp_path), val=None)) == str(tmp_path)
    with pytest.raises(ValueError, match="none of the split 'test'"):
        read(tmp_path, "test")


def test_a_folder_of_one_split_is_a_folder(tmp_path):
    draw(tmp_path, "images/train/1.jpg", "masks/train/1.png")
    assert layouts.splits(tmp_path / "images") == {}
    assert read(tmp_path, "validation") == [("images/train/1.jpg", "masks/train/1.png")]


def test_two_folders_of_masks_ask_which_is_meant(tmp_path):
    draw(tmp_path, "images/1.jpg", "masks/1.png", "label/1.png")
    with pytest.raises(ValueError, match=r"several folders of maps, label, masks: choose one with --mask-column label"):
        read(tmp_path)
    assert read(tmp_path, columns=(None, "masks")) == [("images/1.jpg", "masks/1.png")]
    with pytest.raises(ValueError, match="has no folder 'nope'"):
        read(tmp_path, columns=(None, "nope"))


def test_labels_of_texts_are_no_masks(tmp_path):
    draw(tmp_path, "images/1.jpg", "masks/1.png")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "1.txt").write_text("0 0.5 0.5 1 1")
    assert read(tmp_path) == [("images/1.jpg", "masks/1.png")]


def test_depths_lie_in_the_same_layouts(tmp_path):
    draw(tmp_path, "a/1.jpg", "a/1_depth.png")
    assert read(tmp_path, names=depth.DEPTH_NAMES) == [("a/1.jpg", "a/1_depth.png")]


# -------------------------------------------------------------------------------------------------- columns of images


def table(tmp_path, *columns):
    import datasets

    row = {c: [Image.fromarray(np.full((4, 4), i, np.uint8))] for i, c in enumerate(columns)}
    features = datasets.Features({c: datasets.Image() for c in columns})
    datasets.Dataset.from_dict(row, features=features).to_parquet(tmp_path / "a.parquet")
    return str(tmp_path / "a.parquet")


def greys(name, **more):
    row = open_dataset(name, "train", **more)[0]
    return [row[c].getpixel((0, 0)) for c in ("image", "mask")]


@pytest.mark.parametrize(
    ("columns", "chosen"),
    [
        (("image", "mask"), [0, 1]),
        (("mask", "picture"), [1, 0]),
        (("nir", "image", "annotation"), [1, 2]),  # the one called image, not the first
        (("a", "mask"), [0, 1]),
        (("image", "b"), [0, 1]),
    ],
)
def test_columns_that_can_mean_one_thing_only_are_found(tmp_path, columns, chosen):
    assert greys(table(tmp_path, *columns)) == chosen


@pytest.mark.parametrize(
    ("columns", "option", "chosen"),
    [
        (("left", "right", "mask"), "--image-column left", ("right", None)),
        (("image", "mask", "label"), "--mask-column label", (None, "mask")),
        (("image", "a", "b"), "--mask-column a", (None, "b")),
    ],
)
def test_columns_that_can_mean_several_things_ask(tmp_path, columns, option, chosen):
    name = table(tmp_path, *columns)
    with pytest.raises(ValueError, match=f"several columns of images, .*choose one with {option}"):
        greys(name)
    assert greys(name, columns=chosen) == [
        columns.index(c or "image" if c or "image" in columns else "mask") if c or i == 0 else columns.index("mask")
        for i, c in enumerate(chosen)
    ]


def test_a_depth_map_is_preferred_to_a_mask_beside_it(tmp_path):
    assert greys(table(tmp_path, "image", "mask", "depth"), names=depth.DEPTH_NAMES) == [0, 2]
