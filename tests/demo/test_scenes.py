"""The embedded segmentation set: drawn by seed, the same everywhere, with every class in it."""

import numpy as np
import pytest

from adaptkit.demo.scenes import CLASSES, SPLITS, scene, scenes


@pytest.fixture(scope="module")
def masks() -> np.ndarray:
    """Twenty masks (20, 96, 96) of the training split."""
    return np.stack([scene("train", i, size=96)[1] for i in range(20)])


def test_a_scene_is_the_same_on_every_run():
    first, again = scene("train", 3, size=96), scene("train", 3, size=96)
    assert all(np.array_equal(a, b) for a, b in zip(first, again))


def test_the_splits_the_indices_and_the_seeds_give_different_scenes():
    images = [scene("train", 0, size=64), scene("val", 0, size=64), scene("train", 1, size=64)]
    images.append(scene("train", 0, size=64, seed=1))
    assert len({image.tobytes() for image, _ in images}) == len(images)


def test_asking_for_more_images_leaves_the_earlier_ones_as_they_were():
    pytest.importorskip("datasets")
    few, many = scenes("val", size=64, count=2), scenes("val", size=64, count=4)
    assert all(np.array_equal(few[i]["image"], many[i]["image"]) for i in range(2))


def test_the_dataset_has_images_and_masks_of_one_size():
    pytest.importorskip("datasets")
    row = scenes("train", size=80, count=1)[0]
    assert row["image"].mode == "RGB"
    assert row["mask"].mode == "L"
    assert row["image"].size == row["mask"].size == (80, 80)


def test_masks_hold_known_classes_only(masks):
    assert masks.dtype == np.uint8
    assert masks.max() < len(CLASSES)


def test_every_class_is_in_a_fair_share_of_the_scenes(masks):
    present = [(masks == k).any((1, 2)).mean() for k in range(len(CLASSES))]
    assert min(present) >= 0.3


def test_thin_classes_are_thinner_than_a_token(masks):
    """No 8 x 8 window lies inside a wire, a lattice or a ring, while every region class has such windows."""
    windows = np.lib.stride_tricks.sliding_window_view(masks, (8, 8), (1, 2))
    whole = {k: (windows == k).all((-1, -2)).any() for k in range(len(CLASSES))}
    assert not any(whole[CLASSES.index(name)] for name in ("wire", "lattice", "ring"))
    assert all(whole[CLASSES.index(name)] for name in ("smooth", "grain", "brick", "stripes", "cells"))


def test_mean_colour_does_not_give_the_class_away():
    """Between-class variance of the mean colour is a small part of the variance within a class."""
    colours = {k: [] for k in range(len(CLASSES))}
    for i in range(60):
        image, mask = scene("train", i, size=64)
        for k in np.unique(mask):
            colours[k].append(image[mask == k].mean(0))
    between = np.var([np.mean(c, 0) for c in colours.values()], 0)
    within = np.mean([np.var(c, 0) for c in colours.values()], 0)
    assert (between < 0.15 * within).all()


@pytest.mark.parametrize("wrong", [{"split": "test"}, {"size": 32}])
def test_wrong_requests_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        scenes(**wrong)


def test_the_splits_have_a_default_size():
    assert SPLITS == {"train": 240, "val": 80}
