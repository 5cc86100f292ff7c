"""LoRA inside the backbone: it acts, it leaves no trace, it goes to peft and comes back."""

import copy
import json
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS

import adaptkit
from adaptkit.adapters.lora.layer_names import default_targets, resolve_targets
from adaptkit.core.registry import view
from adaptkit.interop import to_peft

x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SMALL = {"conv_inplane": 8}
TYPES = {
    "lora": {"r": 4},
    "rslora": {"use_rslora": True, "lora_dropout": 0.3},
    "dora": {"use_dora": True},
    "loha": {"peft_type": "LOHA", "r": 2},
    "lokr": {"peft_type": "LOKR", "r": 2},
    "oft": {"peft_type": "OFT", "oft_block_size": 4},
    "boft": {"peft_type": "BOFT", "boft_block_size": 4},
    "hra": {"peft_type": "HRA", "r": 2},
    "ia3": {"peft_type": "IA3", "target_modules": ["qkv", "fc2"]},
    "patterns": {"rank_pattern": {"blocks.1.attn.qkv": 2}, "alpha_pattern": {"blocks.2.attn.qkv": 1}},
}


def host(name="timm-vit"):
    return HOSTS[name].build()


def image(name):
    return torch.randn(2, 3, HOSTS[name].size, HOSTS[name].size, generator=torch.Generator().manual_seed(0))


def moved(model):
    """Every trained parameter off its initial value."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=g))
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(HOSTS))
def test_it_reaches_the_output_of_every_host_and_merges_into_the_weights_and_back_exactly(name):
    model, before = adaptkit.attach(host(name), "lora"), copy.deepcopy(host(name).state_dict())
    images, plain = image(name), view(host(name)).features(image(name)).tokens
    adapted = moved(model)(images).tokens
    assert (adapted - plain).abs().max() > 1e-4
    model.merge_adapter()
    torch.testing.assert_close(model(images).tokens, adapted, atol=1e-4, rtol=1e-4)
    with model.disable_adapter():
        assert torch.equal(model(images).tokens, plain)
    torch.testing.assert_close(model(images).tokens, adapted, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(model(images).tokens, adapted)
    assert all(torch.equal(v, before[k]) for k, v in model.detach().state_dict().items())


@pytest.mark.parametrize("kind", TYPES)
def test_every_method_of_the_family_trains_and_is_saved(kind, tmp_path):
    base = host()
    names = list(base.state_dict())
    model = adaptkit.attach(base, "lora", **TYPES[kind]).train()
    assert list(base.state_dict()) == names
    model(x).tokens.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not any(p.requires_grad for p in base.parameters())
    expected = moved(model)(x).tokens
    model.save(tmp_path)
    again = adaptkit.attach(host(), tmp_path)
    assert torch.equal(again(x).tokens, expected)
    assert not torch.equal(model.detach().forward_features(x)[:, 1:], expected)


@pytest.mark.parametrize("kind", TYPES)
@torch.no_grad()
def test_peft_loads_what_is_exported_and_what_peft_saves_is_attached(kind, tmp_path):
    model = moved(adaptkit.attach(host(), "lora", **TYPES[kind]))
    expected = model(x).tokens
    to_peft(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(host(), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs.forward_features(x)[:, 1:], expected, atol=1e-6, rtol=1e-6)

    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(adaptkit.attach(host(), tmp_path / "theirs")(x).tokens, expected)


def test_lora_side_adapter_and_head_are_one_file(tmp_path):
    adapters = ("lora", ("vit-adapter", SMALL))
    model = adaptkit.attach(host(), *adapters, head=("fpn", {"num_classes": 3, "channels": 8})).train()
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = {k: v.clone() for k, v in model.adapter_state_dict().items()}
    for _ in range(2):  # LoRA's A moves once its B is not zero
        optimiser.zero_grad()
        model(x).logits.square().mean().backward()
        optimiser.step()
    after = model.adapter_state_dict()
    still = [k for k, v in after.items() if torch.equal(v, before[k]) and "lora_" in k]
    assert not still
    model.eval()
    expected = model(x)
    model.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    again = adaptkit.attach(host(), tmp_path)
    assert torch.equal(again(x).logits, expected.logits)
    assert all(torch.equal(a, b) for a, b in zip(again(x).maps, expected.maps))
    untouched = host().state_dict()
    assert all(torch.equal(v, untouched[k]) for k, v in again.detach().state_dict().items())


def test_a_peft_model_is_attached_to_as_it_stands_and_trained_in_place(tmp_path):
    theirs = peft.get_peft_model(host(), peft.LoraConfig(r=4, target_modules=["qkv", "fc1"], init_lora_weights=False))
    theirs.eval()
    plain = theirs.forward_features(x)
    structure = [n for n, _ in theirs.named_parameters()]
    model = adaptkit.attach(theirs, ("vit-adapter", {**SMALL, "injector": False})).eval()
    assert list(model.adapters) == ["lora", "vit-adapter"]
    assert torch.equal(model(x).prefix, plain[:, :1])
    model.save(tmp_path)
    assert torch.equal(adaptkit.attach(host(), tmp_path)(x).prefix, plain[:, :1])

    features = model.train()(x)
    sum(m.square().sum() for m in (features.tokens, *features.maps)).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    expected = model.eval()(x).prefix
    assert model.detach() is theirs
    assert [n for n, _ in theirs.named_parameters()] == structure
    assert torch.equal(theirs.eval().forward_features(x)[:, :1], expected)
    assert not torch.equal(expected, plain[:, :1])


def test_a_failed_attach_leaves_a_peft_model_as_it_was():
    theirs = peft.get_peft_model(host(), peft.LoraConfig(target_modules=["qkv"], init_lora_weights=False)).eval()
    plain, structure = theirs.forward_features(x), [n for n, _ in theirs.named_parameters()]
    with pytest.raises(ValueError, match="has no option"):
        adaptkit.attach(theirs, ("vit-adapter", {"nonsense": 1}))
    theirs.merge_adapter()
    with pytest.raises(ValueError, match="is merged: call unmerge_adapter"):
        adaptkit.attach(theirs, "vit-adapter")
    theirs.unmerge_adapter()
    assert [n for n, _ in theirs.named_parameters()] == structure
    torch.testing.assert_close(theirs.forward_features(x), plain)


def test_a_config_of_peft_is_an_adapter():
    model = adaptkit.attach(host(), peft.LoraConfig(r=2, lora_alpha=4, target_modules=["proj"]), "sfp")
    config = model.adapters["lora"].config
    # `proj` is also the name of the patch embedding's convolution, which is not meant
    assert config.options["target_modules"] == [f"blocks.{i}.attn.proj" for i in range(4)]
    assert (config.options["r"], config.options["lora_alpha"]) == (2, 4)
    json.dumps(model.header())


def test_names_of_layers_are_translated_into_those_of_the_host():
    assert default_targets(host("timm-vit")) == ["qkv"]
    assert default_targets(host("hf-dinov2")) == ["q_proj", "v_proj"]
    assert resolve_targets(host("hf-dinov2"), ["query", "value"]) == ["q_proj", "v_proj"]
    assert resolve_targets(host("hf-dinov2"), ["qkv"]) == ["q_proj", "k_proj", "v_proj"]
    assert resolve_targets(host("timm-vit"), ["q_proj", "v_proj"]) == ["qkv"]
    assert set(resolve_targets(host("hf-dinov3"), "all-linear")) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}  # fmt: skip
    with pytest.raises(ValueError, match="no layer named 'wq'; its blocks have fc1, fc2, proj, qkv"):
        resolve_targets(host("timm-vit"), ["wq"])


@torch.no_grad()
def test_a_file_of_an_older_transformers_finds_the_same_layers_under_their_new_names(tmp_path):
    model = moved(adaptkit.attach(host("hf-vit"), "lora"))
    to_peft(model, tmp_path)
    from safetensors.torch import load_file, save_file

    old = {}
    for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
        key = key.replace("model.layers.", "model.vit.encoder.layer.").replace("attention.", "attention.attention.")
        old[key.replace("q_proj", "query").replace("v_proj", "value")] = tensor
    assert any("vit.encoder.layer.0.attention.attention.query.lora_A" in k for k in old)
    old["base_model.model.classifier.weight"] = torch.zeros(3, 32)
    save_file(old, tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config |= {"target_modules": ["query", "value"], "modules_to_save": ["classifier"], "an_option_to_come": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"classifier\.weight in this peft folder are no LoRA"):
        again = adaptkit.attach(host("hf-vit"), tmp_path)
    images = image("hf-vit")
    assert torch.equal(again(images).tokens, model(images).tokens)


def test_a_file_of_another_library_says_that_lora_is_bound_to_names(tmp_path):
    adaptkit.attach(host("timm-dinov2"), "lora").save(tmp_path)
    with pytest.raises(ValueError, match=r"changes blocks\.N\.attn\.qkv, this backbone has .*N.*q_proj.*bound to the"):
        adaptkit.attach(host("hf-dinov2"), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rr": 4}, "LORA: .*rr.*; its options are .*lora_alpha"),
        ({"peft_type": "PREFIX_TUNING"}, "no method that works layer by layer.*; the methods are LORA"),
        ({"modules_to_save": ["head"]}, "a head is given by head="),
        ({"bias": "all"}, "would train biases of the backbone"),
        ({"init_lora_weights": "pissa"}, "rewrites the weights of the backbone"),
        ({"target_modules": ["nothing"]}, "no layer named 'nothing'; its blocks have"),
        ({"target_modules": r".*\.nothing"}, "nothing"),
    ],
)
def test_a_wrong_option_is_a_clear_error_and_leaves_the_host(options, message):
    model = host().train()
    before = [(m, set(vars(m)), list(m._modules)) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        adaptkit.attach(model, "lora", **options)
    assert [(m, set(vars(m)), list(m._modules)) for m in model.modules()] == before
    assert all(p.requires_grad for p in model.parameters())


def test_a_host_that_reads_weights_takes_what_is_added_to_them_only():
    with pytest.raises(ValueError, match="reads the weight of blocks.0.attn.qkv and does not call it"):
        adaptkit.attach(host("timm-beit"), "lora", use_dora=True)
    adaptkit.attach(host("timm-beit"), "lora", use_dora=True, target_modules=["fc1"])


def test_merging_is_refused_where_it_would_lose_something():
    model = adaptkit.attach(host(), "lora", ("vit-adapter", SMALL)).train()
    with pytest.raises(RuntimeError, match=r"call eval\(\) before merge_adapter"):
        model.merge_adapter()
    with pytest.raises(TypeError, match="vit-adapter: this cannot become weights"):
        model.merge_and_unload()
    model.eval().merge_adapter()
    with pytest.raises(RuntimeError, match=r"unmerge_adapter\(\) before training"):
        model.train()
    with pytest.raises(TypeError, match="sfp: none of these can be merged"):
        adaptkit.attach(host(), "sfp").eval().merge_adapter()


@torch.no_grad()
def test_merge_and_unload_gives_a_plain_backbone_with_the_change_in_its_weights():
    model = moved(adaptkit.attach(host(), "lora"))
    expected = model(x).tokens
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain.forward_features(x)[:, 1:], expected, atol=1e-4, rtol=1e-4)
    assert list(plain.state_dict()) == list(host().state_dict())


@torch.no_grad()
def test_a_copy_has_layers_of_its_own():
    model = moved(adaptkit.attach(host(), "lora"))
    other = copy.deepcopy(model)
    expected = model(x).tokens
    for p in other.adapters.parameters():
        p.zero_()
    assert torch.equal(model(x).tokens, expected)
    assert not torch.equal(other(x).tokens, expected)


def test_a_half_precision_host_trains_its_lora_in_float32():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = adaptkit.attach(host().bfloat16(), "lora")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model.train()(x).tokens.float().square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_folder_of_peft_is_inspected_and_its_backbone_is_asked_for(tmp_path, capsys):
    from adaptkit.cli import main

    to_peft(adaptkit.attach(host(), "lora", r=2), tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "LoRA in peft's layout" in said
    assert "unnamed" in said
    with pytest.raises(ValueError, match="without the name of its backbone: build that yourself"):
        adaptkit.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "no_such_vit"}))
    with pytest.raises(ValueError, match="no backbone is named 'no_such_vit'"):
        adaptkit.from_pretrained(tmp_path)
    assert adaptkit.from_pretrained(tmp_path, backbone=host()).adapters["lora"].config.options["r"] == 2


def test_the_order_in_which_layers_were_named_makes_no_other_adapter(tmp_path):
    """peft saves a set as a list, in whatever order Python's hashes have that day."""
    for name, targets in (("a", ["qkv", "proj"]), ("b", ["proj", "qkv"])):
        to_peft(moved(adaptkit.attach(host(), "lora", target_modules=targets)), tmp_path / name)
        said = tmp_path / name / "adapter_config.json"
        config = json.loads(said.read_text())
        config["target_modules"].sort(reverse=name == "b")
        said.write_text(json.dumps(config))
    assert adaptkit.interpolate(tmp_path / "a", tmp_path / "b", 0.5).tensors
    model = adaptkit.attach(host(), tmp_path / "a")
    model.hotswap_adapter(tmp_path / "b")


def test_a_pattern_of_layers_changes_them_where_their_names_do():
    named = adaptkit.attach(host(), "lora", peft_type="IA3", target_modules=["qkv", "fc2"])
    pattern = adaptkit.attach(host(), "lora", peft_type="IA3", target_modules=r"blocks\.\d+\.(attn\.qkv|mlp\.fc2)")
    shapes = [{n: p.shape for n, p in m.adapters.named_parameters()} for m in (named, pattern)]
    assert shapes[0] == shapes[1]
