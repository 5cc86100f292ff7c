"""A frozen RGB backbone reads more channels: its own answer at the start, and what is trained of it is in the file."""

import copy
import gc
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS, stirred

import adaptkit
from adaptkit.core.registry import view

#: One of each family whose first layer is a convolution.
FAMILIES = ("timm-vit", "timm-dinov3", "timm-beit", "timm-sam", "hf-vit", "hf-dinov2", "hf-dinov3", "hf-clip", "hf-siglip",
            "hf-beit", "hf-vit-mae", "hf-timm-wrapper")  # fmt: skip
NEW = ("*.new_channels",)


def image(name, channels, seed=0):
    side = HOSTS[name].size
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("n", [4, 13])
@pytest.mark.parametrize("name", FAMILIES)
def test_at_zero_it_gives_the_frozen_answer_for_rgb_bit_for_bit(name, n):
    backbone = HOSTS[name].build()
    before, x = list(backbone.state_dict()), image(name, n)
    expected = view(backbone).features(x[:, :3])
    expanded = adaptkit.expand_channels(backbone, n)
    assert view(expanded).spec.channels == n
    features = adaptkit.attach(expanded, "sfp" if name != "timm-swin" else "lora").eval()(x)
    assert torch.equal(features.tokens, expected.tokens)
    assert torch.equal(features.prefix, expected.prefix)
    assert list(backbone.state_dict()) == before
    assert view(backbone).spec.channels == 3
    assert torch.equal(view(backbone).features(x[:, :3]).tokens, expected.tokens)
    shared = {p.data_ptr() for p in backbone.parameters()}
    assert [k for k, p in expanded.named_parameters() if p.data_ptr() not in shared] == [
        k for k, _ in expanded.named_parameters() if k.endswith("new_channels")
    ]


@torch.no_grad()
def test_it_is_the_convolution_over_all_channels():
    backbone = HOSTS["timm-vit"].build()
    kernel, x = backbone.patch_embed.proj.weight, image("timm-vit", 6)
    for how, rows in (("mean", kernel.mean(1, keepdim=True).expand(-1, 3, -1, -1)),
                      ("wavelength", torch.stack([kernel[:, 0], kernel[:, 2], (kernel[:, 0] + kernel[:, 1]) / 2], 1))):  # fmt: skip
        bands = {"wavelengths": (842, 443, 612.5)} if how == "wavelength" else {}
        embed = adaptkit.expand_channels(backbone, 6, how, **bands).patch_embed.proj
        torch.testing.assert_close(embed.new_channels, rows)
        whole = F.conv2d(x, torch.cat([kernel, rows], 1), backbone.patch_embed.proj.bias, stride=8)
        torch.testing.assert_close(embed(x), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["timm-vit", "hf-dinov2"])
@pytest.mark.parametrize("adapter", ["sfp", "adapter-plus", "vpt", "lora", ("vit-adapter", {"conv_inplane": 8})])
def test_the_new_rows_alone_are_trained_and_saved_in_the_adapters_file(name, adapter, tmp_path):
    backbone = HOSTS[name].build()
    before = copy.deepcopy(backbone.state_dict())
    expanded = adaptkit.expand_channels(backbone, 13)
    model, x = adaptkit.attach(expanded, adapter, train_backbone=NEW), image(name, 13)
    features = model.train()(x)
    sum(t.square().mean() for t in (features.tokens, *features.maps)).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    torch.optim.SGD(trained, lr=0.1).step()
    expected = model.eval()(x)
    assert not torch.equal(expected.tokens, model(torch.cat([x[:, :3], 0 * x[:, 3:]], 1)).tokens)
    model.save(tmp_path)
    own = [k for k in adaptkit.load(tmp_path).tensors if k.startswith("backbone.")]
    assert [k.rpartition(".")[2] for k in own] == ["new_channels"]
    again = adaptkit.attach(adaptkit.expand_channels(HOSTS[name].build(), 13), tmp_path)
    assert torch.equal(again(x).tokens, expected.tokens)
    assert model.detach() is expanded
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    with pytest.raises(ValueError, match=r"trained on channels=13 .* this backbone has channels=3"):
        adaptkit.attach(HOSTS[name].build(), tmp_path)


def test_what_cannot_be_expanded_says_what_it_is():
    backbone = HOSTS["timm-vit"].build()
    with pytest.raises(ValueError, match="n=3 is not more than the three channels"):
        adaptkit.expand_channels(backbone, 3)
    with pytest.raises(ValueError, match=r"n=1 is not more .*goes in as three equal ones, image\.expand"):
        adaptkit.expand_channels(backbone, 1)
    with pytest.raises(ValueError, match="how='random'"):
        adaptkit.expand_channels(backbone, 4, "random")
    with pytest.raises(ValueError, match="2 wavelengths for 1 further channels"):
        adaptkit.expand_channels(backbone, 4, "wavelength", (842, 900))
    with pytest.raises(ValueError, match="it needs them"):
        adaptkit.expand_channels(backbone, 4, "wavelength")
    with pytest.raises(ValueError, match="reads 4 channels; give one that reads three"):
        adaptkit.expand_channels(adaptkit.expand_channels(backbone, 4), 13)


def test_what_is_no_number_of_channels_and_no_wavelength_is_refused():
    for n in (4.0, "4", True):
        with pytest.raises(TypeError, match="is no number of channels"):
            adaptkit.expand_channels(HOSTS["timm-vit"].build(), n)
    assert adaptkit.expand_channels(HOSTS["timm-vit"].build(), 4, "wavelength", np.array([842])) is not None
    for wavelength in (float("nan"), float("inf"), -1.0, "a"):
        with pytest.raises(ValueError, match="give nanometres"):
            adaptkit.expand_channels(HOSTS["timm-vit"].build(), 4, "wavelength", [wavelength])


def test_a_stem_that_standardises_its_weights_is_refused_and_another_is_expanded():
    """timm's hybrids: a ResNet v2 before the tokens, or one of plain convolutions."""
    import timm

    sizes = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    with pytest.raises(TypeError, match=r"stem.conv, a StdConv2dSame\), and one plain nn.Conv2d is expanded"):
        adaptkit.expand_channels(timm.create_model("vit_base_r50_s16_224", **sizes), 4)
    plain = timm.create_model("vit_small_resnet26d_224", **sizes).eval()
    image = torch.randn(1, 5, 64, 64)
    expanded = adaptkit.expand_channels(plain, 5)
    assert torch.equal(expanded(image), plain(image[:, :3]))
    assert adaptkit.attach(expanded, "sfp").spec.channels == 5


def test_torchvisions_vit_is_expanded_and_attached():
    from torchvision.models.vision_transformer import VisionTransformer

    plain = VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64).eval()
    image = torch.randn(1, 4, 32, 32)
    model = adaptkit.attach(adaptkit.expand_channels(plain, 4)).eval()
    assert model.spec.channels == 4
    assert torch.equal(model(image).logits, plain(image[:, :3]))


# ------------------------------------------------------------------------------- two trees that hold the same weights


def test_what_an_adapted_model_holds_is_not_expanded():
    """Its LoRA, or weights that hold it, would be taken for the frozen backbone."""
    backbone = HOSTS["timm-vit"].build()
    model = stirred(adaptkit.attach(backbone, "lora"))
    with pytest.raises(ValueError, match="has adapters already"):
        adaptkit.expand_channels(backbone, 5)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="has adapters already"):
        adaptkit.expand_channels(backbone, 5)
    model.detach()
    assert "_adaptkit_owner" not in vars(adaptkit.expand_channels(backbone, 5))


@pytest.mark.parametrize("first", ["rgb", "expanded"])
def test_one_of_two_that_share_weights_has_adapters_at_a_time(first):
    backbone = HOSTS["timm-vit"].build()
    both = {"rgb": backbone, "expanded": adaptkit.expand_channels(backbone, 5)}
    other = next(tree for name, tree in both.items() if name != first)
    flags = {name: [p.requires_grad for p in tree.parameters()] for name, tree in both.items()}
    model = adaptkit.attach(both[first], "sfp")
    with pytest.raises(ValueError, match=r"belongs to the backbone of another adapted model"):
        adaptkit.attach(other, "lora")
    adaptkit.attach(copy.deepcopy(other), "lora")  # which has weights of its own
    model.detach()
    adaptkit.attach(other, "lora").detach()
    model = adaptkit.attach(both[first], "sfp")
    del model  # without detach()
    gc.collect()
    adaptkit.attach(other, "lora").detach()
    adaptkit.attach(both[first], "sfp").detach()
    assert {name: [p.requires_grad for p in tree.parameters()] for name, tree in both.items()} == flags


@torch.no_grad()
def test_a_module_of_three_channels_is_expanded_as_the_file_says(tmp_path):
    """By ``from_pretrained``; ``attach`` changes no backbone and says the call."""
    build = HOSTS["timm-vit"].build
    model = stirred(
        adaptkit.attach(adaptkit.expand_channels(build(), 5, how="mean"), "adapter-plus", train_backbone=NEW)
    )
    model.eval().save(tmp_path)
    x = image("timm-vit", 5)
    again = adaptkit.from_pretrained(tmp_path, backbone=build())
    assert torch.equal(again(x).tokens, model(x).tokens)
    with pytest.raises(ValueError, match=r"attach it to adaptkit.expand_channels\(backbone, 5, how='mean'\)"):
        adaptkit.attach(build(), tmp_path)
    native = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, in_chans=5, num_classes=5
    )
    with (
        pytest.warns(UserWarning, match="other weights"),
        pytest.raises(ValueError, match=r"expand_channels\(a backbone"),
    ):
        adaptkit.attach(native, tmp_path)


def test_an_attach_that_fails_thaws_nothing_of_another_model():
    """The model of one tree is gone without detach(), the other tree is adapted, and the first is asked for again."""
    backbone = HOSTS["timm-vit"].build()
    expanded = adaptkit.expand_channels(backbone, 5)
    flags = [p.requires_grad for p in expanded.parameters()]
    gone = adaptkit.attach(backbone, "sfp")
    del gone
    gc.collect()
    model = adaptkit.attach(expanded, "lora")
    for fails in (lambda: adaptkit.attach(backbone, "sfp"), lambda: adaptkit.expand_channels(backbone, 4)):
        with pytest.raises(ValueError, match="another adapted model too"):
            fails()
    own = {id(p) for p in model.adapters.parameters()}
    assert not [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    model.detach()
    assert [p.requires_grad for p in expanded.parameters()] == flags
    assert all(p.requires_grad for p in backbone.parameters())


def test_weights_that_trained_copies_stand_for_are_taken_too():
    backbone = HOSTS["timm-vit"].build()
    expanded = adaptkit.expand_channels(backbone, 5)
    model = adaptkit.attach(backbone, "sfp", train_backbone=("*",))
    assert not {id(p) for p in model.backbone.parameters()} & {id(p) for p in expanded.parameters()}
    with pytest.raises(ValueError, match="another adapted model too"):
        adaptkit.attach(expanded, "lora")
    model.detach()
    adaptkit.attach(expanded, "lora")


PARTS = {
    "new_channels": NEW,
    "norm": ("norm",),
    "biases": ("*.bias",),
    "all": ("*",),
    "some": ("blocks.3", "norm.bias"),
}


@torch.no_grad()
@pytest.mark.parametrize("trained", PARTS)
def test_weights_that_the_file_brings_itself_need_not_be_the_backbones(trained, tmp_path):
    build, wide = HOSTS["timm-vit"].build, trained == "new_channels"
    host = adaptkit.expand_channels(build(), 5, how="mean") if wide else build()
    model = stirred(adaptkit.attach(host, "adapter-plus", train_backbone=PARTS[trained])).eval()
    model.save(tmp_path)
    brought = set(adaptkit.load(tmp_path).tensors_of("backbone"))
    other = adaptkit.expand_channels(build(), 5, how="zero") if wide else build()
    for name, parameter in other.named_parameters():
        if name in brought:
            parameter.normal_()
    x = image("timm-vit", 5 if wide else 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = adaptkit.attach(other, tmp_path, strict=True).eval()
    assert torch.allclose(again(x).tokens, model(x).tokens, atol=1e-6)
    again.detach()
    if trained != "all":  # of what is not brought another value is found
        kernel = other.patch_embed.proj
        (kernel.rgb if wide else kernel.weight).mul_(1.5)
        with pytest.raises(ValueError, match=r"they differ in (patch_embed|'patch')"):
            adaptkit.attach(other, tmp_path, strict=True)


def test_a_warning_points_at_the_line_of_the_user(tmp_path):
    adaptkit.attach(HOSTS["timm-vit"].build(), "sfp").save(tmp_path)
    other = HOSTS["timm-vit"].build()
    torch.nn.init.normal_(other.blocks[1].mlp.fc1.weight)
    with pytest.warns(UserWarning, match="other weights") as caught:
        adaptkit.attach(other, tmp_path)
    assert [warning.filename for warning in caught] == [__file__]
