"""The papers' figures: identities that their numbers keep, on hosts of every kind, and files that can be opened."""

import importlib
import math
import pkgutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "backbones"))
from families import HOSTS
from test_hierarchical import HOSTS as HIERARCHICAL
from towers import TOWERS

import adaptkit
from adaptkit.analysis import (
    GammaByStep,
    attention_distance,
    attention_maps,
    feature_maps,
    feature_pca,
    gamma_by_depth,
    grad_cam,
    offset_lengths,
    position_similarity,
    query_keys,
    rgb_filters,
    rollout,
    spectrum,
)
from adaptkit.analysis.attention import attentions, centres
from adaptkit.analysis.distance import distances, even_distance
from adaptkit.analysis.patches import PositionSimilarity
from adaptkit.analysis.pca import otsu
from adaptkit.analysis.principal import principal
from adaptkit.analysis.seen import Seen
from adaptkit.analysis.spectra import _curve, _log_amplitude, diagonal
from adaptkit.analysis.watch import run_watched

ODD = torch.randn(2, 3, 37, 53, generator=torch.Generator().manual_seed(0))


def build(name):
    return HIERARCHICAL[name]() if name in HIERARCHICAL else HOSTS[name].build()


def seen(weights, grid, stride):
    return Seen(centres(grid, stride)[None, None, None], weights, grid, stride)


def test_no_figure_hides_the_module_of_its_name():
    for found in pkgutil.iter_modules(adaptkit.analysis.__path__):
        module = importlib.import_module(f"adaptkit.analysis.{found.name}")
        assert getattr(adaptkit.analysis, found.name) is module


# ---- distance


def test_even_attention_on_14_by_14_patches_of_16_pixels_looks_116_and_a_half_pixels_far():
    at = centres((14, 14), 16).double()
    assert even_distance((14, 14), 16) == pytest.approx(float(torch.cdist(at, at).mean()), rel=1e-9)
    assert even_distance((14, 14), 16) == pytest.approx(116.49, abs=0.005)
    even = distances(seen(torch.full((196, 3, 1, 196), 1 / 196), (14, 14), 16))
    torch.testing.assert_close(even.mean(0), torch.full((3,), 116.49), rtol=0, atol=0.01)


def test_attention_on_oneself_looks_nowhere():
    assert distances(seen(torch.eye(15)[:, None, None], (3, 5), 8)).abs().max() == 0


def test_what_prefix_tokens_get_does_not_count():
    weights = torch.rand(15, 2, 1, 15)
    torch.testing.assert_close(
        distances(seen(weights, (3, 5), 8)), distances(seen(weights * torch.rand(15, 2, 1, 1), (3, 5), 8))
    )


@pytest.mark.parametrize(
    "name", ["timm-siglip", "timm-vit", "timm-dinov3", "timm-beit", "hf-dinov2", "caformer", "swin"]
)
def test_every_head_looks_a_distance_inside_of_the_image(name):
    found = attention_distance(build(name), ODD)
    assert len(found.blocks) == {"caformer": 3, "swin": 8}.get(name, 4)
    for values in found.distances:
        assert values.min() >= 0
        assert values.max() < math.hypot(64, 64)


def test_on_constant_tokens_attention_is_even():
    host = build("timm-siglip")
    with torch.no_grad():
        host.pos_embed.zero_()
    found = attention_distance(host, torch.zeros(3, 32, 32))
    assert [float(d) for d in found.distances[0]] == pytest.approx([even_distance((4, 4), 8)] * 2, rel=1e-5)


@pytest.mark.parametrize("name", ["poolformer", "timm-sam"])
def test_who_has_no_attention_that_comes_apart_is_refused_with_the_reason(name):
    with pytest.raises(TypeError, match="does not show its attention: .*(token mixer|windows)"):
        attention_distance(build(name), ODD)


def test_adavit_decides_who_attends_so_it_is_refused():
    model = adaptkit.attach(build("timm-vit"), "adavit")
    with pytest.raises(TypeError, match="kept_patches"):
        attention_distance(model, ODD)


@pytest.mark.parametrize("adapter", ["lora", "vit-adapter", "dat", "metaformer"])
def test_adapted_models_are_looked_at_as_they_run(adapter):
    model = adaptkit.attach(build("timm-vit"), adapter)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape))
    adapted = attention_distance(model, ODD[:1])
    with model.disable_adapter():
        bare = attention_distance(model, ODD[:1])
    apart = [float((a - b).abs().max()) for a, b in zip(adapted.distances, bare.distances)]
    assert adapted.blocks == bare.blocks
    assert max(apart[1:]) > 1e-3


# ---- the attention itself


@pytest.mark.parametrize("name", ["timm-vit", "timm-eva02", "timm-beit", "hf-dinov3", "timm-eva-gqa"])
def test_attention_is_what_the_block_computed(name):
    """softmax(...) v, put through ``out``, is ``attn``."""
    from adaptkit.analysis.watch import run_watched

    host, kept, outs = build(name), {}, {}

    def visit(block, index, x, y):
        h = block.norm1(x)
        outs[index] = (block.attn(h), block, block.qkv(h)[2])

    with torch.no_grad():
        run_watched(host, ODD[:1], visit)
        attentions(host, ODD[:1], lambda a: kept.update({a.block: a}))
        for index, (out, block, v) in outs.items():
            torch.testing.assert_close(block.out(kept[index].full[None] @ v), out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (75, 53)])
def test_attention_in_swins_windows_is_what_timm_computes(size):
    host, theirs, ours = build("swin-dynamic"), [], []
    for layer in host.layers:
        for block in layer.blocks:
            block.attn.fused_attn = False
            block.attn.softmax.register_forward_hook(lambda m, i, out: theirs.append(out))
    image = torch.randn(1, 3, *size)
    attentions(host, image, lambda a: ours.append(a.patches))
    for mine, them in zip(ours, theirs, strict=True):
        weights = mine.weights[:, :, 0].transpose(0, 1)  # (heads, N, K): timm's rows, in another order
        rows = them.transpose(0, 1).flatten(1, 2)  # (heads, windows * 16, 16)
        for a, b in zip(weights, rows):
            if mine.grid[0] % 4 == mine.grid[1] % 4 == 0:
                torch.testing.assert_close(ordered(a), ordered(b), rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(a.sum(-1), torch.ones(len(a)))
            else:  # padded: each row is one of timm's, without what padding gets
                near = (a[:, None, :, None] - b[None, :, None]).abs().amin(-1) < 1e-6  # (N, rows, K)
                assert (near | (a == 0)[:, None]).all(-1).any(1).all()
                assert ((a > 0).sum(-1) > 0).all()


def ordered(rows):
    return rows.sort(-1).values.sort(0).values


def test_a_swin_query_reads_its_own_window():
    found = attention_maps(build("swin"), ODD[0, :, :32, :32], (1, 30), blocks=[0])
    assert found.strides == {0: 4}
    assert found.maps[0].sum((1, 2)) == pytest.approx([1.0])
    assert (found.maps[0][0, :4, 4:] > 0).all()
    assert found.maps[0][0, 4:].sum() == 0


# ---- rollout, maps


@pytest.mark.parametrize("name", ["timm-siglip", "timm-vit", "timm-dinov2-reg", "hf-dinov3", "hf-beit"])
@pytest.mark.parametrize("heads", ["mean", "max"])
def test_rows_of_a_rollout_sum_to_one(name, heads):
    found = rollout(build(name), ODD, heads=heads)
    for matrix in found.matrices:
        torch.testing.assert_close(matrix.sum(1), torch.ones(len(matrix)))
    assert found.prefix == {"timm-siglip": 0, "timm-dinov2-reg": 5, "hf-dinov3": 5}.get(name, 1)
    assert found.maps[0].shape == found.grids[0]


def test_a_rollout_of_one_block_is_half_its_attention_and_half_itself():
    host, kept = build("timm-vit"), []
    attentions(host, ODD[:1], lambda a: kept.append(a.full.mean(0)), [2])
    torch.testing.assert_close(rollout(host, ODD[:1], [2]).matrices[0], (kept[0] + torch.eye(len(kept[0]))) / 2)


def test_a_hierarchical_backbone_has_no_rollout():
    with pytest.raises(TypeError, match="other tokens in each stage"):
        rollout(build("swin"), ODD)


def test_maps_are_rows_of_the_attention():
    host, kept = build("timm-vit"), []
    attentions(host, ODD[:1], lambda a: kept.append(a.full), [1])
    torch.testing.assert_close(attention_maps(host, ODD[0], None, [1]).maps[1].flatten(1), kept[0][:, 0, 1:])
    patch = attention_maps(host, ODD[0], (20, 50), [1]).maps[1]  # row 2, column 6 of 5 x 7 patches
    torch.testing.assert_close(patch.flatten(1), kept[0][:, 1 + 2 * 7 + 6, 1:])
    with pytest.raises(ValueError, match="outside"):
        attention_maps(host, ODD[0], (20, 53), [1])


# ---- patches and positions


def test_a_sinusoid_table_has_the_known_similarity():
    host = build("timm-vit")
    at = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    waves = 1 / 100 ** (torch.arange(8) / 8)
    angles = (at[:, :, None] * waves).flatten(1)  # (16, 16)
    with torch.no_grad():
        host.pos_embed[0, 1:] = torch.cat([angles.sin(), angles.cos()], 1)
    apart = at[:, None] - at[None]
    known = (apart[..., None] * waves).cos().mean((2, 3))
    torch.testing.assert_close(position_similarity(host).similarity, known, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["timm-siglip", "timm-clip", "timm-dinov2-reg", "hf-vit", "hf-clip", "hf-dinov2"])
def test_similarity_is_that_of_the_table(name):
    host = build(name)
    table = next(p for n, p in host.named_parameters() if "pos" in n and p.numel() >= 16 * 32).view(-1, 32)[-16:]
    table = F.normalize(table.detach(), dim=1)
    torch.testing.assert_close(position_similarity(host).similarity, table @ table.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["timm-vit", "hf-dinov2"])
def test_a_table_is_read_off_a_backbone_in_bfloat16(name):
    expected = position_similarity(build(name)).similarity
    found = position_similarity(build(name).bfloat16()).similarity
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("name", ["timm-dinov3", "hf-dinov3", "timm-beit", "swin", "poolformer"])
def test_positions_that_are_no_table_are_refused(name):
    with pytest.raises(TypeError, match="table"):
        position_similarity(build(name))


@pytest.mark.parametrize("name", ["timm-vit", "hf-dinov2", "swin", "poolformer"])
def test_filters_are_orthonormal_and_sorted(name):
    found = rgb_filters(build(name), 5)
    rows = found.filters.flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), atol=1e-5, rtol=0)
    assert (found.explained.diff() <= 0).all()


@pytest.mark.parametrize("name", ["timm VisionTransformer (R50 hybrid)", "Siglip2VisionModel"])
@torch.no_grad()
def test_similarity_of_a_table_behind_a_network_or_a_linear_projection(name):
    host = TOWERS[name].build()
    (table,) = (p for n, p in host.named_parameters() if "pos_embed" in n or "position_embedding" in n)
    known = F.normalize(table if table.ndim == 2 else table[0, host.num_prefix_tokens :], dim=1)
    found = position_similarity(host)
    assert found.grid[0] * found.grid[1] == len(known)
    torch.testing.assert_close(found.similarity, known @ known.T, rtol=0, atol=1e-4)


def test_a_grid_of_one_patch_is_like_itself():
    assert position_similarity(build("timm-vit"), (8, 8)).similarity.tolist() == [[pytest.approx(1.0)]]


def test_maps_of_two_cells_are_coloured_too(tmp_path):
    model = adaptkit.attach(build("timm-vit"), "sfp")
    feature_maps(model, torch.randn(3, 32, 64)).save(tmp_path / "maps.png")
    assert (tmp_path / "maps.png").is_file()


def test_what_is_no_size_and_no_count_is_refused():
    with pytest.raises(ValueError, match=r"size=\(0, 3\) is no image"):
        position_similarity(build("timm-vit"), (0, 3))
    with pytest.raises(ValueError, match="count=0"):
        rgb_filters(build("timm-vit"), 0)
    with pytest.raises(ValueError, match="no image was given"):
        feature_pca(build("timm-vit"), torch.randn(0, 3, 32, 32))


def test_the_sign_of_a_component_is_fixed():
    x = torch.randn(50, 7)
    a, b = principal(x, 3), principal(x.flip(0) * 1.0, 3)
    torch.testing.assert_close(a.components, b.components, atol=1e-9, rtol=0)
    assert (a.components.gather(1, a.components.abs().argmax(1, keepdim=True)) > 0).all()
    torch.testing.assert_close(principal(-x, 3).components, a.components, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["timm-vit", "hf-dinov2", "swin"])
def test_tokens_become_colours_in_one_basis(name):
    images = [ODD[0], torch.randn(3, 70, 45)]
    one, two = (feature_pca(build(name), images, "all") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.maps, two.maps))
    assert [m.shape[:2] for m in one.maps] == [m.shape for m in one.masks]
    assert min(float(m.min()) for m in one.maps) == 0
    assert max(float(m.max()) for m in one.maps) == 1


@pytest.mark.parametrize(("name", "stride"), [("timm-vit", 8), ("swin", 32)])
def test_a_token_has_the_size_of_its_patch_where_the_last_one_reaches_over_the_edge(name, stride):
    found = feature_pca(build(name), [torch.randn(3, 50, 83), torch.randn(3, 64, 64)], foreground="all")
    assert found.stride == stride
    assert [m.shape for m in found.maps] == [(-(-h // stride), -(-w // stride), 3) for h, w in ((50, 83), (64, 64))]


def test_seven_images_stand_in_two_rows_without_an_empty_tile():
    found = feature_pca(build("timm-vit"), torch.randn(7, 3, 32, 32), foreground="all").figure()
    tiles = [axes.get_position() for axes in found.axes if axes.images]
    assert len(tiles) == 14
    rows = sorted({round(tile.y0, 3) for tile in tiles})
    by_row = [[t for t in tiles if round(t.y0, 3) == y] for y in rows]
    assert sorted(map(len, by_row)) == [3, 3, 4, 4]
    for row in by_row:  # the shorter ones stand in the middle
        assert min(t.x0 for t in row) + max(t.x1 for t in row) == pytest.approx(1, abs=0.03)


def test_the_threshold_lies_between_two_heaps():
    low, high = torch.rand(300) * 0.2, 0.7 + torch.rand(100) * 0.3
    assert 0.2 < otsu(torch.cat([low, high])) < 0.7


# ---- spectrum


@pytest.mark.parametrize("size", [(32, 32), (31, 31), (24, 40)])
def test_the_spectrum_of_white_noise_is_flat(size):
    """log |z| has mean (log 2) / 2 more where z is complex: everywhere but at the lowest and the highest frequency."""
    count = 3000
    noise = torch.randn(1, count, *size, generator=torch.Generator().manual_seed(1))
    curve = _curve(_log_amplitude(noise))
    inner = curve.amplitude[1:-1]
    error = 6 * 1.3 / math.sqrt(count)  # log |z| has a standard deviation below 1.3
    assert (inner - math.log(2) / 2).abs().max() < error


def test_the_spectrum_of_a_constant_is_one_peak():
    curve = _curve(_log_amplitude(torch.full((1, 4, 12, 20), 3.0)))
    assert (curve.amplitude[1:] < -15).all()
    assert (curve.plane > -1).sum() == 1
    assert curve.plane[6, 10] == 0


def test_on_a_square_the_diagonal_is_the_diagonal():
    plane = torch.randn(10, 10, dtype=torch.float64)
    frequency, values = diagonal(plane)
    torch.testing.assert_close(values, plane.diagonal()[:6])
    assert float(frequency[-1]) == pytest.approx(math.pi)


def test_a_wave_stands_where_its_frequency_is():
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(40.0), indexing="ij")
    wave = (2 * math.pi * (y + x) / 8).cos()  # an eighth of a turn each cell: pi / 4
    frequency, values = diagonal(_log_amplitude(wave[None, None]))
    assert float(frequency[values.argmax()]) == pytest.approx(math.pi / 4)


def test_spectra_of_several_models_share_a_figure(tmp_path):
    host = build("timm-vit")
    adapted = adaptkit.attach(build("timm-vit"), "sfp")
    found = spectrum({"ViT": host, "sfp": adapted}, ODD)
    assert {n: sorted(c) for n, c in found.curves.items()} == {"ViT": [8], "sfp": [4, 8, 16, 32]}
    assert found.save(tmp_path / "s.svg").read_text().startswith("<?xml")
    assert list(spectrum(adapted, ODD, [8]).curves["model"]) == [8]
    with pytest.raises(ValueError, match="one size"):
        spectrum(host, [ODD[0], ODD[0, :, :32]])


# ---- Grad-CAM


def classifying(name):
    return adaptkit.attach(build(name), head=("linear", {"num_classes": 3})) if name in HOSTS else build(name)


def test_grad_cam_is_what_a_hand_computes():
    """With y = sum of w . a over the patches of the last stage, after its norm, and pooled: by autograd on the parts."""
    host = build("poolformer")
    got = grad_cam(host, ODD[0], 2, at=4)
    view = adaptkit.core.registry.view(host)
    a = view.features(ODD[:1]).maps[-1].detach().requires_grad_()
    y = host.forward_head(a)[0, 2]
    (slope,) = torch.autograd.grad(y, a)
    by_hand = (slope.mean((2, 3), keepdim=True) * a).sum(1).relu()[0]
    torch.testing.assert_close(got.cam, by_hand.detach(), rtol=1e-4, atol=1e-7)
    assert got.score == pytest.approx(float(y), rel=1e-4)


def test_a_head_of_masks_has_a_grad_cam_of_a_function_of_its_queries():
    model = adaptkit.attach(
        build("timm-vit"), head=("plain-mask", {"num_classes": 3, "num_q": 4, "num_blocks": 1})
    ).eval()
    for at in (None, np.int64(1)):
        found = grad_cam(model, ODD[0], target=lambda logits: logits.class_queries_logits[0, 0, 0], at=at)
        assert found.cam.isfinite().all()


@pytest.mark.parametrize("name", ["timm-siglip", "swin"])
def test_the_slope_of_grad_cam_is_that_of_finite_differences(name):
    from adaptkit.analysis.cam import _try
    from adaptkit.analysis.watch import Watched, run_watched

    model = build(name).double()
    at = {"swin": 7}.get(name, 2)
    host = Watched.of(model)
    a, slope, *_ = _try(model, host, ODD[:1].double(), 1, None, at)
    direction = torch.randn(a.shape, dtype=a.dtype)

    def y(step):
        def visit(block, index, x, y):
            return y + step * direction.flatten(0, 1) if index == at else None

        with torch.no_grad():
            return host.logits(run_watched(model, ODD[:1].double(), visit))[0, 1]

    h = 1e-5
    assert float((slope * direction).sum()) == pytest.approx(float((y(h) - y(-h)) / (2 * h)), rel=1e-5)


def test_a_class_token_reads_patches_in_the_last_block_so_the_last_but_one_is_taken():
    model = build("timm-vit")
    assert grad_cam(model, ODD[0], 1).at == "block 2"
    with pytest.raises(ValueError, match="at=3 has no say"):
        grad_cam(model, ODD[0], 1, at=3)
    with pytest.raises(ValueError, match="target=99: this model knows 5 classes"):
        grad_cam(model, ODD[0], 99)
    with pytest.raises(ValueError, match="classifies whole images"):
        grad_cam(model, ODD[0], 1, pixels=(5, 40))


@pytest.mark.parametrize("adapter", ["sfp", "vit-adapter"])
def test_pixels_have_a_target_and_maps_are_a_place(adapter):
    model = adaptkit.attach(build("hf-dinov2"), adapter, head=("fpn", {"num_classes": 3}))
    found = grad_cam(model, ODD[0], 1, pixels=(5, 40))
    assert found.at == "map 32"
    assert found.cam.shape == (2, 2)
    assert "1 pixels" in found.target
    assert grad_cam(model, ODD[0], 1, pixels=(5, 40), at="map 8").cam.shape == (5, 7)
    assert grad_cam(model, ODD[0], 1, pixels=torch.ones(37, 53), at=1).stride == 14
    with pytest.raises(ValueError, match="map 8"):
        grad_cam(model, ODD[0], 1, at="map 5")
    with pytest.raises(ValueError, match="outside of an image of 37x53 pixels"):
        grad_cam(model, ODD[0], 1, pixels=(40, 5))


@pytest.mark.parametrize("name", ["timm-vit", "hf-vit", "swin"])
def test_tokens_that_never_become_a_map_have_a_grad_cam(name):
    model = adaptkit.attach(build(name), head=("linear", {"num_classes": 3}))
    found = grad_cam(model, ODD[0])
    assert found.at.startswith("block")
    assert found.cam.max() > 0


# ---- keys, offsets, gates


def dat():
    from adaptkit.models import DAT

    sizes = {"dim_stem": 8, "dims": (8, 16, 32, 64), "depths": (2, 2, 2, 2), "heads": (1, 2, 2, 4)}
    return DAT(img_size=64, num_classes=5, window_sizes=(4, 4, 2, 2), groups=(-1, -1, 2, 2), **sizes).eval()


def test_keys_of_a_query_stand_side_by_side(tmp_path):
    image = torch.randn(3, 64, 64)
    models = {"ViT": build("timm-siglip"), "Swin": build("swin"), "DAT": dat(),
              "adapter": adaptkit.attach(build("hf-vit"), "vit-adapter", conv_inplane=8)}  # fmt: skip
    found = query_keys(models, image, (20.0, 40.0))
    names = list(found.points)
    assert names[:3] == ["ViT, block 3", "Swin, block 5", "DAT, stages.2.attns.1"]
    extractors = [f"adapter, extractor 3, stride {s}" for s in (8, 16, 32)]
    assert names[3:] == ["adapter, block 3", "adapter, injector 3", *extractors]
    for name, scores in found.scores.items():
        most = 1e-4 if name != "adapter, block 3" else 0.1  # its class token has a share, too
        assert scores.sum(1) == pytest.approx([1.0] * len(scores), abs=most), name
    assert found.save(tmp_path / "keys.pdf").read_bytes().startswith(b"%PDF")


def test_blocks_of_a_dat_show_their_windows_and_their_points_bare_and_adapted():
    image = torch.randn(3, 64, 64)
    found = query_keys(dat(), image, (20.0, 40.0), blocks=[0, 4, 5, 7])
    assert list(found.points) == ["stages.2.attns.1", "stages.3.attns.1", "block 0", "block 4"]
    assert found.points["block 0"].shape == (1, 16, 2)  # a window of 4 x 4 cells
    host = dat()
    adapted = adaptkit.attach(host, ("metaformer", {"mixer": "msda", "width": 8}))
    assert next(iter(query_keys(adapted, image, (20.0, 40.0)).points)) == "stages.2.attns.1"
    assert next(iter(query_keys(adapted, image, (20.0, 40.0), blocks=[5]).points)) == "stages.2.attns.1"


@pytest.mark.parametrize("name", ["dat", "hf-swin"])
@pytest.mark.parametrize("size", [(64, 64), (37, 53)], ids=str)
def test_what_a_window_attends_to_gives_what_it_says(name, size, monkeypatch):
    """Values read at the keys, by the weights, through the last layer: the output of the block's own attention."""
    found, image = {}, torch.randn(1, 3, *size)
    model = build(name)
    attentions(model, image, lambda a: found.update({a.block: a.patches}))
    assert len(found) == (6 if name == "dat" else 7)  # all but the deformable blocks

    def compare(block, index, x, y):
        if index not in found:
            return
        h, seen = block.norm1(x), found[index]
        attn = block.attended.args[0]
        weights, cells = block.attended(h)
        if name == "dat":
            value, out = attn.proj_qkv(h).chunk(3, -1)[2], attn.proj_out
            rest = torch.zeros(weights.shape[1], value.shape[-1] // weights.shape[1])
            torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))  # padding is nobody's key
        else:
            value, out = attn.v_proj(h), attn.o_proj
            rest = attn.v_proj.bias.unflatten(0, (weights.shape[1], -1))  # the value of padding
        value = value[0].unflatten(1, (weights.shape[1], -1))  # (N, heads, E)
        read = torch.einsum("hnk,nkhe->nhe", weights[0], value[cells])
        read = read + (1 - weights[0].sum(-1)).T[..., None] * rest
        torch.testing.assert_close(out(read.flatten(1))[None], block.attn(h), rtol=1e-4, atol=1e-5)
        assert seen.weights.shape[0] == x.shape[1]

    with torch.no_grad():
        run_watched(model, image, compare)


def test_offsets_have_a_length_and_points_an_object():
    model = adaptkit.attach(build("timm-vit"), "dat", mode="replace", groups=1)
    still = offset_lengths(model, ODD[0])["block 0"]
    assert still.mean < 1e-4
    assert still.in_object is None
    with torch.no_grad():
        for block in model.adapters["dat"].blocks.values():
            block.conv_offset[-1].weight.normal_()
    mask = torch.zeros(37, 53)
    mask[:, 24:] = 1
    found = offset_lengths(model, ODD[0], mask)["block 0"]
    assert 0 < found.mean <= found.largest <= 8 * math.sqrt(2) + 1e-4
    assert found.cells == pytest.approx(found.mean / 8)
    assert found.stood_in_object == pytest.approx(20 / 35)  # of 5 x 7 centres 4 columns lie on it
    assert 0 <= found.attention_in_object <= 1


def test_injectors_of_an_adapter_start_at_points_around_their_query():
    model = adaptkit.attach(build("timm-vit"), "vit-adapter", conv_inplane=8)
    found = offset_lengths(model, torch.randn(3, 32, 32))
    assert found
    assert all(o.mean > 0 for o in found.values())


def test_gates_are_told_by_depth_and_step(tmp_path):
    model = adaptkit.attach(build("timm-vit"), "vit-adapter", conv_inplane=8)
    steps = GammaByStep()
    steps.add(0, model)
    with torch.no_grad():
        model.adapters["vit-adapter"].interactions[1].injector.gamma.fill_(-0.5)
    steps.add(10, model)
    found = gamma_by_depth(model)
    assert [float(g.abs().mean()) for g in found.gammas.values()] == [0, 0.5, 0, 0]
    assert steps.sizes[list(found.gammas)[1]] == [0, 0.5]
    assert found.save(tmp_path / "g.png").is_file()
    assert steps.save(tmp_path / "s.png").is_file()
    with pytest.raises(TypeError, match="no gates"):
        gamma_by_depth(adaptkit.attach(build("timm-vit"), "sfp"))


# ---- drawing


@pytest.mark.parametrize("name", ["timm-dinov2-reg", "hf-siglip", "swin"])
def test_every_figure_can_be_written_and_the_model_is_as_it_was(name, tmp_path):
    pytest.importorskip("matplotlib")
    model = build(name).train()
    made = {
        "distance": lambda: attention_distance(model, ODD),
        "maps": lambda: attention_maps(model, ODD[0], (3, 4), [0, 1]),
        "pca": lambda: feature_pca(model, ODD, "all"),
        "features": lambda: feature_maps(model, ODD[0]),
        "filters": lambda: rgb_filters(model, 10),
        "spectrum": lambda: spectrum(model, ODD).planes(),
    }
    for what, make in made.items():
        assert make().save(tmp_path / f"{what}.png").read_bytes().startswith(b"\x89PNG")
    assert model.training
    assert all(m.training for m in model.modules())


def test_the_same_numbers_are_the_same_file(tmp_path):
    found = PositionSimilarity(torch.eye(12), (3, 4))
    for suffix in ("pdf", "svg", "png"):
        first, second = (found.save(tmp_path / f"{i}.{suffix}").read_bytes() for i in range(2))
        assert first == second
    with pytest.raises(ValueError, match=r"\.pdf, \.svg, \.png"):
        found.save(tmp_path / "a.jpg")


def test_without_matplotlib_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'adaptkit-vit\[figures\]'"):
        PositionSimilarity(torch.eye(4), (2, 2)).figure()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 11])
def test_no_panel_is_empty(count):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from adaptkit.analysis.style import panels

    figure = Figure()
    assert len(panels(figure, count, 4)) == count == len(figure.axes)


def test_look_makes_what_applies_and_says_why_the_others_do_not(tmp_path, capsys):
    from PIL import Image

    from adaptkit.cli import main

    for i in range(2):
        pixels = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    only = ["attention_distance", "rgb_filters", "gamma", "rollout"]
    argv = ["look", "demo", str(tmp_path), "--out", str(tmp_path / "out"), "--size", "32", "--formats", "svg"]
    assert main([*argv, "--only", *only]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == only
    assert said[2].startswith("gamma: no, ")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "attention_distance.svg", "rgb_filters.svg", "rollout.svg"
    ]  # fmt: skip
    assert main([*argv, "--only", "rolout"]) == 2
    assert "rollout" in capsys.readouterr().err


def test_look_refuses_what_no_figure_could_show(tmp_path, capsys):
    from PIL import Image

    from adaptkit.cli import main

    Image.fromarray(torch.zeros(40, 50, 3, dtype=torch.uint8).numpy()).save(tmp_path / "0.png")
    argv = ["look", "demo", str(tmp_path), "--out", str(tmp_path / "out"), "--size", "32", "--only", "rgb_filters"]
    for more, said in ((["--blocks", "99"], "give indices below 12"), (["--query", "40", "2"], "outside of an image")):
        assert main([*argv, *more]) == 2
        assert said in capsys.readouterr().err


def test_look_takes_the_normalisation_of_a_folder_that_says_none(tmp_path, capsys):
    from PIL import Image

    from adaptkit.cli import main

    HOSTS["hf-dinov2"].build().save_pretrained(tmp_path / "host")
    Image.fromarray(torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8).numpy()).save(tmp_path / "0.png")
    argv = ["look", str(tmp_path / "host"), str(tmp_path / "0.png"), "--out", str(tmp_path / "out"), "--size", "32"]
    assert main([*argv, "--only", "attention_maps", "--formats", "svg"]) == 2
    assert "--mean and --std" in capsys.readouterr().err
    assert main([*argv, "--mean", "0", "--std", "0"]) == 2
    assert "a standard deviation is above 0" in capsys.readouterr().err
    assert main([*argv, "--only", "attention_maps", "--formats", "svg", "--mean", "0.5", "--std", *"111"]) == 0
    assert (tmp_path / "out" / "attention_maps.svg").is_file()
