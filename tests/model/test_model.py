"""``attach``: what it takes, what it refuses, and what an adapted model is to torch."""

import contextlib
import copy
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS

import adaptkit
from adaptkit import FPNHeadConfig, LinearHeadConfig, ViTAdapterConfig
from adaptkit.core import registry
from adaptkit.core.view import Features
from adaptkit.hub.backbone import describe_backbone
from adaptkit.model.offloading import offload

x = torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(0))
SMALL = {"conv_inplane": 8}


def host(name="timm-vit"):
    return HOSTS[name].build()


def test_a_name_a_config_and_a_pair_are_the_same():
    models = []
    for adapter in ("vit-adapter", ViTAdapterConfig(), ("vit-adapter", {})):
        torch.manual_seed(0)
        models.append(adaptkit.attach(host(), adapter))
    states = [m.adapter_state_dict() for m in models]
    assert all(torch.equal(states[0][k], s[k]) for s in states for k in s)


def test_options_go_with_the_one_adapter_given_by_name():
    assert adaptkit.attach(host(), "vit-adapter", injector=False).adapters["vit-adapter"].config.injector is False
    with pytest.raises(TypeError, match="injector: options go with one adapter given by name"):
        adaptkit.attach(host(), ViTAdapterConfig(), injector=False)


def test_the_names_are_listed():
    assert {"sfp", "vit-adapter"} <= set(adaptkit.list_adapters())
    assert {"fpn", "linear"} <= set(adaptkit.list_heads())


@pytest.mark.parametrize(
    ("adapter", "error", "message"),
    [
        (
            "vit-adaptor",
            ValueError,
            "no adapter is named 'vit-adaptor' and no file is there .did you mean 'vit-adapter'.*; the adapters are .*vit-adapter",
        ),
        (
            ("vit-adapter", {"injektor": 1}),
            ValueError,
            "has no option 'injektor' .did you mean 'injector'.*; its options are injector",
        ),
        (("vit-adapter", {"norm": "nrom"}), ValueError, "norm='nrom' is not a choice; choose one of 'batch'"),
        (
            ("vit-adapter", {"interaction_indexes": [[0, 1], [3, 3]]}),
            ValueError,
            r"do not run through the 4 blocks 0\.\.3",
        ),
        (("vit-adapter", {"deform_num_heads": 5}), ValueError, "deform_num_heads=5 does not divide the value width 32"),
        (("vit-adapter", {"n_points": 0}), ValueError, "n_points=0 must be positive"),
        (42, TypeError, "42 is no adapter: give a name"),
    ],
)
def test_a_wrong_adapter_is_a_clear_error_and_touches_nothing(adapter, error, message):
    model = host().train()
    with pytest.raises(error, match=message):
        adaptkit.attach(model, adapter)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_a_head_without_classes_asks_for_them():
    with pytest.raises(ValueError, match="head 'fpn' needs more options: .*num_classes"):
        adaptkit.attach(host(), head="fpn")


def test_two_side_adapters_and_the_same_one_twice_are_refused():
    with pytest.raises(ValueError, match="sfp and vit-adapter each own the loop"):
        adaptkit.attach(host(), "sfp", "vit-adapter")
    with pytest.raises(ValueError, match="each may be attached once"):
        adaptkit.attach(host(), "sfp", "sfp")


def test_attaching_to_an_adapted_model_is_refused():
    with pytest.raises(TypeError, match=r"attach all of them in one call, or detach\(\) first"):
        adaptkit.attach(adaptkit.attach(host(), "sfp"), "vit-adapter")


def test_a_detached_model_says_so():
    model = adaptkit.attach(host(), "sfp")
    model.detach()
    with pytest.raises(RuntimeError, match="was detached"):
        model(x)
    with pytest.raises(RuntimeError, match="was detached"):
        model.detach()


def test_detach_of_a_wrapped_host_returns_the_wrapper():
    model = host("hf-timm-wrapper")
    assert adaptkit.attach(model, "sfp").detach() is model


def test_no_adapter_at_all_is_the_frozen_backbone_with_a_head():
    model = adaptkit.attach(host(), head=LinearHeadConfig(num_classes=4)).eval()
    assert model(x).logits.shape == (2, 4, 32, 40)
    assert model(x).maps == ()


def test_a_fresh_adapter_is_in_training_mode_whatever_the_hosts_was_and_a_loaded_one_in_eval_mode(tmp_path):
    assert adaptkit.attach(host().train(), "sfp").training
    model = adaptkit.attach(host().eval(), "sfp")
    assert model.training
    assert not any(m.training for m in model.backbone.modules())
    model.save(tmp_path)
    assert not adaptkit.attach(host().train(), tmp_path).training


class Pooled(nn.Module):
    """A head of the user's own."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(32, 2)

    def forward(self, features: Features):
        return self.fc(features.tokens.mean(1))


def test_a_head_of_ones_own_is_saved_and_comes_back_when_it_is_given_again(tmp_path):
    model = adaptkit.attach(host(), "sfp", head=Pooled()).eval()
    model.save(tmp_path)
    with pytest.raises(ValueError, match=r"custom module \(.*Pooled\); build it and pass it as head="):
        adaptkit.attach(host(), tmp_path)
    again = adaptkit.attach(host(), tmp_path, head=Pooled())
    assert torch.equal(again(x).logits, model(x).logits)


def test_another_head_replaces_the_saved_one(tmp_path):
    adaptkit.attach(host(), "sfp", head=("linear", {"num_classes": 3})).save(tmp_path)
    again = adaptkit.attach(host(), tmp_path, head=FPNHeadConfig(num_classes=7, channels=8)).eval()
    assert again(x).logits.shape[1] == 7


def test_a_copy_is_a_model_of_its_own():
    model = adaptkit.attach(host(), ("vit-adapter", SMALL)).eval()
    other = copy.deepcopy(model)
    assert other.vit.backbone is other.backbone
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert not torch.equal(model(x).maps[0], other(x).maps[0])


def test_a_backbone_in_bfloat16_serves_an_adapter_in_float32():
    model = adaptkit.attach(host().bfloat16(), ("vit-adapter", SMALL), head=("fpn", {"num_classes": 2, "channels": 8}))
    torch.nn.init.normal_(model.adapters["vit-adapter"].interactions[0].injector.gamma)
    model.train()(x).logits.sum().backward()
    assert model.backbone.blocks[0].norm1.weight.dtype == torch.bfloat16
    assert model.adapters["vit-adapter"].level_embed.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_forward_and_backward_are_finite(dtype):
    model = adaptkit.attach(host(), ("vit-adapter", SMALL), head=("fpn", {"num_classes": 2, "channels": 8})).train()
    with torch.autocast("cpu", dtype):
        logits = model(x).logits
    logits.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_an_image_without_a_batch_is_a_clear_error():
    with pytest.raises(ValueError, match="expected \\(batch, channels, height, width\\)"):
        adaptkit.attach(host(), "sfp")(x[0])


def test_import_is_light():
    import subprocess

    code = "import sys, adaptkit; adaptkit.list_adapters(); print([m for m in ('timm', 'transformers', 'peft', 'datasets', 'accelerate', 'torchvision', 'huggingface_hub', 'yaml', 'onnx') if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"


@pytest.mark.parametrize(
    "around", [torch.inference_mode, torch.no_grad, lambda: torch.device("meta")], ids=("inference", "no grad", "meta")
)
def test_what_is_attached_is_the_same_whatever_the_caller_entered(around):
    for name in ("timm-vit", "timm-dinov3"):
        models = []
        for entered in (contextlib.nullcontext, around):
            torch.manual_seed(0)
            backbone = host(name)
            with entered():
                model = adaptkit.attach(backbone, ("vit-adapter", SMALL), "lora")
                model.add_adapter("metaformer", name="other")
            models.append(model)
        plain, inside = (dict(m.named_parameters()) for m in models)
        assert all(torch.equal(p, inside[n]) and not inside[n].is_inference() for n, p in plain.items())
        models[1](x).maps[0].sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_is_recorded_of_a_backbone_is_the_same_with_another_default_dtype(dtype):
    backbone = host()
    usual = describe_backbone(registry.view(backbone))
    torch.set_default_dtype(dtype)
    try:
        assert describe_backbone(registry.view(backbone)) == usual
        adaptkit.attach(backbone, ("vit-adapter", SMALL))
    finally:
        torch.set_default_dtype(torch.float32)


def test_an_option_of_another_type_is_not_called_missing():
    with pytest.raises(ValueError, match="adapter 'vpt' cannot be made with {'num_tokens': '10'}: .*int"):
        adaptkit.attach(HOSTS["timm-vit"].build(), ("vpt", {"num_tokens": "10"}))
    with pytest.raises(ValueError, match="head 'fpn' needs more options: num_classes"):
        adaptkit.attach(HOSTS["timm-vit"].build(), head="fpn")


def test_features_of_bytes_are_refused_as_a_forward_is():
    model = adaptkit.attach(HOSTS["timm-vit"].build(), "sfp")
    with pytest.raises((TypeError, ValueError)) as forward:
        model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(type(forward.value), match=re.escape(str(forward.value))):
        model.extract(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_what_was_not_attached_is_named():
    with pytest.raises(TypeError, match="Linear holds nothing that attach.. made: attach an adapter, then offload"):
        offload(torch.nn.Linear(2, 2), "cpu")
