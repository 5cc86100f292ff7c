"""DAT as a backbone: parity with the authors' model, sizes, timm's interface."""

import json
import warnings
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open

from adaptkit.create import create_backbone
from adaptkit.mixers.window import ShiftedWindowAttention
from adaptkit.models import DAT

GOLDEN = Path(__file__).parents[2] / "../shared/golden/dat_model_a.safetensors"
TINY = {"dim_stem": 8, "dims": (8, 16, 32, 64), "depths": (2, 2, 2, 2), "heads": (1, 2, 2, 4), "groups": (-1, -1, 2, 2)}
X = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def tiny(**options):
    torch.manual_seed(0)
    return DAT(**{**TINY, "img_size": 64, "num_classes": 5, "window_sizes": (3, 4, 2, 2), **options}).eval()


@pytest.fixture(scope="module")
def golden():
    if not GOLDEN.is_file():
        pytest.skip("golden vectors are not beside this checkout")
    with safe_open(GOLDEN, "pt") as f:
        config = json.loads(f.metadata()["config"])
        return config, {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118


def official(tensors):
    return {k.removeprefix("official."): v for k, v in tensors.items() if k.startswith("official.")}


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 2e-4)])
def test_it_agrees_with_the_authors_model(golden, dtype, tolerance):
    config, tensors = golden
    model = DAT(**config).to(dtype).eval()
    model.load_state_dict(official(tensors))
    points = {}
    logits = model.forward_head(model.forward_features(tensors["input"].to(dtype), points))
    torch.testing.assert_close(logits, tensors["logits"].to(dtype), atol=tolerance, rtol=tolerance)
    assert {f"pos.{k}" for k in points} == {k for k in tensors if k.startswith("pos.")}
    for key, value in points.items():
        torch.testing.assert_close(value, tensors[f"pos.{key}"].to(dtype), atol=tolerance, rtol=tolerance)


def test_its_state_dict_has_the_authors_keys_and_shapes(golden):
    config, tensors = golden
    own = {k: v.shape for k, v in DAT(**config).state_dict().items()}
    assert own == {k: v.shape for k, v in official(tensors).items()}


def test_its_mask_and_index_are_the_authors(golden):
    config, tensors = golden
    own = DAT(**config).state_dict()
    for key, value in official(tensors).items():
        if key.endswith(("attn_mask", "relative_position_index")):
            assert torch.equal(own[key], value), key


def test_a_checkpoint_of_another_size_is_resized_with_a_warning(golden):
    config, tensors = golden
    model = DAT(**{**config, "img_size": 160, "window_sizes": (5, 5, 5, 5)})
    with pytest.warns(UserWarning, match=r"bias tables of 27x27 were resized to 19x19"):
        model.load_state_dict(official(tensors))


@torch.no_grad()
def test_a_model_resizes_its_tables_as_a_checkpoint_is_resized(golden):
    config, tensors = golden
    config = {**config, "window_sizes": (7, 7, 7, 7)}
    here, there = DAT(**config).eval(), DAT(**{**config, "img_size": 256}).eval()
    here.load_state_dict(official(tensors))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there.load_state_dict(official(tensors))
    image = torch.randn(1, 3, 256, 256)
    torch.testing.assert_close(here(image), there(image))


@pytest.mark.parametrize(("name", "million"), [("dat_tiny", 28.32), ("dat_small", 49.70), ("dat_base", 87.88)])
def test_the_papers_models_have_their_number_of_parameters(name, million):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == million


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (32, 96), (50, 70), (4, 4), (1, 9)])
def test_any_image_size_gives_maps_of_its_size(size):
    image = torch.randn(1, 3, *size)
    _, maps = tiny().forward_intermediates(image)
    assert [m.shape[2:] for m in maps] == [torch.Size((-(-size[0] // s), -(-size[1] // s))) for s in (4, 8, 16, 32)]
    assert all(m.isfinite().all() for m in maps)


@torch.no_grad()
@pytest.mark.parametrize("shift", [0, 2])
def test_padding_of_a_window_is_nobodys_key(shift):
    torch.manual_seed(0)
    attn = ShiftedWindowAttention(8, heads=2, window=4, shift=shift)
    x = torch.randn(1, 8, 6, 7)
    y = attn(x)
    proj, attn.proj_qkv = attn.proj_qkv, torch.nn.Identity()

    def marked(tokens):  # padding arrives as zeros: make its keys and values enormous
        return torch.where((tokens == 0).all(-1, keepdim=True), 1e4 * torch.ones(24), proj(tokens))

    attn.proj_qkv.forward = marked
    torch.testing.assert_close(attn(x), y)


@torch.no_grad()
def test_a_shifted_window_keeps_apart_what_the_shift_brings_together():
    torch.manual_seed(0)
    attn = ShiftedWindowAttention(8, heads=2, window=4, shift=2, size=(8, 8))
    x = torch.randn(1, 8, 8, 8)
    other = x.clone()
    other[..., -1, -1] += 1  # the shift puts this corner into the window of the first one
    assert torch.equal(attn(x)[..., :2, :2], attn(other)[..., :2, :2])


@torch.no_grad()
def test_forward_is_the_head_after_the_features():
    model = tiny()
    assert torch.equal(model(X), model.forward_head(model.forward_features(X)))
    assert model.forward_head(model.forward_features(X), pre_logits=True).shape == (1, 64)


@torch.no_grad()
def test_forward_intermediates_returns_what_timm_returns():
    model = tiny()
    final, maps = model.forward_intermediates(X, indices=[1, 3], norm=True)
    assert torch.equal(final, model.forward_features(X))
    assert torch.equal(final, maps[-1])
    assert [m.shape[1] for m in maps] == [16, 64]
    early = model.forward_intermediates(X, indices=[1], stop_early=True, intermediates_only=True)
    assert torch.equal(early[0], maps[0])


@torch.no_grad()
def test_reset_classifier_changes_the_classes_and_removes_them():
    model = tiny()
    model.reset_classifier(3)
    assert model(X).shape == (1, 3)
    assert model.get_classifier().out_features == 3
    model.reset_classifier(0)
    assert model(X).shape == (1, 64)
    model.reset_classifier(0, "")
    assert model(X).shape == (1, 64, 2, 2)


@torch.no_grad()
def test_timm_builds_it_as_a_pyramid():
    options = {**TINY, "img_size": 64, "window_sizes": (3, 4, 2, 2)}
    model = timm.create_model("dat_tiny", features_only=True, out_indices=(1, 2), **options).eval()
    assert model.feature_info.channels() == [16, 32]
    assert model.feature_info.reduction() == [8, 16]
    assert [m.shape for m in model(X)] == [(1, 16, 8, 8), (1, 32, 4, 4)]


def test_create_backbone_knows_its_name():
    assert isinstance(create_backbone("dat_tiny", pretrained=False), DAT)


def test_every_parameter_gets_a_gradient():
    model = tiny(drop_path_rate=0.1).train()
    model(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_it_compiles_as_one_graph():
    torch._dynamo.reset()
    model = tiny()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(X), model(X))


@torch.no_grad()
def test_it_exports():
    model = tiny()
    program = torch.export.export(model, (X,), strict=False)
    torch.testing.assert_close(program.module()(X), model(X), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"no_offs": (False, False, True, True)}, "no_offs=.* is of a variant that is not supported"),
        ({"stage_spec": (("N", "D"),) * 4}, "block 'N' is none of DAT's L, S and D"),
        ({"depths": (2, 2, 2, 4), "stage_spec": (("L", "S"),) * 4}, "stage_spec has .* make them agree"),
        ({"windows": 7}, "DAT has no option 'windows'"),
    ],
)
def test_options_that_do_not_fit_say_so(options, words):
    with pytest.raises(ValueError, match=words):
        tiny(**options)
