"""The shared loop: averages and resumed runs to the byte, two ranks, configurations, several adapters."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import TINY, cut_off

import adaptkit
from recipes import options, prepare, segment
from recipes.average import Average
from recipes.log import forget_after
from recipes.optimising import linear

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Five images with masks: an odd number, for two ranks."""
    path, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for kind in ("images", "masks"):
        (path / kind).mkdir()
    for i in range(5):
        mask = rng.integers(0, 3, (5, 7), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(np.stack([mask * 80, 255 - mask * 80, mask * 40], -1)).save(path / "images" / f"{i}.png")
        Image.fromarray(mask).save(path / "masks" / f"{i}.png")
    return str(path)


def command_line(data, out, *more):
    return ["--train", data, "--val", data, "--num-classes", "3", *TINY, "--size", "32", "48",
            "--batch-size", "2", "--adapter", "metaformer", "--adapter-options", '{"width": 8}', "--head", "linear",
            "--out", str(out), *more]  # fmt: skip


def weights(out):
    return (Path(out) / "adapter" / "adapter_model.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------------- averages


def test_the_average_follows_its_formula_and_leaves_the_weights_as_they_were():
    p = torch.nn.Parameter(torch.tensor([1.0]))
    average = Average([p], 0.5)
    for step, value in ((1, 2.0), (2, 4.0), (30, 8.0)):
        p.data.fill_(value)
        average.update(step)
    want = 1.0
    for decay, value in ((2 / 11, 2.0), (3 / 12, 4.0), (0.5, 8.0)):
        want = decay * want + (1 - decay) * value
    with average.applied():
        assert p.item() == pytest.approx(want)
    assert p.item() == 8.0


@pytest.mark.parametrize("asked", [["--ema", "0.9"], ["--optimizer", "muon"]], ids=["average", "muon"])
def test_a_run_with_an_average_or_with_muon_resumes_to_the_byte(asked, pictures, tmp_path, monkeypatch):
    wide = ["--adapter-options", '{"width": 16}']  # the least that Muon takes for a matrix
    more = ["--steps", "5", "--save-every", "2", "--eval-every", "3", *wide]
    for name, own in (("plain", []), ("whole", asked)):
        segment.main(command_line(pictures, tmp_path / name, *more, *own))
    assert weights(tmp_path / "plain") != weights(tmp_path / "whole")

    with monkeypatch.context() as patch:
        patch.setattr("recipes.segment.F.cross_entropy", cut_off(segment.F.cross_entropy, 4))
        with pytest.raises(KeyboardInterrupt):
            segment.main(command_line(pictures, tmp_path / "cut", *more, *asked))
    segment.main(command_line(pictures, tmp_path / "cut", *more, *asked, "--resume"))
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    rows = [
        [json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in ("cut", "whole")
    ]
    assert [r.get("miou") for r in rows[0]] == [r.get("miou") for r in rows[1]]  # nothing twice, nothing lost


def test_rows_after_the_checkpoint_are_forgotten_even_half_a_line(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 2, "loss": 1}\n{"step": 4, "loss": 1}\n{"step": 6, "lo')
    forget_after(log, 3)
    assert log.read_text() == '{"step": 2, "loss": 1}\n'


# ------------------------------------------------------------------------------------------------------ two ranks


@pytest.fixture(scope="module")
def two(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = str(Path(__file__).with_name("two_ranks.py"))
    done = subprocess.run([*torchrun, script, pictures, str(out)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_two_ranks_that_stream_and_average_resume_to_the_byte(two):
    assert weights(two / "cut") == weights(two / "whole")


def test_a_sharded_backbone_trains_the_same_adapter(two):
    sharded, whole = (adaptkit.load(two / run / "adapter").tensors for run in ("sharded", "whole"))
    for key, tensor in whole.items():
        torch.testing.assert_close(sharded[key], tensor, atol=1e-5, rtol=1e-5)
    scores = [json.loads((two / run / "result.json").read_text()) for run in ("sharded", "whole")]
    assert scores[0]["miou"] == scores[1]["miou"] == scores[0]["miou_reattached"] == scores[1]["miou_reattached"]


def test_sharding_on_one_process_is_refused(pictures, tmp_path):
    with pytest.raises(ValueError, match="--shard puts the backbone in parts on several processes and this is one"):
        segment.main(command_line(pictures, tmp_path, "--shard"))


def test_two_ranks_count_every_image_once_where_the_set_does_not_divide(two):
    for rank in range(2):
        for case, seen in json.loads((two / f"counted-{rank}.json").read_text()).items():
            assert seen == list(range(int(case.split()[0]))), case


def test_resuming_with_another_number_of_processes_is_refused(two, pictures):
    again = command_line(
        pictures,
        two / "cut",
        "--batch-size",
        "1",
        "--steps",
        "3",
        "--ema",
        "0.9",
        "--resume",
        "--streaming",
        "--shuffle-buffer",
        "3",
    )
    with pytest.raises(ValueError, match="processes=2; now it is processes=1"):
        segment.main(again)


# ------------------------------------------------------------------------------------------------------- options


def write(path, text):
    path.write_text(text)
    return str(path)


def test_a_configuration_gives_options_and_the_command_line_wins(tmp_path):
    config = write(tmp_path / "c.yaml", "num_classes: 7\nsize: [64, 96]\nadapter: [sfp]\nstreaming: true\nlr: 1.0e-4\n"
                   "adapter-options: {norm: group}\nbackbone: null\n")  # fmt: skip
    args = segment.parse(["--train", "t", "--config", config, "--lr", "0.5", "--no-streaming"])
    assert (args.num_classes, args.size, args.adapter, args.adapter_options) == (
        7,
        [64, 96],
        ["sfp"],
        {"norm": "group"},
    )
    assert (args.lr, args.streaming, args.backbone) == (0.5, False, "demo")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num-clases: 7", "unknown key 'num-clases' (did you mean 'num-classes'?)"),
        ("size: [64]", "--size: expected 2 arguments"),
        ("steps: many", "--steps: invalid int value: 'many'"),
        ("streaming: 3", "streaming is 3; give true or false"),
        ("a: [", "is no YAML"),
        ("- a", "holds no 'option: value' lines"),
    ],
)
def test_a_mistake_in_a_configuration_is_named(tmp_path, capsys, text, message):
    with pytest.raises(SystemExit):
        segment.parse(["--train", "t", "--num-classes", "3", "--config", write(tmp_path / "c.yaml", text)])
    assert message in capsys.readouterr().err


def test_a_configuration_that_is_nowhere_names_those_that_ship(capsys):
    with pytest.raises(SystemExit):
        segment.parse(["--train", "t", "--config", "no-such"])
    assert "there is no such file, nor one in recipes/configs" in capsys.readouterr().err


def given(adapter, options):
    return options_of(Namespace(adapter=adapter, adapter_options=options))


options_of = options.adapters


def test_one_or_several_adapters_with_their_options():
    assert given(["none"], {}) == given(["linear"], {}) == []
    assert given(["sfp"], {"norm": "group"}) == [("sfp", {"norm": "group"})]
    assert given(["sfp"], {"sfp": {"norm": "group"}}) == [("sfp", {"norm": "group"})]
    assert given(["metaformer", "sfp"], {"metaformer": {"width": 8}}) == [("metaformer", {"width": 8}), "sfp"]


@pytest.mark.parametrize(
    ("adapter", "opts", "message"),
    [
        (["metaformer", "sfp"], {"width": 8}, r"has width; with --adapter metaformer sfp give \{\"metaformer\": "),
        (["none", "sfp"], {}, "stand alone"),
        (["none"], {"width": 8}, "has no options"),
        (["sfp"], [1], "give a JSON object"),
    ],
)
def test_options_that_belong_to_nothing_are_refused(adapter, opts, message):
    with pytest.raises(ValueError, match=message):
        given(adapter, opts)


def test_two_adapters_train_and_are_saved_as_one_file(pictures, tmp_path):
    both = ["--adapter", "metaformer", "sfp", "--adapter-options", '{"metaformer": {"width": 8}}', "--head", "fpn"]
    result = segment.main(command_line(pictures, tmp_path, "--steps", "1", *both))
    assert result["adapter"] == "metaformer + sfp"
    assert result["miou"] == result["miou_reattached"]


def test_the_linear_schedule_rises_and_falls_to_zero():
    factors = [linear(s, 10, 0.2) for s in range(11)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert np.allclose(np.diff(factors[2:]), -1 / 8)
    assert factors[-1] == 0


def test_frameworks_that_would_save_the_backbone_are_refused(monkeypatch, tmp_path):
    fsdp = Namespace(distributed_type=Namespace(value="FSDP"))
    monkeypatch.setattr(prepare, "Accelerator", lambda **_: fsdp)
    args = Namespace(out=str(tmp_path), mixed_precision="no", accumulate=1, tracker=None)
    with pytest.raises(ValueError, match="configured for FSDP, whose checkpoints hold the frozen backbone"):
        prepare.start(segment.TASK, args)


@pytest.mark.parametrize(("capabilities", "expected"), [({"avx512_bf16": True}, "bf16"), ({"avx512_bf16": False}, "no"), ({"amx_bf16": True}, "bf16"), ({}, "no")])  # fmt: skip
def test_automatic_precision_is_what_the_processor_computes_in(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert options.precision("auto") == expected
    assert options.precision("fp16") == "fp16"
