"""Pictures of deformable attention, and the numbers they show."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS

import adaptkit
from adaptkit.analysis import attended_keys, deformed_points
from adaptkit.mixers.dat import to_cells
from adaptkit.models import DAT

X = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))


def dat():
    torch.manual_seed(0)
    sizes = {"dim_stem": 8, "dims": (8, 16, 32, 64), "depths": (2, 2, 2, 2), "heads": (1, 2, 2, 4)}
    return DAT(img_size=64, num_classes=5, window_sizes=(4, 4, 2, 2), groups=(-1, -1, 2, 2), **sizes)


def adapted(*more, **options):
    torch.manual_seed(0)
    return adaptkit.attach(HOSTS["timm-vit"].build(), ("dat", options), *more)


def test_points_of_a_dat_are_those_of_its_forward_in_pixels():
    model = dat().eval()
    seen = deformed_points(model, X).points
    own = model.points(X[None])
    assert set(seen) == {"stages.2.attns.1", "stages.3.attns.1"}
    torch.testing.assert_close(
        seen["stages.2.attns.1"], (to_cells(own["2.1"][0].flatten(1, 2), (4, 4), "v1") + 0.5) * 16
    )


def test_points_of_the_adapter_are_those_of_its_forward_in_pixels():
    model = adapted(blocks=2)
    seen = deformed_points(model, X).points
    assert set(seen) == {"block 2", "block 3"}
    points = model.eval()(X[None]).aux["points.3"][0]
    torch.testing.assert_close(seen["block 3"], (points.flatten(1, 2) + 1) * 32)


def test_points_that_have_not_moved_are_the_centres_of_the_patches():
    seen = deformed_points(adapted(mode="replace", groups=1), X).points["block 0"][0]
    centres = torch.arange(8) * 8 + 4.0
    torch.testing.assert_close(seen, torch.stack(torch.meshgrid(centres, centres, indexing="ij"), -1).flatten(0, 1))


@pytest.mark.parametrize("query", [None, (20.0, 50.0)])
def test_scores_are_the_attention_of_all_queries_or_of_one(query):
    got = attended_keys(dat(), X, query)
    queries = 16 if query is None else 1
    assert got.scores["stages.2.attns.1"].shape == (2, 16)
    torch.testing.assert_close(got.scores["stages.2.attns.1"].sum(), torch.tensor(2.0 * queries))


def test_a_side_adapter_beside_it_runs_along():
    model = adapted(("vit-adapter", {"conv_inplane": 8}), blocks=1)
    with torch.no_grad():
        for p in model.adapters["vit-adapter"].parameters():
            p.add_(0.1)
    torch.testing.assert_close(
        deformed_points(model, X).points["block 3"],
        (model.eval()(X[None]).aux["points.3"][0].flatten(1, 2) + 1) * 32,
    )


@pytest.mark.parametrize("build", [dat, adapted])
def test_the_picture_is_written_and_the_model_left_as_it_was(build, tmp_path):
    model = build().train()
    modes = [m.training for m in model.modules()]
    got = attended_keys(model, X, query=(3, 60), path=tmp_path / "keys.png")
    assert (tmp_path / "keys.png").is_file()
    assert got.picture.width > 256
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_model_without_deformable_attention_is_refused():
    with pytest.raises(TypeError, match="has no deformable attention; give a DAT, or attach the adapter 'dat'"):
        deformed_points(adaptkit.attach(HOSTS["timm-vit"].build(), "sfp"), X)


def test_a_batch_is_refused():
    with pytest.raises(ValueError, match="a batch of 2; give one image"):
        deformed_points(dat(), torch.stack([X, X]))
