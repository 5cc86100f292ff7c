"""Every vision tower attaches and is the host's own bit for bit, or the error names what to hand over, or why not."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from containers import HELD, REFUSED, VISION
from towers import OPTIONS, SWIN, TOWERS

import adaptkit
from adaptkit.cli import main
from adaptkit.core.registry import view
from adaptkit.model.proof import prove

#: They take a second or more to build or to run: the full tier.
SLOW = {"timm VisionTransformer (R50 hybrid)"}
towers = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] if name in SLOW else []) for name in TOWERS]
)


def image(height, width, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def tokens(features):
    return torch.cat([features.prefix, features.tokens], dim=1)


@towers
@torch.no_grad()
def test_the_view_is_the_host_bitwise_at_the_sizes_that_it_takes(name):
    tower = TOWERS[name]
    host = tower.build()
    seen = view(host)
    prove(seen)
    for size in tower.sizes:
        features = seen.features(image(*size))
        assert torch.equal(tokens(features), tower.tokens(host, image(*size)))
        logits = seen.logits(features)
        assert (logits is None) == (tower.logits is None)
        if logits is not None:
            assert torch.equal(logits, tower.logits(host, image(*size)))
            assert seen.source().classes == logits.shape[1]


@towers
@torch.no_grad()
def test_images_of_any_size_are_taken(name):
    seen = view(TOWERS[name].build())
    patch = seen.spec.patch_size
    features = seen.features(image(5 * patch + 3, 3 * patch + 1, batch=1))
    assert features.grid == (6, 4)
    assert features.tokens.shape[1] == 24
    assert features.tokens.isfinite().all()


@torch.no_grad()
def test_a_swin_that_has_run_an_image_of_one_window_is_seen_as_one_that_has_not():
    """It stops to shift for good where a map is one window; a view leaves it as it was, and does not ask."""
    fresh, run = TOWERS["SwinModel"].build(), TOWERS["SwinModel"].build()
    shifts = [[layer.shift_size for layer in stage.blocks] for stage in fresh.encoder.layers]
    run(image(64, 64))
    assert [layer.shift_size for layer in run.encoder.layers[-1].blocks] == [0, 0]
    for size in ((64, 64), (96, 160)):
        seen = view(fresh).features(image(*size)).tokens
        assert torch.equal(seen, view(run).features(image(*size)).tokens)
        assert torch.equal(seen, TOWERS["SwinModel"].build()(image(*size)).last_hidden_state)
        assert [[layer.shift_size for layer in stage.blocks] for stage in fresh.encoder.layers] == shifts
    assert not torch.equal(run(image(96, 160)).last_hidden_state, seen)


@pytest.mark.parametrize("name", ["Swin", "Swinv2"])
def test_a_backbone_class_that_does_not_return_its_last_stage_is_refused(name):
    import transformers

    config = getattr(transformers, f"{name}Config")(**SWIN, out_features=["stage2"])
    with pytest.raises(TypeError, match=r"returns stage2 and not its last stage stage4; name it in out_features="):
        view(getattr(transformers, f"{name}Backbone")(config))


ADAPTERS = [name for name in adaptkit.list_adapters() if "toy" not in name]
TURNS = [
    pytest.param(name, ADAPTERS[i % len(ADAPTERS)], marks=[pytest.mark.full] if name in SLOW else [])
    for i, name in enumerate(TOWERS)
]


@pytest.mark.parametrize(("name", "adapter"), TURNS)
def test_an_adapter_trains_on_it_and_detaches(name, adapter):
    """One for each tower, in turn; ``tests/fits.py`` tries them all."""
    host, size = TOWERS[name].build(), TOWERS[name].sizes[0]
    with torch.no_grad():
        expected = TOWERS[name].tokens(host, image(*size))
    options = {"target_modules": ["mlp.0", "mlp.3"]} if "torchvision" in name and adapter == "lora" else {}
    try:
        model = adaptkit.attach(host, (adapter, {**OPTIONS.get(adapter, {}), **options}))
    except TypeError as error:
        known = ("does not come apart", "one width and one grid", "no list of its", "tome merges tokens")
        if not any(why in str(error) for why in known):
            raise
        model = adaptkit.attach(host, ("metaformer", OPTIONS["metaformer"]))
    features = model(image(*size))
    outputs = [features.tokens, *features.maps, *features.aux.values()]
    loss = sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in outputs)
    if trained := [p for p in model.parameters() if p.requires_grad]:  # tome has none
        loss.backward()
    assert all(p.grad is not None for p in trained)
    assert trained or "tome" in model.adapters
    assert model.detach() is host
    with torch.no_grad():
        assert torch.equal(TOWERS[name].tokens(host, image(*size)), expected)


@pytest.mark.parametrize(
    "name", ["ViTForImageClassification", "Dinov2ForImageClassification", "CLIPForImageClassification"]
)
@torch.no_grad()
def test_a_classifier_is_kept_under_adapters(name):
    host = TOWERS[name].build()
    expected = host(image(32, 32)).logits
    model = adaptkit.attach(host, ("vit-adapter", OPTIONS["vit-adapter"])).eval()
    assert torch.equal(model(image(32, 32)).logits, expected)
    assert not any(p.requires_grad for p in model.vit.backbone.parameters())


def test_an_adapter_saved_on_a_base_model_attaches_to_the_class_with_a_classifier(tmp_path):
    host = TOWERS["ViTForImageClassification"].build()
    model = adaptkit.attach(host.vit, ("vit-adapter", OPTIONS["vit-adapter"])).eval()
    expected = model(image(32, 32)).maps
    model.save(tmp_path)
    model.detach()
    again = adaptkit.attach(host, str(tmp_path), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(again(image(32, 32)).maps, expected))


@pytest.mark.parametrize("name", HELD)
def test_a_model_around_a_tower_says_which_attribute_to_hand_over_and_that_one_attaches(name):
    build, path = HELD[name]
    model = build()
    with pytest.raises(TypeError, match=rf"{name} as a whole; hand over what sees images in it, `model\.{path}`"):
        adaptkit.attach(model, "sfp")
    adapted = adaptkit.attach(model.get_submodule(path), ("metaformer", OPTIONS["metaformer"])).eval()
    assert adapted(image(32, 32)).tokens.isfinite().all()
    assert adapted.vit.spec.depth == VISION["num_hidden_layers"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_tower_of_other_blocks_is_refused_with_the_reason(name):
    build, reason = REFUSED[name]
    with pytest.raises(TypeError, match=rf"no family sees .*{name}.*{reason}.*Use "):
        adaptkit.attach(build(), "sfp")


def test_vitdet_with_convolutions_after_its_blocks_is_refused():
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = transformers.VitDetConfig(**sizes, pretrain_image_size=32, residual_block_indices=[1])
    with pytest.raises(TypeError, match=r"convolutions after blocks \[1\].*residual_block_indices=\[\]"):
        view(transformers.VitDetModel(config))


def test_attributes_alone_are_no_proof():
    """A class with the names of DINOv2's that adds something of its own is refused by ``attach``."""
    host = TOWERS["DINOv2 of torch.hub"].build()

    def forward_features(self, x, masks=None):
        said = type(self).__mro__[1].forward_features(self, x, masks)
        return {**said, "x_norm_patchtokens": said["x_norm_patchtokens"] * 2}

    host.__class__ = type("Mine", (type(host),), {"forward_features": forward_features})
    view(host)
    with pytest.raises(TypeError, match="Mine is not what DINOv2Hub sees of it"):
        adaptkit.attach(host, "sfp")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("LlavaForConditionalGeneration", "model.model.vision_tower"),
        ("DepthAnythingForDepthEstimation", "model.backbone"),
        ("SiglipForImageClassification", "of 2 classes, kept"),
    ],
)
def test_doctor_takes_a_class_of_transformers_and_says_what_to_do(name, said, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["doctor", name]) == 0
    out = capsys.readouterr().out
    assert said in out
    assert "yes: " in out


@pytest.mark.parametrize(
    ("name", "said"),
    [("Qwen2VLModel", "packed into one row of patches"), ("DPTForSemanticSegmentation", "no family sees")],
)
def test_doctor_says_why_a_class_is_refused(name, said, capsys):
    assert main(["doctor", name]) != 0
    assert said in capsys.readouterr().err


def test_doctor_asks_for_a_folder_where_a_class_has_no_default_config(capsys):
    assert main(["doctor", "TimmBackbone"]) != 0
    assert "TimmBackbone cannot be built from its default config" in capsys.readouterr().err
