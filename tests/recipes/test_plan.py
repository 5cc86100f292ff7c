"""``adaptkit plan`` and ``--batch-size auto``: what is said is what a run then does, and nothing is written."""

import json

import pytest
import torch
import yaml
from runs import reset, write_folder
from torch import nn

import adaptkit.cli as cli
from recipes import dry, segment, shapes
from recipes.dry import bytes_of, largest, machine_memory, peak_of
from recipes.options import batch_of

QUICK = ["--num-classes", "3", "--backbone", "test_vit", "--random-backbone", "--size", "32", "48", "--adapter-options",
         '{"conv_inplane": 8, "injector": false}', "--save-every", "0", "--steps", "2"]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data", size=(64, 96))


def plan(capsys, *argv):
    assert cli.main(["plan", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_plan_is_what_the_run_does_and_nothing_is_written(folder, tmp_path, capsys):
    out, cached = tmp_path / "run", tmp_path / "cache"
    argv = ["--train", str(folder), "--val", str(folder), "--out", str(out), *QUICK, "--batch-size", "2", "--views", "2",
            "--cache-features", str(cached)]  # fmt: skip
    found = plan(capsys, "segment", *argv)
    assert not out.exists()
    assert not cached.exists()
    reset()
    result = segment.main(argv)
    assert found["trained_parameters"] == result["trained_parameters"]
    assert found["file_bytes"] == pytest.approx(result["file_bytes"], rel=0.02)  # metrics and size are recorded too
    assert found["cache"]["samples"] == 2 * 5
    on_disk = sum(f.stat().st_size for f in cached.rglob("*.safetensors"))
    assert found["cache"]["bytes"] == pytest.approx(on_disk, rel=0.05)
    assert found["epochs"] == pytest.approx(2 * 2 / 5)
    assert found["seconds"] == pytest.approx(2 * found["seconds_per_step"] + found["cache"]["seconds"], abs=0.1)
    assert found["data"][0]["images"] == 5
    assert len(found["seconds_of_steps"]) == 3


def test_macs_are_those_of_one_image(folder, capsys):
    """A linear head on a frozen ViT: patches, blocks and head, by hand."""
    argv = ["--train", folder, "--val", folder, *QUICK[:-6], "--adapter", "none", "--batch-size", "2"]
    found = plan(capsys, "segment", *argv)
    vit = segment.build(segment.parse([str(a) for a in argv])).backbone
    d = vit.embed_dim
    grid = (-(-32 // vit.patch_embed.patch_size[0])) * (-(-48 // vit.patch_embed.patch_size[1]))
    n = grid + vit.num_prefix_tokens
    block = n * (4 * d * d + 2 * d * vit.blocks[0].mlp.fc1.out_features) + 2 * n * n * d
    patches = grid * 3 * vit.patch_embed.patch_size[0] * vit.patch_embed.patch_size[1] * d
    assert found["macs_per_image"] == pytest.approx(len(vit.blocks) * block + patches, rel=0.02)  # and a small head


@pytest.mark.parametrize("recipe", ["classify", "depth", "detect", "panoptic"])
def test_every_recipe_of_the_loop_has_a_plan_in_one_screen(recipe, tmp_path, capsys):
    size = ["--size", "32", "48", "--batch-size", "2"]
    if recipe in ("detect", "panoptic"):
        pytest.importorskip("faster_coco_eval")
        pytest.importorskip("scipy")
        path = shapes.write(tmp_path / "shapes", 3, 32, 48)
        data = ["--train", str(path), "--val", str(path), "--adapter-options", '{"conv_inplane": 8}', "--width", "32"]
        data += ["--model", "faster-rcnn"] if recipe == "detect" else ["--queries", "4", "--layers", "1", "1"]
    else:
        drawn = ["--train", "drawn:4", "--val", "drawn:2", "--max-depth", "10", "--adapter", "none"]
        data = drawn if recipe == "depth" else ["--train", "digits", "--adapter", "linear"]
    size = ["--size", "32", "--batch-size", "2"] if recipe == "classify" else size
    argv = [recipe, *data, *size, "--backbone", "test_vit", "--random-backbone", "--out", str(tmp_path / "run")]
    assert cli.main(["plan", *argv]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) <= 40
    steps = "600 steps" if recipe == "classify" else "400 steps"
    for word in ("trained parameters", "file ", "GMACs", "peak memory", "a step", steps, "data --train"):
        assert any(word in line for line in said), word
    assert not (tmp_path / "run").exists()


def test_validation_is_measured_on_the_largest_images_at_the_size_it_looks_at(folder, tmp_path, capsys):
    from PIL import Image

    argv = ["--train", folder, *QUICK[:-6], "--adapter", "none", "--batch-size", "2"]
    write_folder(tmp_path / "val", size=(64, 96))
    found = [plan(capsys, "segment", *argv, "--val", tmp_path / "val", "--resize", "native")]
    for kind in ("images", "masks"):  # the last one, in the order of their names
        file = sorted((tmp_path / "val" / kind).iterdir())[-1]
        Image.open(file).resize((384, 256), Image.Resampling.NEAREST).save(file)
    reset()
    found.append(plan(capsys, "segment", *argv, "--val", tmp_path / "val", "--resize", "native"))
    assert [one["validation_images"] for one in found] == ["the largest 2"] * 2
    assert found[1]["validation_memory_bytes"] > found[0]["validation_memory_bytes"] + 3 * 256 * 384 * 4
    assert found[1]["peak_memory_bytes"] == found[0]["peak_memory_bytes"]  # of training, which resizes


def test_what_has_no_plan_says_what_has(capsys):
    assert cli.main(["plan", "vtab", "--data", "d"]) == 2
    assert "no plan for 'vtab'; there is one for segment, classify" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- --batch-size auto


@pytest.mark.parametrize(
    ("fixed", "each", "memory", "most", "batch"),
    [(0, 1, 8, 256, 8), (0, 1, 15, 256, 8), (10, 1, 8, 256, 1), (0, 1, 1000, 256, 256), (0, 1, 1000, 101, 64)],
)
def test_the_largest_power_of_two_that_fits(fixed, each, memory, most, batch):
    assert largest(fixed, each, memory, most) == batch


def test_a_batch_is_a_number_or_auto():
    assert (batch_of("4"), batch_of("auto")) == (4, "auto")
    with pytest.raises(Exception, match="'many': give a number of images, or auto"):
        batch_of("many")


def test_the_peak_is_what_was_held_at_once():
    def hold():
        kept = [torch.ones(2**18) for _ in range(4)]  # 4 x 1 MiB together
        del kept
        [torch.ones(2**18) for _ in range(2)]

    assert peak_of(hold, torch.device("cpu")) == pytest.approx(4 * 2**20, rel=0.1)
    assert bytes_of(nn.Linear(10, 5)) == 4 * 55
    assert 2**28 < machine_memory() < 2**50


def test_auto_trains_as_the_number_that_it_finds_and_records_it(folder, tmp_path, capsys, monkeypatch):
    argv = [
        "--train",
        str(folder),
        "--val",
        str(folder),
        *QUICK[:-6],
        "--adapter",
        "none",
        "--steps",
        "2",
        "--save-every",
        "1",
    ]
    monkeypatch.setattr(dry, "machine_memory", lambda: 2**40)
    found = segment.main([*argv, "--batch-size", "auto", "--out", str(tmp_path / "auto")])
    assert "--batch-size auto: 4 per process, of 5 images (about" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "auto" / "config.yaml").read_text())["options"]["batch_size"] == 4
    reset()
    same = segment.main([*argv, "--batch-size", "4", "--out", str(tmp_path / "four")])
    assert found["file_sha256"] == same["file_sha256"]
    reset()
    monkeypatch.setattr(dry, "machine_memory", lambda: 0)  # a run that goes on keeps its batch
    again = segment.main([*argv, "--batch-size", "auto", "--out", str(tmp_path / "auto"), "--resume"])
    assert "--batch-size auto: 4 per process, as the run began" in capsys.readouterr().out
    assert again["file_sha256"] == same["file_sha256"]
    reset()
    small = segment.main([*argv, "--batch-size", "auto", "--out", str(tmp_path / "small")])
    assert yaml.safe_load((tmp_path / "small" / "config.yaml").read_text())["options"]["batch_size"] == 1
    assert small["file_sha256"] != same["file_sha256"]


def test_a_gpu_doubles_until_memory_is_short():
    class Gpu:
        device = "cuda"
        asked: list = []

        def peak(self, size):
            self.asked.append(size)
            if size > 16:
                raise torch.OutOfMemoryError("short")
            return size * 2**20

    properties = type("P", (), {"total_memory": 2**30})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        assert dry._on_gpu(Gpu(), 1, 256)[0] == 16
        assert Gpu.asked == [1, 2, 4, 8, 16, 32]
        properties.total_memory = 10 * 2**20  # of which nine tenths may be full
        assert dry._on_gpu(Gpu(), 1, 256)[0] == 8
        properties.total_memory = 2**20
        with pytest.raises(ValueError, match="not even 1 fits"):
            dry._on_gpu(Gpu(), 1, 256)
