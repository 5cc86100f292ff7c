"""Blocks, and parts of blocks, that were compiled or wrapped one by one: what runs is the wrapper, what is seen is inside."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS

import adaptkit
from adaptkit.core.registry import view
from adaptkit.core.tree import unwrapped
from adaptkit.model.proof import prove
from adaptkit.model.sharding import blocks_of

_spec = importlib.util.spec_from_file_location("hierarchical", Path(__file__).with_name("test_hierarchical.py"))
hierarchical = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hierarchical)
STAGED = hierarchical.HOSTS
EVERY = {name: host.build for name, host in HOSTS.items()} | STAGED
every = pytest.mark.parametrize("name", sorted(EVERY))
ATTENTION = ("attn", "attention", "self_attn", "token_mixer")


def compiled(module):
    return torch.compile(module, backend="eager")


def replace(host, old, new):
    for module in list(host.modules()):
        for name, child in list(module._modules.items()):
            if child is old:
                module._modules[name] = new


def wrap_blocks(name, wrap):
    """A backbone each of whose blocks is wrapped."""
    host = EVERY[name]()
    seen = view(host)
    for block in blocks_of(seen.backbone, len(seen.spec.widths)):
        replace(host, block, wrap(block))
    return host


def wrap_parts(name, wrap):
    """A backbone the attention and the FFN of whose blocks are wrapped."""
    host = EVERY[name]()
    seen = view(host)
    for block in blocks_of(seen.backbone, len(seen.spec.widths)):
        for part in (*ATTENTION, "mlp"):
            if part in block._modules:
                block._modules[part] = wrap(block._modules[part])
    return host


def image(name, seed=0):
    size = HOSTS[name].size if name in HOSTS else 64
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


@every
@pytest.mark.parametrize("way", [wrap_blocks, wrap_parts])
@torch.no_grad()
def test_a_host_wrapped_piece_by_piece_is_seen_as_the_plain_one_bitwise(name, way):
    x = image(name)
    plain, wrapped = view(EVERY[name]()), view(way(name, checkpoint_wrapper))
    a, b = plain.features(x), wrapped.features(x)
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.prefix, b.prefix)
    assert {k: t.shape for k, t in wrapped.fingerprint_tensors().items()} == {
        k: t.shape for k, t in plain.fingerprint_tensors().items()
    }
    assert wrapped.spec == plain.spec
    prove(wrapped)
    assert getattr(wrapped, "splits", None) == getattr(plain, "splits", None)


@every
@torch.no_grad()
def test_the_parts_of_a_wrapped_block_say_what_the_block_says(name):
    wrapped, x = view(wrap_parts(name, checkpoint_wrapper)), image(name)
    if name in STAGED:
        pytest.skip("their parts are tried block by block in the proof")
    tokens, blocks = wrapped.begin(x)
    for block in blocks:
        torch.testing.assert_close(block.equation(tokens), block(tokens), atol=1e-5, rtol=1e-5)
        if wrapped.splits:
            h = block.norm1(tokens)
            torch.testing.assert_close(block.attention(h), block.attn(h), atol=1e-5, rtol=1e-5)
        tokens = block(tokens)


class Counting(nn.Module):
    """A wrapper as activation checkpointing makes it, that counts."""

    def __init__(self, module, ran):
        super().__init__()
        self._checkpoint_wrapped_module, self.ran = module, ran

    def forward(self, *args, **given):
        self.ran.append(1)
        return self._checkpoint_wrapped_module(*args, **given)


@every
@torch.no_grad()
def test_what_runs_is_the_wrapper(name):
    ran = []
    host = wrap_blocks(name, lambda module: Counting(module, ran))
    seen = view(host)
    seen.features(image(name))
    assert len(ran) == len(seen.spec.widths)


COMPILED = "timm-vit timm-dinov3 timm-beit timm-sam hf-vit hf-dinov2-reg hf-dinov3 hf-clip hf-beit poolformer"


@pytest.mark.parametrize("name", COMPILED.split())
@torch.no_grad()
def test_blocks_compiled_one_by_one_run_compiled_and_give_the_same(name):
    torch._dynamo.reset()
    x = image(name)
    expected = adaptkit.attach(EVERY[name]()).eval()(x)
    host = wrap_blocks(name, compiled)
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(adaptkit.attach(host).eval()(x).tokens, expected.tokens, atol=1e-5, rtol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@torch.no_grad()
def test_blocks_compiled_in_place_run_compiled():
    torch._dynamo.reset()
    host = EVERY["timm-vit"]()
    for block in host.blocks:
        block.compile(backend="eager")
    torch._dynamo.utils.counters.clear()
    view(host).features(image("timm-vit"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch._dynamo.utils.counters.clear()
    prove(view(host))
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]


@every
def test_the_blocks_to_shard_are_those_inside_the_wrappers(name):
    host = wrap_blocks(name, checkpoint_wrapper)
    seen = view(host)
    found = blocks_of(seen.backbone, len(seen.spec.widths))
    assert len(found) == len(seen.spec.widths)
    assert all(unwrapped(block) is block for block in found)


@pytest.mark.parametrize("part", ["qkv", "proj", "attn", "fc1", "mlp"])
@pytest.mark.parametrize("how", ["hook", "pre-hook", "wrapper", "compile", "forward", "subclass"])
def test_weights_are_not_read_past_something_that_acts(part, how):
    host = EVERY["timm-vit"]()
    block = host.blocks[0]
    holder = block if part in ("attn", "mlp") else block.mlp if part == "fc1" else block.attn
    module = getattr(holder, part)
    if how == "hook":
        module.register_forward_hook(lambda *given: None)
    elif how == "pre-hook":
        module.register_forward_pre_hook(lambda *given: None)
    elif how == "wrapper":
        setattr(holder, part, checkpoint_wrapper(module))
    elif how == "compile":
        module.compile(backend="eager")
    elif how == "forward":
        module.forward = module.forward
    else:
        module.__class__ = type("Mine", (type(module),), {})
    first, second = view(host).begin(image("timm-vit"))[1][:2]
    assert (first.mlp_layers() is None) == (part in ("fc1", "mlp"))
    assert (first.projections() is None) == (part not in ("fc1", "mlp"))
    assert second.mlp_layers() is not None
    assert second.projections() is not None


@pytest.mark.parametrize("part", ["q_proj", "o_proj", "attention", "fc1", "mlp"])
@pytest.mark.parametrize("how", ["hook", "wrapper"])
def test_weights_of_transformers_are_not_read_past_something_that_acts(part, how):
    host = EVERY["hf-vit"]()
    layer = host.layers[0]
    holder = layer if part in ("attention", "mlp") else layer.mlp if part == "fc1" else layer.attention
    if how == "hook":
        getattr(holder, part).register_forward_hook(lambda *given: None)
    else:
        setattr(holder, part, checkpoint_wrapper(getattr(holder, part)))
    first = view(host).begin(image("hf-vit"))[1][0]
    assert (first.mlp_layers() is None) == (part in ("fc1", "mlp"))
    assert (first.projections() is None) == (part not in ("fc1", "mlp"))


@pytest.mark.parametrize("name", ["timm-vit", "hf-dinov2", "swin"])
def test_a_backbone_compiled_or_wrapped_as_a_whole_is_refused_with_a_remedy(name):
    host = EVERY[name]()
    for whole in (compiled(host), checkpoint_wrapper(host)):
        with pytest.raises(TypeError, match=rf"as a whole \({type(whole).__name__}\).*compile the adapted model"):
            view(whole)
    host.compile(backend="eager")
    with pytest.raises(TypeError, match=r"as a whole \(\w+\.compile\(\)\).*compile the adapted model"):
        view(host)


def test_a_list_of_blocks_compiled_as_one_is_refused_with_a_remedy():
    host = EVERY["timm-vit"]()
    host.blocks = compiled(host.blocks)
    with pytest.raises(TypeError, match="one OptimizedModule, and adapters run them one by one: compile or wrap each"):
        view(host)


def test_a_config_that_asks_for_tuples_is_named():
    host = HOSTS["hf-vit"].build()
    host.config.return_dict = False
    with pytest.raises(TypeError, match=r"forward returns tuple, .* set its config.return_dict = True"):
        adaptkit.attach(host, "sfp")


@pytest.mark.parametrize(("given", "remedy"), [
    (lambda: "vit_small_patch14_dinov2", r"is a str and no nn.Module; build it first, timm.create_model\('vit_small"),
    (lambda: None, "is a NoneType and no nn.Module; hand over a model of timm"),
    (lambda: torch.nn.Linear, "this is the class Linear: hand over a model of it"),
    (lambda: SimpleNamespace(model=HOSTS["timm-vit"].build()), r"hand over its \.model"),
    (lambda: torch.jit.trace(HOSTS["timm-vit"].build(), torch.zeros(1, 3, 32, 32)), "was scripted or traced"),
])  # fmt: skip
@pytest.mark.parametrize("verb", [adaptkit.view, lambda model: adaptkit.attach(model, "sfp")], ids=["view", "attach"])
def test_what_is_no_module_is_answered_with_what_to_hand_over(given, remedy, verb):
    with pytest.raises(TypeError, match=remedy):
        verb(given())


def test_a_backbone_of_inference_tensors_comes_back_as_it_was():
    with torch.inference_mode():
        host = HOSTS["timm-vit"].build()
    flags = {name: p.requires_grad for name, p in host.named_parameters()}
    model = adaptkit.attach(host, "sfp").eval()
    with torch.no_grad():
        assert torch.equal(
            model(torch.zeros(1, 3, 32, 32)).tokens,
            HOSTS["timm-vit"].build().forward_features(torch.zeros(1, 3, 32, 32))[:, 1:],
        )
    assert model.detach() is host
    assert {name: p.requires_grad for name, p in host.named_parameters()} == flags
