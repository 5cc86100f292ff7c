"""The picture of kept patches shows what was decided."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS

import adaptkit
from adaptkit.adapters.adavit import Decision
from adaptkit.analysis import kept_patches, usage_by_depth
from adaptkit.analysis.draw import GAP, TITLE


def left_half(index, own):
    """Keep the left half of a 4 x 4 grid."""
    return Decision(own.patch * torch.tensor([1.0, 1, 0, 0]).repeat(4), own.head, own.layer)


def test_patches_that_are_off_are_faded_where_they_are():
    model = adaptkit.attach(HOSTS["timm-vit"].build(), "adavit")
    with model.adapters["adavit"].deciding(left_half):
        page = np.asarray(kept_patches(model, torch.zeros(3, 32, 32)).convert("L"), float)
    side = 192
    top, left = GAP + TITLE, GAP + side + GAP  # the second tile: block 1
    tile = page[top : top + side, left : left + side]
    assert (tile[:, side // 2 :] > tile[:, : side // 2] + 50).all()
    first = page[top : top + side, GAP : GAP + side]
    assert first.std() == 0


def test_it_is_written_where_one_asks_and_the_mode_is_left_as_it_was(tmp_path):
    model = adaptkit.attach(HOSTS["timm-vit"].build(), "adavit").train()
    picture = kept_patches(model, torch.randn(1, 3, 32, 40), tmp_path / "kept.png")
    assert (tmp_path / "kept.png").is_file()
    assert picture.width > 192
    assert model.training


def test_a_batch_and_a_model_without_gates_are_refused():
    with pytest.raises(ValueError, match="a batch of 2; give one image"):
        kept_patches(adaptkit.attach(HOSTS["timm-vit"].build(), "adavit"), torch.zeros(2, 3, 32, 32))
    with pytest.raises(TypeError, match="no AdaViT gates"):
        kept_patches(adaptkit.attach(HOSTS["timm-vit"].build(), "sfp"), torch.zeros(1, 3, 32, 32))


def test_usage_by_depth_draws_one_line_per_kind():
    aux = {"patch_keep": torch.rand(5, 4, 16), "layer_keep": torch.ones(5, 3, 2)}
    picture = np.asarray(usage_by_depth(aux, {"patch": 0, "layer": 1}))
    colours = {tuple(c) for c in picture.reshape(-1, 3)}
    assert {(0x1B, 0x6C, 0xA8), (0x2E, 0x93, 0x3C)} <= colours
    assert (0xD1, 0x49, 0x5B) not in colours
