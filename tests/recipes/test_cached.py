"""Cached features: the backbone runs once per view, the training is the same, and nothing stale is read."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).parent))
from runs import write_folder  # noqa: E402

import adaptkit  # noqa: E402
from recipes import segment  # noqa: E402

ADAPTERS = {
    "none": ["--adapter", "none", "--head", "linear"],
    "sfp": ["--adapter", "sfp"],
    "split": ["--adapter", "vit-split", "--head", "upsample"],
    "extractor": ["--adapter", "vit-adapter", "--adapter-options", '{"conv_inplane": 8, "injector": false, "drop_path": 0}'],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "set", count=5)


def train(folder, out, *more):
    return segment.main(["--train", str(folder), "--val", str(folder), "--num-classes", "3", "--random-backbone",
                         "--size", "32", "48", "--batch-size", "2", "--steps", "8", "--save-every", "0", "--out",
                         str(out), *more])  # fmt: skip


def shards(folder):
    return {f.name: f.stat().st_mtime_ns for f in folder.glob("*.safetensors")}


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_cache_trains_what_the_backbone_trains_on_the_same_views(name, folder, tmp_path, monkeypatch):
    views = [*ADAPTERS[name], "--views", "2"]
    train(folder, tmp_path / "live", *views)
    ran = []
    monkeypatch.setattr(segment, "loss", None)
    forward = adaptkit.AdaptedModel.forward

    def counted(self, image):
        ran.append(type(image).__name__)
        return forward(self, image)

    monkeypatch.setattr(adaptkit.AdaptedModel, "forward", counted)
    train(folder, tmp_path / "kept", *views, "--cache-features", str(tmp_path / "cache"), "--cache-dtype", "float32")
    live, kept = (adaptkit.load(tmp_path / run / "adapter").tensors for run in ("live", "kept"))
    for key, tensor in live.items():
        torch.testing.assert_close(kept[key], tensor, atol=2e-4, rtol=2e-3)
    assert ran.count("CachedFeatures") == 8  # each step; the images are those of the two evaluations
    assert json.loads((tmp_path / "kept" / "result.json").read_text())["seconds_to_cache"] > 0


def test_a_second_run_reads_the_cache_and_a_cut_one_makes_what_is_missing(folder, tmp_path, capsys):
    keep = [*ADAPTERS["sfp"], "--views", "14", "--cache-features", str(tmp_path / "cache")]
    train(folder, tmp_path / "a", *keep)
    there = shards(tmp_path / "cache")
    assert len(there) == 2  # 70 samples, 64 in a shard
    (tmp_path / "cache" / "features-00001.safetensors").unlink()
    train(folder, tmp_path / "b", *keep)
    assert "for 6 of them, 64 were there" in capsys.readouterr().out
    again = shards(tmp_path / "cache")
    assert again["features-00000.safetensors"] == there["features-00000.safetensors"]
    a, b = ((tmp_path / run / "adapter" / "adapter_model.safetensors").read_bytes() for run in "ab")
    assert a == b


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (["--size", "48", "48"], "size"),
        (["--views", "3"], "samples"),
        (["--cache-dtype", "float32"], "dtype"),
        (["--seed", "1"], "backbone"),  # a random backbone of another seed
    ],
)
def test_features_of_something_else_are_never_read(more, what, folder, tmp_path):
    keep = [*ADAPTERS["none"], "--views", "2", "--cache-features", str(tmp_path / "cache"), "--steps", "1"]
    train(folder, tmp_path / "a", *keep)
    with pytest.raises(ValueError, match=rf"were made with {what}=.*now it is .*choose another folder"):
        train(folder, tmp_path / "b", *keep, *more)


def test_adapters_that_need_the_backbone_are_refused(folder, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"its injectors write into the tokens"):
        train(folder, tmp_path, "--adapter", "vit-adapter", "--views", "2", "--cache-features", str(tmp_path / "cache"))
    with pytest.raises(SystemExit):
        train(folder, tmp_path, "--cache-features", str(tmp_path / "cache"))
    assert "--cache-features needs --views K" in capsys.readouterr().err
