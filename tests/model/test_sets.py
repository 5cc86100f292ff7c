"""Several sets of adapters on one backbone: switched, left out, dropped and swapped."""

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from errors import assert_rounds_to, transformer
from families import HOSTS

import adaptkit

x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SMALL = {"conv_inplane": 8}
SUMS = transformer(8, 32, 17)  # of the backbone, and as many again of the adapters


def host():
    return HOSTS["timm-vit"].build()


def moved(module, seed):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=g))
    return module.eval()


def saved(folder, *adapters, seed, **options):
    model = moved(adaptkit.attach(host(), *adapters, **options), seed)
    model.save(folder)
    return folder, model(x)


def same(a, b):
    return torch.equal(a.tokens, b.tokens) and all(torch.equal(m, n) for m, n in zip(a.maps, b.maps, strict=True))


@pytest.fixture
def three(tmp_path):
    """A model with three sets, and what each says alone."""
    a, alone_a = saved(tmp_path / "a", "lora", ("vit-adapter", SMALL), seed=1)
    b, alone_b = saved(tmp_path / "b", "lora", seed=2, head=("linear", {"num_classes": 3}))
    c, alone_c = saved(tmp_path / "c", ("lora", {"peft_type": "LOHA", "target_modules": ["fc1"]}), seed=3)
    model = adaptkit.attach(host(), a, name="a")
    model.add_adapter(b, name="b")
    model.add_adapter(c, name="c")
    return model, {"a": alone_a, "b": alone_b, "c": alone_c}


@torch.no_grad()
def test_each_set_says_what_it_says_alone_in_whatever_order_they_are_set(three):
    model, alone = three
    plain = host().forward_features(x)[:, 1:]
    for name in "abcbaac":
        model.set_adapter(name)
        assert model.active_adapter == name
        assert same(model(x), alone[name])
        with model.disable_adapter():
            assert torch.equal(model(x).tokens, plain)
            assert model(x).maps == ()
        assert same(model(x), alone[name])


def test_the_active_set_alone_is_trained(three):
    model, _ = three
    for name in "abc":
        model.set_adapter(name)
        model.train()
        model.zero_grad()
        model(x).tokens.square().sum().backward()
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trained
        assert all(n.startswith(f"sets.{name}.") for n in trained)
        assert any(p.grad is not None for p in model.sets[name].parameters())
        count, every = model.get_nb_trainable_parameters()
        assert count == sum(p.numel() for p in model.sets[name].parameters())
        assert every == sum(p.numel() for p in model.parameters())


def test_deleting_all_gives_the_backbone_back_bit_for_bit(three):
    model, alone = three
    before = copy.deepcopy(host().state_dict())
    model.set_adapter("b")
    model.delete_adapter("b")
    assert model.active_adapter == "a"
    assert same(model(x), alone["a"])
    model.delete_adapter("c")
    model.delete_adapter("a")
    assert model.active_adapter is None
    assert torch.equal(model(x).tokens, host().forward_features(x)[:, 1:])
    assert not list(model.adapters)
    with pytest.raises(RuntimeError, match=r"every adapter of this model was deleted; add_adapter\(\) one"):
        model.save("nowhere")
    model.add_adapter("sfp", name="new")
    model.set_adapter("new")
    assert len(model(x).maps) == 4
    backbone = model.detach()
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


@torch.no_grad()
def test_a_merged_set_that_is_left_leaves_the_weights_exactly(three):
    model, alone = three
    model.merge_adapter()
    model.set_adapter("b")
    assert same(model(x), alone["b"])
    model.set_adapter("a")
    assert same(model(x), alone["a"])


def test_flags_of_ones_own_survive_a_switch(three):
    model, _ = three
    model.set_adapter("b")
    model.head.requires_grad_(False)
    model.set_adapter("a")
    model.set_adapter("b")
    assert not any(p.requires_grad for p in model.head.parameters())
    assert all(p.requires_grad for p in model.adapters.parameters())


def test_switching_back_compiles_nothing_new(three):
    model, alone = three
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for name in "abc":
            model.set_adapter(name)
            compiled(x)
        seen = len(graphs)
        for name in "bacab":
            model.set_adapter(name)
            assert_rounds_to(compiled(x).tokens, alone[name].tokens, *SUMS)
    assert seen == 3
    assert len(graphs) == seen


def test_a_hot_swap_changes_the_tensors_in_place_and_nothing_is_recompiled(tmp_path):
    torch._dynamo.reset()
    first, alone = saved(tmp_path / "1", "lora", ("vit-adapter", SMALL), seed=1)
    second, other = saved(tmp_path / "2", "lora", ("vit-adapter", SMALL), seed=2)
    model = adaptkit.attach(host(), first)
    graphs = []
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    with torch.no_grad():
        assert_rounds_to(compiled(x).tokens, alone.tokens, *SUMS)
        model.hotswap_adapter(second)
        assert_rounds_to(compiled(x).tokens, other.tokens, *SUMS)
    assert len(graphs) == 1
    assert same(model(x), other)


def test_a_swap_for_another_method_is_refused(tmp_path):
    folder, _ = saved(tmp_path, "sfp", seed=1)
    model = adaptkit.attach(host(), "lora")
    with pytest.raises(ValueError, match=r"holds sfp, this set has lora; .*load it as another set with add_adapter"):
        model.hotswap_adapter(folder)
    adaptkit.attach(host(), "lora", r=2).save(folder)
    with pytest.raises(ValueError, match=r"holds options=.*'r': 2.*, this set has options="):
        model.hotswap_adapter(folder)
    with pytest.raises(ValueError, match="is no saved adapter"):
        model.hotswap_adapter("lora")


def test_wrong_names_are_clear_errors(three):
    model, alone = three
    with pytest.raises(ValueError, match="no adapters are named 'd'; there are 'a', 'b', 'c'"):
        model.set_adapter("d")
    with pytest.raises(ValueError, match=r"named 'a' are there already"):
        model.add_adapter("sfp", name="a")
    with pytest.raises(ValueError, match="cannot be named 'a.b'"):
        model.add_adapter("sfp", name="a.b")
    with pytest.raises(ValueError, match="has no option 'nonsense'"):
        model.add_adapter(("vit-adapter", {"nonsense": 1}), name="d")
    assert list(model.sets) == ["a", "b", "c"]
    assert same(model(x), alone["a"])


def test_trainable_parameters_are_printed_as_peft_prints_them(capsys):
    model = adaptkit.attach(host(), "lora", r=2)
    model.print_trainable_parameters()
    count = 4 * 2 * (32 + 96)
    every = count + sum(p.numel() for p in host().parameters())
    said = f"trainable params: {count:,} || all params: {every:,} || trainable%: {100 * count / every:.4f}\n"
    assert capsys.readouterr().out == said
