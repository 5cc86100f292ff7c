"""A backbone in fewer bits: what is quantised, by which library, and that adapters are trained on it."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import randomise

import adaptkit
from adaptkit.core import packed
from adaptkit.core.packed import in_fewer_bits, linear_layers, numel
from adaptkit.model.offloading import bytes_of

WAYS = [("int8", "torchao"), ("int8", "bitsandbytes"), ("nf4", "bitsandbytes")]
OFF = {"bfloat16": 0.05, "int8": 0.1, "nf4": 0.5}  # of the tokens after two blocks: each has about half of its weights'
x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def host(library="timm", depth=2):
    torch.manual_seed(0)
    if library == "timm":
        from timm.models.vision_transformer import VisionTransformer

        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": depth, "num_heads": 2, "num_classes": 5}
        return randomise(VisionTransformer(**sizes)).eval()
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 64, "num_hidden_layers": depth, "num_attention_heads": 2, "intermediate_size": 128}
    return randomise(ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8))).eval()


def needs(library):
    if library is not None:
        pytest.importorskip(library)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["timm", "hf"])
@pytest.mark.parametrize(("dtype", "library"), [("bfloat16", None), *WAYS])
def test_the_tokens_are_near_and_what_is_no_linear_layer_of_a_block_is_bfloat16(dtype, library, kind):
    needs(library)
    exact = adaptkit.attach(host(kind))(x).tokens
    small = in_fewer_bits(host(kind), dtype, library)
    linear = {id(layer) for _, _, layer in linear_layers(host(kind))}
    assert len(linear) == {"timm": 4, "hf": 6}[kind] * 2
    plain = [p for p in small.parameters() if p.ndim < 2 or p.ndim == 4]
    assert plain
    assert all(p.dtype == torch.bfloat16 for p in plain)
    found = adaptkit.attach(small)(x).tokens.float()
    assert 0 < float((found - exact).norm() / exact.norm()) < OFF[dtype]


@pytest.mark.parametrize(("dtype", "library"), WAYS)
def test_the_bytes_are_those_of_the_format(dtype, library):
    needs(library)
    full = sum(p.numel() for p in host().parameters())
    assert sum(numel(p) for p in in_fewer_bits(host(), dtype, library).parameters()) == full
    half = bytes_of(in_fewer_bits(host(), "bfloat16"))
    weights = sum(layer.weight.numel() for _, _, layer in linear_layers(host()))
    rows = sum(layer.out_features for _, _, layer in linear_layers(host()))
    per_weight, scales = {"int8": (1, 4 * rows), "nf4": (0.5, weights / 64 * 4)}[dtype]
    saved = half - bytes_of(in_fewer_bits(host(), dtype, library))
    assert saved == pytest.approx((2 - per_weight) * weights - scales, abs=4 * rows + 1000)


@pytest.mark.parametrize("adapter", ["lora", ("vit-adapter", {"conv_inplane": 8}), "vit-split"], ids=str)
@pytest.mark.parametrize(("dtype", "library"), WAYS)
def test_adapters_in_and_beside_it_are_trained_in_float32(dtype, library, adapter):
    needs(library)
    model = adaptkit.attach(in_fewer_bits(host(), dtype, library), adapter)
    with torch.no_grad():
        model.eval()(x)  # what the library does at the first call in eval mode is done
    f = model.train()(x)
    sum(t.float().square().mean() for t in (f.tokens, *f.maps) if t.requires_grad).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_the_first_library_that_is_there_is_taken_and_none_is_an_error_with_a_remedy(monkeypatch):
    there = {"torchao", "bitsandbytes"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in there else None)
    taken = []
    monkeypatch.setattr(packed, "MAKERS", {way: lambda b, way=way: taken.append(way) or b for way in WAYS})
    in_fewer_bits(host(), "int8")
    there.remove("torchao")
    in_fewer_bits(host(), "int8")
    assert taken == [("int8", "torchao"), ("int8", "bitsandbytes")]
    there.clear()
    with pytest.raises(ImportError, match="nf4 weights need bitsandbytes: pip install bitsandbytes"):
        in_fewer_bits(host(), "nf4")
    with pytest.raises(ImportError, match="int8 weights need torchao or bitsandbytes: pip install torchao"):
        in_fewer_bits(host(), "int8")
    with pytest.raises(ValueError, match="nf4 weights by 'torchao': choose among bitsandbytes"):
        in_fewer_bits(host(), "nf4", "torchao")
    with pytest.raises(ValueError, match="dtype='int4' of a backbone: choose among float32, bfloat16, int8, nf4"):
        in_fewer_bits(host(), "int4")


def test_only_layers_of_blocks_are_quantised():
    model = host()
    chosen = {id(layer) for _, _, layer in linear_layers(model)}
    others = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) not in chosen]
    assert others == ["head"]


@pytest.mark.parametrize(("dtype", "library"), WAYS)
def test_packed_weights_are_counted_one_by_one(dtype, library):
    needs(library)
    counts = [
        adaptkit.attach(model, "sfp").get_nb_trainable_parameters()
        for model in (host(), in_fewer_bits(host(), dtype, library))
    ]
    assert counts[0] == counts[1]
