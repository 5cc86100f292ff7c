"""ViT-Adapter: counts, sizes, switches, geometry, memory."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS, randomise

import adaptkit
from adaptkit import Spec
from adaptkit.adapters.vit_adapter import Grids, ViTAdapter, ViTAdapterConfig, even_groups
from adaptkit.mixers import list_mixers

SMALL = {"conv_inplane": 8}
OFFICIAL = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}


def host(patch=16, **options):
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return randomise(VisionTransformer(img_size=4 * patch, patch_size=patch, embed_dim=32, depth=4, num_heads=2, num_classes=0, **options))  # fmt: skip


@pytest.mark.parametrize(("size", "millions"), [("tiny", 2.438), ("small", 5.830), ("base", 13.681), ("large", 23.237)])
def test_trained_parameters_are_the_official_ones(size, millions):
    dim, depth, heads = OFFICIAL[size]
    with torch.device("meta"):
        adapter = ViTAdapter(Spec("timm-vit", dim, depth, heads, 16, 1), ViTAdapterConfig())
    assert round(sum(p.numel() for p in adapter.parameters()) / 1e6, 3) == millions


@pytest.mark.parametrize("size", OFFICIAL)
def test_presets_are_the_official_ones(size):
    dim, depth, heads = OFFICIAL[size]
    config = ViTAdapterConfig().resolve(Spec("timm-vit", dim, depth, heads, 16, 1))
    expected = {"tiny": (6, 1.0, 0.1), "small": (6, 1.0, 0.2), "base": (12, 0.5, 0.3), "large": (16, 0.5, 0.4)}
    assert (config.deform_num_heads, config.deform_ratio, config.drop_path) == expected[size]
    step = depth // 4
    assert config.interaction_indexes == tuple((i * step, (i + 1) * step - 1) for i in range(4))


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 6, 7, 10, 14, 40])
def test_a_depth_that_four_does_not_divide_is_split_evenly(depth):
    groups = even_groups(depth, 4)
    sizes = [b - a + 1 for a, b in groups]
    assert sum(sizes) == depth
    assert max(sizes) - min(sizes) <= 1
    assert len(groups) == min(4, depth)


def test_a_number_of_interactions_is_as_many_even_groups():
    spec = Spec("timm-vit", 192, 12, 3, 16, 1)
    for count in (1, 2, 4, 6, 12):
        groups = ViTAdapterConfig(interactions=count).resolve(spec).interaction_indexes
        assert groups == even_groups(12, count)
        assert len(groups) == count
    again = ViTAdapterConfig(interactions=6).resolve(spec)
    assert again.resolve(spec) == again
    with pytest.raises(ValueError, match="interactions=13 are more than the 12 blocks"):
        ViTAdapterConfig(interactions=13).resolve(spec)
    with pytest.raises(ValueError, match="interactions=2, and interaction_indexes has 1 ranges"):
        ViTAdapterConfig(interactions=2, interaction_indexes=((0, 11),))
    with pytest.raises(ValueError, match=r"drop_path=1.0 must be at least 0 and below 1"):
        ViTAdapterConfig(drop_path=1.0)
    with pytest.raises(ValueError, match="extra_extractors=-1 must be 0 or more"):
        ViTAdapterConfig(extra_extractors=-1)


@pytest.mark.parametrize("patch", [8, 14, 16, 32])
@pytest.mark.parametrize("size", [(518, 518), (336, 560), (97, 131)])
@torch.no_grad()
def test_any_patch_and_any_size_work(patch, size):
    model = adaptkit.attach(host(patch), ("vit-adapter", SMALL)).eval()
    maps = model(torch.randn(1, 3, *size)).maps
    assert [m.shape[-2:] for m in maps] == [tuple(-(-n // s) for n in size) for s in (4, 8, 16, 32)]
    assert all(m.isfinite().all() for m in maps)


def test_reference_points_are_the_same_place_in_the_image_for_both_grids():
    image = torch.zeros(1, 3, 97, 131, dtype=torch.float64)
    grids = Grids.of((7, 10), 14, [(16, 20), (8, 10), (4, 5)], image)  # 98x140 pixels of tokens, 128x160 of prior
    centre = torch.tensor([3 * 14 + 7, 2 * 14 + 7], dtype=torch.float64)  # token in row 2, column 3
    torch.testing.assert_close(grids.injection.points[2 * 10 + 3] * torch.tensor([160.0, 128.0]), centre)
    first_of_stride_16 = 16 * 20
    torch.testing.assert_close(
        grids.extraction.points[first_of_stride_16] * torch.tensor([140.0, 98.0]),
        torch.tensor([8.0, 8.0], dtype=torch.float64),
    )


@torch.no_grad()
def test_padding_does_not_move_the_pyramid():
    """An image and the same image in a larger black frame agree where the frame is far away."""
    model = adaptkit.attach(host(14), ("vit-adapter", {**SMALL, "injector": False, "norm": "layer"})).eval()
    model.backbone.pos_embed.zero_()  # positions differ between the two grids, and are not the point here
    for block in model.backbone.blocks:
        block.attn.proj.weight.zero_()  # nor is global attention
    image = torch.randn(1, 3, 126, 126)
    framed = torch.nn.functional.pad(image, (0, 57, 0, 33))
    small, large = model(image).maps[0], model(framed).maps[0]
    torch.testing.assert_close(small[..., :16, :16], large[..., :16, :16], atol=2e-3, rtol=2e-3)


@torch.no_grad()
def test_gamma_opens_the_injector_and_prefix_tokens_pass_by():
    model = adaptkit.attach(host(), ("vit-adapter", SMALL)).eval()
    x = torch.randn(1, 3, 64, 96)
    before = model(x)
    injector = model.adapters["vit-adapter"].interactions[-1].injector
    tokens = torch.randn(1, 1 + 24, 32)
    grids = Grids.of((4, 6), 16, [(8, 12), (4, 6), (2, 3)], x)
    injector.gamma.fill_(0.5)
    out = injector(tokens, torch.randn(1, 96 + 24 + 6, 32), grids)
    assert torch.equal(out[:, :1], tokens[:, :1])
    assert not torch.equal(out[:, 1:], tokens[:, 1:])
    assert not torch.equal(model(x).tokens, before.tokens)


def test_without_injector_no_graph_goes_through_the_backbone():
    model = adaptkit.attach(host(), ("vit-adapter", {**SMALL, "injector": False})).train()
    features = model(torch.randn(2, 3, 64, 64))
    assert not features.tokens.requires_grad
    assert all(m.requires_grad for m in features.maps)


@torch.no_grad()
def test_without_injector_and_extractor_a_level_is_the_prior_plus_the_tokens():
    options = {
        **SMALL,
        "injector": False,
        "extractor": False,
        "add_vit_feature": "last",
        "strides": [16],
        "norm": "layer",
    }
    model = adaptkit.attach(host(), ("vit-adapter", options)).eval()
    adapter, x = model.adapters["vit-adapter"], torch.randn(2, 3, 64, 64)
    randomise(adapter)
    _, _, c3, _ = adapter.spm(x)  # stride 16, that of the tokens: nothing is resized
    tokens = model.backbone.forward_features(x)[:, 1:].transpose(1, 2).unflatten(2, (4, 4))  # its norm included
    expected = adapter.norm3(c3 + adapter.level_embed[1][:, None, None] + tokens)
    torch.testing.assert_close(model(x).maps[0], expected, atol=1e-5, rtol=1e-4)


def test_what_is_switched_off_is_not_there():
    def parts(**options):
        adapter = adaptkit.attach(host(), ("vit-adapter", {**SMALL, **options})).adapters["vit-adapter"]
        return {name.split(".")[2] for name, _ in adapter.named_parameters() if name.startswith("interactions")}

    assert parts() == {"injector", "extractor", "extra_extractors"}
    assert parts(extractor=False) == {"injector"}
    assert parts(injector=False, extractor=False) == set()
    trained = adaptkit.attach(host(), ("vit-adapter", {**SMALL, "extractor": False})).train()
    assert trained(torch.randn(2, 3, 64, 64)).tokens.requires_grad
    with pytest.raises(
        ValueError, match="extractor=False leaves the tokens out of the pyramid, and add_vit_feature=None"
    ):
        ViTAdapterConfig(extractor=False, add_vit_feature=None)


def test_dropping_the_prefix_runs_the_blocks_on_patches_alone():
    model = adaptkit.attach(host(), ("vit-adapter", {**SMALL, "prefix": "drop"})).eval()
    features = model(torch.randn(1, 3, 64, 64))
    assert features.prefix.shape[1] == 0
    assert features.tokens.shape[1] == 16
    assert features.logits is None


def test_dropping_the_prefix_is_refused_where_positions_hang_on_it():
    with pytest.raises(ValueError, match="prefix='drop' needs blocks that run without prefix tokens"):
        adaptkit.attach(HOSTS["timm-dinov3"].build(), ("vit-adapter", {**SMALL, "prefix": "drop"}))


def test_checkpointing_changes_no_number():
    gradients = []
    for on in (False, True):
        torch.manual_seed(0)
        model = adaptkit.attach(host(), ("vit-adapter", {**SMALL, "checkpoint": on, "drop_path": 0.0})).train()
        torch.nn.init.ones_(model.adapters["vit-adapter"].interactions[0].injector.gamma)
        torch.manual_seed(1)
        sum(m.square().mean() for m in model(torch.randn(2, 3, 64, 64)).maps).backward()
        gradients.append([p.grad for p in model.adapters.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["vit-adapter", "sfp"])
def test_maps_at_some_strides_are_those_of_all(name):
    torch.manual_seed(0)
    options = SMALL if name == "vit-adapter" else {}
    full = adaptkit.attach(host(), (name, options)).eval()
    some = adaptkit.attach(host(), (name, {**options, "strides": [16, 8]}), head=("fpn", {"num_classes": 3}))
    own = some.adapters[name].state_dict()
    some.adapters[name].load_state_dict({k: v for k, v in full.adapters[name].state_dict().items() if k in own})
    x = torch.randn(2, 3, 70, 64)
    features = some.eval()(x)
    assert [tuple(m.shape[-2:]) for m in features.maps] == [(9, 8), (5, 4)]
    assert features.logits.shape == (2, 3, 70, 64)
    for a, b in zip(features.maps, full(x).maps[1:3], strict=True):
        assert torch.equal(a, b)
    assert sum(v.numel() for v in own.values()) < sum(v.numel() for v in full.adapters[name].state_dict().values())
    for strides in ([], [8, 8], [8, 64]):
        with pytest.raises(ValueError, match="must be some of 4, 8, 16, 32"):
            adaptkit.attach(host(), (name, {**options, "strides": strides}))


def test_a_batch_of_one_trains_and_a_single_cell_says_why_not():
    model = adaptkit.attach(host(), ("vit-adapter", SMALL)).train()
    sum(m.mean() for m in model(torch.randn(1, 3, 64, 64)).maps).backward()
    with pytest.raises(
        ValueError, match="more than 1 value per channel"
    ):  # BatchNorm, one image, one cell at stride 32
        model(torch.randn(1, 3, 32, 32))
    layer = adaptkit.attach(host(), ("vit-adapter", {**SMALL, "norm": "layer"})).train()
    sum(m.mean() for m in layer(torch.randn(1, 3, 32, 32)).maps).backward()


def test_files_of_batch_and_sync_norm_interchange():
    torch.manual_seed(0)
    models = [adaptkit.attach(host(), ("vit-adapter", {**SMALL, "norm": norm})) for norm in ("batch", "sync")]
    models[1].load_adapter_state_dict(models[0].adapter_state_dict())
    x = torch.randn(2, 3, 64, 64)
    a, b = (m.eval()(x).maps for m in models)
    assert all(torch.equal(u, v) for u, v in zip(a, b))
    for m in models:
        torch.manual_seed(3)
        m.train()(x)
    a, b = (m.adapter_state_dict()["vit-adapter.norm1.running_mean"] for m in models)
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)  # in training their stems round in another order


@torch.no_grad()
def test_vit_features_come_from_the_stage_the_option_says():
    x = torch.randn(1, 3, 64, 64)
    outputs = {}
    for option in ("last", "per-stage", None):
        torch.manual_seed(0)
        outputs[option] = adaptkit.attach(host(), ("vit-adapter", {**SMALL, "add_vit_feature": option})).eval()(x).maps
    assert not torch.equal(outputs["last"][0], outputs["per-stage"][0])
    assert torch.equal(outputs["last"][3], outputs["per-stage"][3])  # the last stage is the last either way
    assert not torch.equal(outputs[None][3], outputs["last"][3])


@pytest.mark.parametrize("attention", list_mixers())
def test_any_mixer_stands_in_for_the_attention_and_none_of_its_tensors_is_dead(attention):
    torch.manual_seed(0)
    options = {**SMALL, "attention": attention, "norm": "layer", "gamma_init": 0.5}
    model = randomise(adaptkit.attach(host(), ("vit-adapter", options)), 5).double()
    maps = model(torch.randn(2, 3, 70, 52).double()).maps
    sum((m * torch.randn_like(m)).sum() for m in maps).backward()
    gradients = {n: float(p.grad.abs().max()) for n, p in model.named_parameters() if p.requires_grad}
    # In float64 a gradient that cancels exactly is 1e-16 of the sums that make it.
    assert {n: g for n, g in gradients.items() if g < 1e-9 * max(gradients.values())} == {}


def test_the_attention_is_deformable_unless_another_is_asked_for():
    keys = set(adaptkit.attach(host(), ("vit-adapter", SMALL)).adapters["vit-adapter"].state_dict())
    assert keys == set(adaptkit.attach(host(), ("vit-adapter", {**SMALL, "attention": "msda"})).adapters["vit-adapter"].state_dict())  # fmt: skip
    assert "interactions.0.injector.attn.sampling_offsets.weight" in keys


def test_an_unknown_attention_is_a_value_error_that_names_the_mixers():
    with pytest.raises(ValueError, match="attention='fft' is not a choice; choose one of 'conv', .*'global'"):
        ViTAdapterConfig(attention="fft")
