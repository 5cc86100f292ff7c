"""Images of any number of channels: grey, infrared beside RGB, whatever the backbone's first layer reads."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from dealt import dealt
from families import HOSTS, randomise
from fits import OPTIONS

import adaptkit
from adaptkit import export
from adaptkit.analysis import accounting
from adaptkit.analysis.draw import to_picture
from adaptkit.core.registry import view
from adaptkit.core.view import Source
from adaptkit.hub.card import model_card

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
ADAPTERS = [name for name in adaptkit.list_adapters() if "toy" not in name]


def timm_host(name, channels):
    if name == "timm-swin":
        from timm.models.swin_transformer import SwinTransformer

        sizes = {"window_size": 4, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)}
        return SwinTransformer(64, in_chans=channels, num_classes=5, **sizes)
    if name == "timm-metaformer":
        from timm.models.metaformer import MetaFormer

        return MetaFormer(in_chans=channels, dims=(8, 12, 16, 24), depths=(1, 1, 1, 1), num_classes=5)
    return HOSTS[name].build(in_chans=channels)


def hf_host(path, cls, config, channels):
    module = importlib.import_module(f"transformers.models.{path}")
    sizes = {**SIZES, "image_size": 32, "patch_size": 8, "num_channels": channels}
    return getattr(module, cls)(getattr(module, config)(**sizes))


def build(name, channels):
    """A tiny host with stirred weights and biases that reads images of so many channels."""
    torch.manual_seed(0)
    return randomise(hf_host(*HF[name], channels) if name in HF else timm_host(name, channels))


HF = {
    "hf-vit": ("vit", "ViTModel", "ViTConfig"),
    "hf-vit-mae": ("vit_mae", "ViTMAEModel", "ViTMAEConfig"),
    "hf-dinov2": ("dinov2", "Dinov2Model", "Dinov2Config"),
    "hf-dinov3": ("dinov3_vit", "DINOv3ViTModel", "DINOv3ViTConfig"),
    "hf-clip": ("clip", "CLIPVisionModel", "CLIPVisionConfig"),
    "hf-siglip": ("siglip", "SiglipVisionModel", "SiglipVisionConfig"),
    "hf-beit": ("beit", "BeitModel", "BeitConfig"),
}
TIMM = ("timm-vit", "timm-eva02", "timm-beit", "timm-sam", "timm-swin", "timm-metaformer")


def small(name):
    """Two blocks and four channels: what an export can trace quickly."""
    if name in HF:
        return build(name, 4)
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return randomise(VisionTransformer(in_chans=4, num_classes=0, **sizes))


def attached(name, adapter, channels):
    return adaptkit.attach(build(name, channels), (adapter, OPTIONS.get(adapter, {})))


def image(channels, size=32):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(channels))


def outputs(model, x):
    features = model.eval()(x)
    return [t for t in (*features.maps, features.tokens, features.prefix, features.logits) if t is not None]


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", [*TIMM, *HF])
def test_each_family_reads_them_off_its_host_and_equals_it(name, channels):
    host = build(name, channels)
    assert view(host).spec.channels == channels
    x = image(channels, 64 if name == "timm-swin" else 32)
    with torch.no_grad():
        features = view(host).features(x)
        wanted = HOSTS[name].tokens(host, x) if name in HOSTS else host.forward_features(x)
    wanted = wanted.flatten(2).mT if name == "timm-metaformer" else wanted.flatten(1, -2)
    assert torch.equal(torch.cat([features.prefix, features.tokens], dim=1), wanted)


@pytest.mark.parametrize("channels", [1, 4, 13])
@pytest.mark.parametrize("name", ["timm-vit", "hf-dinov2"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_adapter_trains_saves_and_loads(adapter, name, channels, tmp_path):
    model, x = attached(name, adapter, channels), image(channels)
    features = model.train()(x)
    if trained := [p for p in model.parameters() if p.requires_grad]:
        sum(t.square().mean() for t in (features.tokens, *features.maps) if t.requires_grad).backward()
        torch.optim.SGD(trained, lr=0.1).step()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trained) or adapter == "tome"
    model.save(tmp_path)
    again = adaptkit.attach(build(name, channels), str(tmp_path))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(outputs(again, x), outputs(model, x), strict=True))
    assert adaptkit.load(tmp_path).spec.channels == channels


@pytest.mark.parametrize(("adapter", "name"), dealt(ADAPTERS, ["timm-vit", "hf-dinov2"], share=3))
def test_every_adapter_is_exported(adapter, name, tmp_path):
    light = {"interaction_indexes": ((0, 1),), "with_cffn": False, "extra_extractors": 0, "strides": (16,)}
    options = {"vit-adapter": light, "dat": {"blocks": (1,)}}
    model = adaptkit.attach(small(name), (adapter, options.get(adapter, OPTIONS.get(adapter, {})))).eval()
    path = export.to_exported_program(model, tmp_path / "model.pt2", (32, 32), dynamic_batch=False)
    again = torch.export.load(path).module()(image(4))
    with torch.no_grad():
        for a, b in zip(again, export.trace.Graph(model)(image(4)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert len(export.output_names(model, (32, 32))) == len(again)


@pytest.mark.parametrize("name", ["timm-swin", "timm-metaformer"])
def test_a_host_of_several_stages_too(name, tmp_path):
    model = attached(name, "metaformer", 4)
    model.save(tmp_path)
    again = adaptkit.attach(build(name, 4), str(tmp_path))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(outputs(again, image(4, 64)), outputs(model, image(4, 64))))


@pytest.mark.parametrize("channels", [1, 4])
def test_it_is_counted(channels):
    costs = accounting.costs(attached("timm-vit", "adavit", channels), (32, 32))
    other = accounting.costs(attached("timm-vit", "adavit", 3), (32, 32))
    assert costs.other - other.other == (channels - 3) * 8 * 8 * 32 * 16  # the patch kernel, on sixteen patches
    assert costs.blocks == other.blocks


@pytest.mark.parametrize("adapter", [None, "vit-adapter", "metaformer"])
@pytest.mark.parametrize("name", ["timm-vit", "hf-dinov2", "timm-swin"])
def test_an_image_of_another_number_is_an_error_with_both(name, adapter):
    if (name, adapter) == ("timm-swin", "vit-adapter"):
        adapter = "lora"
    adapters = [] if adapter is None else [(adapter, OPTIONS.get(adapter, {}))]
    model = adaptkit.attach(build(name, 4), *adapters)
    with pytest.raises(ValueError, match=r"\(2, 3, 64, 64\), so 3 channels; \w+ takes 4: give \(batch, 4, height"):
        model(image(3, 64))


def test_a_file_for_another_number_does_not_fit(tmp_path):
    attached("timm-vit", "vit-adapter", 4).save(tmp_path)
    with pytest.raises(ValueError, match=r"trained on channels=4 .*this backbone has channels=3"):
        adaptkit.attach(HOSTS["timm-vit"].build(), str(tmp_path))


@pytest.mark.parametrize("name", ["timm-vit", "timm-swin"])
def test_a_file_that_does_not_say_means_three(name, tmp_path):
    adaptkit.attach(build(name, 3), ("metaformer", {"width": 4})).save(tmp_path)
    file = adaptkit.load(tmp_path)
    del file.header["backbone"]["spec"]["channels"]  # as before it was written
    assert file.spec.channels == 3
    adaptkit.attach(build(name, 3), file)
    with pytest.raises(ValueError, match=r"trained on channels=3 .*this backbone has channels=1"):
        adaptkit.attach(build(name, 1), file)


@pytest.mark.parametrize("adapter", ["sfp", ("vit-adapter", {"conv_inplane": 8, "injector": False})])
def test_recorded_features_are_those_of_the_image(adapter):
    model = adaptkit.attach(build("timm-vit", 4), adapter).eval()
    with torch.no_grad():
        told, seen = model(model.extract(image(4))), model(image(4))
    assert all(torch.equal(a, b) for a, b in zip(told.maps, seen.maps, strict=True))


def test_several_tasks_run_on_it():
    many = adaptkit.attach_many(build("timm-vit", 4), {"one": "sfp", "other": "sfp"}).eval()
    with torch.no_grad():
        assert many(image(4))["one"].maps
    with pytest.raises(ValueError, match="so 3 channels; VisionTransformer takes 4"):
        many(image(3))


def test_smps_pyramid_says_how_many_the_image_has():
    model = adaptkit.attach(build("timm-vit", 4), "sfp")
    assert adaptkit.as_pyramid(model, out="smp").out_channels[:2] == [4, 0]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_cards_snippet_makes_such_an_image(channels):
    card = model_card(adaptkit.attach(build("timm-vit", channels), "sfp").header())
    assert f"torch.rand(1, {channels}, 128, 128)" in card


def test_a_normalisation_of_another_number_is_none():
    import timm

    host = timm.create_model("vit_tiny_patch16_224", in_chans=4, depth=1)
    assert len(host.pretrained_cfg["mean"]) == 3
    assert view(host).source().mean == ()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_an_image_of_any_number_is_drawn(channels):
    source = Source(mean=(0.5,) * channels, std=(0.25,) * channels)
    picture = to_picture(torch.zeros(channels, 4, 6), source)
    assert (picture.mode, picture.size, picture.getpixel((0, 0))) == ("RGB", (6, 4), (128, 128, 128))
