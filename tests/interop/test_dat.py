"""The authors' DAT checkpoints, whole and in part."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open

import adaptkit.models
from adaptkit.interop import from_official

GOLDEN = Path(__file__).parents[2] / "../shared/golden"


def golden(name):
    path = GOLDEN / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip("golden vectors are not beside this checkout")
    with safe_open(path, "pt") as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        config = json.loads(f.metadata()["config"])
    return config, {k[9:]: v for k, v in tensors.items() if k.startswith("official.")}, tensors


@torch.no_grad()
def test_a_checkpoint_and_the_authors_configuration_give_their_model():
    config, official, tensors = golden("dat_model_a")
    model = from_official("dat", {"model": official}, **config)
    torch.testing.assert_close(model(tensors["input"]), tensors["logits"], atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_a_single_attention_is_built_from_its_own_arguments():
    config, official, tensors = golden("dat_attention_a")
    mixer = from_official("dat", official, **config)
    torch.testing.assert_close(mixer(tensors["input"]), tensors["output"], atol=2e-4, rtol=2e-4)


def test_a_backbone_without_classifier_takes_the_rest():
    config, official, _ = golden("dat_model_a")
    model = from_official("dat", official, adaptkit.models.DAT(**{**config, "num_classes": 0}))
    assert torch.equal(model.cls_norm.norm.weight, official["cls_norm.norm.weight"])


def test_another_number_of_classes_is_an_error_with_its_remedy():
    config, official, _ = golden("dat_model_a")
    with pytest.raises(ValueError, match="the checkpoint has 10 classes, the model 3; build it with num_classes=10"):
        from_official("dat", official, **{**config, "num_classes": 3})


def test_another_configuration_is_an_error_that_names_tensors():
    _, official, _ = golden("dat_model_a")
    with pytest.raises(
        ValueError, match="tensors are missing .*; give the whole checkpoint, and the options that it was trained with"
    ):
        from_official("dat", official, timm.create_model("dat_tiny", num_classes=10))


def test_a_checkpoint_of_the_second_version_is_refused():
    with pytest.raises(ValueError, match=r"DAT\+\+"):
        from_official("dat", {"stages.0.local_perception_units.0.weight": torch.zeros(1)})


def test_an_adapter_checkpoint_needs_its_backbone():
    with pytest.raises(ValueError, match="'adavit' needs the backbone"):
        from_official("adavit", {})


def test_what_the_tensors_of_one_attention_do_not_tell_is_asked_for_by_name():
    with pytest.raises(ValueError, match="head_dim, hw, stage_idx: not in the tensors of a single attention"):
        from_official("dat", {"proj_q.weight": torch.zeros(8, 8, 1, 1)}, heads=2, groups=1)
