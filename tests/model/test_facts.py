"""An adapted model says what its backbone would say of itself, and no more."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS

import adaptkit
from adaptkit import cli

NAMES = ("pretrained_cfg", "default_cfg", "config")


def backbone(**options):
    """A timm model of one block whose weights are said to want SigLIP's normalisation at 384 pixels."""
    overlay = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, 384, 384), "crop_pct": 0.9}
    return timm.create_model("vit_tiny_patch16_224", depth=1, pretrained_cfg_overlay=overlay, **options)


def whole(model):
    return model


def pyramid(model):
    return adaptkit.as_pyramid(model)


@pytest.mark.parametrize("around", [whole, pyramid])
def test_timm_makes_the_transform_of_the_backbone(around):
    host = backbone()
    wanted = timm.data.resolve_model_data_config(host)
    assert wanted["mean"] == (0.5,) * 3
    assert wanted["input_size"] == (3, 384, 384)
    model = around(adaptkit.attach(host, "sfp"))
    assert timm.data.resolve_model_data_config(model) == wanted
    made = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    assert str(made) == str(timm.data.create_transform(**wanted))


def test_a_compiled_model_has_them_too():
    host = backbone()
    assert torch.compile(adaptkit.attach(host, "sfp")).pretrained_cfg is host.pretrained_cfg


def test_timms_two_names_and_transformers_config_are_the_backbones_own():
    host = backbone()
    model = adaptkit.attach(host, "lora")
    assert model.pretrained_cfg is host.pretrained_cfg
    assert model.default_cfg is host.default_cfg
    host = HOSTS["hf-dinov2"].build()
    assert adaptkit.attach(host, "lora").config is host.config


@pytest.mark.parametrize(("name", "absent"), [("timm-vit", "config"), ("hf-vit", "pretrained_cfg")])
def test_what_the_backbone_lacks_is_absent(name, absent):
    model = adaptkit.attach(HOSTS[name].build(), "sfp")
    assert getattr(model, absent, None) is None
    with pytest.raises(AttributeError, match=absent):
        getattr(model, absent)


@pytest.mark.parametrize("name", NAMES)
def test_they_are_read_only(name):
    host = backbone() if name != "config" else HOSTS["hf-vit"].build()
    model, before = adaptkit.attach(host, "sfp"), getattr(host, name)
    with pytest.raises(AttributeError):
        setattr(model, name, {})
    assert getattr(host, name) is before


@pytest.mark.parametrize("build", [HOSTS["hf-vit"].build, backbone])
def test_a_peft_model_is_asked_like_the_model_inside(build):
    peft = pytest.importorskip("peft")
    inner = build()
    targets = ["q_proj"] if "transformers" in type(inner).__module__ else ["qkv"]
    model = adaptkit.attach(peft.get_peft_model(inner, peft.LoraConfig(target_modules=targets)), "sfp")
    name = "config" if "transformers" in type(inner).__module__ else "pretrained_cfg"
    assert getattr(model, name) is getattr(inner, name)


@pytest.mark.parametrize("name", NAMES)
def test_a_detached_model_has_none(name):
    host = backbone() if name != "config" else HOSTS["hf-vit"].build()
    model = adaptkit.attach(host, "sfp")
    model.detach()
    assert getattr(model, name, None) is None
    assert getattr(host, name)


def test_a_timm_model_inside_transformers_is_asked_for_the_record_of_its_weights():
    transformers = pytest.importorskip("transformers")
    record = {"architecture": "vit_tiny_patch16_224", "tag": "mine", "mean": [0.1] * 3, "std": [0.2] * 3}
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", model_args={"depth": 1}, pretrained_cfg=record
    )
    model = adaptkit.attach(transformers.TimmWrapperModel(config), "sfp")
    assert timm.data.resolve_model_data_config(model)["mean"] == [0.1] * 3
    assert model.config is config


MEAN, STD = [0.25, 0.5, 0.75], [0.2, 0.3, 0.4]


def says_a_tenth():
    host = HOSTS["timm-vit"].build()
    host.pretrained_cfg = {"mean": (0.1,) * 3, "std": (0.9,) * 3}
    return host


def test_the_normalisation_that_was_trained_with_is_what_every_part_of_the_file_says(tmp_path, capsys):
    adaptkit.attach(says_a_tenth(), "sfp").save(tmp_path / "one", mean=np.array(MEAN), std=tuple(STD))
    with pytest.warns(UserWarning, match=r"by mean \[0.25, 0.5, 0.75\], std .*; this backbone declares mean \[0.1"):
        again = adaptkit.attach(says_a_tenth(), tmp_path / "one")
    again.save(tmp_path / "two")
    for name in ("one", "two"):
        said = adaptkit.load(tmp_path / name).header["backbone"]
        assert (said["mean"], said["std"]) == (MEAN, STD)
        assert f"torch.tensor({MEAN}), torch.tensor({STD})" in (tmp_path / name / "README.md").read_text()
    exported = adaptkit.export.to_exported_program(again, tmp_path / "model.pt2", (32, 32))
    said = {"adaptkit.json": ""}
    torch.export.load(exported, extra_files=said)
    assert json.loads(json.loads(said["adaptkit.json"])["mean"]) == MEAN
    assert cli.main(["inspect", str(tmp_path / "two")]) == 0
    assert "mean [0.25, 0.5, 0.75]" in capsys.readouterr().out


@pytest.mark.parametrize("metadata", [{"mean": 0.43}, {"mean": MEAN}, {"mean": MEAN[:2], "std": STD}, {"std": "none"}])
def test_metadata_that_are_no_normalisation_leave_what_the_backbone_says(tmp_path, metadata):
    adaptkit.attach(says_a_tenth(), "sfp").save(tmp_path, **metadata)
    header = adaptkit.load(tmp_path).header
    assert header["backbone"]["mean"] == [0.1] * 3
    assert header["metadata"] == metadata
