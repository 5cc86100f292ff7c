"""Cached features: the backbone runs once per view, the training is the same, and nothing stale is read."""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).parent))
from runs import TINY, cut_off, tree, write_folder  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import adaptkit  # noqa: E402
from adaptkit.core.view import Source  # noqa: E402
from recipes import depth, segment  # noqa: E402
from recipes.cached import unpacked  # noqa: E402

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
    return segment.main(["--train", str(folder), "--val", str(folder), "--num-classes", "3", *TINY,
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
        (["--cache-dtype", "int8"], "dtype"),
        (["--label-map", '{"0": 1, "1": 0, "2": 2}'], "reading"),
        (["--ignore-index", "2"], "reading"),
        (["--seed", "1"], "backbone"),  # a random backbone of another seed
    ],
)
def test_features_of_something_else_are_never_read(more, what, folder, tmp_path):
    keep = [*ADAPTERS["none"], "--views", "2", "--cache-features", str(tmp_path / "cache"), "--steps", "1"]
    train(folder, tmp_path / "a", *keep)
    with pytest.raises(ValueError, match=rf"were made with {what}[= ].*now it is .*choose another folder"):
        train(folder, tmp_path / "b", *keep, *more)


def test_a_set_that_moved_is_known_and_one_that_changed_is_not(folder, tmp_path, capsys):
    """By what the files hold: where they lie and when they were written does not matter."""
    keep = [*ADAPTERS["none"], "--views", "2", "--cache-features", str(tmp_path / "cache"), "--steps", "1"]
    train(folder, tmp_path / "a", *keep)
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "set", copy_function=shutil.copyfile)
    train(moved, tmp_path / "b", *keep)
    assert "10 were there" in capsys.readouterr().out
    mask = sorted((moved / "masks").iterdir())[3]
    ids = np.array(Image.open(mask))
    Image.fromarray(np.where(ids == 1, 2, ids).astype(ids.dtype)).save(mask)
    with pytest.raises(
        ValueError, match="were made with data whose checksum was [0-9a-f]{8}, now it is [0-9a-f]{8}: choose"
    ):
        train(moved, tmp_path / "c", *keep)


def test_depth_maps_that_are_read_in_another_way_are_told_apart():
    options = argparse.Namespace(seed=0, size=(8, 8), depth_scale=1000.0, min_depth=0.001, max_depth=10.0)
    source = Source(mean=(0.5,) * 3, std=(0.5,) * 3)
    told = depth.DepthData([], source, options, train=True).reading()
    for name, value in (("depth_scale", 256.0), ("min_depth", 1.0), ("max_depth", 80.0)):
        other = argparse.Namespace(**{**vars(options), name: value})
        assert depth.DepthData([], source, other, train=True).reading() != told


def test_adapters_that_need_the_backbone_are_refused(folder, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"its injectors write into the tokens"):
        train(folder, tmp_path, "--adapter", "vit-adapter", "--views", "2", "--cache-features", str(tmp_path / "cache"))
    with pytest.raises(SystemExit):
        train(folder, tmp_path, "--cache-features", str(tmp_path / "cache"))
    assert "--cache-features needs --views K" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float16", pytest.param("int8", marks=pytest.mark.full)])
def test_a_cache_that_holds_more_blocks_trains_the_same(folder, tmp_path, dtype):
    views = ["--views", "2", "--steps", "3", "--cache-dtype", dtype, "--cache-features"]
    train(folder, tmp_path / "own", *ADAPTERS["sfp"], *views, str(tmp_path / "last"))
    train(folder, tmp_path / "larger", *ADAPTERS["extractor"], *views, str(tmp_path / "all"))
    before = tree(tmp_path / "all")
    train(folder, tmp_path / "other", *ADAPTERS["sfp"], *views, str(tmp_path / "all"))
    assert len(kept_in(tmp_path / "all")) > len(kept_in(tmp_path / "last"))
    assert tree(tmp_path / "all") == before
    own, other = (adaptkit.load(tmp_path / run / "adapter").tensors for run in ("own", "other"))
    assert all(torch.equal(other[key], tensor) for key, tensor in own.items())


def test_a_cache_that_holds_fewer_blocks_or_is_not_whole_is_refused(folder, tmp_path):
    views = ["--views", "2", "--steps", "1", "--cache-features"]
    train(folder, tmp_path / "a", *ADAPTERS["sfp"], *views, str(tmp_path / "last"))
    with pytest.raises(ValueError, match=r"were made with after=\[5\], now it is after=\["):
        train(folder, tmp_path / "b", *ADAPTERS["extractor"], *views, str(tmp_path / "last"))
    train(folder, tmp_path / "c", *ADAPTERS["extractor"], *views, str(tmp_path / "all"))
    next((tmp_path / "all").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"were made with after=\[.*\], now it is after=\[5\]"):
        train(folder, tmp_path / "d", *ADAPTERS["sfp"], *views, str(tmp_path / "all"))


# ------------------------------------------------------------------------------------------------------ eight bits


def kept_in(folder):
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def test_eight_bits_keep_every_feature_within_half_a_step_in_half_the_room(folder, tmp_path):
    keep = [*ADAPTERS["sfp"], "--views", "2", "--steps", "2"]
    for dtype in ("float32", "float16", "int8"):
        train(
            folder, tmp_path / dtype, *keep, "--cache-features", str(tmp_path / f"of {dtype}"), "--cache-dtype", dtype
        )
    exact, half, eight = (kept_in(tmp_path / f"of {dtype}") for dtype in ("float32", "float16", "int8"))
    names = [name for name in exact if name != "target"]
    assert sorted(eight) == sorted([*names, *(name + "_scale" for name in names), "target"])
    for name in names:
        q, scale = eight[name], eight[name + "_scale"]
        step = scale.float().repeat_interleave(32, -1)[..., : q.shape[-1]]
        off = (unpacked(name, {name: q, name + "_scale": scale}) - exact[name]).abs()
        assert (off <= 0.501 * step).all()
        assert off.max() > 0
        assert q.nbytes + scale.nbytes <= 0.54 * half[name].nbytes
    assert torch.equal(eight["target"], exact["target"])


def test_a_cache_of_eight_bits_that_was_cut_ends_as_one_that_was_not(folder, tmp_path, monkeypatch):
    keep = [*ADAPTERS["none"], "--views", "2", "--steps", "1", "--cache-dtype", "int8", "--cache-features"]
    train(folder, tmp_path / "a", *keep, str(tmp_path / "whole"))
    extract = adaptkit.AdaptedModel.extract
    monkeypatch.setattr(adaptkit.AdaptedModel, "extract", cut_off(extract, 4))
    with pytest.raises(KeyboardInterrupt):
        train(folder, tmp_path / "b", *keep, str(tmp_path / "cut"))
    parts = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "cut").glob("*.part")}
    assert len(parts) == 3
    monkeypatch.setattr(adaptkit.AdaptedModel, "extract", extract)
    train(folder, tmp_path / "b", *keep, str(tmp_path / "cut"), "--overwrite")
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def test_eight_bits_alone_say_how_many_share_a_scale(folder, tmp_path):
    keep = [*ADAPTERS["none"], "--views", "2", "--steps", "1", "--cache-features"]
    train(folder, tmp_path / "a", *keep, str(tmp_path / "float16"))
    said = json.loads((tmp_path / "float16" / "cache.json").read_text())
    assert "group" not in said
    assert said["format"] == 1
    assert set(kept_in(tmp_path / "float16")) == {f"after_{i}" for i in said["after"]} | {"target"}
    train(folder, tmp_path / "b", *keep, str(tmp_path / "int8"), "--cache-dtype", "int8")
    eight = json.loads((tmp_path / "int8" / "cache.json").read_text())
    assert {k: v for k, v in eight.items() if said.get(k) != v} == {"dtype": "int8", "group": 32}
