"""Fresh adapters come in training mode whatever the mode of the backbone, loaded ones in eval mode; on every host."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS

import adaptkit

BUILDERS = {
    **{name: host.build for name, host in HOSTS.items()},
    "demo": lambda: adaptkit.demo_backbone(pretrained=False),
}


def backbone(name, training):
    torch.manual_seed(0)
    return BUILDERS[name]().train(training)


def modes(model):
    """Of the backbone's modules, and of all others."""
    inside = set(model.backbone.modules())
    return {m.training for m in inside}, {m.training for m in model.modules() if m not in inside}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", BUILDERS)
def test_fresh_adapters_are_in_training_mode_and_loaded_ones_are_not(name, training, tmp_path):
    head = ("linear", {"num_classes": 2})
    fresh = adaptkit.attach(backbone(name, training), "metaformer", head=head)
    assert modes(fresh) == ({False}, {True})
    folder = fresh.save(tmp_path / "a")
    assert fresh.training  # saving changes nothing
    assert modes(adaptkit.attach(backbone(name, training), folder)) == ({False}, {False})
    opened = adaptkit.from_pretrained(folder, backbone=backbone(name, training))
    assert modes(opened) == ({False}, {False})


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["demo", "timm-vit", next(n for n in HOSTS if n.startswith("hf"))])
def test_sets_and_many_tasks_follow_the_same_rule(name, training, tmp_path):
    folder = adaptkit.attach(backbone(name, False), "sfp").save(tmp_path / "a")
    model = adaptkit.attach(backbone(name, training), "sfp")
    model.add_adapter("metaformer", name="fresh")
    model.add_adapter(folder, name="loaded")
    assert model.sets["fresh"].training
    assert not model.sets["loaded"].training
    model.set_adapter("loaded")  # a model in training mode trains what acts, with its dropout
    assert all(m.training for m in model.sets["loaded"].modules())
    many = adaptkit.attach_many(backbone(name, training), {"fresh": "sfp"})
    assert modes(many.model) == ({False}, {True})
    many = adaptkit.attach_many(backbone(name, training), {"loaded": folder})
    assert modes(many.model) == ({False}, {False})
