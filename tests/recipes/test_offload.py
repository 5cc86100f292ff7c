"""--offload: the cache, the run and the plan of a backbone whose blocks wait in CPU memory."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).parent))
from runs import TINY, cut_off, reset, tree, write_folder  # noqa: E402

import adaptkit.cli as cli  # noqa: E402
from adaptkit.model import offloading  # noqa: E402
from recipes import cached, devices, segment  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "set", count=5)


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory):
    """A run without --offload: its cache and its result."""
    path = tmp_path_factory.mktemp("plain")
    return path / "cache", segment.main(arguments(folder, path / "cache", path / "run"))


@pytest.fixture
def visits(monkeypatch):
    """Has blocks go elsewhere, where clones of their tensors stand for those on a GPU; the copies of each pass."""
    copies = []

    def offload(model, device):
        there = offloading.offload(model, device)
        there.device = torch.device("cuda", 0)
        return there

    def copied(tensor, device):
        copies.append(tensor)
        return nn.Parameter(tensor.detach().clone(), False) if isinstance(tensor, nn.Parameter) else tensor.clone()

    monkeypatch.setattr(devices, "offload", offload)
    monkeypatch.setattr(offloading, "_copied", copied)
    return copies


def arguments(folder, cache, out, *more):
    return ["--train", str(folder), "--val", str(folder), "--num-classes", "3", *TINY,
            "--size", "32", "48", "--adapter", "vit-adapter", "--adapter-options",
            '{"conv_inplane": 8, "injector": false}', "--batch-size", "2", "--steps", "3", "--save-every", "0", "--views",
            "3", "--cache-features", str(cache), "--out", str(out), *more]  # fmt: skip


def test_cache_and_run_are_the_same_bits(folder, plain, tmp_path, visits):
    reset()
    there = segment.main(arguments(folder, tmp_path / "cache", tmp_path / "run", "--offload"))
    assert tree(tmp_path / "cache") == tree(plain[0])
    assert there["file_sha256"] == plain[1]["file_sha256"]
    assert there["miou"] == plain[1]["miou"]
    assert len(visits) > len({id(t) for t in visits})  # validation runs the backbone too


def test_the_cache_takes_one_pass_for_64_images(folder, tmp_path, visits, monkeypatch):
    """15 samples in batches of 2."""
    passes = []
    real = cached.extract_each
    monkeypatch.setattr(cached, "extract_each", lambda model, images: passes.append(len(images)) or real(model, images))
    before = []
    monkeypatch.setattr(cached.FeatureCache, "write", lambda *a: before.append(len(visits)))
    with pytest.raises(IndexError, match="shards are missing"):
        segment.main(arguments(folder, tmp_path / "c", tmp_path / "out", "--offload"))
    assert passes == [8]
    assert before == [len({id(t) for t in visits[: before[0]]})]


def test_a_cache_that_was_cut_ends_as_one_that_was_not(folder, plain, tmp_path, monkeypatch):
    reset()
    monkeypatch.setattr(cached, "TOGETHER", 4)
    real = cached.extract_each
    monkeypatch.setattr(cached, "extract_each", cut_off(real, 3))
    with pytest.raises(KeyboardInterrupt):
        segment.main(arguments(folder, tmp_path / "cut", tmp_path / "b", "--offload"))
    assert len(list((tmp_path / "cut").glob("*.part"))) == 4
    monkeypatch.setattr(cached, "extract_each", real)
    reset()
    segment.main(arguments(folder, tmp_path / "cut", tmp_path / "b", "--offload", "--overwrite"))
    assert tree(tmp_path / "cut") == tree(plain[0])


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--shard"], "--offload has one block on the device at a time, and --shard has parts"),
        (["--compile"], "and --compile makes one program"),
    ],
)
def test_what_makes_no_sense_beside_it_is_an_error(more, why, folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        segment.parse(arguments(folder, tmp_path / "c", tmp_path / "o", "--offload", *more))
    assert why in capsys.readouterr().err


def test_without_a_cache_it_is_an_error_and_so_is_an_adapter_that_writes_into_the_backbone(folder, tmp_path, capsys):
    argv = arguments(folder, tmp_path / "c", tmp_path / "o", "--offload")
    at = argv.index("--cache-features")
    with pytest.raises(SystemExit):
        segment.parse([*argv[:at], *argv[at + 2 :]])
    assert "--offload copies the backbone to the device for each pass" in capsys.readouterr().err
    with pytest.raises(ValueError, match="injectors write into the tokens"):
        segment.main([*argv, "--adapter-options", '{"conv_inplane": 8}'])
    assert not (tmp_path / "c").exists()


def test_the_plan_counts_one_block_where_the_backbone_runs_and_none_where_it_does_not(folder, tmp_path, capsys):
    argv, said = arguments(folder, tmp_path / "c", tmp_path / "o"), []
    for more in ([], ["--offload"]):
        reset()
        assert cli.main(["plan", "segment", *argv, *more, "--json"]) == 0
        said.append(json.loads(capsys.readouterr().out))
    plain, there = said
    kept = there["offload"]
    blocks = segment.build(segment.parse(argv)).backbone.blocks
    sizes = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks]
    assert kept == {"bytes": sum(sizes), "blocks": len(blocks), "largest_block_bytes": max(sizes)}
    assert plain["peak_memory_bytes"] - there["peak_memory_bytes"] == kept["bytes"]
    saved = kept["bytes"] - kept["largest_block_bytes"]
    assert plain["validation_memory_bytes"] - there["validation_memory_bytes"] == saved
    # 32 batches of 2 share a pass, each image of which waits with its tokens: (3 + 24 of 64) float32 of 32 x 48 pixels.
    waiting = there["cache"]["peak_memory_bytes"] - (plain["cache"]["peak_memory_bytes"] - saved)
    assert waiting > 31 * 2 * 3 * 32 * 48 * 4
    reset()
    assert cli.main(["plan", "segment", *argv, "--offload"]) == 0
    assert "in CPU memory" in capsys.readouterr().out
    assert not (tmp_path / "c").exists()
