"""One ``--out``, one writer, one run: what is in a folder is never of two runs, and a full disk leaves it as it was."""

import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import pytest
import torch
from accelerate import PartialState

import adaptkit
from adaptkit.create import create_backbone
from adaptkit.features.cache import FeatureCache
from adaptkit.hub.write import write_atomic
from recipes import checkpoints, engine, segment
from recipes.folder import begin, name_run, occupied, run_of
from recipes.log import append

sys.path.insert(0, str(Path(__file__).parent))
from runs import argv, tree

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys
from accelerate import PartialState
from recipes.folder import occupied
with occupied(sys.argv[1], PartialState(cpu=True), resume=True):
    print("in", flush=True)
    sys.stdin.readline()
"""


# ---------------------------------------------------------------------------------------------------- two writers


@pytest.fixture
def held(tmp_path):
    """A folder that another process has, and the process."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], env=env, stdin=-1, stdout=-1, text=True
    )
    assert process.stdout.readline() == "in\n"
    yield tmp_path / "run", process
    process.kill()
    process.wait()


def test_a_second_run_in_the_folder_is_refused_and_told_who_is_there(held, pictures):
    out, process = held
    with pytest.raises(ValueError, match=f"process {process.pid} on .* writes to .*run: wait until it ends"):
        segment.main(argv(pictures, out, "--steps", "1"))
    assert tree(out) == {}


@pytest.mark.parametrize("end", ["killed", "ended"])
def test_the_folder_is_free_when_its_process_is_gone(held, end):
    out, process = held
    process.kill() if end == "killed" else process.communicate("go\n")
    process.wait()
    with occupied(out, PartialState(cpu=True)) as path:
        assert path == out


RANKS = """
import sys
from accelerate import PartialState
from recipes.folder import occupied
process = PartialState(cpu=True)
try:
    with occupied(sys.argv[1], process):
        print(f"rank {process.process_index} went in", flush=True)
except ValueError as error:
    print(f"rank {process.process_index}: {error}", flush=True)
process.destroy_process_group()
"""


def test_every_rank_of_a_second_run_hears_why_it_is_refused(held, tmp_path):
    out, holder = held
    (tmp_path / "ranks.py").write_text(RANKS)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *torchrun, str(tmp_path / "ranks.py"), str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert f"rank {rank}: process {holder.pid} on " in done.stdout


# ------------------------------------------------------------------------------------------------ an earlier run


def enter(out, **options):
    with occupied(out, PartialState(cpu=True), **options):
        pass


@pytest.mark.parametrize("left", ["checkpoints", "adapter", "metrics.jsonl", "result.json"])
def test_a_folder_with_what_a_run_left_is_refused_without_a_word(tmp_path, left):
    (tmp_path / left).mkdir() if "." not in left else (tmp_path / left).write_text("{}")
    with pytest.raises(ValueError, match=rf"holds an earlier run \({left}\): go on with it with --resume, delete it"):
        enter(tmp_path)
    enter(tmp_path, resume=True)
    enter(tmp_path, overwrite=True)
    assert (tmp_path / left).exists()  # only a run that begins deletes it


def test_both_options_together_are_refused(tmp_path):
    with pytest.raises(ValueError, match="give one of them"):
        enter(tmp_path, resume=True, overwrite=True)


def test_what_begins_deletes_what_a_run_left_and_nothing_else(tmp_path):
    (tmp_path / "checkpoints" / "step-00000400").mkdir(parents=True)
    (tmp_path / "mine.txt").write_text("mine")
    name_run(tmp_path, "old")
    begin(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "run.json"]
    assert run_of(tmp_path) not in (None, "old")


def test_a_new_run_in_a_used_folder_keeps_its_own_checkpoints(pictures, tmp_path):
    out, short = tmp_path / "run", ["--steps", "3", "--save-every", "1"]
    segment.main(argv(pictures, out, "--steps", "5", "--save-every", "1"))
    earlier = tree(out)
    with pytest.raises(ValueError, match="earlier run"):
        segment.main(argv(pictures, out, *short))
    assert tree(out) == earlier
    segment.main(argv(pictures, out, *short, "--overwrite"))
    assert [path.name for path in checkpoints.checkpoints(out)] == ["step-00000001", "step-00000002"]
    assert {checkpoints.progress_of(path)["run"] for path in checkpoints.checkpoints(out)} == {run_of(out)}


def test_a_checkpoint_of_another_run_is_not_gone_on_with(pictures, tmp_path):
    out = tmp_path / "run"
    segment.main(argv(pictures, out, "--steps", "3", "--save-every", "1"))
    name_run(out, "another")
    with pytest.raises(ValueError, match=r"step-00000002 is of run \w+, and .* is the folder of run another"):
        segment.main(argv(pictures, out, "--steps", "3", "--save-every", "1", "--resume"))


def test_checkpoints_in_a_folder_without_a_name_give_it_theirs(pictures, tmp_path):
    out, common = tmp_path / "run", ["--steps", "4", "--save-every", "1"]
    segment.main(argv(pictures, out, *common))
    name = run_of(out)
    (out / "run.json").unlink()
    segment.main(argv(pictures, out, *common, "--resume"))
    assert run_of(out) == name


# ------------------------------------------------------------------------------------------------- a full disk


@contextmanager
def full_after(size):
    """No file may grow beyond so many bytes: a write ends as it does on a full disk, with an OSError."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_checkpoint_that_does_not_fit_is_named_and_the_earlier_ones_stay(pictures, tmp_path, monkeypatch):
    out, common, save = tmp_path / "run", ["--steps", "4", "--save-every", "1"], engine.save_checkpoint
    before = {}

    def saves(accelerator, out, step, *more):
        if step < 3:
            return save(accelerator, out, step, *more)
        before.update(tree(out / "checkpoints"))
        with full_after(2000):
            save(accelerator, out, step, *more)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "save_checkpoint", saves)
        with pytest.raises(OSError, match=r"checkpoint .*step-00000003 cannot be written: .*from .*step-00000002"):
            segment.main(argv(pictures, out, *common))
    assert tree(out / "checkpoints") == before
    segment.main(argv(pictures, out, *common, "--resume"))
    segment.main(argv(pictures, tmp_path / "whole", *common))
    cut, whole = ((tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("run", "whole"))
    assert cut.read_bytes() == whole.read_bytes()


def test_an_adapter_that_does_not_fit_is_named_and_the_folder_stays_as_it_was(tmp_path):
    model = adaptkit.attach(create_backbone("demo", pretrained=False), "metaformer")
    model.save(tmp_path / "adapter")
    before = tree(tmp_path)
    room = len(before["adapter/adapter_model.safetensors"]) - 1  # enough for all but the weights
    with full_after(room), pytest.raises(OSError, match="adapter_model.safetensors"):
        model.save(tmp_path / "adapter", score=1.0)
    assert tree(tmp_path) == before


def test_a_shard_of_features_that_does_not_fit_is_named_and_the_folder_stays_as_it_was(tmp_path):
    cache = FeatureCache(tmp_path, 4, {"made": "of this"}, shard=2)
    cache.write(0, [{"x": torch.zeros(1000)}] * 2)
    before = tree(tmp_path)
    with full_after(2000), pytest.raises(OSError, match="features-00001.safetensors"):
        cache.write(1, [{"x": torch.zeros(1000)}] * 2)
    assert tree(tmp_path) == before
    assert cache.missing() == [1]


def test_a_result_that_does_not_fit_is_named_and_the_old_one_stays(tmp_path):
    write_atomic(tmp_path / "result.json", b"old")
    with full_after(100), pytest.raises(OSError, match="result.json"):
        write_atomic(tmp_path / "result.json", b"x" * 1000)
    assert tree(tmp_path) == {"result.json": b"old"}


def test_a_row_of_the_log_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with FileIO(path, "w") as file:
        append(file, {"step": 1})
        with full_after(40), pytest.raises(OSError, match="metrics.jsonl"):
            append(file, {"step": 2, "loss": "x" * 100})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}]
