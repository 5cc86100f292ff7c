"""Every trained parameter gets a gradient with every head that attaches."""

import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS

import adaptkit

HEADS = {"linear": {"num_classes": 3}, "fpn": {"num_classes": 3, "channels": 8},
         "classifier": {"num_classes": 3}, "depth": {"max_depth": 10.0}}  # fmt: skip
OPTIONS = {"vit-adapter": {"conv_inplane": 8}, "metaformer": {"width": 8}}


def host(name="timm-vit"):
    return HOSTS[name].build()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("adapter", ["adavit", "dat", "lora", "metaformer", "sfp", "vit-adapter", "vit-split"])
def test_a_loss_on_the_logits_gives_every_trained_parameter_a_gradient(adapter, head):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = adaptkit.attach(host(), (adapter, OPTIONS.get(adapter, {})), head=(head, HEADS[head]))
    features = model(torch.randn(2, 3, 40, 32))
    (features.logits.square().sum() + sum(v.sum() for v in features.aux.values())).backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    unread = adapter in ("sfp", "vit-adapter", "vit-split") and head in ("linear", "classifier")
    assert any("does not read all that" in str(w.message) for w in caught) == unread


def test_the_proof_leaves_the_host_the_random_numbers_and_the_statistics():
    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(32)
            self.fc = torch.nn.Linear(32, 2)

        def forward(self, features):
            return self.fc(self.norm(features.tokens.mean(1)))

    head, base = Counting(), host().train()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    adaptkit.attach(base, head=head)
    assert torch.equal(torch.rand(3), expected)
    assert int(head.norm.num_batches_tracked) == 0
    assert not head.norm.running_mean.any()


def test_a_head_of_ones_own_that_wants_another_size_attaches():
    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(1000, 2)

        def forward(self, features):
            return self.fc(features.tokens.flatten(1))

    adaptkit.attach(host(), head=Fixed())


def test_a_layer_whose_output_is_not_used_is_refused():
    base = host()
    with pytest.raises(ValueError, match=r"no gradient would reach .*head.*Leave these layers out of target_modules"):
        adaptkit.attach(base, "lora", target_modules=["qkv", "head"], head=("linear", {"num_classes": 2}))
    assert list(adaptkit.attach(base, "lora", target_modules=["qkv", "head"]).adapters["lora"].proxies)[-1] == "head"


class NoBackward(torch.nn.Linear):
    """As quantised layers of some libraries are: the tokens that they get may want no gradient."""

    def forward(self, x):
        assert not (x.requires_grad and torch.is_grad_enabled()), "no backward pass"
        return super().forward(x)


def test_the_backbone_wants_no_gradient_while_it_is_tried_and_is_left_as_it_was():
    host = HOSTS["timm-vit"].build()
    for block in host.blocks:
        old = block.mlp.fc1
        block.mlp.fc1 = NoBackward(old.in_features, old.out_features)
    host.blocks[0].norm1.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in host.named_parameters()}
    model = adaptkit.attach(host, ("vit-adapter", {"conv_inplane": 8, "injector": False}))
    assert not any(p.requires_grad for p in model.backbone.parameters())
    model.detach()
    assert {n: p.requires_grad for n, p in host.named_parameters()} == flags
    with pytest.raises(AssertionError, match="no backward pass"):
        adaptkit.attach(host, ("vit-adapter", {"conv_inplane": 8}))
    assert {n: p.requires_grad for n, p in host.named_parameters()} == flags


@pytest.mark.filterwarnings("ignore:the head does not read")
def test_a_head_that_returns_a_dict_of_its_own_class_gives_it_in_training_too():
    from transformers.modeling_outputs import SemanticSegmenterOutput

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(32, 2)

        def forward(self, features):
            return SemanticSegmenterOutput(logits=self.fc(features.tokens.mean(1)))

    model = adaptkit.attach(host(), "sfp", head=Head())  # whose maps the head ignores
    for mode in (True, False):
        logits = model.train(mode)(torch.randn(2, 3, 32, 32)).logits
        assert type(logits) is SemanticSegmenterOutput
        assert logits.logits is logits["logits"]
    model.train()(torch.randn(2, 3, 32, 32)).logits.logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_one_process_of_many_may_attach_alone(monkeypatch):
    """What is proven must not wait for the others, which may be elsewhere."""

    def waits(*args, **kwargs):
        raise AssertionError("attach asked other processes")

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *args: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", waits)
    model = adaptkit.attach(HOSTS["timm-vit"].build(), ("vit-adapter", {"conv_inplane": 8, "norm": "sync"}))
    assert all(m.training for m in model.adapters.modules())
    with pytest.raises(AssertionError, match="asked other processes"):
        model(torch.randn(2, 3, 32, 32))
