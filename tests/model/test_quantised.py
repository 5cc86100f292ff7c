"""Hosts whose layers bitsandbytes or torchao quantised: attached, trained, saved, given back; merging is refused."""

import copy
import importlib.util
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import randomise
from reference import State, distance, equal, plain, said, stir

import adaptkit

DIM = 64  # bitsandbytes quantises 4 bits in blocks of 64
ADAPTERS = {
    "lora": "lora",
    "vit-adapter": ("vit-adapter", {"conv_inplane": 8, "norm": "group"}),
    "metaformer": ("metaformer", {"width": 8}),
    "adavit": "adavit",
    "sfp": "sfp",
    "vit-split": "vit-split",
}
x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def timm_host():
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": DIM, "depth": 2, "num_heads": 2, "num_classes": 5}
    return randomise(VisionTransformer(**sizes))


def hf_host():
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 2 * DIM}
    return randomise(ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)))


BUILD = {"timm": timm_host, "hf": hf_host}


def linear_layers(host):
    """Those of the blocks, by path."""
    for path, layer in list(host.named_modules()):
        if isinstance(layer, nn.Linear) and any(map(str.isdigit, path.split("."))):
            yield path, layer


def bnb8(host):
    import bitsandbytes

    for path, layer in linear_layers(host):
        made = bitsandbytes.nn.Linear8bitLt(
            layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False
        )
        made.load_state_dict(layer.state_dict())
        _put(host, path, made)
    return host.to("cpu")


def bnb4(host):
    import bitsandbytes

    for path, layer in linear_layers(host):
        made = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, torch.float32, quant_type="nf4"
        )
        made.load_state_dict(layer.state_dict())
        # On processors with AVX-512 it packs its weight anew at the first call in eval mode, and anew for a state
        # dict: its own business, but a backbone that changes by itself cannot be compared bit for bit.
        made.support_avx512bf16_for_cpu = False
        _put(host, path, made)
    return host.to("cpu")


def ao8(host):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    chosen = {path for path, _ in linear_layers(host)}
    quantize_(host, Int8WeightOnlyConfig(), filter_fn=lambda _, path: path in chosen)
    return host


def _put(host, path, layer):
    parent, _, name = path.rpartition(".")
    setattr(host.get_submodule(parent), name, layer)


QUANTISE = {"bnb8": bnb8, "bnb4": bnb4, "ao8": ao8}
NEEDS = {"bnb8": "bitsandbytes", "bnb4": "bitsandbytes", "ao8": "torchao"}


@pytest.fixture(params=[f"{library}-{kind}" for library in BUILD for kind in QUANTISE])
def quantised(request):
    """What builds a quantised host; skipped where the library is absent or cannot compute on this machine."""
    library, kind = request.param.split("-")
    if importlib.util.find_spec(NEEDS[kind]) is None:
        pytest.skip(f"{NEEDS[kind]} is not installed")

    def build():
        host = QUANTISE[kind](BUILD[library]()).eval()
        with torch.no_grad():
            getattr(host, "forward_features", host)(x)  # what the library does at the first call is done
        return host

    build.full = BUILD[library]
    try:
        build()
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"{NEEDS[kind]} cannot compute here: {error}")
    return build


every = pytest.mark.parametrize("adapter", ADAPTERS)


def train_a_step(model):
    """Returns the tensors that moved."""
    stir(model, 1)
    before = {k: v.clone() for k, v in model.adapter_state_dict().items()}
    trained = [p for p in model.train().parameters() if p.requires_grad]
    features = model(x)
    terms = (features.tokens, *features.maps, *features.aux.values())
    sum(t.float().square().mean() for t in terms if t.requires_grad).backward()
    assert all(p.grad is not None for p in trained)
    torch.optim.SGD(trained, lr=0.1).step()
    for p in trained:
        p.grad = None
    return [k for k, v in model.adapter_state_dict().items() if not torch.equal(v, before[k])]


@every
@torch.no_grad()
def test_just_attached_the_output_is_the_quantised_backbones(adapter, quantised):
    model = adaptkit.attach(quantised(), ADAPTERS[adapter]).eval()
    expected, found = plain(quantised(), x)[:2], said(model, x)[:2]
    assert equal(found, expected) or distance(found, expected) < 1e-5  # AdaViT computes attention anew


@every
def test_it_is_trained_and_the_backbone_is_given_back_bit_for_bit(adapter, quantised):
    host = quantised().train()
    before = State(host)
    expected = plain(quantised(), x)
    model = adaptkit.attach(host, ADAPTERS[adapter])
    assert train_a_step(model)
    said(model.eval(), x)
    with model.disable_adapter():
        assert equal(said(model, x), expected)
    assert model.detach() is host
    assert before.changes() == []
    assert equal(plain(host.eval(), x), expected)


@every
def test_its_file_fits_the_quantised_copy_bitwise_and_the_full_precision_one_within_the_quantisation(
    adapter, quantised, tmp_path
):
    model = adaptkit.attach(quantised(), ADAPTERS[adapter])
    train_a_step(model)
    model.eval().save(tmp_path)
    again = adaptkit.attach(quantised(), tmp_path)
    assert equal(said(again, x), said(model, x))
    full = adaptkit.attach(quantised.full(), tmp_path)
    held, expected = full.adapter_state_dict(), model.adapter_state_dict()
    assert held.keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in held.items())
    # What an adapter adds to the error of the quantised backbone itself is of the same size.
    of_backbone = distance(plain(quantised(), x)[:1], plain(quantised.full(), x)[:1])
    if adapter != "adavit":  # whose decisions are steps
        assert distance(said(model, x)[:1], said(full, x)[:1]) < 5 * of_backbone


@every
def test_a_file_of_full_precision_fits_a_quantised_copy(adapter, quantised, tmp_path):
    model = stir(adaptkit.attach(quantised.full(), ADAPTERS[adapter]), 1).eval()
    model.save(tmp_path)
    again = adaptkit.attach(quantised(), tmp_path)
    assert all(torch.equal(v, model.adapter_state_dict()[k]) for k, v in again.adapter_state_dict().items())
    assert all(t.isfinite().all() for t in said(again, x))


def test_strict_takes_the_same_weights_in_any_precision_and_refuses_others(quantised, tmp_path):
    """What is quantised on one side is compared by patches and norms; between two quantised copies all is, bit by bit."""
    adaptkit.attach(quantised(), "sfp").save(tmp_path / "quantised")
    adaptkit.attach(quantised.full(), "sfp").save(tmp_path / "full")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for file in ("quantised", "full"):
            adaptkit.attach(quantised(), tmp_path / file, strict=True).detach()
            adaptkit.attach(quantised.full(), tmp_path / file, strict=True).detach()
            adaptkit.attach(quantised.full().bfloat16(), tmp_path / file, strict=True).detach()
    for build in (quantised, quantised.full):
        other = build()
        with torch.no_grad():
            path = "patch_embed.proj" if hasattr(other, "patch_embed") else "embeddings.patch_embeddings.projection"
            other.get_submodule(path).weight.neg_()
        for file in ("quantised", "full"):
            with pytest.raises(ValueError, match="trained on other weights of this structure"):
                adaptkit.attach(other, tmp_path / file, strict=True)


@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"use_dora": True}, {"peft_type": "LOHA"}], ids=str)
def test_merging_into_quantised_layers_is_refused_or_undone_exactly(options, quantised):
    host = quantised()
    before = State(host)
    try:
        model = adaptkit.attach(host, "lora", **options)
        stir(model, 1).eval()
        alone = said(model, x)
    except (ValueError, TypeError):  # the method is refused by attach: nothing to merge
        assert before.changes() == []
        return
    assert not equal(alone, plain(quantised(), x))
    try:
        model.merge_adapter()
    except (ValueError, TypeError, RuntimeError):
        assert before.changed_values() == []
        assert equal(said(model, x), alone)
    else:
        assert distance(said(model, x), alone) < 5 * distance(plain(quantised(), x), plain(quantised.full(), x))
        model.unmerge_adapter()
        assert before.changed_values() == []
        assert equal(said(model, x), alone)
    model.detach()
    assert before.changes() == []


def test_no_layer_is_merged_where_only_some_of_them_can_be(quantised):
    """Layers in full precision come first in the walk; the refusal of a quantised one leaves them as they were."""
    host, full = quantised(), quantised.full()
    path = next(path for path, _ in linear_layers(full))
    _put(host, path, full.get_submodule(path))
    before = State(host)
    names = ["qkv", "fc1"] if "blocks" in path else ["q_proj", "fc1"]
    model = stir(adaptkit.attach(host, "lora", target_modules=names), 1).eval()
    alone = said(model, x)
    try:
        model.merge_adapter()
    except (ValueError, TypeError, RuntimeError):
        assert before.changed_values() == []
    model.unmerge_adapter()
    assert before.changed_values() == []
    assert equal(said(model, x), alone)


def test_a_copy_of_an_adapted_quantised_model_is_its_own(quantised):
    model = stir(adaptkit.attach(quantised(), "lora"), 1).eval()
    was = said(model, x)
    other = copy.deepcopy(model)
    assert equal(said(other, x), was)
    with torch.no_grad():
        for p in other.adapters.parameters():
            p.zero_()
    assert equal(said(model, x), was)
    assert not equal(said(other, x), was)
