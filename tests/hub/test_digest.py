"""The digest says exactly which layers of a backbone have other weights; the sums say it across libraries."""

import copy
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import DEPTH, HOSTS, randomise

import adaptkit
from adaptkit.core.registry import view
from adaptkit.hub import digest as module
from adaptkit.hub.digest import block_sums, changed, digest, other_blocks, other_layers, tensors_of

FAMILIES = sorted(HOSTS)


def vit(**options):
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 0}
    return randomise(VisionTransformer(**{**sizes, **options}))


def with_classes(number):
    """The same weights but for the classifier."""
    host = vit(num_classes=number)
    host.load_state_dict(vit().state_dict(), strict=False)
    return host


# ------------------------------------------------------------------------------------------------------------- exact


def test_the_layers_are_the_parts_of_the_backbone():
    assert list(digest(vit())) == [*(f"blocks.{i}" for i in range(4)), "cls_token", "norm", "patch_embed", "pos_embed"]


def test_a_part_below_what_all_names_share_is_a_layer():
    outer = nn.Module()
    outer.inside = nn.ModuleDict({"model": vit()})
    assert {k.removeprefix("inside.model."): v.partition("-")[2] for k, v in digest(outer).items()} == {
        k: v.partition("-")[2] for k, v in digest(vit()).items()
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_one_bit_of_any_tensor_shows_in_its_layer_and_in_no_other(name):
    host = view(HOSTS[name].build()).backbone
    before = digest(host)
    assert len(before) > DEPTH
    layers = module._layers([key for key, _ in tensors_of(host)])
    g = torch.Generator().manual_seed(0)
    one_each = {layers[k]: (k, t) for k, t in tensors_of(host) if t.is_floating_point() and t.numel()}
    for key, tensor in one_each.values():
        bits = tensor.detach().view(-1).view(torch.int32)
        place = int(torch.randint(bits.numel(), (), generator=g))
        bits[place] ^= 1
        assert changed(before, digest(host)) == [layers[key]]
        bits[place] ^= 1
    assert digest(host) == before


@pytest.mark.parametrize("name", FAMILIES)
def test_a_copy_a_wrapper_a_mode_and_a_flag_change_nothing(name):
    host = view(HOSTS[name].build()).backbone
    before = digest(host)
    other = copy.deepcopy(host).train().requires_grad_(False)
    for _, child in list(other.named_children()):
        if isinstance(child, nn.ModuleList):
            for i, block in enumerate(child):
                child[i] = torch.compile(block)
    assert digest(other) == before


@pytest.mark.parametrize("flip", [lambda w: w.neg_(), lambda w: w[[0, 1]].neg_(), lambda w: w[:, ::2].neg_()])
def test_signs_show(flip):
    """Two flips of the highest bit add up to zero modulo 2^64 where the words are 64 bits wide."""
    host = vit()
    before = digest(host)
    with torch.no_grad():
        weight = host.blocks[1].mlp.fc1.weight
        flipped = weight.clone()
        flip(flipped)
        weight.copy_(flipped if not torch.equal(flipped, weight) else -weight.flip(0))
    assert changed(before, digest(host)) == ["blocks.1"]


def test_any_two_signs_show():
    seen = set()
    for i in range(40):
        for j in range(i):
            one = torch.ones(40)
            one[[i, j]] = -1
            seen.add(digest(Held(one))["w"])
    assert len(seen) == 40 * 39 // 2


def test_another_order_shows():
    host = vit()
    before = digest(host)
    with torch.no_grad():
        weight = host.blocks[2].attn.qkv.weight
        weight.copy_(weight[torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))])
    assert changed(before, digest(host)) == ["blocks.2"]


class Held(nn.Module):
    """One tensor."""

    def __init__(self, tensor):
        super().__init__()
        self.register_buffer("w", tensor)


def test_more_than_a_row_is_read_to_its_end():
    for length in (module.ROW - 1, module.ROW, module.ROW + 1, 3 * module.ROW + 5):
        one, other = torch.zeros(length), torch.zeros(length)
        other[-1] = 1
        assert digest(Held(one)) != digest(Held(other))
        other = one.clone()
        other[length // 2] = 1
        assert digest(Held(one)) != digest(Held(other))


def test_rows_in_another_order_show():
    one = torch.randn(3, module.ROW, generator=torch.Generator().manual_seed(0))
    assert digest(Held(one)) != digest(Held(one[[1, 0, 2]]))


def test_many_rows_at_once_say_the_same(monkeypatch):
    """As an accelerator reads them."""
    tensors = [torch.randn(n, generator=torch.Generator().manual_seed(0)) for n in (1, module.ROW, 5 * module.ROW + 3)]
    one = [list(torch.cat(list(module._row_sums(t, {})))) for t in tensors]
    monkeypatch.setattr(module, "ROWS", 2)
    monkeypatch.setattr(module, "_rows_at_once", lambda device: module.ROWS)
    assert [list(torch.cat(list(module._row_sums(t, {})))) for t in tensors] == one


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.uint8, torch.bool,
          torch.complex64, torch.float8_e4m3fn]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [0, 1, 3, 7, 64])
def test_every_dtype_and_length_is_read(dtype, length):
    octets = torch.arange(1, 1 + length * torch.empty((), dtype=dtype).element_size()).to(torch.uint8)
    octets = octets % 2 if dtype is torch.bool else octets
    tensor = octets.view(dtype)
    before = digest(Held(tensor.clone()))
    if length:
        octets[-1] ^= 1
        assert changed(before, digest(Held(tensor.clone()))) == ["w"]
    shifted = torch.cat([octets.new_zeros(torch.empty((), dtype=dtype).element_size()), octets]).view(dtype)[1:]
    assert digest(Held(shifted)) == digest(Held(tensor.clone()))  # wherever in memory it begins


def test_how_it_lies_in_memory_does_not_matter():
    tensor = torch.randn(4, 3, 5, 6)
    expected = digest(Held(tensor))
    assert digest(Held(tensor.to(memory_format=torch.channels_last))) == expected
    assert digest(Held(tensor.transpose(0, 1).contiguous().transpose(0, 1))) == expected


def test_shape_and_dtype_are_no_bits():
    a, b = digest(Held(torch.zeros(4)))["w"], digest(Held(torch.zeros(2, 2)))["w"]
    assert a.partition("-")[0] != b.partition("-")[0]
    assert a.partition("-")[2] == b.partition("-")[2]


def test_tied_tensors_are_read_under_each_name():
    host = vit()
    host.blocks[3].mlp.fc1.weight = host.blocks[0].mlp.fc1.weight
    before = digest(host)
    with torch.no_grad():
        host.blocks[0].mlp.fc1.weight[0, 0] += 1
    assert changed(before, digest(host)) == ["blocks.0", "blocks.3"]


def test_buffers_that_are_not_saved_do_not_count():
    host = vit()
    before = digest(host)
    host.register_buffer("angles", torch.ones(3), persistent=False)
    assert digest(host) == before


@pytest.mark.parametrize("how", ["meta", "fake", "part", "lazy", "sparse"])
def test_without_values_there_is_no_digest(how):
    host = vit()
    if how == "meta":
        host = host.to("meta")
    elif how == "part":
        host.norm.to("meta")
    elif how == "lazy":
        host.extra = nn.LazyLinear(3)
    elif how == "sparse":
        host.extra = Held(torch.eye(2).to_sparse())
    else:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode(allow_non_fake_inputs=True):
            host = copy.deepcopy(host)
            host.norm.weight = nn.Parameter(torch.ones(32))
    assert digest(host) == {}
    assert changed(digest(host), digest(vit())) == []


def test_sharded_tensors_have_no_digest():
    distributed = pytest.importorskip("torch.distributed.tensor")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        host = vit()
        host.norm.weight = nn.Parameter(distributed.distribute_tensor(host.norm.weight.detach(), mesh))
        assert digest(host) == {}
        assert set(block_sums(host, 4)) == {"0", "1", "2", "3"}
    finally:
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------------------------------------- what is no host's own


def test_peft_layers_in_place_change_nothing():
    peft = pytest.importorskip("peft")
    host = vit()
    before = digest(host)
    for extra in ({}, {"use_dora": True}, {"modules_to_save": ["norm"]}):
        wrapped = peft.get_peft_model(copy.deepcopy(host), peft.LoraConfig(target_modules=["qkv", "fc1"], **extra))
        assert digest(wrapped.get_base_model()) == before


@pytest.mark.parametrize("adapter", ["lora", "sfp"])
def test_attached_adapters_change_nothing(adapter):
    host = vit()
    before = digest(host)
    model = adaptkit.attach(host, adapter)
    assert digest(model.vit.backbone) == before
    model.detach()
    assert digest(host) == before


def test_a_parametrisation_of_ours_changes_nothing_and_one_of_the_users_is_seen():
    from torch.nn.utils import parametrize

    class Plus(nn.Module):
        def __init__(self):
            super().__init__()
            self.change = nn.Parameter(torch.zeros(1))

        def forward(self, w):
            return w + self.change

    host = vit()
    before = digest(host)
    foreign = copy.deepcopy(host)
    parametrize.register_parametrization(foreign.blocks[0].attn.qkv, "weight", Plus())
    assert changed(before, digest(foreign)) == ["blocks.0"]
    Plus.__module__ = "adaptkit.adapters.lora.adapter"
    parametrize.register_parametrization(host.blocks[0].attn.qkv, "weight", Plus())
    assert digest(host) == before


# --------------------------------------------------------------------------------------------------------- quantised


def test_torchao_weights_count_as_they_are_stored():
    quantize = pytest.importorskip("torchao.quantization")
    host = vit()
    quantize.quantize_(host, quantize.Int8WeightOnlyConfig(), lambda m, _: isinstance(m, nn.Linear))
    before = digest(host)
    assert set(before) == set(digest(vit()))
    assert before == digest(copy.deepcopy(host))
    with torch.no_grad():
        inner = host.blocks[2].mlp.fc2.weight
        names = inner.__tensor_flatten__()[0]
        getattr(inner, names[0]).view(-1)[:1].add_(1)
    assert changed(before, digest(host)) == ["blocks.2"]
    assert block_sums(host, 4) == {}


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_weights_count_as_they_are_stored(bits):
    bnb = pytest.importorskip("bitsandbytes")
    host = vit()
    for block in host.blocks:
        old = block.mlp.fc2
        new = bnb.nn.Linear4bit(128, 32) if bits == 4 else bnb.nn.Linear8bitLt(128, 32, has_fp16_weights=False)
        new.load_state_dict(old.state_dict())
        block.mlp.fc2 = new.to("cpu")
    before = digest(host)
    assert before.keys() == digest(vit()).keys()
    with torch.no_grad():
        host(torch.randn(1, 3, 32, 32))
    assert digest(host) == before
    with torch.no_grad():
        host.blocks[1].mlp.fc2.weight.data.view(-1)[:1].add_(1)
    assert changed(before, digest(host)) == ["blocks.1"]


# ------------------------------------------------------------------------------------------------------- comparisons


def test_what_only_a_classifier_reads_does_not_count_without_one():
    then, now = digest(with_classes(3)), digest(with_classes(5))
    assert other_layers(then, now, classifier=False) == ([], True)
    assert other_layers(then, digest(vit()), classifier=False) == ([], True)
    assert other_layers(then, now, classifier=True) == ([], False)
    host = with_classes(3)
    with torch.no_grad():
        host.head.weight += 1
    assert other_layers(then, digest(host), classifier=False) == ([], True)
    assert other_layers(then, digest(host), classifier=True) == (["head"], True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_sums_hold_in_half_precision(name, dtype):
    host = view(HOSTS[name].build()).backbone
    exact = block_sums(host, DEPTH)
    assert list(exact) == [str(i) for i in range(DEPTH)]
    assert other_blocks(exact, block_sums(host.to(dtype), DEPTH)) == []


def test_the_sums_hold_where_all_values_of_a_vector_round_the_same_way():
    host = vit(init_values=0.1)
    with torch.no_grad():
        for block in host.blocks:
            block.ls1.gamma.fill_(1.0039)
            block.norm1.weight.fill_(3.0117)
    assert other_blocks(block_sums(host, 4), block_sums(copy.deepcopy(host).bfloat16(), 4)) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda block: block.mlp.fc2.weight.mul_(1.05),
        lambda block: block.attn.qkv.weight.add_(0.02 * torch.randn(96, 32)),
        lambda block: block.attn.proj.weight.zero_(),
        lambda block: block.mlp.fc1.weight.copy_(0.1 * torch.randn(128, 32)),
        lambda block: block.mlp.fc1.weight.neg_(),
    ],
)
def test_other_weights_in_one_block_show_through_half_precision(change):
    host = vit()
    exact = block_sums(host, 4)
    torch.manual_seed(1)
    with torch.no_grad():
        change(host.blocks[2])
    assert other_blocks(exact, block_sums(host.bfloat16(), 4)) == ["2"]


# ------------------------------------------------------------------------------------------------------------ in use


def saved(folder, host, adapter="sfp", head=("linear", {"num_classes": 3})):
    return adaptkit.attach(host, adapter, head=head).save(folder)


@pytest.mark.parametrize("layer", ["blocks.1", "norm", "cls_token", "pos_embed", "patch_embed"])
def test_strict_names_the_layer_that_differs(tmp_path, layer):
    saved(tmp_path, vit())
    host = vit()
    with torch.no_grad():
        next(t for n, t in tensors_of(host) if n == layer or n.startswith(layer + ".")).view(-1)[3] += 1e-3
    with pytest.raises(ValueError, match=f"other weights of this structure .*they differ in {re.escape(layer)}\\)"):
        adaptkit.attach(host, tmp_path, strict=True)
    with pytest.warns(UserWarning, match=f"they differ in {re.escape(layer)}\\)"):
        adaptkit.attach(host, tmp_path)


def test_strict_sees_a_block_in_the_middle_in_half_precision(tmp_path):
    saved(tmp_path, vit())
    host = vit().bfloat16()
    adaptkit.attach(host, tmp_path, strict=True).detach()
    with torch.no_grad():
        host.blocks[2].mlp.fc1.weight.neg_()
    with pytest.raises(ValueError, match="they differ in block 2"):
        adaptkit.attach(host, tmp_path, strict=True)


def test_many_layers_are_counted(tmp_path):
    saved(tmp_path, vit(depth=8))
    with pytest.raises(ValueError, match=r"blocks\.0, .* and \d+ more\)"):
        adaptkit.attach(randomise(vit(depth=8), 3), tmp_path, strict=True)


def test_another_classifier_of_the_backbone_does_not_matter_beside_a_head(tmp_path):
    saved(tmp_path, with_classes(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*does not read all that")
        adaptkit.attach(with_classes(7), tmp_path, strict=True)


def test_a_pooler_that_is_made_anew_does_not_matter(tmp_path):
    transformers = pytest.importorskip("transformers")
    host = HOSTS["hf-vit"].build()
    assert isinstance(host, transformers.ViTModel)
    saved(tmp_path, host)
    other = HOSTS["hf-vit"].build()
    with torch.no_grad():
        other.pooler.dense.weight += 1
    adaptkit.attach(other, tmp_path, strict=True)


def test_a_file_without_a_digest_is_compared_as_it_was(tmp_path):
    saved(tmp_path, vit())
    file = adaptkit.load(tmp_path)
    del file.header["backbone"]["digest"], file.header["backbone"]["sums"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*does not read all that")
        adaptkit.attach(vit(), file, strict=True)
    with pytest.warns(UserWarning, match="other weights of this structure"):
        adaptkit.attach(randomise(vit(), 3), file)


def test_what_was_computed_before_sharding_is_what_is_written():
    seen = view(vit())
    seen.digest, seen.sums = {"a": "1-2"}, {"0": [1.0, 2.0, 3.0, 4.0]}
    described = adaptkit.hub.backbone.describe_backbone(seen)
    assert (described["digest"], described["sums"]) == (seen.digest, seen.sums)
