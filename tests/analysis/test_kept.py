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
from adaptkit.analysis import easy_and_hard, kept_patches, usage_by_depth


def left_half(index, own):
    """Keep the left half of a 4 x 4 grid."""
    return Decision(own.patch * torch.tensor([1.0, 1, 0, 0]).repeat(4), own.head, own.layer)


def test_patches_that_are_off_are_faded_where_they_are():
    model = adaptkit.attach(HOSTS["timm-vit"].build(), "adavit")
    with model.adapters["adavit"].deciding(left_half):
        found = kept_patches(model, torch.zeros(3, 32, 30))  # the last patch is cut where the picture ends
    for block in found.kept:
        tile = found.faded(block).astype(float)
        assert tile.shape == (32, 30, 3)
        assert np.array_equal(tile[:, :16], found.picture[:, :16])
        expected = 0.2 * found.picture[:, 16:] + 0.8 * 255
        assert np.abs(tile[:, 16:] - expected).max() <= 0.5
    assert found.usage.shares["patch"] == pytest.approx([0.5] * len(found.kept))


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_it_is_written_where_one_asks_and_the_mode_is_left_as_it_was(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    model = adaptkit.attach(HOSTS["timm-vit"].build(), "adavit").train()
    found = kept_patches(model, torch.randn(1, 3, 32, 40), tmp_path / f"kept.{suffix}")
    assert (tmp_path / f"kept.{suffix}").stat().st_size > 1000
    assert len(found.figure().axes) == 1 + len(found.kept)  # the image, and no empty panel
    assert model.training


def test_a_batch_and_a_model_without_gates_are_refused():
    with pytest.raises(ValueError, match="a batch of 2; give one image"):
        kept_patches(adaptkit.attach(HOSTS["timm-vit"].build(), "adavit"), torch.zeros(2, 3, 32, 32))
    with pytest.raises(TypeError, match="no AdaViT gates"):
        kept_patches(adaptkit.attach(HOSTS["timm-vit"].build(), "sfp"), torch.zeros(1, 3, 32, 32))


def test_usage_by_depth_draws_one_line_per_kind_at_its_blocks():
    pytest.importorskip("matplotlib")
    aux = {"patch_keep": torch.rand(5, 4, 16), "layer_keep": torch.ones(5, 3, 2)}
    found = usage_by_depth(aux, {"patch": 0, "layer": 1})
    lines = {line.get_label(): line for line in found.figure().axes[0].lines}
    assert set(lines) == {"patch", "layer"}
    assert list(lines["layer"].get_xdata()) == [1, 2, 3]
    assert lines["patch"].get_ydata() == pytest.approx(100 * aux["patch_keep"].mean((0, 2)).numpy())
    assert len({line.get_color() for line in lines.values()}) == 2


def test_inside_disable_adapter_there_is_nothing_that_is_kept():
    model = adaptkit.attach(HOSTS["timm-vit"].build(), "adavit")
    for look in (kept_patches, lambda m, x: easy_and_hard(m, x.expand(2, -1, -1, -1))):
        with model.disable_adapter(), pytest.raises(ValueError, match="gates are switched off"):
            look(model, torch.zeros(1, 3, 32, 32))


def test_easy_images_cost_least_and_hard_ones_most(tmp_path):
    pytest.importorskip("matplotlib")
    model = adaptkit.attach(HOSTS["timm-vit"].build(), "adavit").train()
    wanted = [3, 16, 8, 1, 12]
    served = iter(wanted)

    def decide(index, own):
        if index == min(first.values()):
            decide.now = next(served)
        return Decision((torch.arange(own.patch.shape[1]) < decide.now).float()[None], own.head, own.layer)

    first = model.adapters["adavit"].first
    with model.adapters["adavit"].deciding(decide):
        found = easy_and_hard(model, torch.randn(5, 3, 32, 32), count=2)
    assert found.shares.argsort().tolist() == [3, 0, 2, 4, 1]
    assert (found.easy, found.hard) == ((3, 0), (1, 4))
    assert float(found.shares.min()) < 0.5 < float(found.shares.max())
    figure = found.figure()
    assert len([axes for axes in figure.axes if axes.images]) == 4
    assert found.save(tmp_path / "a.pdf").stat().st_size > 1000
    assert model.training


def test_of_few_images_none_is_easy_and_hard_at_once():
    model = adaptkit.attach(HOSTS["timm-vit"].build(), "adavit")
    found = easy_and_hard(model, [torch.randn(3, 32, 32), torch.randn(3, 24, 40), torch.randn(3, 32, 32)])
    assert len(found.easy) == len(found.hard) == 1
    assert found.easy != found.hard
    with pytest.raises(ValueError, match="give two or more"):
        easy_and_hard(model, torch.randn(3, 32, 32))
    with pytest.raises(TypeError, match="no AdaViT gates"):
        easy_and_hard(HOSTS["timm-vit"].build(), torch.randn(2, 3, 32, 32))
