"""Parts of the backbone that are trained: in the file, counted, and out of the backbone again."""

import copy
import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS, stirred

import adaptkit

x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def host(name="timm-vit"):
    return HOSTS[name].build()


def moved(model, seed=3):
    return stirred(model, seed, by=0.1)


def same_state(module, state):
    return list(module.state_dict()) == list(state) and all(
        torch.equal(v, state[k]) for k, v in module.state_dict().items()
    )


@pytest.mark.parametrize("name", ["timm-vit", "hf-dinov2", "timm-dinov3"])
def test_what_is_named_is_trained_saved_and_attached_elsewhere(name, tmp_path):
    parts = {"timm-vit": ("blocks.3", "norm"), "hf-dinov2": ("encoder.layer.3", "layernorm")}.get(name, ("blocks.3",))
    images = torch.randn(2, 3, HOSTS[name].size, HOSTS[name].size)
    base = host(name)
    before = copy.deepcopy(base.state_dict())
    model = moved(adaptkit.attach(base, "sfp", train_backbone=parts)).eval()
    expected = model(images)
    model.save(tmp_path)
    again = adaptkit.attach(host(name), tmp_path)
    assert torch.equal(again(images).tokens, expected.tokens)
    assert not torch.equal(expected.tokens, adaptkit.attach(host(name)).eval()(images).tokens)
    assert any(key.startswith("backbone.") for key in adaptkit.load(tmp_path).tensors)
    assert model.detach() is base
    assert same_state(base, before)
    assert same_state(again.detach(), before)


def test_detach_keeps_what_was_trained_where_it_is_asked_to():
    base = host()
    model = moved(adaptkit.attach(base, "sfp", train_backbone=("blocks.3", "norm"))).eval()
    expected = model(x).tokens
    assert model.detach(keep=True) is base
    assert torch.equal(base.forward_features(x)[:, 1:], expected)


def test_the_parts_get_the_gradient_that_plain_training_gives_and_count_as_trained():
    plain = host()
    plain.forward_features(x)[:, 1:].square().sum().backward()
    model = adaptkit.attach(host(), train_backbone=("blocks.2", "norm.bias", "blocks.*.attn.proj"))
    model(x).tokens.square().sum().backward()
    trained = {n.removeprefix("backbone."): p for n, p in model.named_parameters() if p.requires_grad}
    wanted = {
        n for n, _ in plain.named_parameters() if n.startswith("blocks.2.") or ".attn.proj." in n or n == "norm.bias"
    }
    assert {n.removeprefix("sets.default.backbone.copies.") for n in trained} == wanted
    theirs = dict(plain.named_parameters())
    for name, parameter in trained.items():
        expected = theirs[name.removeprefix("sets.default.backbone.copies.")].grad
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert model.get_nb_trainable_parameters()[0] == sum(theirs[n].numel() for n in wanted)


def test_another_set_has_the_backbone_without_them():
    model = moved(adaptkit.attach(host(), train_backbone=("blocks.3",)), 1).eval()
    tuned = model(x).tokens
    model.add_adapter("lora", name="other")
    model.set_adapter("other")
    plain = host().forward_features(x)[:, 1:]
    assert torch.equal(model(x).tokens, plain)
    model.set_adapter("default")
    assert torch.equal(model(x).tokens, tuned)
    with model.disable_adapter():
        assert torch.equal(model(x).tokens, plain)


def test_lora_in_a_layer_that_is_trained_too_leaves_the_backbone_exactly():
    base = host()
    before = copy.deepcopy(base.state_dict())
    model = moved(adaptkit.attach(base, "lora", train_backbone=("blocks.3",))).eval()
    expected = model(x).tokens
    model.merge_adapter()
    torch.testing.assert_close(model(x).tokens, expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(model(x).tokens, expected)
    model.detach()
    assert same_state(base, before)


def test_new_parameters_of_a_conversion_are_still_the_trained_ones():
    model = moved(adaptkit.attach(host(), train_backbone=("blocks.3",))).eval()
    expected = model(x).tokens
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    assert torch.equal(model(x).tokens, expected)
    model.train()(x).tokens.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model.double().eval()(x.double()).tokens.dtype == torch.float64
    assert {p.dtype for p in model.detach().parameters()} == {torch.float64}


def test_dropout_acts_in_modules_that_are_trained_as_a_whole():
    from timm.models.vision_transformer import VisionTransformer

    vit = VisionTransformer(32, 8, embed_dim=32, depth=3, num_heads=2, num_classes=0, proj_drop_rate=0.3)
    model = adaptkit.attach(vit, train_backbone=("blocks.2", "*.bias"))
    assert vit.blocks[2].mlp.drop1.training
    assert not vit.blocks[1].mlp.drop1.training
    assert not any(m.training for m in model.eval().backbone.modules())


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (("blocks.9",), r"train_backbone='blocks.9' names nothing in VisionTransformer; its parts are .*blocks\.0"),
        (("nrom",), "names nothing"),
    ],
)
def test_a_part_that_is_not_there_is_an_error_and_touches_nothing(parts, message):
    base = host().train()
    with pytest.raises(ValueError, match=message):
        adaptkit.attach(base, "sfp", train_backbone=parts)
    assert base.training
    assert all(p.requires_grad for p in base.parameters())


def test_a_file_of_another_library_says_so(tmp_path):
    adaptkit.attach(host("timm-dinov2"), train_backbone=("blocks.3",)).save(tmp_path)
    with pytest.raises(ValueError, match="calls them otherwise .*attach it to a backbone of the library"):
        adaptkit.attach(host("hf-dinov2"), tmp_path)


def test_tasks_that_share_a_backbone_cannot_train_it(tmp_path):
    adaptkit.attach(host(), "sfp", train_backbone=("norm",)).save(tmp_path)
    base = host()
    with pytest.raises(ValueError, match=r"task 'a': it trains parts of the backbone, which all tasks share"):
        adaptkit.attach_many(base, {"a": tmp_path})
    adaptkit.attach(base, "sfp")


@pytest.mark.parametrize("state", ["trained", "merged"])
def test_another_set_is_built_on_the_backbones_own_weights(state):
    first = {"train_backbone": ("blocks.3",)} if state == "trained" else {}
    model = moved(adaptkit.attach(host(), ("lora", {"target_modules": ["fc1"]}), **first)).eval()
    if state == "merged":
        model.merge_adapter()
    expected = model(x).tokens
    model.add_adapter(("lora", {"use_dora": True, "target_modules": ["fc1"]}), name="b", train_backbone=("blocks.3",))
    assert torch.equal(model(x).tokens, expected)
    own = host().state_dict()
    copies = model.set_of("b").backbone.copies.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in copies.items())
    model.set_adapter("b")
    torch.testing.assert_close(model(x).tokens, host().forward_features(x)[:, 1:], rtol=1e-5, atol=1e-5)


def test_a_peft_model_keeps_its_lora_beside_the_trained_parts():
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(host(), peft.LoraConfig(r=4, target_modules=["qkv"], init_lora_weights=False)).eval()
    plain, names = theirs.forward_features(x), list(theirs.state_dict())
    model = adaptkit.attach(theirs, train_backbone=("blocks.3",)).eval()
    trained = model.set_of("default").backbone.names
    assert "blocks.3.attn.qkv.weight" in trained
    assert not any("lora" in name or "base_layer" in name for name in trained)
    torch.testing.assert_close(model(x).prefix, plain[:, :1])
    moved(model.set_of("default").backbone)
    assert model.detach() is theirs
    assert list(theirs.state_dict()) == names
    torch.testing.assert_close(theirs.forward_features(x), plain)


def test_parts_in_float16_warn_of_the_optimiser():
    """A step of AdamW in float16 divides by zero, which the file would then hold."""
    with pytest.warns(UserWarning, match=r"norm\.weight is trained in the backbone's float16"):
        model = adaptkit.attach(HOSTS["timm-vit"].build().half(), "adapter-plus", train_backbone=("norm",))
    weight = model.backbone.norm.weight
    weight.grad = torch.zeros_like(weight)
    torch.optim.AdamW([weight]).step()
    assert weight.isnan().any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adaptkit.attach(HOSTS["timm-vit"].build().bfloat16(), "adapter-plus", train_backbone=("norm",))
