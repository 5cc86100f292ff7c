"""MACs from decisions, against torch's own counter on the path that skips."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS

import adaptkit
from adaptkit.adapters.adavit import Random
from adaptkit.analysis import accounting
from adaptkit.losses import macs_loss


def build(name="timm-vit", *others, **options):
    torch.manual_seed(0)
    return adaptkit.attach(HOSTS[name].build(), ("adavit", {"first_block": 0, **options}), *others).eval()


def images(count, name="timm-vit"):
    side = HOSTS[name].size
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("timm-vit", {}),
        ("timm-vit", {"head_mode": "partial"}),
        ("timm-vit", {"last_block": "class"}),
        ("timm-vit", {"last_block": "class", "head_mode": "partial"}),
        ("timm-vit", {"bottleneck": 3, "patch_policy": "class", "first_block": 1}),
        ("timm-dinov2-reg", {}),
        ("hf-dinov2", {}),
        ("timm-dinov3", {"gates": ("patch", "layer")}),
        ("timm-eva02", {"gates": ("patch", "layer")}),
        ("timm-dinov3", {}),  # whose heads do not come apart
        ("timm-eva-gqa", {"last_block": "class"}),
        ("timm-eva-gqa", {"head_mode": "partial"}),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
@torch.no_grad()
def test_macs_are_what_the_packed_path_multiplies(name, options, seed):
    model = build(name, **options)
    x = images(3, name)
    costs = accounting.costs(model, tuple(x.shape[-2:]))
    gates = model.adapters["adavit"]
    found = []
    with gates.executing("packed"), gates.deciding(Random(0.5, 0.6, 0.7, seed)):
        counted = accounting.counted(lambda: found.append(model(x)))
    assert float(accounting.macs(costs, found[0].aux).sum()) == pytest.approx(counted, rel=1e-6)


@torch.no_grad()
def test_with_everything_on_it_is_the_dense_model_and_the_gates():
    model = build()
    costs = accounting.costs(model, (32, 32))
    plain = HOSTS["timm-vit"].build()
    assert costs.dense == accounting.counted(lambda: plain(images(1)))
    spent = accounting.macs(costs, model(images(2)).aux)
    assert spent.tolist() == pytest.approx([costs.dense + sum(b.gates for b in costs.blocks)] * 2)


@torch.no_grad()
def test_a_side_adapter_is_counted_too():
    alone, both = build(), build("timm-vit", ("vit-adapter", {"conv_inplane": 8}))
    assert accounting.costs(both, (32, 32)).dense > accounting.costs(alone, (32, 32)).dense


def test_macs_carry_a_gradient_to_every_kind_of_gate():
    model = build().train()
    costs = accounting.costs(model, (32, 32))
    assert model.training
    macs_loss(accounting.macs(costs, model(images(2)).aux), costs.dense, 0.5).backward()
    for name, p in model.adapters["adavit"].named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name


def test_the_summary_has_mean_median_and_the_95th_percentile():
    assert accounting.summary(torch.arange(101.0)) == (50.0, 50.0, 95.0)


def test_a_model_without_gates_says_so():
    with pytest.raises(TypeError, match="no AdaViT gates"):
        accounting.costs(adaptkit.attach(HOSTS["timm-vit"].build(), "sfp"), (32, 32))


@pytest.mark.parametrize("adapter", ["vpt", "rein", "lora", "adapter-plus", "vit-adapter"])
def test_the_same_is_counted_whether_or_not_gradients_are_recorded(adapter):
    """A module may be given a parameter: prompts, to the first norm."""
    model, x = adaptkit.attach(HOSTS["timm-vit"].build(), adapter).eval(), images(2)
    found = {}
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            found[mode] = accounting.counted(lambda: model(x))
    assert found[torch.enable_grad] > 0
    assert set(found.values()) == {found[torch.enable_grad]}


def test_what_is_kept_for_backward_is_counted_once_and_weights_are_not():
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU())
    x = torch.randn(4, 8)
    assert accounting.saved_bytes(lambda: model(x), model) == 4 * 4 * (8 + 16)  # the input, and what GELU was given
    with torch.inference_mode():
        assert accounting.saved_bytes(lambda: model(x), model) == 4 * 4 * (8 + 16)
    model[0].requires_grad_(False)
    assert accounting.saved_bytes(lambda: model(x), model) == 0
    assert (
        accounting.saved_bytes(lambda: model(x.requires_grad_()), model) == 4 * 4 * 16
    )  # a frozen layer needs no input
    y = torch.randn(4, 8, requires_grad=True)
    assert (
        accounting.saved_bytes(lambda: (y * y[:2].repeat(2, 1)).sum(), model) == 2 * 4 * 4 * 8
    )  # y, and what was repeated


@torch.no_grad()
def test_an_adapter_that_only_reads_keeps_less_than_one_that_writes():
    side = accounting.saved_bytes(
        lambda: reading(images(1)), reading := adaptkit.attach(HOSTS["timm-vit"].build(), "sfp")
    )
    both = accounting.saved_bytes(
        lambda: writing(images(1)), writing := adaptkit.attach(HOSTS["timm-vit"].build(), "lora")
    )
    assert 0 < side < both
