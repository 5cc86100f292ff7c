"""Inputs that users of other libraries reported in public, each with the right value."""

import copy
import json
import sys
import threading
import warnings
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parent))
from dealt import dealt
from families import DEPTH, HOSTS
from reference import State, distance, equal, image, outputs, plain, said, stir, stirred

import adaptkit
from adaptkit.core.registry import view
from adaptkit.model.trainable import tensors_in

SMALL = ("vit-adapter", {"conv_inplane": 8, "norm": "group"})
EPS = torch.finfo(torch.float32).eps


def host(name="timm-vit", **more):
    return HOSTS[name].build(**more)


def x_of(name="timm-vit"):
    return image(HOSTS[name].size)


x = x_of()


def blocks_of(backbone):
    return next(m for m in backbone.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) == DEPTH)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def refused(error, word, before):
    """A refusal names what it refuses, and leaves the backbone."""
    assert word.lower() in str(error).lower()
    assert before.changes() == []


def merged_like_unmerged(model, images, double):
    """Merge, compare, unmerge: a merged weight is rounded once more; ``double`` says what float64 says."""
    alone = said(model, images)
    model.merge_adapter()
    merged = said(model, images)
    model.unmerge_adapter()
    assert distance(merged, double) <= 16 * (distance(alone, double) + EPS)
    assert equal(said(model, images), alone)
    return merged


def in_double(name, tensors, *adapters):
    model = adaptkit.attach(host(name), *adapters)
    model.load_adapter_state_dict(tensors)
    return said(model.eval().double(), x_of(name).double())


# ---------------------------------------------------------------------------------------------- sets beside each other


@pytest.mark.parametrize("method", [("lora", {}), ("lora", {"use_dora": True}), ("lora", {"peft_type": "LOHA"})])
@pytest.mark.parametrize("verb", ["add", "delete"])
@pytest.mark.parametrize("training", [True, False])
def test_a_lora_that_comes_or_goes_leaves_the_active_lora_acting_and_trained(method, verb, training):
    model = stir(adaptkit.attach(host(), "lora", name="a"), 1)
    if verb == "delete":
        model.add_adapter(method, name="b")
        model.set_adapter("a")
    model.train(training)
    before = said(model, x)
    assert not equal(before[:2], plain(host(), x)[:2])
    model.add_adapter(method, name="b") if verb == "add" else model.delete_adapter("b")
    assert model.active_adapter == "a"
    assert equal(said(model, x), before)
    model(x).tokens.square().sum().backward()
    assert {id(p) for p in trained(model)} == {id(p) for p in model.sets["a"].parameters()}
    assert all(p.grad is not None for p in trained(model))


def test_an_added_set_that_cannot_be_built_leaves_the_active_lora_acting():
    model = stir(adaptkit.attach(host(), "lora", name="a"), 1).eval()
    before = said(model, x)
    for wrong in (("lora", {"target_modules": ["nothing"]}), ("lora", {"rr": 1}), (SMALL[0], {"nonsense": 1})):
        with pytest.raises(ValueError):
            model.add_adapter("lora", wrong, name="b")
        assert list(model.sets) == ["a"]
        assert equal(said(model, x), before)


@pytest.mark.parametrize("name", ["timm-vit", "timm-beit", "hf-dinov2"])
def test_set_adapter_inside_disable_adapter_acts_when_the_block_is_left(name):
    images = x_of(name)
    alone = stir(adaptkit.attach(host(name), "lora"), 2).eval()
    model = stir(adaptkit.attach(host(name), "lora", name="a"), 1).eval()
    model.add_adapter("lora", name="b")
    model.sets["b"].load(alone.adapter_state_dict())
    first, bare = said(model, images), plain(host(name), images)
    with model.disable_adapter():
        model.set_adapter("b")
        assert equal(said(model, images), bare)
    assert model.active_adapter == "b"
    assert equal(said(model, images), said(alone, images))
    with model.disable_adapter():
        model.set_adapter("b")  # the active one
    assert equal(said(model, images), said(alone, images))
    assert {id(p) for p in trained(model)} == {id(p) for p in model.sets["b"].parameters()}
    model.set_adapter("a")
    assert equal(said(model, images), first)


def test_disable_adapter_within_disable_adapter_stays_disabled_until_the_outer_one_is_left():
    model = stir(adaptkit.attach(host(), "lora"), 1).eval()
    before, bare = said(model, x), plain(host(), x)
    with model.disable_adapter():
        with model.disable_adapter():
            assert equal(said(model, x), bare)
        assert equal(said(model, x), bare)
    assert equal(said(model, x), before)


def test_an_error_inside_disable_adapter_turns_the_adapters_on_again():
    model = stir(adaptkit.attach(host(), "lora"), 1).eval()
    before = said(model, x)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert equal(said(model, x), before)


@pytest.mark.parametrize("bad", ["a.b", "", "a/b", "keys", "training"])
def test_a_bad_name_of_a_set_is_an_error_and_leaves_the_backbone(bad):
    backbone = host().train()
    before = State(backbone)
    with pytest.raises(ValueError):
        adaptkit.attach(backbone, "lora", name=bad)
    assert before.changes() == []
    model = stir(adaptkit.attach(backbone, "lora", name="a"), 1).eval()
    was = said(model, x)
    with pytest.raises(ValueError):
        model.add_adapter("lora", name=bad)
    assert list(model.sets) == ["a"]
    assert equal(said(model, x), was)


@pytest.mark.parametrize("bad", ["a.b", "", "a/b", "keys", "training"])
def test_a_bad_name_of_a_set_leaves_a_peft_model_as_it_was(bad):
    theirs = peft.get_peft_model(host(), peft.LoraConfig(target_modules=["qkv"], init_lora_weights=False)).eval()
    before, said_before = State(theirs), theirs.forward_features(x)
    with pytest.raises(ValueError):
        adaptkit.attach(theirs, "sfp", name=bad)
    assert before.changes() == []
    assert torch.equal(theirs.forward_features(x), said_before)


def test_a_bad_task_name_leaves_the_backbone():
    backbone = host().train()
    before = State(backbone)
    with pytest.raises(ValueError):
        adaptkit.attach_many(backbone, {"good": "lora", "a.b": "sfp"})
    assert before.changes() == []


# --------------------------------------------------------------------------------------------- a backbone that is taken

WAYS_OUT = r"(?s)(?=.*add_adapter)(?=.*attach_many)(?=.*detach)"


@pytest.mark.parametrize("first", ["lora", "sfp"])
@pytest.mark.parametrize("second", ["lora", "sfp"])
def test_attaching_twice_to_one_object_is_an_error_that_names_the_ways_out(first, second):
    backbone = host()
    model = stir(adaptkit.attach(backbone, first), 1).eval()
    before = said(model, x)
    with pytest.raises((ValueError, RuntimeError), match=WAYS_OUT):
        adaptkit.attach(backbone, second)
    with pytest.raises((ValueError, RuntimeError), match=WAYS_OUT):
        adaptkit.attach_many(backbone, {"task": second})
    assert equal(said(model, x), before)
    assert model.detach() is backbone
    assert adaptkit.attach(backbone, second).detach() is backbone


def test_a_backbone_is_free_again_when_its_model_is_detached_and_a_copy_of_it_is_free():
    backbone = host()
    model = adaptkit.attach(backbone, "lora")
    adaptkit.attach(copy.deepcopy(model).detach(), "lora").detach()
    adaptkit.attach(host(), "lora").detach()
    model.detach()
    adaptkit.attach(backbone, "lora").detach()
    adaptkit.attach(copy.deepcopy(backbone), "lora").detach()


def test_a_backbone_is_free_again_after_an_attach_that_failed():
    backbone = host()
    with pytest.raises(ValueError):
        adaptkit.attach(backbone, "lora", ("sfp", {"nonsense": 1}))
    adaptkit.attach(backbone, "lora").detach()


def test_a_wrapper_around_a_taken_backbone_is_taken_too():
    theirs = peft.get_peft_model(host(), peft.LoraConfig(target_modules=["qkv"]))
    model = adaptkit.attach(theirs, "sfp")
    with pytest.raises((ValueError, RuntimeError), match=WAYS_OUT):
        adaptkit.attach(theirs.base_model.model, "sfp")
    model.detach()
    inner = host()
    model = adaptkit.attach(inner, "sfp")
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        adaptkit.attach(peft.get_peft_model(inner, peft.LoraConfig(target_modules=["qkv"])), "sfp")


@pytest.mark.parametrize("adapter", ["lora", "sfp"])
def test_a_detached_model_raises_and_never_touches_the_backbone(adapter):
    backbone = host()
    backbone.train()
    before = State(backbone)
    model = adaptkit.attach(backbone, adapter)
    held = model.adapter_state_dict()
    model.detach()
    calls = (
        lambda: model(x),
        lambda: model.set_adapter("default"),
        lambda: model.add_adapter("lora", name="b"),
        lambda: model.delete_adapter("default"),
        lambda: model.merge_adapter(),
        lambda: model.unmerge_adapter(),
        lambda: model.disable_adapter().__enter__(),
        lambda: model.detach(),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match="detached"):
            call()
        assert before.changes() == []
    model.load_adapter_state_dict(held)  # the adapters' own tensors stay at hand
    again = adaptkit.attach(backbone, "sfp").eval()
    was = said(again, x)
    for call in calls:
        with pytest.raises(RuntimeError):
            call()
    model.train()
    model.eval()
    assert equal(said(again, x), was)
    again.detach()
    assert before.changes() == []


# -------------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("name", ["timm-vit", "timm-eva02", "hf-dinov2"])
def test_a_lora_with_a_bias_merges_into_weight_and_bias_and_back_exactly(name):
    options = (
        "lora",
        {"lora_bias": True, "target_modules": ["fc2", "proj"] if name == "timm-vit" else ["proj", "fc1"]},
    )
    if name == "hf-dinov2":
        options = ("lora", {"lora_bias": True, "target_modules": ["q_proj", "fc1"]})
    if name == "timm-eva02":
        options = ("lora", {"lora_bias": True, "target_modules": ["proj"]})
    backbone = host(name)
    before = State(backbone)
    model = stir(adaptkit.attach(backbone, options), 1).eval()
    tensors = model.adapter_state_dict()
    merged = merged_like_unmerged(model, x_of(name), in_double(name, tensors, options))
    without = {k: torch.zeros_like(v) if "lora_B" in k and k.endswith("bias") else v for k, v in tensors.items()}
    assert distance(in_double(name, without, options), merged) > 1e-3  # the bias counts
    model.merge_adapter()
    model.detach()
    assert before.changed_values() == []


@pytest.mark.parametrize("kind", ["LORA", "LOHA", "IA3"])
@pytest.mark.parametrize("layer", [0, 1, -1])
def test_a_nan_in_one_layer_leaves_all_layers_unmerged(kind, layer):
    backbone = host()
    before = State(backbone)
    model = stir(adaptkit.attach(backbone, "lora", peft_type=kind, target_modules=["qkv", "fc2"]), 1).eval()
    good = model.adapter_state_dict()
    good = {k: v.clone() for k, v in good.items()}
    bad = {k: v.clone() for k, v in good.items()}
    paths = [k for k in bad if ".layers." in k and not k.endswith(".bias")]
    bad[paths[layer]].view(-1)[0] = float("nan")
    was = said(model, x)
    model.load_adapter_state_dict(bad)
    with pytest.raises(ValueError):
        model.merge_adapter()
    assert before.changed_values() == []
    model.load_adapter_state_dict(good)
    assert equal(said(model, x), was)
    model.train()  # it is not merged
    model.detach()
    assert before.changed_values() == []


@pytest.mark.parametrize("verb", ["merge", "unmerge-in-eval", "disable"])
def test_when_the_seventh_of_twelve_layers_cannot_be_merged_none_is(verb, monkeypatch):
    backbone = host()
    before = State(backbone)
    model = stir(adaptkit.attach(backbone, "lora", target_modules=["qkv", "proj", "fc1"]), 1).eval()
    from peft.tuners.lora.layer import Linear

    was, merged, seen = said(model, x), None, []
    merge = Linear.merge

    def seventh(self, *args, **kwargs):
        seen.append(self)
        if len(seen) == 7:
            raise MemoryError("no room for the seventh layer")
        return merge(self, *args, **kwargs)

    if verb == "merge":
        with monkeypatch.context() as patch:
            patch.setattr(Linear, "merge", seventh)
            with pytest.raises(MemoryError):
                model.merge_adapter()
        assert len(seen) == 7
        assert before.changed_values() == []
        assert equal(said(model, x), was)
    model.merge_adapter()
    merged = said(model, x)
    if verb == "disable":
        with model.disable_adapter():
            assert equal(said(model, x), plain(host(), x))
        assert equal(said(model, x), merged)
    model.unmerge_adapter()
    assert equal(said(model, x), was)
    model.detach()
    assert before.changed_values() == []


@pytest.mark.parametrize("name", ["timm-vit", "timm-beit", "hf-dinov2"])
@pytest.mark.parametrize("way", ["hotswap", "load", "hotswap-inside-disable"])
def test_weights_that_come_while_merged_are_merged(name, way, tmp_path):
    images = x_of(name)
    other = stir(adaptkit.attach(host(name), "lora"), 2).eval()
    other.save(tmp_path)
    alone = said(other, images)
    backbone = host(name)
    before = State(backbone)
    model = stir(adaptkit.attach(backbone, "lora"), 1).eval()
    model.merge_adapter()
    if way == "hotswap":
        model.hotswap_adapter(tmp_path)
    elif way == "load":
        model.load_adapter_state_dict(other.adapter_state_dict())
    else:
        with model.disable_adapter():
            model.hotswap_adapter(tmp_path)
            assert equal(said(model, images), plain(host(name), images))
    double = in_double(name, other.adapter_state_dict(), "lora")
    assert distance(said(model, images), double) <= 16 * (distance(alone, double) + EPS)
    assert before.changed_values() != []
    model.unmerge_adapter()
    assert before.changed_values() == []
    assert equal(said(model, images), alone)


def test_a_state_dict_is_not_loaded_into_merged_weights():
    model = stir(adaptkit.attach(host(), "lora"), 1).eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.merge_adapter()
    was = said(model, x)
    with pytest.raises(RuntimeError, match="unmerge_adapter"):
        model.load_state_dict(state)
    assert equal(said(model, x), was)


@pytest.mark.parametrize("merge", [True, False])
def test_train_while_merged_is_refused_and_no_dropout_of_the_host_acts(merge):
    backbone = host(proj_drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5)
    model = stir(adaptkit.attach(backbone, "lora", "sfp"), 1).eval()
    if merge:
        model.merge_adapter()
        modes, was = [m.training for m in model.modules()], said(model, x)
        with pytest.raises(RuntimeError, match="unmerge_adapter"):
            model.train()
        assert [m.training for m in model.modules()] == modes
        assert equal(said(model, x, seed=1), was)
        assert equal(said(model, x, seed=2), was)
    else:
        tokens = said(model, x)[0]
        assert torch.equal(said(model.train(), x, seed=1)[0], said(model, x, seed=2)[0])
        assert torch.equal(said(model, x)[0], tokens)
    assert not any(m.training for m in backbone.modules() if "drop" in type(m).__name__.lower())


def test_merging_twice_and_unmerging_twice_are_merging_and_unmerging_once():
    backbone = host()
    before = State(backbone)
    model = stir(adaptkit.attach(backbone, "lora"), 1).eval()
    alone = said(model, x)
    model.merge_adapter()
    merged = said(model, x)
    model.merge_adapter()
    assert equal(said(model, x), merged)
    model.unmerge_adapter()
    model.unmerge_adapter()
    assert equal(said(model, x), alone)
    assert before.changed_values() == []


# ------------------------------------------------------------------------------------------------------------ state dict


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("name", ["timm-vit", "timm-beit", "hf-dinov2"])
def test_a_loaded_state_dict_keeps_which_of_two_sets_is_trained(assign, name):
    images, backbone = x_of(name), host(name).train()
    next(backbone.parameters()).requires_grad_(False)
    before = State(backbone)
    model = stir(adaptkit.attach(backbone, "lora", name="a"), 1)
    model.add_adapter("lora", "sfp", name="b")
    model.set_adapter("b")
    stir(model, 2)
    alone = {"b": said(model.eval(), images)}
    model.set_adapter("a")
    alone["a"] = said(model.train().eval(), images)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict({k: torch.zeros_like(v) for k, v in state.items()}, assign=assign)
    model.load_state_dict({k: v.clone() for k, v in state.items()}, assign=assign)
    for chosen in "abab":
        model.set_adapter(chosen)
        assert equal(said(model, images), alone[chosen])
        assert {id(p) for p in trained(model)} == {id(p) for p in model.sets[chosen].parameters()}
        model.zero_grad()
        model(images).tokens.square().sum().backward()
        assert any(p.grad is not None for p in model.sets[chosen].parameters())
    model.zero_grad()
    assert model.detach() is backbone
    assert before.changes() == []


def test_flags_of_the_backbone_come_back_by_name_when_its_parameters_were_replaced():
    backbone = host()
    for p in list(backbone.parameters())[::2]:
        p.requires_grad_(False)
    before = State(backbone)
    model = adaptkit.attach(backbone, "lora")
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    model.detach()
    assert before.changes() == []


# ------------------------------------------------------------------------------------------------------------------ heads


class Shared(nn.Module):
    """A head whose levels share one convolution."""

    def __init__(self, dim=32):
        super().__init__()
        conv = nn.Conv2d(dim, 8, 1)
        self.levels = nn.ModuleList([conv, conv, conv, conv])
        self.classifier = nn.Conv2d(8, 3, 1)

    def forward(self, features):
        return self.classifier(sum(conv(m).mean((2, 3), keepdim=True) for conv, m in zip(self.levels, features.maps)))


def test_a_head_whose_levels_share_one_convolution_is_saved_and_loaded(tmp_path):
    model = stir(adaptkit.attach(host(), "sfp", head=Shared()), 1).eval()
    was = said(model, x)
    model.save(tmp_path)
    again = adaptkit.attach(host(), tmp_path, head=Shared())
    assert equal(said(again, x), was)
    assert again.head.levels[0] is again.head.levels[3]
    other = adaptkit.attach(host(), "sfp", head=Shared())
    other.load_adapter_state_dict(model.adapter_state_dict())
    assert equal(said(other.eval(), x), was)
    other.load_state_dict(model.state_dict())
    assert equal(said(other, x), was)


def test_the_same_head_module_given_with_its_file_keeps_what_is_trained(tmp_path):
    head = Shared()
    model = stir(adaptkit.attach(host(), "sfp", head=head), 1).eval()
    was = said(model, x)
    model.save(tmp_path)
    model.detach()
    assert equal(said(adaptkit.attach(host(), tmp_path, head=head), x), was)


def test_another_head_than_the_one_of_the_file_is_a_warning(tmp_path):
    adaptkit.attach(host(), "sfp", head=("linear", {"num_classes": 3})).save(tmp_path)
    with pytest.warns(UserWarning, match="head"):
        adaptkit.attach(host(), tmp_path, head=("linear", {"num_classes": 4}))


def test_one_head_given_to_two_sets_is_trained_with_whichever_is_active():
    head = Shared()
    model = adaptkit.attach(host(), "sfp", name="a", head=head)
    model.add_adapter("sfp", name="b", head=head)
    for name in "abab":
        model.set_adapter(name)
        assert all(p.requires_grad for p in head.parameters())
        assert {id(p) for p in trained(model)} == {id(p) for p in model.sets[name].parameters()}
        model.zero_grad()
        model(x).logits.square().sum().backward()
        assert all(p.grad is not None for p in head.parameters())
    model.delete_adapter("a")
    assert all(p.requires_grad for p in head.parameters())
    model.detach()


HEADS = {
    "linear": ("linear", {"num_classes": 3}),
    "fpn": ("fpn", {"num_classes": 3, "channels": 8}),
    "classifier": ("classifier", {"num_classes": 3}),
    "depth": ("depth", {"max_depth": 10.0, "channels": 8, "bins": 8}),
    "plain-mask": ("plain-mask", {"num_classes": 3, "num_q": 4, "num_blocks": 2}),
}
ADAPTERS = {
    "vit-adapter": SMALL,
    "vit-adapter-extract-only": (SMALL[0], {**SMALL[1], "injector": False}),
    "sfp": "sfp",
    "adavit": "adavit",
    "dat": "dat",
    "metaformer": ("metaformer", {"width": 8}),
    "lora": "lora",
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", ["timm-vit", "hf-dinov2"])
def test_every_trained_parameter_gets_a_gradient_from_the_logits_or_attach_refuses(adapter, head, name):
    backbone = host(name)
    before = State(backbone)
    try:
        model = adaptkit.attach(backbone, ADAPTERS[adapter], head=HEADS[head])
    except (ValueError, TypeError) as error:
        refused(error, head, before)
        return
    model.train()
    said = tensors_in(model(x_of(name)).logits)
    sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in said).backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


# ------------------------------------------------------------------------------------------------------ layers by name


def test_a_target_outside_the_blocks_is_adapted_or_refused_but_not_dropped():
    """``head`` is no layer of the blocks: it would never be seen again, for the tokens do not pass it."""
    backbone = host()
    before = State(backbone)
    try:
        model = adaptkit.attach(backbone, "lora", target_modules=["qkv", "head"])
    except ValueError as error:
        refused(error, "head", before)
        return
    reached = {k.split(".lora_")[0].removeprefix("lora.layers.") for k in model.adapter_state_dict()}
    assert reached == {*(f"blocks.{i}.attn.qkv" for i in range(DEPTH)), "head"}
    was = stir(model, 1).eval()(x).logits
    zeroed = {k: torch.zeros_like(v) if ".head." in k else v for k, v in model.adapter_state_dict().items()}
    model.load_adapter_state_dict(zeroed)
    assert not torch.equal(model(x).logits, was)


def layers(model):
    return {k.split(".lora_")[0].removeprefix("lora.layers.") for k in model.adapter_state_dict()}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"layers_to_transform": [1]}, {"blocks.1.attn.qkv"}),
        ({"layers_to_transform": 2, "target_modules": ["qkv"]}, {"blocks.2.attn.qkv"}),
        ({"layers_to_transform": [0, 3], "target_modules": ["proj"]}, {"blocks.0.attn.proj", "blocks.3.attn.proj"}),
        ({"layers_to_transform": [1], "layers_pattern": "blocks", "target_modules": ["fc1"]}, {"blocks.1.mlp.fc1"}),
        ({"target_modules": r"blocks\.[02]\..*\.qkv"}, {"blocks.0.attn.qkv", "blocks.2.attn.qkv"}),
        ({"exclude_modules": ["blocks.0.attn.qkv"]}, {f"blocks.{i}.attn.qkv" for i in (1, 2, 3)}),
        ({"exclude_modules": r"blocks\.[0-2]\..*"}, {"blocks.3.attn.qkv"}),
        ({"rank_pattern": {r"blocks\.1\.attn\.qkv": 2}}, {f"blocks.{i}.attn.qkv" for i in range(DEPTH)}),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_options_that_choose_layers_choose_those_layers(options, expected, tmp_path):
    model = adaptkit.attach(host(), "lora", **options)
    assert layers(model) == expected
    if "rank_pattern" in options:
        ranks = {k: v.shape[0] for k, v in model.adapter_state_dict().items() if "lora_A" in k}
        assert sorted(ranks.values()) == [2, 8, 8, 8]
    stir(model, 1).eval()
    was = said(model, x)
    assert not equal(was, plain(host(), x))
    model.save(tmp_path)
    assert equal(said(adaptkit.attach(host(), tmp_path), x), was)


@pytest.mark.parametrize(
    "options",
    [
        {"layers_to_transform": [7]},
        {"layers_to_transform": [0, 9], "target_modules": ["qkv"]},
        {"target_modules": r"blocks\.9\..*\.qkv"},
        {"target_modules": ["qkv", "nothing"]},
        {"rank_pattern": {"blocks.9.attn.qkv": 2}},
        {"exclude_modules": ["qkv"]},
        {"target_modules": ["norm1"]},
    ],
    ids=str,
)
def test_options_that_choose_nothing_or_less_than_they_say_are_an_error(options):
    backbone = host()
    before = State(backbone)
    with pytest.raises(ValueError):
        adaptkit.attach(backbone, "lora", **options)
    assert before.changes() == []


# ---------------------------------------------------------------------------------------------- every method everywhere

TYPES = {
    "lora": {"r": 4},
    "rslora": {"use_rslora": True},
    "lora-bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "loha": {"peft_type": "LOHA", "r": 2},
    "lokr": {"peft_type": "LOKR", "r": 2},
    "oft": {"peft_type": "OFT", "oft_block_size": 4},
    "boft": {"peft_type": "BOFT", "boft_block_size": 4},
    "hra": {"peft_type": "HRA", "r": 2},
    "ia3": {"peft_type": "IA3"},
}


def swin():
    from families import randomise
    from timm.models.swin_transformer import SwinTransformer

    torch.manual_seed(0)
    return randomise(
        SwinTransformer(64, window_size=4, embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), num_classes=5)
    )


KINDS = ["timm-vit", "timm-beit", "timm-eva02", "hf-vit", "hf-beit", "timm-sam", "swin"]


def any_host(name):
    return swin() if name == "swin" else host(name)


def any_image(name):
    return image(64) if name == "swin" else x_of(name)


@pytest.mark.parametrize(("name", "kind", "targets"), dealt(KINDS, TYPES, ["default", "attention", "mlp"], share=3))
def test_a_method_reaches_its_layers_with_output_gradient_and_merge_or_is_refused_by_name(name, kind, targets):
    backbone, images = any_host(name), any_image(name)
    before, bare = State(backbone), plain(any_host(name), images)
    fused = name.startswith("timm") or name == "swin"
    options = dict(TYPES[kind])
    if targets == "attention":
        options["target_modules"] = ["qkv"] if fused else ["q_proj"]
    if targets == "mlp":
        options["target_modules"] = ["fc1", "fc2"] if name != "timm-eva02" else ["fc2"]
    try:
        model = adaptkit.attach(backbone, "lora", **options)
    except ValueError as error:
        method = str(options.get("peft_type", "LORA"))
        words = {"dora": "DoRA", "lora-bias": "lora_bias"}.get(kind, method)
        assert kind not in ("lora", "rslora", "loha", "lokr"), "what is added to a weight fits everywhere"
        refused(error, words, before)
        return
    assert equal(said(model.eval(), images), bare) or distance(said(model, images), bare) < 1e-5
    tensors = stirred(model.adapter_state_dict(), 1)
    model.load_adapter_state_dict(tensors)
    was = said(model, images)
    assert distance(was, bare) > 1e-4
    for key, tensor in tensors.items():  # each tensor of it counts: LoRA's A, B and bias, DoRA's magnitude
        model.load_adapter_state_dict({**tensors, key: stirred({key: tensor}, 2, scale=1.0)[key]})
        assert not equal(said(model, images), was), f"{key} does not reach the output"
    model.load_adapter_state_dict(tensors)
    model.train()
    features = model(images)
    sum((t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in (features.tokens, features.prefix)).backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.zero_grad()
    model.eval()
    alone = said(model, images)
    double = adaptkit.attach(any_host(name), "lora", **options)
    double.load_adapter_state_dict(tensors)
    double = said(double.eval().double(), images.double())
    model.merge_adapter()
    assert distance(said(model, images), double) <= 32 * (distance(alone, double) + EPS)
    model.unmerge_adapter()
    assert equal(said(model, images), alone)
    model.detach()
    assert before.changes() == []


# ------------------------------------------------------------------------------------------------------------- threads


def lora_tasks(folder, name="timm-vit"):
    """Two LoRA tasks saved, and what each says alone."""
    alone = {}
    for seed, task in enumerate(("one", "two"), 1):
        model = stir(adaptkit.attach(host(name), "lora", head=("classifier", {"num_classes": 3})), seed).eval()
        model.save(folder / task)
        alone[task] = model
    return alone


@pytest.mark.parametrize("name", ["timm-vit", "timm-beit", "hf-dinov2"])
@pytest.mark.parametrize("whole", [True, False], ids=["every task", "one task each"])
def test_threads_that_ask_for_different_lora_tasks_get_the_bits_that_each_gives_alone(name, whole, tmp_path):
    alone = lora_tasks(tmp_path, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        many = adaptkit.attach_many(host(name), {t: tmp_path / t for t in alone}).eval()
    images = [image(HOSTS[name].size, seed=seed) for seed in range(4)]
    with torch.no_grad():
        expected = {t: [outputs(model(i)) for i in images] for t, model in alone.items()}
    wrong, start = [], threading.Barrier(4)

    def ask(worker):
        task = ("one", "two")[worker % 2]
        start.wait()
        with torch.no_grad():
            for _ in range(25):
                for i, batch in enumerate(images):
                    out = many(batch) if whole else many(batch, tasks=[task] * len(batch))
                    for t, found in out.items():
                        if not equal(outputs(found), expected[t][i]):
                            wrong.append((worker, t, i))

    threads = [threading.Thread(target=ask, args=(worker,)) for worker in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    many.detach()


@pytest.mark.parametrize("name", ["timm-vit", "timm-beit", "hf-dinov2"])
def test_lora_tasks_mixed_in_one_batch_share_a_pass_and_each_row_says_what_it_says_alone(name, tmp_path):
    alone = lora_tasks(tmp_path, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        many = adaptkit.attach_many(host(name), {t: tmp_path / t for t in alone}).eval()
    runs = []
    blocks_of(many.model.backbone)[0].register_forward_pre_hook(lambda *_: runs.append(0))
    batch, tasks = image(HOSTS[name].size, batch=5), ["one", "two", "two", "one", "two"]
    with torch.no_grad():
        out = many(batch, tasks=tasks)
        assert len(runs) == (2 if name == "timm-beit" else 1)  # its attention reads one weight for all rows
        for task, model in alone.items():
            rows = [i for i, t in enumerate(tasks) if t == task]
            assert distance(outputs(out[task]), outputs(model(batch[rows]))) < 1e-5


# --------------------------------------------------------------------------------------------------- recomputed blocks


def recomputed(name, backbone):
    if name.startswith("timm"):
        backbone.set_grad_checkpointing(True)
    else:
        backbone.gradient_checkpointing_enable()
    return backbone


def kept_and_gradients(model, images):
    """Bytes that autograd keeps of one forward, beside parameters, and the gradients."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = (t.untyped_storage().nbytes(), t)
        return t

    model.train()
    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        features = model(images)
    total = sum(size for size, _ in kept.values())
    sum(t.square().sum() for t in (features.tokens, *features.maps)).backward()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("adapter", ["lora", "vit-adapter", "metaformer"])
@pytest.mark.parametrize("name", ["timm-vit", "timm-eva02", "timm-beit", "hf-dinov2", "hf-vit"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_blocks_that_the_host_recomputes_keep_less_and_give_the_same_gradients(name, adapter, when):
    given = {"lora": "lora", "vit-adapter": SMALL, "metaformer": ("metaformer", {"width": 8})}[adapter]
    images = image(HOSTS[name].size, batch=4)
    torch.manual_seed(1)
    plain_model = adaptkit.attach(host(name), given)
    tensors = stirred(plain_model.adapter_state_dict(), 1)
    plain_model.load_adapter_state_dict(tensors)
    backbone = recomputed(name, host(name)) if when == "before" else host(name)
    torch.manual_seed(1)
    model = adaptkit.attach(backbone, given)
    if when == "after":
        model.gradient_checkpointing_enable()
    model.load_adapter_state_dict(tensors)
    much, expected = kept_and_gradients(plain_model, images)
    little, found = kept_and_gradients(model, images)
    assert little < much * {"lora": 0.3, "metaformer": 0.6, "vit-adapter": 0.95}[adapter]  # it keeps much of its own
    assert expected.keys() == found.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5 * float(expected[key].abs().max()))


# ----------------------------------------------------------------------------------------------------- compiled regions


def compiled(backbone, how):
    blocks = blocks_of(backbone)
    for i, block in enumerate(list(blocks)):
        if how == "around":
            blocks[i] = torch.compile(block, backend="eager")
        else:
            block.compile(backend="eager")
    return backbone


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("how", "name", "when"),
    dealt(["around", "in place"], ["timm-vit", "timm-eva02", "hf-dinov2", "hf-vit"], ["before", "after"]),
)
def test_blocks_compiled_one_by_one_say_the_plain_backbone_while_disabled_and_switching_compiles_nothing_new(
    name, how, when
):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    images = x_of(name)
    bare = plain(host(name), images)
    backbone = compiled(host(name), how) if when == "before" else host(name)
    model = stir(adaptkit.attach(backbone, "lora", name="a"), 1).eval()
    model.add_adapter("lora", "sfp", name="b")
    if when == "after":
        compiled(model.backbone, how)
    alone = {}
    for seed, chosen in enumerate("ab", 1):
        expected = stir(adaptkit.attach(host(name), *(["lora"] if chosen == "a" else ["lora", "sfp"])), seed).eval()
        model.set_adapter(chosen)
        model.load_adapter_state_dict(expected.adapter_state_dict())
        alone[chosen] = said(expected, images)
    with torch._dynamo.config.patch(recompile_limit=64):
        for _ in range(2):
            for chosen in "ab":
                model.set_adapter(chosen)
                assert distance(said(model, images), alone[chosen]) < 1e-5
                with model.disable_adapter():
                    assert distance(said(model, images), bare) < 1e-5
                assert distance(said(model, images), alone[chosen]) < 1e-5
        seen = graphs()
        assert seen > 0, "the blocks are compiled"
        for chosen in "baab":
            model.set_adapter(chosen)
            assert distance(said(model, images), alone[chosen]) < 1e-5
            with model.disable_adapter():
                assert distance(said(model, images), bare) < 1e-5
        assert graphs() == seen
    model.merge_adapter()
    assert distance(said(model, images), alone["b"]) < 1e-4
    assert model.detach() is backbone
    assert distance(plain(backbone, images), bare) < 1e-5


# -------------------------------------------------------------------------------------- layers replaced under our feet


@pytest.mark.parametrize("name", ["timm-vit", "hf-dinov2"])
@pytest.mark.parametrize("adapter", ["sfp", "lora"])
def test_a_checkpoint_wrapper_put_around_a_block_acts(name, adapter):
    calls = []

    def counting(function, *args, **kwargs):
        calls.append(0)
        return checkpoint(function, *args, **kwargs)

    model = stir(adaptkit.attach(host(name), adapter), 1).eval()
    was = said(model, x_of(name))
    blocks = blocks_of(model.backbone)
    blocks[1] = checkpoint_wrapper(blocks[1], checkpoint_fn=counting, use_reentrant=False)
    assert equal(said(model, x_of(name)), was)
    assert calls


@pytest.mark.parametrize("what", ["layer", "block"])
def test_a_layer_replaced_while_lora_is_in_it_is_refused_at_the_next_forward(what):
    backbone = host()
    model = stir(adaptkit.attach(backbone, "lora"), 1).eval()
    if what == "layer":
        model.backbone.blocks[0].attn.qkv = nn.Linear(32, 96)
    else:
        model.backbone.blocks[0] = copy.deepcopy(host().blocks[0])
    with pytest.raises(RuntimeError):
        model(x)


@pytest.mark.parametrize("what", ["layer", "block"])
def test_a_layer_replaced_beside_adapters_that_are_not_in_it_acts(what):
    model = stir(adaptkit.attach(host(), "sfp"), 1).eval()
    was = said(model, x)
    if what == "layer":
        model.backbone.blocks[0].attn.qkv = nn.Linear(32, 96)
    else:
        other = copy.deepcopy(host().blocks[1])
        model.backbone.blocks[0] = other
    try:
        assert not equal(said(model, x), was)
    except (RuntimeError, TypeError, ValueError):
        return  # refused is as good


@pytest.mark.parametrize("adapter", ["sfp", "lora"])
def test_another_backbone_set_on_the_model_acts_or_is_refused(adapter):
    model = stir(adaptkit.attach(host(), adapter), 1).eval()
    was = said(model, x)
    other = host()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    try:
        model.backbone = other
        found = said(model, x)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return
    assert not equal(found, was)
    expected = adaptkit.attach(copy.deepcopy(other), adapter)
    expected.load_adapter_state_dict(model.adapter_state_dict())
    assert equal(found, said(expected.eval(), x))


@pytest.mark.parametrize("adapter", ["sfp", "lora"])
def test_a_replica_of_data_parallel_is_refused_or_right(adapter):
    model = stir(adaptkit.attach(host(), adapter), 1).eval()
    with pytest.raises((RuntimeError, TypeError)):
        model._replicate_for_data_parallel()(x)
    assert model(x).tokens.isfinite().all()


# ------------------------------------------------------------------------------------------------------ other devices


@pytest.mark.parametrize("adapter", ["lora", "sfp", "vit-adapter", "metaformer", "adavit", "dat"])
@pytest.mark.parametrize("name", ["timm-vit", "hf-dinov2"])
def test_adapters_and_head_follow_the_backbone_to_its_device(name, adapter):
    given = {"vit-adapter": SMALL, "metaformer": ("metaformer", {"width": 8})}.get(adapter, adapter)
    model = adaptkit.attach(host(name).to("meta"), given, head=HEADS["fpn"])
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
    model.add_adapter("lora", name="b", head=HEADS["linear"])
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
    model.detach()


def test_a_head_of_ones_own_follows_the_backbone_to_its_device():
    model = adaptkit.attach(host().to("meta"), "sfp", head=Shared())
    assert {p.device.type for p in model.parameters()} == {"meta"}


# ------------------------------------------------------------------------------------------- hosts that are not as named


def subclass(method):
    from families import randomise
    from timm.models.vision_transformer import VisionTransformer

    class Own(VisionTransformer):
        pass

    def _pos_embed(self, tokens):
        return VisionTransformer._pos_embed(self, tokens) * 0.5

    def forward_features(self, images, **more):
        return VisionTransformer.forward_features(self, images, **more).flip(1)

    def _norm(self, images, **more):
        return VisionTransformer.forward_features(self, images * 2, **more)

    setattr(Own, *{"_pos_embed": ("_pos_embed", _pos_embed), "forward_features": ("forward_features", forward_features),
                   "image": ("forward_features", _norm)}[method])  # fmt: skip
    torch.manual_seed(0)
    return randomise(Own(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=5))


@pytest.mark.parametrize("method", ["_pos_embed", "forward_features", "image"])
@torch.no_grad()
def test_a_subclass_that_overrides_a_method_is_seen_as_it_is_or_refused(method):
    backbone = subclass(method)
    before = State(backbone)
    expected = backbone.forward_features(x)
    try:
        model = adaptkit.attach(backbone, "lora").eval()
    except (TypeError, ValueError):
        assert before.changes() == []
        return
    features = model(x)
    assert torch.equal(torch.cat([features.prefix, features.tokens], 1), expected)


# --------------------------------------------------------------------------------------------------- partly trained


def test_the_last_block_is_trained_saved_attached_and_given_back(tmp_path):
    backbone = host().train()
    before = State(backbone)
    model = adaptkit.attach(backbone, "sfp", train_backbone=("blocks.3", "norm"))
    names = {n for n, p in model.backbone.named_parameters() if p.requires_grad}
    assert names == {n for n, _ in backbone.named_parameters() if n.startswith(("blocks.3.", "norm."))}
    count, _ = model.get_nb_trainable_parameters()
    own = sum(p.numel() for n, p in backbone.named_parameters() if n in names)
    assert count == own + sum(p.numel() for p in model.sets["default"].adapters.parameters())
    optimiser = torch.optim.SGD(trained(model), lr=0.05)
    for _ in range(2):
        optimiser.zero_grad()
        features = model(x)
        sum(t.square().mean() for t in (features.tokens, *features.maps)).backward()
        optimiser.step()
    optimiser.zero_grad()
    assert not any(m.training for n, m in backbone.named_modules() if n.startswith("blocks.0"))
    assert set(before.changed_values()) == names
    was = said(model.eval(), x)
    model.save(tmp_path)
    again = adaptkit.attach(host(), tmp_path)
    assert equal(said(again, x), was)
    fresh = host()
    fresh_state = State(fresh)
    third = adaptkit.attach(fresh, tmp_path)
    with third.disable_adapter():
        assert equal(said(third, x), plain(host(), x))
    third.detach()
    assert fresh_state.changes() == []
    assert model.detach() is backbone
    assert before.changes() == []


def test_detach_leaves_the_trained_layers_in_the_backbone_when_asked():
    backbone = host()
    before = State(backbone)
    model = adaptkit.attach(backbone, "sfp", train_backbone=("blocks.3", "norm"))
    names = {n for n, p in backbone.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for n, p in backbone.named_parameters():
            if n in names:
                p.add_(0.1)
    tokens = model.eval()(x).tokens
    kept = model.detach(keep=True)
    assert kept is backbone
    assert set(before.changed_values()) == names
    assert torch.equal(kept.eval().forward_features(x)[:, 1:], tokens)
    assert {n: p.requires_grad for n, p in kept.named_parameters()} == before.flags


@pytest.mark.parametrize("wrong", [("blocks.9",), ("nothing",), ("",)])
def test_layers_to_train_that_are_not_there_are_an_error(wrong):
    backbone = host()
    before = State(backbone)
    with pytest.raises(ValueError):
        adaptkit.attach(backbone, "sfp", train_backbone=wrong)
    assert before.changes() == []


@pytest.mark.parametrize("name", ["blocks.3.mlp.fc1.weight", "norm.bias", "blocks.0.attn.qkv.bias"])
def test_a_backbone_that_was_trained_behind_our_back_is_not_saved_without_it(name, tmp_path):
    backbone = host()
    model = adaptkit.attach(backbone, "sfp")
    parameter = dict(backbone.named_parameters())[name]
    parameter.requires_grad_(True)
    features = model(x)
    sum(t.square().mean() for t in (features.tokens, *features.maps)).backward()
    torch.optim.SGD([parameter], lr=0.1).step()
    layer = name.rpartition(".")[0]
    with pytest.raises((ValueError, RuntimeError), match=rf"(?s)(?=.*{layer})(?=.*train_backbone=)"):
        model.save(tmp_path / "folder")
    assert not (tmp_path / "folder").exists() or not list((tmp_path / "folder").iterdir())


@pytest.mark.parametrize("name", ["blocks.2.mlp.fc1.bias", "blocks.1.attn.qkv.weight"])
def test_the_strict_check_sees_a_change_in_any_layer(name, tmp_path):
    adaptkit.attach(host(), "sfp").save(tmp_path)
    adaptkit.attach(host(), tmp_path, strict=True).detach()
    other = host()
    with torch.no_grad():
        dict(other.named_parameters())[name].view(-1)[3] += 0.01
    with pytest.raises(ValueError):
        adaptkit.attach(other, tmp_path, strict=True)


# ----------------------------------------------------------------------------------------------------- modes and saving


def test_a_fresh_adapter_is_in_training_mode_and_a_loaded_one_in_eval_mode(tmp_path):
    for mode in (True, False):
        model = adaptkit.attach(host().train(mode), "sfp")
        assert model.training
        assert model.adapters["sfp"].training
        assert not model.backbone.training
    model.save(tmp_path)
    assert not adaptkit.attach(host().train(), tmp_path).training


def test_a_readme_that_we_did_not_write_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("My own words.\n")
    adaptkit.attach(host(), "sfp").save(tmp_path)
    assert (tmp_path / "README.md").read_text() == "My own words.\n"


def test_metadata_are_converted_or_named_and_survive_load_and_save(tmp_path):
    import numpy as np

    model = adaptkit.attach(host(), "sfp")
    model.save(tmp_path / "a", miou=np.float32(0.5), classes=np.array([1, 2]), data=Path("some/where"), task="seg")
    said_first = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["metadata"]
    assert said_first == {"miou": 0.5, "classes": [1, 2], "data": "some/where", "task": "seg"}
    adaptkit.attach(host(), tmp_path / "a").save(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["metadata"] == said_first
    with pytest.raises((TypeError, ValueError), match="thing"):
        model.save(tmp_path / "c", thing=object())
    assert not (tmp_path / "c").exists() or not list((tmp_path / "c").iterdir())


def test_the_hosts_own_config_is_seen_through_the_model():
    import timm

    backbone = host()
    backbone.pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    model = adaptkit.attach(backbone, "sfp")
    assert model.pretrained_cfg is backbone.pretrained_cfg
    assert timm.data.resolve_model_data_config(model)["mean"] == (0.1, 0.2, 0.3)
    other = host("hf-dinov2")
    assert adaptkit.attach(other, "sfp").config is other.config


def test_the_view_is_read_from_what_the_model_runs():
    model = adaptkit.attach(host(), "sfp")
    assert model.vit.backbone is model.backbone
    assert view(host()).spec == model.spec
