"""The adapter file: whole by itself, checked against the backbone, never half-written."""

import json
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import randomise
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

import adaptkit
from adaptkit.hub import file as files
from adaptkit.hub.backbone import fingerprint
from adaptkit.hub.fits import OtherNormalisation

HEAD = ("linear", {"num_classes": 3})


def host(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 0}
    return randomise(VisionTransformer(**{**sizes, **options}), seed)


def swin():
    torch.manual_seed(0)
    sizes = {"img_size": 64, "patch_size": 4, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}
    return randomise(SwinTransformer(**sizes, num_classes=0), 0)


@pytest.fixture
def saved(tmp_path):
    model = adaptkit.attach(host(), "sfp", head=HEAD)
    model.save(tmp_path / "run", task="semantic-segmentation")
    return tmp_path / "run"


def test_the_header_says_everything(saved):
    header = adaptkit.load(saved).header
    assert header["format"] == 2
    assert header["adaptkit"] == adaptkit.__version__
    assert header["adapters"] == [{"name": "sfp", "config": {"strides": [4, 8, 16, 32]}}]
    assert header["head"] == {"name": "linear", "config": {"num_classes": 3}}
    assert header["backbone"]["spec"]["embed_dim"] == 32
    assert header["backbone"]["positions"] == "bicubic antialias"
    assert set(header["backbone"]["fingerprint"]) == {"patch", "first", "last"}
    assert header["metadata"] == {"task": "semantic-segmentation"}
    assert json.loads((saved / "adapter_config.json").read_text()) == header
    assert "library_name: adaptkit" in (saved / "README.md").read_text()


@pytest.mark.parametrize("backbone", ["plain", "hierarchical"])
def test_a_file_of_format_1_is_read_with_the_names_of_today(tmp_path, backbone):
    build = host if backbone == "plain" else swin
    model = adaptkit.attach(build(), ("metaformer", {"width": 8}), head=None)
    model.save(tmp_path / "new")
    names = {
        "embed_dim": "dim",
        "num_heads": "heads",
        "patch_size": "patch",
        "num_prefix_tokens": "prefix",
        "embed_dims": "dims",
    }
    file = adaptkit.load(tmp_path / "new")
    spec = {names.get(k, k): v for k, v in file.header["backbone"]["spec"].items()}
    header = {**file.header, "format": 1, "backbone": {**file.header["backbone"], "spec": spec}}
    save_file(file.tensors, tmp_path / "old.safetensors", {"adaptkit": json.dumps(header)})
    old = adaptkit.load(tmp_path / "old.safetensors")
    assert old.spec == file.spec == model.spec
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(adaptkit.attach(build(), old, strict=True)(x).tokens, model.eval()(x).tokens)


@pytest.mark.parametrize(
    ("old", "new"),
    [("dim", "embed_dim"), ("heads", "num_heads"), ("patch", "patch_size"), ("prefix", "num_prefix_tokens")],
)
def test_old_names_of_a_spec_work_and_warn(old, new):
    spec = adaptkit.Spec("timm-vit", 384, 12, 6, 14, 5)
    with pytest.warns(DeprecationWarning, match=f"Spec.{old} is called {new} now"):
        assert getattr(spec, old) == getattr(spec, new)


def test_no_name_of_the_backbone_is_in_the_file(saved):
    with safe_open(saved / "adapter_model.safetensors", "pt") as f:
        assert all(k.startswith(("sfp.", "head.")) for k in f.keys())  # noqa: SIM118


def test_the_weights_file_alone_is_enough(saved, tmp_path):
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((saved / "adapter_model.safetensors").read_bytes())
    x = torch.randn(1, 3, 40, 40)
    a, b = (adaptkit.attach(host(), adaptkit.load(p))(x).logits for p in (saved, alone))
    assert torch.equal(a, b)


def test_equal_adapters_are_equal_bytes(tmp_path):
    model = adaptkit.attach(host(), "vit-adapter", head=HEAD)
    a, b = model.save(tmp_path / "a"), model.save(tmp_path / "b")
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (a / name).read_bytes() == (b / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "both_sides"),
    [
        ({"depth": 6}, "trained on depth=4 .* this backbone has depth=6"),
        ({"embed_dim": 48}, "trained on embed_dim=32 .* this backbone has embed_dim=48"),
        ({"patch_size": 16}, "trained on patch_size=8 .* this backbone has patch_size=16"),
        ({"num_heads": 4}, "trained on num_heads=2 .* this backbone has num_heads=4"),
        ({"reg_tokens": 4}, "trained on num_prefix_tokens=1 .* this backbone has num_prefix_tokens=5"),
    ],
)
def test_another_structure_is_an_error_that_names_both_sides_and_the_remedy(saved, options, both_sides):
    other = host(**options)
    with pytest.raises(ValueError, match=f"{both_sides}.*attach it to a ViT with"):
        adaptkit.attach(other, saved)
    assert all(p.requires_grad for p in other.parameters())  # nothing was frozen on the way


def test_other_weights_are_a_warning_and_with_strict_an_error(saved):
    with pytest.warns(UserWarning, match="other weights of this structure"):
        adaptkit.attach(host(seed=5), saved)
    with pytest.raises(ValueError, match="other weights of this structure"):
        adaptkit.attach(host(seed=5), saved, strict=True)


def test_the_same_weights_in_half_precision_are_no_other_weights(saved, recwarn):
    adaptkit.attach(host().bfloat16(), saved, strict=True)
    adaptkit.attach(host().half(), saved, strict=True)
    assert not [w for w in recwarn if "other weights" in str(w.message)]


def test_other_normalisation_is_a_warning(saved, tmp_path):
    model = host()
    model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    adaptkit.attach(model, "sfp").save(tmp_path / "half")
    other, same = host(), host()
    other.pretrained_cfg = same.pretrained_cfg = {"mean": (0.4, 0.4, 0.4), "std": (0.2, 0.2, 0.2)}
    with pytest.warns(UserWarning, match="normalised by mean"):
        adaptkit.attach(other, tmp_path / "half")
    with warnings.catch_warnings():  # predict() of this model follows the file
        warnings.simplefilter("error", OtherNormalisation)
        adaptkit.from_pretrained(tmp_path / "half", backbone=same)


@pytest.mark.parametrize("keep", [0, 5, 500, -1])
def test_a_truncated_file_is_a_clear_error(saved, keep):
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        adaptkit.load(saved)


def test_what_is_no_weights_file_is_called_by_its_name(saved):
    with pytest.raises(ValueError, match=r"Give the folder, or adapter_model\.safetensors in it"):
        adaptkit.load(saved / "adapter_config.json")
    weights = saved / "adapter_model.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        adaptkit.load(saved)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_a_permission_error(saved):
    (saved / "adapter_model.safetensors").chmod(0)
    with pytest.raises(PermissionError):
        adaptkit.load(saved)


def test_a_foreign_safetensors_file_is_a_clear_error(tmp_path):
    save_file({"model.weight": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"no 'adaptkit' header; its tensors are model\.weight"):
        adaptkit.load(tmp_path / "x.safetensors")


def test_a_newer_format_asks_for_an_upgrade(tmp_path):
    save_file(
        {"a": torch.ones(1)}, tmp_path / "x.safetensors", {"adaptkit": json.dumps({"format": 99, "adaptkit": "9"})}
    )
    with pytest.raises(ValueError, match="format 99, written by adaptkit 9.*upgrade"):
        adaptkit.load(tmp_path / "x.safetensors")


def test_a_damaged_header_is_a_clear_error(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors", {"adaptkit": "{"})
    with pytest.raises(ValueError, match="adaptkit header is damaged: .*line 1 column 2"):
        adaptkit.load(tmp_path / "x.safetensors")


def test_tensors_that_do_not_match_the_header_are_a_clear_error(saved):
    loaded = adaptkit.load(saved)
    loaded.tensors.pop(next(k for k in loaded.tensors if k.startswith("sfp.")))
    with pytest.raises(ValueError, match="1 tensors are missing"):
        adaptkit.attach(host(), loaded)


def test_a_missing_file_says_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a folder with adapter_model\.safetensors"):
        adaptkit.load(tmp_path / "nothing")


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path, monkeypatch):
    target = tmp_path / "x"
    files.write_atomic(target, b"old")

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        files.write_atomic(target, b"new")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_an_unwritable_folder_is_found_by_asking(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot write to .*Choose a folder"):
        files.check_writable(tmp_path / "file" / "run")


def test_the_folder_of_a_run_is_answered_with_the_adapter_in_it(tmp_path):
    adaptkit.attach(host(), "sfp").save(tmp_path / "run" / "adapter")
    with pytest.raises(FileNotFoundError, match=r"no adapter at .*run \(there is one in .*run.adapter\): expected"):
        adaptkit.load(tmp_path / "run")


def test_a_layer_of_more_weights_than_float32_can_count_has_a_fingerprint():
    weight = torch.zeros(2**24 + 3)
    weight[-1] = 7.0
    view = SimpleNamespace(fingerprint=None, fingerprint_tensors=lambda: {"patch": weight})
    assert fingerprint(view)["patch"] == [0.0] * 7 + [7.0]
