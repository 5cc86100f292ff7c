"""What a model does on a GPU, followed without one: no copy from the host, no waiting, as many operators at any batch."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from fake_cuda import Recorder, backward, fake_cuda, moved
from families import DEPTH, HOSTS
from reference import stir

import adaptkit
from adaptkit.adapters.adavit.capacity import Capacities
from adaptkit.mixers import list_mixers
from adaptkit.model.trainable import tensors_in
from adaptkit.seam import reference

SIZE = 48, 56  # pixels: not the hosts' own, and no multiple of 32
BATCHES = 2, 16
SMALL = {"conv_inplane": 8}
LIGHT = {"add_vit_feature": None, "extra_extractors": 0, "with_cffn": False, "strides": (8, 16, 32)}
ADAPTERS = {
    "vit-adapter": [("vit-adapter", SMALL)],
    "vit-adapter-sync": [("vit-adapter", {**SMALL, "norm": "sync", "add_vit_feature": "last"})],
    "vit-adapter-group": [("vit-adapter", {**SMALL, "norm": "group"})],
    "vit-adapter-layer": [("vit-adapter", {**SMALL, "norm": "layer"})],
    "vit-adapter-extract-only": [("vit-adapter", {**SMALL, "injector": False})],
    "vit-adapter-light": [("vit-adapter", {**SMALL, **LIGHT, "prefix": "drop"})],
    "vit-adapter-checkpoint": [("vit-adapter", {**SMALL, "checkpoint": True})],
    **{f"vit-adapter-{m}": [("vit-adapter", {**SMALL, **LIGHT, "attention": m})] for m in list_mixers() if m != "msda"},
    "vit-split": ["vit-split"],
    "vit-split-checkpoint": [("vit-split", {"checkpoint": True, "norm": "sync"})],
    "sfp": ["sfp"],
    "adavit": ["adavit"],
    "adavit-masked": [("adavit", {"execution": "masked"})],
    "adavit-class": [("adavit", {"execution": "masked", "patch_policy": "class", "head_mode": "partial",
                                 "bottleneck": 4, "last_block": "class"})],
    "dat": ["dat"],
    "dat-replace": [("dat", {"mode": "replace", "bias": "log-cpb", "stride": 2})],
    **{f"metaformer-{m}": [("metaformer", {"width": 16, "mixer": m})] for m in list_mixers()},
    "metaformer-gate": [("metaformer", {"width": 0, "norm": "group1"})],
    "lora": [("lora", {"r": 2})],
    "dora": [("lora", {"r": 2, "use_dora": True, "lora_dropout": 0.1})],
    **{kind: [("lora", {"peft_type": kind, "r": 2})] for kind in ("LOHA", "LOKR", "HRA")},
    "OFT": [("lora", {"peft_type": "OFT", "oft_block_size": 4})],
    "BOFT": [("lora", {"peft_type": "BOFT", "boft_block_size": 4})],
    "IA3": [("lora", {"peft_type": "IA3", "target_modules": ["qkv", "fc2"]})],
    "lora+metaformer+vit-adapter": [("lora", {"r": 2}), ("metaformer", {"width": 8}), ("vit-adapter", SMALL)],
    "none": [],
}  # fmt: skip
HEADS = {
    "fpn": ("fpn", {"num_classes": 3, "channels": 16}),
    "linear": ("linear", {"num_classes": 3}),
    "classifier": ("classifier", {"num_classes": 3}),
    "depth": ("depth", {"max_depth": 80.0, "bins": 16, "channels": 16}),
    "plain-mask": ("plain-mask", {"num_classes": 3, "num_q": 4, "num_blocks": 2}),
    "none": None,
}
ON_TRANSFORMERS = (
    "vit-adapter",
    "vit-adapter-extract-only",
    "vit-split",
    "sfp",
    "adavit-masked",
    "dat",
    "metaformer-msda",
    "lora",
)


ONCE = ("vit-adapter", "vit-adapter-layer", "vit-adapter-extract-only")


def full(number, name=""):
    """Of mixers and of what transformers has, every other one comes with each run of the tests."""
    mixers = {f"{adapter}-{mixer}" for adapter in ("vit-adapter", "metaformer") for mixer in list_mixers()}
    return pytest.mark.full if number % 2 and (not name or name in mixers) else ()


CASES = [
    *(pytest.param(name, "timm-vit", "fpn", id=name, marks=full(i, name)) for i, name in enumerate(ADAPTERS)),
    *(pytest.param(name, "hf-dinov2", "fpn", id=f"hf-{name}", marks=full(i)) for i, name in enumerate(ON_TRANSFORMERS)),
    *(pytest.param("lora", "timm-vit", head, id=f"lora-{head}") for head in HEADS),
]
every = pytest.mark.parametrize(("adapter", "host", "head"), CASES)


class Run(NamedTuple):
    copies: list[str]
    waits: list[str]
    operators: dict[str, int]


def attach(adapter, host, head):
    more = {} if ADAPTERS[adapter] else {"train_backbone": ("blocks.3",)}
    torch.manual_seed(0)
    return adaptkit.attach(HOSTS[host].at(*SIZE), *ADAPTERS[adapter], head=HEADS[head], **more)


def runs(adapter, host, head):
    """Forward and backward in training, forward in eval mode, at each batch: ``{(mode, batch): Run}``."""
    model, found = attach(adapter, host, head), {}
    with fake_cuda() as mode:
        moved(model, mode)
        for training in (True, False):
            model.train(training)
            for batch in BATCHES:
                with Recorder() as recorder, torch.set_grad_enabled(training):
                    features = model(torch.empty(batch, 3, *SIZE, device="cuda"))
                    made = list(tensors_in([features.tokens, *features.maps, features.logits]))
                    backward([t for t in made if t.requires_grad])
                key = "training" if training else "eval", batch
                found[key] = Run(recorder.copies, recorder.waits, dict(recorder.operators))
    return found


@every
@pytest.mark.filterwarnings("ignore:the head")
def test_the_host_neither_copies_nor_waits_and_operators_do_not_grow_with_the_batch(adapter, host, head):
    found = runs(adapter, host, head)
    for when, run in found.items():
        assert run.copies == [], when
        assert run.waits == [], when
    for mode in ("training", "eval"):
        few, many = (found[mode, batch].operators for batch in BATCHES)
        assert few == many, mode
    if adapter in ONCE:  # a backward pass computes nothing again
        operators, forward = (found[mode, 2].operators for mode in ("training", "eval"))
        for once in ("adaptkit.ms_deform_attn.default", "aten.native_layer_norm.default", "aten.gelu.default"):
            assert operators[once] == forward[once] > 0
    if adapter == "vit-adapter-checkpoint":  # where it was asked for, it does
        assert found["training", 2].operators["aten.gelu.default"] > found["eval", 2].operators["aten.gelu.default"]


# ------------------------------------------------------------------------------------------- AdaViT, packed


@pytest.mark.parametrize("last", ["all", "class"])
@pytest.mark.parametrize("name", ["timm-vit", "timm-dinov2-reg", "timm-dinov3", "timm-beit", "hf-dinov2"])
def test_packing_asks_the_device_once_in_a_forward(name, last, monkeypatch):
    """Fake tensors hold no numbers: what each block keeps is told by hand, in the place where it is read."""
    asked = []

    def read(counts):
        asked.append(counts.shape)
        return [[0.7, 0.7, 0.3, 0.0]] * len(counts)

    monkeypatch.setattr("adaptkit.adapters.adavit.adapter.read", read)
    host = HOSTS[name]
    torch.manual_seed(0)
    model = adaptkit.attach(host.build(), ("adavit", {"execution": "packed", "last_block": last})).eval()
    found = {}
    with fake_cuda() as mode, torch.no_grad():
        moved(model, mode)
        for batch in BATCHES:
            for when in ("unknown", "known"):
                if when == "unknown":
                    model.adapters["adavit"].capacities = Capacities()
                with Recorder() as recorder:
                    model(torch.empty(batch, 3, host.size, host.size, device="cuda"))
                assert (recorder.copies, recorder.waits) == ([], [])
                recorder.operators["aten.slice.Tensor"] += recorder.operators.pop("aten.alias.default", 0)  # of all
                found[when, batch] = recorder.operators
    assert asked == [(DEPTH - 1, 4)] * 4  # once in each forward, by all blocks that have gates
    assert found["known", 2] == found["known", 16]
    assert found["unknown", 2] == found["unknown", 16]


# ----------------------------------------------------------------------------------------- the recorder itself


def test_the_recorder_sees_copies_and_waits():
    with fake_cuda(), Recorder() as recorder:
        x = torch.empty(3, device="cuda")
        x.new_tensor([1, 2])
        torch.empty(2).to("cuda")
        x.cpu()
        x.copy_(torch.empty(3))
        assert (len(recorder.copies), recorder.waits) == (4, [])
        for waiting in (lambda: x.sum().item(), lambda: bool((x > 0).all()), lambda: x.nonzero(), lambda: x[x > 0]):
            with pytest.raises(Exception, match=r"aten\."):
                waiting()
        assert len(recorder.waits) == 4


def test_the_walk_over_the_graph_is_autograd():
    model = stir(attach("vit-adapter", "timm-vit", "fpn"), 0).double().train()
    model.adapters["vit-adapter"].apply(lambda m: setattr(m, "p", 0.0) if hasattr(m, "p") else None)
    with reference():
        features = model(torch.randn(2, 3, *SIZE, dtype=torch.float64))
        out = [features.tokens, *features.maps, features.logits]
        walked = backward(out)
        torch.autograd.backward(out, [torch.ones_like(t) for t in out])
    trained = {p for p in model.parameters() if p.grad is not None}
    assert set(walked) == trained
    for p in trained:
        torch.testing.assert_close(walked[p], p.grad)


# ----------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize(
    "adapter",
    [
        pytest.param(name, marks=full(i, name))
        for i, name in enumerate(ADAPTERS)
        if name.startswith(("vit-adapter", "dat", "metaformer-msda", "sfp"))
    ],
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_the_text_says_what_the_fast_paths_of_a_cpu_say(adapter, training):
    """In float32 both are as far from float64 as rounding takes them."""

    def outcome(dtype, text):
        model = stir(attach(adapter, "timm-vit", "fpn"), 0).to(dtype).train(training)
        image = torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
        torch.manual_seed(1)  # dropped paths
        with reference() if text else nullcontext(), torch.set_grad_enabled(training):
            features = model(image)
            found = [features.tokens, *features.maps, features.logits]
            if training:
                trained = [p for p in model.parameters() if p.requires_grad]
                grads = torch.autograd.grad(sum(t.square().sum() for t in found), trained, allow_unused=True)
                found += [g for g in grads if g is not None]
        return [t.detach().double() for t in found]

    exact = outcome(torch.float64, text=True)
    largest = max(float(t.norm()) for t in exact)
    for wanted, text, fast in zip(exact, outcome(torch.float32, True), outcome(torch.float32, False), strict=True):
        rounding = float((text - wanted).norm()) + 1e-6 * float(wanted.norm()) + 1e-9 * largest
        assert float((fast - wanted).norm()) <= 8 * rounding
