"""Pictures of deformable attention, and the numbers they show."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS

import adaptkit
from adaptkit.analysis import attended_keys, deformed_points, sampling_points
from adaptkit.analysis.points import MANY, brief
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


def test_points_of_a_dat_under_an_adapter_are_those_of_the_bare_one():
    host = dat().eval()
    bare = deformed_points(host, X).points
    seen = deformed_points(adaptkit.attach(host, "metaformer"), X).points
    assert list(seen) == [f"backbone.{name}" for name in bare]
    assert all(torch.equal(a, b) for a, b in zip(seen.values(), bare.values()))


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
def test_the_figure_is_written_and_the_model_left_as_it_was(build, tmp_path):
    pytest.importorskip("matplotlib")
    model = build().train()
    modes = [m.training for m in model.modules()]
    got = attended_keys(model, X, query=(3, 60), path=tmp_path / "keys.png")
    deformed_points(model, X, path=tmp_path / "points.pdf")
    assert {path.name for path in tmp_path.iterdir()} == {"keys.png", "points.pdf"}
    assert got.picture.shape == (64, 64, 3)
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_model_without_deformable_attention_is_refused():
    with pytest.raises(TypeError, match="has no deformable attention; give a DAT, or attach the adapter 'dat'"):
        deformed_points(adaptkit.attach(HOSTS["timm-vit"].build(), "sfp"), X)


def test_a_batch_is_refused():
    with pytest.raises(ValueError, match="a batch of 2; give one image"):
        deformed_points(dat(), torch.stack([X, X]))


# ------------------------------------------------------------------------------------- every adapter that reads points


def stirred(*adapters):
    torch.manual_seed(0)
    model = adaptkit.attach(HOSTS["timm-vit"].build(), *adapters).eval()
    with torch.no_grad():
        for p in model.adapters.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


VIT_ADAPTER = {"conv_inplane": 8}
NEW = {
    "vit-adapter": ("vit-adapter", VIT_ADAPTER),
    "vit-adapter with dat": ("vit-adapter", {**VIT_ADAPTER, "attention": "dat"}),
    "metaformer msda": ("metaformer", {"mixer": "msda", "width": 16}),
    "metaformer dat": ("metaformer", {"mixer": "dat", "width": 16}),
    "dat": ("dat", {"groups": 1}),
}


@pytest.mark.parametrize("name", NEW)
def test_each_has_points_and_weights_in_pixels(name):
    seen = sampling_points(stirred(NEW[name]), X)
    assert seen
    for one in seen.values():
        queries, heads, levels, k = one.weights.shape
        assert one.points.shape == (queries, heads, levels, k, 2)
        assert one.queries.shape == (queries, 2)
        assert queries == one.grid[0] * one.grid[1]
        total = one.weights.sum((2, 3))
        assert (total <= 1 + 1e-5).all()
        if name != "dat":  # whose class token takes the rest
            torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("name", NEW)
def test_the_figure_of_each_has_a_panel_for_each_attention_and_shows_every_point_or_those_of_some_queries(name):
    pytest.importorskip("matplotlib")
    model = stirred(NEW[name])
    found = deformed_points(model, X)
    panels = found.figure().axes
    assert [p.get_title() for p in panels] == [brief(name) for name in found.points]
    for panel, (attention, points) in zip(panels, found.points.items()):
        grid = found.grids.get(attention)
        if grid is not None and points.shape[1] > MANY:  # every n-th query, down and across
            each = points.unflatten(1, (*grid, -1))
            n = next(n for n in range(2, 99) if each[:, ::n, ::n].flatten(1, 3).shape[1] <= MANY)
            points = each[:, n // 2 :: n, n // 2 :: n].flatten(1, 3)
            assert points.shape[1] > MANY / 8
        drawn = np.concatenate([np.asarray(group.get_offsets()) for group in panel.collections])
        np.testing.assert_allclose(drawn, points.flatten(0, 1).flip(-1).numpy(), rtol=1e-6)
    got = attended_keys(model, X, query=(20.0, 50.0))
    assert set(got.scores) == set(sampling_points(model, X))


def test_names_of_a_vit_adapter_are_brief_and_others_are_as_they_are():
    names = [f"vit-adapter.interactions.3.{n}.attn, stride 8" for n in ("extractor", "injector", "extra_extractors.1")]
    assert list(map(brief, names)) == [f"{n}, stride 8" for n in ("extractor 3", "injector 3", "extra extractor 1")]
    assert brief("stages.2.attns.1") == "stages.2.attns.1"


def test_of_each_group_the_keys_with_most_attention_are_drawn_larger_ones_for_more():
    pytest.importorskip("matplotlib")
    got = attended_keys(dat(), X, (20.0, 50.0), top=3)
    panel = got.figure().axes[0]
    scores = got.scores["stages.2.attns.1"]
    assert [len(group.get_offsets()) for group in panel.collections] == [3, 3]
    for group, score, points in zip(panel.collections, scores, got.points["stages.2.attns.1"]):
        best, index = score.topk(3)
        np.testing.assert_allclose(group.get_offsets(), points[index].flip(-1).numpy(), rtol=1e-6)
        np.testing.assert_allclose(
            group.get_sizes(), 2 + 110 * (best / scores.topk(3, -1).values.max()).numpy(), rtol=1e-5
        )
    assert len(panel.lines) == 1  # the star


def test_every_injector_and_extractor_of_a_vit_adapter_is_there_by_stride():
    seen = sampling_points(stirred(NEW["vit-adapter"]), X)
    for i in range(4):
        assert f"vit-adapter.interactions.{i}.injector.attn" in seen
        for stride, side in ((8, 8), (16, 4), (32, 2)):
            one = seen[f"vit-adapter.interactions.{i}.extractor.attn, stride {stride}"]
            assert one.grid == (side, side)
            torch.testing.assert_close(one.queries[0], torch.full((2,), stride / 2))
            torch.testing.assert_close(one.queries[-1], torch.full((2,), 64 - stride / 2))
    assert seen["vit-adapter.interactions.0.injector.attn"].weights.shape[2] == 3  # levels
    assert len(seen) == 4 * (1 + 3) + 2 * 3  # two extractors more behind the last


def test_a_vit_adapter_that_was_not_trained_reads_the_star_of_deformable_detr():
    """Point k of head m is k cells of its level from the query, in direction 2 pi m / heads on the unit square."""
    model = adaptkit.attach(HOSTS["timm-vit"].build(), NEW["vit-adapter"])
    one = sampling_points(model, X)["vit-adapter.interactions.0.injector.attn"]
    away = one.points - one.queries[:, None, None, None]
    cells = torch.tensor([8.0, 16.0, 32.0]).view(3, 1) * torch.arange(1, one.weights.shape[3] + 1)
    torch.testing.assert_close(away.abs().amax(-1), cells.expand(64, one.weights.shape[1], -1, -1))
    torch.testing.assert_close(away[:, 0, ..., 1], cells.expand(64, -1, -1))  # head 0 looks along x
    torch.testing.assert_close(one.weights, torch.full_like(one.weights, 1 / 12))


def test_reading_the_values_there_by_those_weights_is_the_attention(monkeypatch):
    """A slow literal bilinear reading at the points in pixels gives what the extractor's attention returns."""
    from adaptkit.seam import reference

    model, caught = stirred(NEW["vit-adapter"]), {}
    attn = model.adapters["vit-adapter"].interactions[1].extractor.attn
    hook = attn.register_forward_hook(lambda module, args, out: caught.update(feat=args[1], out=out))
    with torch.no_grad(), reference():
        model(X[None])
    hook.remove()
    with torch.no_grad():
        value = attn.value_proj(caught["feat"])[0].view(8, 8, attn.heads, -1)
        one = sampling_points(model, X)["vit-adapter.interactions.1.extractor.attn, stride 16"]
        rows = torch.zeros(16, attn.heads, value.shape[-1])
        for q in range(16):
            for head in range(attn.heads):
                for (y, x), w in zip((one.points[q, head, 0] / 8 - 0.5).tolist(), one.weights[q, head, 0].tolist()):
                    for i in range(8):
                        for j in range(8):
                            near = max(0.0, 1 - abs(y - i)) * max(0.0, 1 - abs(x - j))
                            rows[q, head] += w * near * value[i, j, head]
        wanted = attn.output_proj(rows.flatten(1))
    torch.testing.assert_close(caught["out"][0, 64:80], wanted, rtol=1e-4, atol=1e-5)


def test_on_a_hierarchical_backbone_points_are_in_pixels_of_each_stage():
    torch.manual_seed(0)
    import timm

    host = timm.create_model(
        "swin_tiny_patch4_window7_224", embed_dim=8, depths=(1, 1), num_heads=(1, 2), num_classes=0
    )
    seen = sampling_points(
        adaptkit.attach(host, ("metaformer", {"mixer": "msda", "width": 16})), torch.randn(3, 224, 224)
    )
    strides = [(one.queries[0, 0] * 2).item() for one in seen.values()]
    assert strides == [4, 8]


def test_a_query_outside_of_the_image_is_refused():
    model = adaptkit.attach(HOSTS["timm-vit"].build(), "dat")
    for query in ((32.0, 3.0), (3.0, -1.0)):
        with pytest.raises(ValueError, match="outside of an image of 32x40 pixels"):
            attended_keys(model, torch.randn(3, 32, 40), query)


def test_points_and_keys_of_a_model_in_bfloat16_can_be_drawn():
    model = adaptkit.attach(HOSTS["timm-vit"].build(), "dat").bfloat16()
    x = torch.randn(3, 32, 40).bfloat16()
    assert len(attended_keys(model, x).figure().axes) == len(deformed_points(model, x).figure().axes) == 4
