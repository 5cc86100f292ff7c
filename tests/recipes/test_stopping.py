"""Ctrl-C and SIGTERM stop a run after its step, with a checkpoint from which it ends as one that was left alone."""

import argparse
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adaptkit.create import create_backbone
from recipes import adavit, fewshot, mixers, pretrain_mae, segment, shapes, stopping
from recipes.options import command, seed_of
from recipes.order import folded
from recipes.stopping import Asked, Stop, Stopped

sys.path.insert(0, str(Path(__file__).parent))
from runs import argv

ROOT = Path(__file__).parents[2]
STEPS = "100000"  # a run that would not end by itself


def started(command_line):
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", *command_line], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=-1, text=True
    )


def stopped(process, there, number):
    """Send the signal once the run has written its first checkpoint; return status and errors."""
    while not list(there()):
        assert process.poll() is None, process.communicate()[1]
        stopping.threading.Event().wait(0.05)
    process.send_signal(number)
    errors = process.communicate()[1]
    return process.returncode, errors


@pytest.mark.parametrize(
    ("front", "number", "status"),
    [
        (["recipes.segment"], signal.SIGTERM, 143),
        (["recipes.segment", "--workers", "1"], signal.SIGINT, 130),
        pytest.param(["adaptkit", "train", "segment"], signal.SIGINT, 130, marks=pytest.mark.full),
        pytest.param(["adaptkit", "train", "segment"], signal.SIGTERM, 143, marks=pytest.mark.full),
    ],
)
def test_a_recipe_says_where_its_checkpoint_is(pictures, tmp_path, front, number, status):
    where, more = ([n for n in front if "-" not in n and n != "1"], front[1:] if "--workers" in front else [])
    process = started([*where, *argv(pictures, tmp_path, "--steps", STEPS, "--save-every", "2", *more)])
    found, errors = stopped(process, lambda: (tmp_path / "checkpoints").glob("step-*[0-9]"), number)
    assert found == status, errors
    step, path = re.search(r"stopped after step (\d+); checkpoint in (\S+); go on with --resume", errors).groups()
    assert "Traceback" not in errors
    assert Path(path) == tmp_path / "checkpoints" / f"step-{int(step):08d}"
    assert (Path(path) / "progress.json").is_file()


def test_pretraining_says_where_its_checkpoint_is(tmp_path):
    tiny = ["--batch-size", "2", "--image-size", "64", "--canvases", "2", "--reuse", "2", "--save-every", "1"]
    process = started(["recipes.pretrain_mae", "--steps", STEPS, "--out", str(tmp_path), *tiny])
    status, errors = stopped(process, lambda: tmp_path.glob("checkpoint"), signal.SIGTERM)
    assert status == 143, errors
    assert re.search(rf"stopped after step \d+; checkpoint in {tmp_path}/checkpoint; go on with --resume", errors)
    assert (tmp_path / "checkpoint" / "run.json").is_file()


@pytest.mark.parametrize("last", [3, 5])
def test_a_run_that_was_stopped_and_goes_on_ends_as_one_that_was_not(pictures, tmp_path, monkeypatch, last):
    common = ["--steps", "5", "--save-every", "0", "--ema", "0.9"]
    segment.main(argv(pictures, tmp_path / "whole", *common))
    real, calls = segment.F.cross_entropy, []

    def until(*args, **kwargs):
        calls.append(0)
        if len(calls) == last:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("recipes.segment.F.cross_entropy", until)
        with pytest.raises(Stopped, match=f"stopped after step {last}; checkpoint in .*step-0000000{last}"):
            segment.main(argv(pictures, tmp_path / "cut", *common))
    segment.main(argv(pictures, tmp_path / "cut", *common, "--resume"))
    whole, cut = (tmp_path / run / "adapter" / "adapter_model.safetensors" for run in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()


def test_the_second_signal_ends_it_at_once_and_the_handlers_are_given_back():
    former = [signal.getsignal(number) for number in stopping.SIGNALS]
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == former


def test_a_loader_whose_worker_is_gone_is_an_error_unless_the_run_was_asked_to_stop():
    def loader():
        yield 1
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")

    with Stop() as stop:
        with pytest.raises(RuntimeError, match="Terminated"):
            list(stop.batches(loader()))
        batches = stop.batches(loader())
        assert next(batches) == 1
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Asked):  # and not the end of the data, after which a run would be scored as if it were whole
            next(batches)


def test_a_recipe_that_is_interrupted_before_it_trains_says_stopped(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        command("segment", main)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "segment: stopped\n"


# -------------------------------------------------------------------------------------------------------- seeds


@pytest.mark.parametrize("seed", [2**32 - 1, 2**32, 2**63 - 1])
def test_any_seed_of_63_bits_trains(pictures, tmp_path, seed):
    more = [
        "--steps",
        "1",
        "--seed",
        str(seed),
        "--adapter",
        "none",
        "--adapter-options",
        "{}",
        "--crop-features",
        "32",
        "32",
    ]
    assert "miou" in segment.main(argv(pictures, tmp_path / str(seed), *more))


@pytest.mark.parametrize("text", ["-1", str(2**63), "1.5", "many"])
def test_another_seed_is_an_error_of_the_command_line(pictures, tmp_path, text, capsys):
    with pytest.raises(SystemExit) as ended:
        segment.main(argv(pictures, tmp_path, f"--seed={text}"))
    assert ended.value.code == 2
    assert f"{text!r}: a seed is a whole number from 0 to 2^63 - 1" in capsys.readouterr().err


def test_small_seeds_are_themselves_and_large_ones_stay_apart():
    assert [folded(n, 31) for n in (0, 1, 2**31 - 1)] == [0, 1, 2**31 - 1]
    assert seed_of(str(2**63 - 1)) == 2**63 - 1
    large = {folded(n, 31) for n in range(2**63 - 1000, 2**63)}
    assert len(large) == 1000
    for number in large:
        torch.manual_seed(number)


def test_the_largest_seed_works_in_the_recipes_with_loops_of_their_own(tmp_path, monkeypatch):
    seed = 2**63 - 1
    monkeypatch.setattr(sys, "argv", ["pretrain_mae", "--seed", str(seed), "--canvases", "1", "--image-size", "64"])
    pictures = pretrain_mae.Pictures(pretrain_mae.arguments(), 7, torch.device("cpu"))
    assert (
        torch.rand(2, generator=pictures.seed(0, 1)).tolist() != torch.rand(2, generator=pictures.seed(1, 1)).tolist()
    )
    assert len(fewshot.draw(torch.tensor([0, 0, 1, 1]), 1, seed)) == 2
    assert shapes.write(tmp_path, 1, seed=2 * seed + 1).is_dir()
    monkeypatch.setattr("recipes.mixers.create_backbone", lambda name: create_backbone(name, pretrained=False))
    args = argparse.Namespace(backbone="demo", num_classes=3, ignore_index=255, lr=1e-3, steps=1, batch_size=1)
    data = torch.zeros(1, 3, 32, 32), torch.zeros(1, 32, 32, dtype=torch.long)
    assert not mixers.train({"options": None}, seed, data, args).training
    data = ["--data", "digits", "--size", "32", "--head-steps", "1", "--steps", "1", "--batch-size", "2"]
    assert adavit.parse([*data, "--seed", str(seed)]).seed == seed


def test_a_worker_says_nothing_of_a_parent_that_is_gone(monkeypatch):
    """Its thread that hands over tensors meets a broken connection; any other error is said as ever."""
    said = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: said.append(kind))
    monkeypatch.setattr(stopping, "ENDED", None)
    stopping.patient(0)
    for error in (EOFError(), ConnectionResetError(), BrokenPipeError(), ValueError()):
        sys.excepthook(type(error), error, None)
    assert said == [ValueError]
