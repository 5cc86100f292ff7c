"""Blocks in CPU memory that visit the device: the same bits, one block there at a time, and nothing left behind.

Without a GPU two things stand in for one. A *visit* puts clones in the place of a block's tensors, as a copy to a GPU
does, so that numbers can be compared; fake tensors on a GPU refuse an operation whose operands lie on two devices.
"""

import copy
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from fake_cuda import fake_cuda
from families import HOSTS
from reference import State, equal, said, stir

import adaptkit
from adaptkit.core.tree import blocks_of
from adaptkit.model import offloading
from adaptkit.model.offloading import bytes_of, extract_each, offload, offloaded

READERS = {
    "none": [],
    "sfp": ["sfp"],
    "split": ["vit-split"],
    "extractor": [("vit-adapter", {"conv_inplane": 8, "injector": False})],
}
SOME = ("timm-vit", "timm-dinov3", "timm-eva02", "timm-sam", "timm-pe", "hf-dinov2-reg", "hf-clip", "hf-dinov3")
x = torch.randn(3, 3, 48, 56, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def visits(monkeypatch):
    """Says that blocks run elsewhere, and counts the clones' bytes: ``[now, most, copies]``."""
    count = [0, 0, 0]

    def copied(tensor, device):
        clone = nn.Parameter(tensor.detach().clone(), False) if isinstance(tensor, nn.Parameter) else tensor.clone()
        size = clone.numel() * clone.element_size()
        count[0], count[2] = count[0] + size, count[2] + 1
        count[1] = max(count[:2])
        weakref.finalize(clone, lambda: count.__setitem__(0, count[0] - size))
        return clone

    monkeypatch.setattr(offloading, "_copied", copied)
    return count


def visiting(model):
    there = offload(model, "cpu")
    there.device = torch.device("cuda", 0)
    return there


def addresses(host):
    return {name: (id(t), t.data_ptr(), t._version) for name, t in (*host.named_parameters(), *host.named_buffers())}


# ------------------------------------------------------------------------------------------------------- same bits


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["timm-vit", "hf-dinov2-reg"])
def test_the_features_are_the_same_bits_and_the_backbone_is_as_it_was(name, reader, visits):
    host = HOSTS[name].build()
    model = stir(adaptkit.attach(host, *READERS[reader]), 1).eval()
    expected, seen = said(model, x), [model.extract(x[:2]), model.extract(x[2:])]
    before, places = State(host), addresses(host)
    with visiting(model) as there:
        assert offloaded(model) is there is offload(model, "cpu")
        assert equal(said(model, x), expected)
        again = extract_each(model, [x[:2], x[2:]])
    assert [part.after for part in again] == [part.after for part in seen]
    assert all(equal(a.states, b.states) for a, b in zip(again, seen, strict=True))
    assert visits[2] > 0
    assert offloaded(model) is None
    assert before.changes() == []
    assert addresses(host) == places


def test_one_block_is_there_at_a_time_and_is_copied_once_for_all_batches(visits):
    model = adaptkit.attach(HOSTS["timm-vit"].build(), "sfp").eval()
    there = visiting(model)
    assert there.bytes() == sum(map(bytes_of, there.blocks)) > there.largest()
    tensors = sum(len(list(b.parameters())) + len(list(b.buffers())) for b in there.blocks)
    extract_each(model, [x[:1], x[1:2], x[2:]])
    assert visits == [0, there.largest(), tensors]
    with torch.no_grad():
        model.extract(x[:1])
        model.extract(x[1:])
    assert visits == [0, there.largest(), 3 * tensors]


def test_on_the_cpu_nothing_is_copied(visits):
    model = adaptkit.attach(HOSTS["timm-vit"].build(), "sfp").eval()
    with offload(model, "cpu"):
        said(model, x)
    assert visits == [0, 0, 0]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_in_a_block_its_own_tensors_are_back(error, visits):
    host = HOSTS["timm-vit"].build()
    model = adaptkit.attach(host, "sfp").eval()
    places, expected = addresses(host), said(model, x)
    there = visiting(model)

    def fail(*_):
        raise error

    handle = host.blocks[1].mlp.register_forward_hook(fail)
    with pytest.raises(error):
        model(x)
    handle.remove()
    if error is KeyboardInterrupt:  # torch calls no hook after it: with the next block, or when it is removed
        assert there.present is not None
        there.remove()
    assert addresses(host) == places
    if error is KeyboardInterrupt:
        visiting(model)
        handle = host.blocks[1].mlp.register_forward_hook(fail)
        with pytest.raises(error):
            model(x)
        handle.remove()
    assert equal(said(model, x), expected)
    assert addresses(host) == places
    assert visits[:2] == [0, there.largest()]


def test_a_shared_tensor_is_copied_once_and_stays_shared(visits):
    host = HOSTS["timm-vit"].build()
    host.blocks[0].norm2.weight = host.blocks[0].norm1.weight
    model = adaptkit.attach(host, "sfp").eval()
    there = visiting(model)
    with there.held(0):
        assert host.blocks[0].norm2.weight is host.blocks[0].norm1.weight
    assert visits[2] == len(list(host.blocks[0].parameters()))


def test_a_file_is_saved_and_checked_as_ever_and_a_copy_has_its_own(visits, tmp_path):
    host = HOSTS["timm-vit"].build()
    model = adaptkit.attach(host, "sfp").eval()
    model.save(tmp_path / "before")
    visiting(model)
    said(model, x)
    model.save(tmp_path / "after")
    files = [(tmp_path / k / "adapter_model.safetensors").read_bytes() for k in ("before", "after")]
    assert files[0] == files[1]
    other = copy.deepcopy(model)
    assert offloaded(other) is not offloaded(model)
    assert offloaded(other).blocks[0] is other.backbone.blocks[0]
    assert equal(said(other, x), said(model, x))


# ------------------------------------------------------------------------------------------------------ on a device


def faked(model):
    """Put fake tensors in place of the model's: its blocks' on the CPU, all others on the GPU."""
    inside = {id(m) for block in blocks_of(model.vit.backbone, len(model.vit.spec.widths)) for m in block.modules()}
    made = {}
    for module in model.modules():
        device = "cpu" if id(module) in inside else "cuda"
        for own in (module._parameters, module._buffers):
            for name, t in own.items():
                if t is not None:
                    new = made.setdefault(id(t), (t, torch.empty(t.shape, dtype=t.dtype, device=device)))[1]
                    own[name] = nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new


# transformers' Beit keeps tables of positions beyond the model's life, which fake ones must not enter
OTHERS = [n for n in sorted(HOSTS) if n not in SOME and not n.startswith(("hf-beit", "timm-beit"))]


@pytest.mark.parametrize("name", [*SOME, *(pytest.param(n, marks=pytest.mark.full) for n in OTHERS)])
def test_on_a_device_every_operation_finds_its_weights_there(name):
    model = adaptkit.attach(HOSTS[name].build(), READERS["extractor"][0]).eval()
    if getattr(model.vit, "rebuilds", True):
        pytest.skip("it has stages")
    with fake_cuda(), torch.no_grad():
        faked(model)
        there, image = offload(model, "cuda"), torch.empty(2, 3, 48, 56, device="cuda")
        maps = model(image).maps
        states = [s for part in extract_each(model, [image, image[:1]]) for s in part.states]
        assert all(t.device.type == "cuda" for t in maps)
        assert all(t.device.type == "cpu" for t in states)  # they are kept for a file
        assert all(t.device.type == "cpu" for b in there.blocks for t in (*b.parameters(), *b.buffers()))
        there.remove()
        with pytest.raises(RuntimeError, match=r"device"):
            model(image)


# --------------------------------------------------------------------------------------------------------- refused


def swin():
    from timm.models.swin_transformer import SwinTransformer

    sizes = {"img_size": 64, "window_size": 2, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
    return SwinTransformer(**sizes, num_classes=0)


@pytest.mark.parametrize(
    ("build", "adapters", "options", "error", "why"),
    [
        (HOSTS["timm-vit"].build, ["lora"], {}, ValueError, "only read .*lora changes what the blocks compute"),
        (HOSTS["timm-vit"].build, [("vit-adapter", {"conv_inplane": 8})], {}, ValueError, "only read .*injectors write"),
        (HOSTS["timm-vit"].build, ["sfp"], {"train_backbone": ["blocks.1.norm1"]}, ValueError,
         r"it trains parts of the backbone \(blocks.1.norm1"),
        (HOSTS["timm-beit"].build, ["sfp"], {}, TypeError, "Beit: only blocks that are run as they are"),
        (swin, [], {"head": ("linear", {"num_classes": 3})}, TypeError, "SwinTransformer: only blocks that are run"),
    ],
)  # fmt: skip
def test_what_cannot_be_offloaded_is_refused_and_left_alone(build, adapters, options, error, why):
    host = build()
    model = adaptkit.attach(host, *adapters, **options)
    before = State(host)
    with pytest.raises(error, match=why):
        offload(model, "cpu")
    assert before.changes() == []


def test_quantised_weights_are_refused():
    quantization = pytest.importorskip("torchao.quantization")
    host = HOSTS["timm-vit"].build()
    quantization.quantize_(host, quantization.Int8WeightOnlyConfig(), lambda m, path: path == "blocks.2.mlp.fc1")
    with pytest.raises(ValueError, match="block 2 holds mlp.fc1.weight as a .*, which is quantised or in parts"):
        offload(adaptkit.attach(host, "sfp"), "cpu")
