"""What files mean: labels that move, Cityscapes' folders."""

import numpy as np
import pytest
import torch
from PIL import Image

from adaptkit.core.view import Source
from recipes.data import SegmentationData, open_dataset
from recipes.labels import Reading, label_table
from recipes.look import check_labels

HALF = Source(mean=(0.5,) * 3, std=(0.5,) * 3)


def test_labels_move_as_the_table_says():
    table = label_table({"7": 0, "33": 18}, False, 255)
    assert table[torch.tensor([7, 33, 0, 8, 255])].tolist() == [0, 18, 255, 255, 255]
    reduced = label_table({}, True, 255)
    assert reduced[torch.tensor([0, 1, 150, 255])].tolist() == [255, 0, 149, 255]
    assert label_table({}, False, 255) is None


@pytest.fixture
def cityscapes(tmp_path):
    """Two frames of one city, labelled with ids of the files: 7 is road, 26 is car."""
    ids = np.full((16, 24), 7, np.uint8)
    ids[:, 12:], ids[:4] = 26, 0
    for i in range(2):
        for folder, end, picture in (
            ("leftImg8bit", "leftImg8bit.png", Image.new("RGB", (24, 16))),
            ("gtFine", "gtFine_labelIds.png", Image.fromarray(ids)),
            ("gtFine", "gtFine_color.png", Image.new("RGB", (24, 16))),
        ):
            where = tmp_path / folder / "val" / "ulm"
            where.mkdir(parents=True, exist_ok=True)
            picture.save(where / f"ulm_{i}_{end}")
    return tmp_path


def test_cityscapes_is_read_from_its_own_folders(cityscapes):
    data = open_dataset(str(cityscapes), "validation")
    table = label_table({"7": 0, "26": 13}, False, 255)
    rows = SegmentationData(data, (16, 24), HALF, labels=Reading(table))
    assert len(rows) == 2
    mask = rows[1][1]
    assert (mask[4:, :12] == 0).all()
    assert (mask[4:, 12:] == 13).all()
    assert (mask[:4] == 255).all()
    check_labels(rows, 19, 255, "--val")
    with pytest.raises(ValueError, match=r"the mask holds labels \[26\]"):
        check_labels(SegmentationData(data, (16, 24), HALF), 19, 255, "--val")


def test_an_image_without_its_labels_is_named(cityscapes):
    (cityscapes / "gtFine" / "val" / "ulm" / "ulm_1_gtFine_labelIds.png").unlink()
    with pytest.raises(ValueError, match="1 files have no partner .2 images, 1 masks., e.g. .*ulm_1_leftImg8bit.png"):
        open_dataset(str(cityscapes), "validation")
    with pytest.raises(ValueError, match="leftImg8bit/train holds no"):
        open_dataset(str(cityscapes), "train")


@pytest.fixture
def folder(tmp_path):
    """Two images and their masks."""
    for kind, mode in (("images", "RGB"), ("masks", "L")):
        (tmp_path / kind).mkdir()
        for i in range(2):
            Image.new(mode, (24, 16)).save(tmp_path / kind / f"{i}.png")
    return tmp_path


def test_hidden_files_and_folders_are_no_pictures_of_a_set(folder):
    (folder / "images" / "._0.png").write_bytes(b"of a Mac")
    (folder / "masks" / "9.png").mkdir()
    assert len(open_dataset(str(folder), "train")) == 2


def test_two_files_of_one_stem_are_an_error_that_names_both(folder):
    Image.new("RGB", (24, 16)).save(folder / "images" / "1.jpg")
    with pytest.raises(ValueError, match=r"images/1.jpg and 1.png have the same stem.*take one out"):
        open_dataset(str(folder), "train")


def test_a_file_without_a_partner_is_named_with_its_folder(folder):
    (folder / "images" / "1.png").rename(folder / "images" / "1.gif")
    with pytest.raises(ValueError, match=r"1 files have no partner .1 images, 2 masks., e.g. .*masks/1.png.*suffixes"):
        open_dataset(str(folder), "train")


def test_a_label_below_zero_asks_for_no_other_number_of_classes(folder):
    Image.fromarray(np.full((16, 24), -1, np.int32)).save(folder / "masks" / "0.tif")
    (folder / "masks" / "0.png").unlink()
    rows = SegmentationData(open_dataset(str(folder), "train"), (16, 24), HALF)
    with pytest.raises(ValueError, match=r"the mask holds labels \[-1\].*; pass --ignore-index -1$"):
        check_labels(rows, 3, 255, "--train")
