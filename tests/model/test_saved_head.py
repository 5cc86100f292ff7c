"""attach(backbone, file, head=...): the same head keeps what it was trained to, another one says what it leaves out."""

import dataclasses
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS, randomise

import adaptkit
from adaptkit import FPNHeadConfig, LinearHeadConfig

LINEAR = ("linear", {"num_classes": 3})


def host():
    return HOSTS["timm-vit"].build()


def image():
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def trained(folder, head, adapter="sfp"):
    model = adaptkit.attach(host(), adapter, head=head)
    randomise(model.sets)
    model.save(folder)
    return model.eval()(image()).logits


class Own(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.score = nn.Linear(32, classes)

    def forward(self, features):
        return self.score(features.tokens)


SAME = [
    ("linear", LINEAR, LINEAR),
    ("config", LINEAR, LinearHeadConfig(num_classes=3)),
    ("defaults completed", LinearHeadConfig(num_classes=3), LINEAR),
    ("fpn", ("fpn", {"num_classes": 3}), FPNHeadConfig(num_classes=3)),
]


@pytest.mark.parametrize(("saved", "given"), [s[1:] for s in SAME], ids=[s[0] for s in SAME])
def test_the_same_head_keeps_what_it_was_trained_to(tmp_path, saved, given, recwarn):
    expected = trained(tmp_path, saved)
    found = adaptkit.attach(host(), tmp_path, head=given)
    assert torch.equal(found(image()).logits, expected)
    assert not [w for w in recwarn if "left out" in str(w.message)]


@pytest.mark.parametrize(
    ("saved", "given", "said"),
    [
        (
            LINEAR,
            ("linear", {"num_classes": 5}),
            r"\('linear', num_classes=3\) is left out.*\('linear', num_classes=5\)",
        ),
        (LINEAR, FPNHeadConfig(num_classes=3), "'linear', num_classes=3.* is left out.*'fpn', num_classes=3"),
        (LINEAR, Own(), r"'linear', num_classes=3.* is left out.*Own"),
        (Own(), LINEAR, r"Own\) is left out.*'linear', num_classes=3"),
        (Own(), Own(5), r"Own\) is left out.*Own"),
    ],
)
def test_another_head_is_a_warning_that_names_both(tmp_path, saved, given, said):
    trained(tmp_path, saved)
    with pytest.warns(UserWarning, match=f"the trained head in .*{said}"):
        model = adaptkit.attach(host(), tmp_path, head=given)
    assert model(image()).logits is not None


def test_a_module_given_beside_another_saved_head_keeps_its_own_weights(tmp_path):
    trained(tmp_path, LINEAR)
    own = randomise(Own(), 7)
    before = own.score.weight.clone()
    with pytest.warns(UserWarning, match="left out"):
        adaptkit.attach(host(), tmp_path, head=own)
    assert torch.equal(own.score.weight, before)


def test_a_registered_head_given_as_a_module_keeps_what_it_was_trained_to(tmp_path):
    expected = trained(tmp_path, LINEAR)
    module = adaptkit.attach(host(), "sfp", head=LINEAR).head
    assert torch.equal(adaptkit.attach(host(), tmp_path, head=module)(image()).logits, expected)


def test_a_registered_head_with_other_options_given_as_a_module_is_another(tmp_path):
    trained(tmp_path, LINEAR)
    module = adaptkit.attach(host(), "sfp", head=("linear", {"num_classes": 4})).head
    with pytest.warns(UserWarning, match="left out"):
        assert adaptkit.attach(host(), tmp_path, head=module)(image()).logits.shape[1] == 4


def test_a_head_of_ones_own_keeps_what_it_was_trained_to(tmp_path):
    expected = trained(tmp_path, Own())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*does not read all that")
        assert torch.equal(adaptkit.attach(host(), tmp_path, head=Own())(image()).logits, expected)


def test_of_two_files_the_head_asked_for_is_the_one_that_is_taken(tmp_path):
    expected = trained(tmp_path / "a", LINEAR)
    trained(tmp_path / "b", ("linear", {"num_classes": 4}), adapter=("metaformer", {"width": 8}))
    with pytest.warns(UserWarning, match=r"b.adapter_model.safetensors .*num_classes=4\) is left out"):
        model = adaptkit.attach(host(), tmp_path / "a", tmp_path / "b", head=LINEAR)
    saved = adaptkit.load(tmp_path / "a").tensors_of("head")
    assert expected.shape[1] == 3
    assert all(torch.equal(v, saved[k]) for k, v in model.head.state_dict().items())


def test_two_files_with_the_head_asked_for_are_an_error_with_a_way_out(tmp_path):
    trained(tmp_path / "a", LINEAR)
    trained(tmp_path / "b", LINEAR, adapter=("metaformer", {"width": 8}))
    with pytest.raises(ValueError, match="both hold this head.*dataclasses.replace"):
        adaptkit.attach(host(), tmp_path / "a", tmp_path / "b", head=LINEAR)
    file = adaptkit.load(tmp_path / "b")
    without = dataclasses.replace(file, header={**file.header, "head": None})
    model = adaptkit.attach(host(), tmp_path / "a", without, head=LINEAR)
    saved = adaptkit.load(tmp_path / "a").tensors_of("head")
    assert all(torch.equal(v, saved[k]) for k, v in model.head.state_dict().items())


def test_a_saved_head_of_a_plug_in_that_is_not_here_is_left_out(tmp_path):
    trained(tmp_path, LINEAR)
    file = adaptkit.load(tmp_path)
    foreign = dataclasses.replace(file, header={**file.header, "head": {"name": "unheard-of", "config": {}}})
    with pytest.warns(UserWarning, match="'unheard-of'.* is left out"):
        adaptkit.attach(host(), foreign, head=LINEAR)
