"""Several sets on one backbone: the mean of what each says alone, and nothing left behind."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS

import adaptkit

HEAD = ("linear", {"num_classes": 5})


def stir(module, seed):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))


def model_of():
    """LoRA changes the blocks, adapter+ too, and sfp reads them from beside."""
    model = adaptkit.attach(HOSTS["timm-vit"].build(), "lora", head=HEAD, name="a")
    model.add_adapter("adapter-plus", head=HEAD, name="b")
    model.add_adapter("sfp", head=("fpn", {"num_classes": 5, "channels": 16}), name="c")
    for number, one in enumerate(model.sets.values()):
        stir(one, number)
    return model.eval()


@pytest.fixture
def image():
    side = HOSTS["timm-vit"].size
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def alone(model, name, image):
    model.set_adapter(name)
    return model(image)


@torch.no_grad()
def test_logits_and_tokens_are_the_weighted_mean_of_each_set_alone(image):
    model = model_of()
    a, b = alone(model, "a", image), alone(model, "b", image)
    assert (a.logits - b.logits).abs().max() > 1e-3
    model.set_adapter(["a", "b"], weights=[1, 3])
    both = model(image)
    for part in ("logits", "tokens", "prefix"):
        torch.testing.assert_close(getattr(both, part), 0.25 * getattr(a, part) + 0.75 * getattr(b, part))
    model.set_adapter(["a", "b"])
    torch.testing.assert_close(model(image).logits, (a.logits + b.logits) / 2)
    assert "a (0.5 of the mean), b (0.5 of the mean)" in repr(model)
    model.set_adapter(["a", "b"], weights=[0, 2])
    assert torch.equal(model(image).logits, b.logits)
    # afterwards each is what it was, and so is the backbone
    assert torch.equal(alone(model, "a", image).logits, a.logits)
    model.set_adapter(["b", "a"])
    with model.disable_adapter():
        plain = model(image).tokens
    assert torch.equal(
        plain, HOSTS["timm-vit"].build().eval().forward_features(image)[:, model.spec.num_prefix_tokens :]
    )


@torch.no_grad()
def test_maps_are_averaged_where_all_make_the_same(image):
    model = model_of()
    model.add_adapter("sfp", head=("fpn", {"num_classes": 5, "channels": 16}), name="d")
    stir(model.sets["d"], 9)
    model.eval()
    c, d = alone(model, "c", image), alone(model, "d", image)
    model.set_adapter(["c", "d"], weights=[0.3, 0.7])
    both = model(image)
    for one, x, y in zip(both.maps, c.maps, d.maps, strict=True):
        torch.testing.assert_close(one, 0.3 * x + 0.7 * y)
    seen = alone(model, "c", image) and model.extract(image)
    model.set_adapter(["c", "d"], weights=[0.3, 0.7])
    torch.testing.assert_close(model(seen).logits, both.logits)
    with pytest.raises(ValueError, match="several, which read other blocks"):
        model.extract(image)


def test_what_does_not_fit_is_refused_and_changes_nothing(image, tmp_path):
    model = model_of()
    for names, weights, said in (
        (["a", "a"], None, "each once"),
        ([], None, "each once"),
        (["a", "b"], [1], "1 weights for 2 sets"),
        (["a", "b"], [0, 0], "not all 0"),
        (["a", "b"], [1e308, 1e308], "whose sum is finite"),
        (["a", "b"], [-1, 2], "0 or more"),
        (["a", "x"], None, "no adapters are named 'x'"),
        ("a", [1], "they are for several names"),
    ):
        with pytest.raises(ValueError, match=said):
            model.set_adapter(names, weights)
        assert model.active_adapter == "a"
        assert not model._shares
    model.add_adapter("lora", head=("linear", {"num_classes": 4}), name="four")
    model.set_adapter(["a", "four"])
    with pytest.raises(ValueError, match="logits of other shapes"):
        model(image)
    model.set_adapter(["a", "c"])  # a pyramid's head and one that reads tokens: their logits are alike
    assert model(image).maps == ()
    with pytest.raises(ValueError, match="save its sets one by one"):
        model.save(tmp_path)
    with pytest.raises(RuntimeError, match="nothing is merged"):
        model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"an ensemble \(a, c\) is not trained"):
        model.train()
    model.set_adapter("b")
    model.train()
    with pytest.raises(RuntimeError, match="call eval"):
        model.set_adapter(["a", "b"])
    model.eval().set_adapter(["a", "b"])
    model.delete_adapter("a")
    assert model.active_adapter == "b"
    assert not model._shares
    assert model.detach() is not None


def test_other_numbers_of_prefix_tokens_are_named(image):
    side = {"conv_inplane": 8, "injector": False}
    model = adaptkit.attach(HOSTS["timm-vit"].build(), ("vit-adapter", side), head=HEAD, name="a")
    model.add_adapter(("vit-adapter", {**side, "prefix": "drop"}), head=HEAD, name="b")
    model.eval().set_adapter(["a", "b"])
    with pytest.raises(ValueError, match=r"numbers of prefix tokens \('a' 1, 'b' 0\)"):
        model(image)


def test_what_looks_inside_refuses_the_mean_of_several_sets(image, tmp_path):
    from adaptkit.analysis import accounting, easy_and_hard, kept_patches

    model = adaptkit.attach(HOSTS["timm-vit"].build(), "adavit", "sfp", name="a")
    model.add_adapter("adavit", "sfp", name="b")
    pyramid = adaptkit.as_pyramid(model.eval())
    model.set_adapter(["a", "b"])
    for look in (
        lambda: model.verify(image),
        lambda: accounting.costs(model, (32, 32)),
        lambda: kept_patches(model, image[:1]),
        lambda: easy_and_hard(model, image),
        lambda: pyramid.save(tmp_path / "file"),
    ):
        with pytest.raises(TypeError, match=r"the sets a, b act as their mean.*model.set_adapter\('a'\)"):
            look()
    assert not (tmp_path / "file").exists()
    model.set_adapter("a")
    assert model.verify(image) < 1e-5
