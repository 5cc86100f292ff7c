"""Gradient checkpointing: less is kept for the backward pass, and nothing else changes."""

import copy
import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS, randomise
from fits import hierarchical

import adaptkit
from adaptkit.adapters.wrapped import wrapped

METHODS = {
    "vit-adapter": [("vit-adapter", {"conv_inplane": 4, "with_cffn": False, "extra_extractors": 0, "strides": (16,)})],
    "adavit": ["adavit"],
    "dat": ["dat"],
    "metaformer": [("metaformer", {"width": 4})],
    "lora": [("lora", {"r": 2})],
    "lora+sfp": [("lora", {"r": 2}), ("sfp", {"strides": (32,)})],
    "adavit+vit-adapter": ["adavit", ("vit-adapter", {"conv_inplane": 4, "strides": (16,)})],
}
PLAIN = ("timm-vit", "timm-beit-both", "hf-dinov2", "hf-beit-shared", "hf-timm-wrapper")


def stirred(host, adapters):
    """Attach, in training mode, and take every trained parameter off its start."""
    torch.manual_seed(0)
    model = adaptkit.attach(host, *adapters).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def image(size, channels=3):
    return torch.randn(2, channels, 2 * size, size, generator=torch.Generator().manual_seed(2))


def step(model, x):
    """One forward and backward: what autograd keeps in bytes, the outputs, and the gradients."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        features = model(x)
    torch.manual_seed(4)  # what the backward pass draws must be what the forward pass drew, not this
    told = [t for t in (features.tokens, features.prefix, *features.maps, *features.aux.values()) if t.numel()]
    sum(t.square().mean() for t in told if t.requires_grad).backward()
    named = dict(zip(("tokens", "prefix", *features.aux), (features.tokens, features.prefix, *features.aux.values())))
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return sum(kept.values()), named, grads


def assert_same(one, other):
    assert list(one) == list(other)
    for name, value in one.items():
        assert (value is None) == (other[name] is None), name
        assert value is None or torch.equal(value, other[name]), name


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("method", METHODS)
def test_values_and_gradients_are_the_same_bit_for_bit_and_less_is_kept(method, name):
    model, x = stirred(HOSTS[name].build(), METHODS[method]), image(HOSTS[name].size)
    whole, outputs, grads = step(model, x)
    model.gradient_checkpointing_enable()
    less, outputs_again, grads_again = step(model, x)
    assert_same(outputs, outputs_again)
    assert_same(grads, grads_again)
    assert less < 0.9 * whole if "vit-adapter" in method else less < 0.4 * whole


@pytest.mark.parametrize("method", ["adavit", "lora"])
def test_so_under_autocast(method):
    model, x = stirred(HOSTS["timm-vit"].build(), METHODS[method]), image(32)
    with torch.autocast("cpu", torch.bfloat16):
        _, outputs, grads = step(model, x)
        model.gradient_checkpointing_enable()
        _, outputs_again, grads_again = step(model, x)
    assert_same(outputs, outputs_again)
    assert_same(grads, grads_again)


@pytest.mark.parametrize("method", ["metaformer", "lora"])
@pytest.mark.parametrize("index", [0, 1], ids=["MetaFormer", "Swin"])
def test_so_on_a_host_of_several_stages(method, index):
    model, x = stirred(randomise(list(hierarchical())[index]), METHODS[method]), image(64)
    whole, outputs, grads = step(model, x)
    model.gradient_checkpointing_enable()
    less, outputs_again, grads_again = step(model, x)
    assert_same(outputs, outputs_again)
    assert_same(grads, grads_again)
    assert less < 0.5 * whole


def test_so_on_a_peft_model():
    import peft

    inside = peft.get_peft_model(HOSTS["hf-vit"].build(), peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"]))
    model, x = stirred(inside, [("metaformer", {"width": 4})]), image(32)
    whole, outputs, grads = step(model, x)
    model.gradient_checkpointing_enable()
    less, outputs_again, grads_again = step(model, x)
    assert_same(outputs, outputs_again)
    assert_same(grads, grads_again)
    assert less < 0.4 * whole


def enable(host):
    with warnings.catch_warnings():  # the name that transformers had before 5
        warnings.simplefilter("ignore", FutureWarning)
        (
            host.gradient_checkpointing_enable
            if "transformers" in type(host).__module__
            else host.set_grad_checkpointing
        )()


HOSTS_THAT_SWITCH = {
    **{name: HOSTS[name].build for name in ("timm-vit", "timm-dinov3", "timm-beit", "timm-sam")},
    **{name: HOSTS[name].build for name in HOSTS if name.startswith("hf-")},
    "MetaFormer": lambda: next(hierarchical()),
    "Swin": lambda: list(hierarchical())[1],
}


@pytest.mark.parametrize("name", HOSTS_THAT_SWITCH)
def test_what_the_backbone_was_told_before_it_was_attached_holds(name):
    host = HOSTS_THAT_SWITCH[name]()
    assert not adaptkit.attach(host, "lora").is_gradient_checkpointing
    host = HOSTS_THAT_SWITCH[name]()
    enable(host)
    assert adaptkit.attach(host, "lora").is_gradient_checkpointing


@pytest.mark.parametrize("name", ["timm-vit", "hf-dinov2"])
def test_what_the_attached_backbone_is_told_holds_too(name):
    model, x = stirred(HOSTS[name].build(), METHODS["lora"]), image(HOSTS[name].size)
    whole = step(model, x)[0]
    enable(model.backbone)
    assert model.is_gradient_checkpointing
    assert step(model, x)[0] < 0.4 * whole


def test_what_the_model_is_told_goes_before_what_the_backbone_was():
    host = HOSTS["timm-vit"].build()
    enable(host)
    model = adaptkit.attach(host, "lora")
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    assert host.grad_checkpointing  # it is the user's


def test_the_backbone_is_left_as_it_was():
    host = HOSTS["hf-vit"].build()
    model = adaptkit.attach(host, "lora")
    model.gradient_checkpointing_enable()
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.detach().modules())


def test_every_second_block_keeps_more_than_every_block():
    model, x = stirred(HOSTS["timm-vit"].build(), METHODS["lora"]), image(32)
    kept = [step(model, x)[0]]
    for every in (2, 1):
        model.activation_checkpointing_enable(every_n_layers=every)  # as transformers' Trainer calls it
        kept.append(step(model, x)[0])
    assert kept[0] > kept[1] > kept[2]


def test_the_adapters_own_option_does_not_run_a_block_a_third_time():
    runs = []
    host = HOSTS["timm-vit"].build()
    host.blocks[1].register_forward_pre_hook(lambda *_: runs.append(1))
    model, x = stirred(host, [("vit-adapter", {"conv_inplane": 4, "checkpoint": True})]), image(32)
    model.gradient_checkpointing_enable()
    step(model, x)
    assert len(runs) == 2


def test_nothing_runs_twice_where_nothing_in_the_blocks_is_trained():
    runs = []
    host = HOSTS["timm-vit"].build()
    host.blocks[1].register_forward_pre_hook(lambda *_: runs.append(1))
    model, x = stirred(host, ["sfp"]), image(32)
    model.gradient_checkpointing_enable()
    step(model, x)
    assert len(runs) == 1


def test_without_gradients_the_view_is_the_plain_one():
    model = adaptkit.attach(HOSTS["timm-vit"].build(), "lora")
    model.gradient_checkpointing_enable()
    with torch.no_grad():
        assert wrapped(model.vit, [], {}) is model.vit


def test_a_copy_is_checkpointed_too():
    model = adaptkit.attach(HOSTS["timm-vit"].build(), "adavit")
    model.gradient_checkpointing_enable()
    assert copy.deepcopy(model).is_gradient_checkpointing


def test_it_compiles_as_one_graph():
    torch._dynamo.reset()
    model, x = stirred(HOSTS["hf-vit"].build(), METHODS["adavit"]), image(32)
    model.gradient_checkpointing_enable()
    _, outputs, grads = step(model, x)
    _, outputs_again, grads_again = step(torch.compile(model, backend="aot_eager", fullgraph=True), x)
    for name, value in outputs.items():
        torch.testing.assert_close(outputs_again[name], value)
    for name, value in grads.items():
        torch.testing.assert_close(grads_again[f"_orig_mod.{name}"], value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant=True gives no gradient"),
        ({"offload": True}, "offload=True is not built"),
        ({"every_n_layers": 0}, "every_n_layers=0 must be at least 1"),
    ],
)
def test_what_would_be_ignored_is_refused(options, message):
    model = adaptkit.attach(HOSTS["timm-vit"].build(), "lora")
    with pytest.raises(ValueError, match=message):
        model.gradient_checkpointing_enable(**options)
    assert not model.is_gradient_checkpointing
