"""`adaptkit compare` makes each run once, goes on with those that were stopped, and puts all on one page."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from runs import TINY, ended_by, write_folder

from adaptkit.cli import main as cli
from recipes import compare, segment

pytest.importorskip("matplotlib")


@pytest.fixture
def given(tmp_path):
    data = str(write_folder(tmp_path / "data"))
    return ["segment", "--adapter", "none", "metaformer", "--adapter-options", '{"metaformer": {"width": 8}}', "--seeds", "1",
            "--out", str(tmp_path / "out"), "--train", data, "--val", data, "--num-classes", "3", "--size", "32", "48",
            "--head", "linear", *TINY, "--batch-size", "2", "--steps", "2", "--save-every", "1"]  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    """Run the recipe in this process; the arguments of each run."""
    made = []

    def call(command):
        assert command[:2] == [sys.executable, "-m"]
        assert command[2] in ("recipes.segment", "adaptkit.recipes.segment")  # in a clone, installed
        made.append(command[3:])
        segment.main(command[3:])
        return 0

    ended_by(monkeypatch, call)
    return made


def test_each_run_is_made_once_and_all_are_on_the_page(given, calls, tmp_path, capsys):
    assert cli(["compare", *given]) == 0
    said = capsys.readouterr().out
    out = tmp_path / "out"
    assert [Path(c[c.index("--out") + 1]).name for c in calls] == [
        "none-seed1", "metaformer-seed1",
    ]  # fmt: skip
    options = [
        yaml.safe_load((out / n / "config.yaml").read_text())["options"] for n in ("none-seed1", "metaformer-seed1")
    ]
    assert [o["adapter_options"] for o in options] == [{}, {"metaformer": {"width": 8}}]
    assert [o["seed"] for o in options] == [1, 1]
    for part in ("no adapter", "metaformer", "trained", "peak memory", "report.html"):
        assert part in said
    html = (out / "report.html").read_text()
    score = json.loads((out / "metaformer-seed1" / "evaluation.json").read_text())["miou"]
    assert f">{100 * score:.1f}<" in html
    calls.clear()
    # One run is taken back to its last checkpoint, one has none: the first goes on, the second begins anew.
    (out / "none-seed1" / "result.json").unlink()
    (out / "metaformer-seed1" / "result.json").unlink()
    for checkpoint in (out / "metaformer-seed1" / "checkpoints").iterdir():
        checkpoint.rename(tmp_path / checkpoint.name)
    before = (out / "none-seed1" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert cli(["compare", *given]) == 0
    assert [c[-1] for c in calls] == ["--resume", "--overwrite"]
    assert (out / "none-seed1" / "adapter" / "adapter_model.safetensors").read_bytes() == before
    assert "[1/2] none-seed1 goes on" in capsys.readouterr().out
    calls.clear()
    assert cli(["compare", *given]) == 0
    assert calls == []
    assert "[2/2] metaformer-seed1 is there" in capsys.readouterr().out
    assert cli(["compare", *given, "--steps", "3"]) == 2
    assert "holds a run with other options: steps 2, now 3" in capsys.readouterr().err


def test_a_run_that_fails_leaves_the_others(given, monkeypatch, tmp_path, capsys):
    def call(command):
        if "metaformer" in command:
            return 1
        segment.main(command[3:])
        return 0

    ended_by(monkeypatch, call)
    assert cli(["compare", *given]) == 2
    assert "these runs failed, see above: metaformer-seed1" in capsys.readouterr().err
    assert "no adapter" in (tmp_path / "out" / "report.html").read_text()


def test_a_run_that_another_process_made_meanwhile_is_there(given, monkeypatch, tmp_path, capsys):
    made, second = [], compare.planned(*compare.parse(given))[1]

    def call(command):
        made.append(Path(command[command.index("--out") + 1]).name)
        for arguments in (command[3:], second.arguments):
            segment.main(arguments)
        return 0

    ended_by(monkeypatch, call)
    assert cli(["compare", *given]) == 0
    assert made == ["none-seed1"]
    assert "[2/2] metaformer-seed1 is there" in capsys.readouterr().out


def test_a_stop_is_a_stop(given, monkeypatch, capsys):
    ended_by(monkeypatch, lambda command: 130)
    assert cli(["compare", *given]) == 130
    assert "stopped in none-seed1; the same command goes on" in capsys.readouterr().err


def test_several_adapters_in_one_and_a_cache_of_its_own():
    args, rest = compare.parse(["segment", "--adapter", "lora+sfp", "--out", "o", "--adapter-options", '{"lora": {"r": 2}}',
                                "--cache-features", "c"])  # fmt: skip
    (run,) = compare.planned(args, rest)
    assert run.out == Path("o/lora+sfp-seed0")
    assert run.arguments == ["--cache-features", "c/lora+sfp-seed0", "--adapter", "lora", "sfp", "--adapter-options",
                             '{"lora": {"r": 2}}', "--seed", "0", "--out", "o/lora+sfp-seed0"]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seed", "1"], "--seed is set for each run"),
        (["--overwrite"], "--overwrite is set for each run"),
        (["--adapter-options", '{"lora": {}}'], "--adapter-options has lora: name the adapters, none"),
        (["--stepz", "3"], "--stepz"),
    ],
)
def test_a_mistake_is_said_before_anything_is_trained(more, message, tmp_path, capsys):
    given = [
        "segment",
        "--adapter",
        "none",
        "--out",
        str(tmp_path / "o"),
        "--train",
        "t",
        "--val",
        "v",
        "--num-classes",
        "3",
    ]
    with pytest.raises(SystemExit) as stopped:
        compare.main(argv=[*given, *more])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.full
def test_in_processes_of_their_own(given, tmp_path):
    import subprocess

    done = subprocess.run([sys.executable, "-m", "adaptkit", "compare", *given], cwd=Path(__file__).parents[2],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report.html").is_file()


CHILD = """
import signal, sys, time
def stop(number, frame):
    time.sleep(0.5)  # a checkpoint takes its time
    print("kept", number, flush=True)
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
print("begun", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_comparison_that_is_stopped_lets_its_run_keep_a_checkpoint(number, tmp_path):
    parent = f"import sys; from recipes.compare import ended; sys.exit(ended([sys.executable, '-c', {CHILD!r}]))"
    group = subprocess.Popen(
        [sys.executable, "-c", parent], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert group.stdout.readline() == "begun\n"
    if number == signal.SIGINT:
        os.killpg(group.pid, number)  # as a terminal does
    else:
        group.send_signal(number)
    assert group.communicate()[0] == f"kept {number:d}\n"
    assert group.returncode == 128 + number


def test_a_batch_size_that_was_found_is_the_one_that_was_asked_for(given, tmp_path):
    arguments = [*given[1:], "--adapter", "metaformer", "--batch-size", "auto"]
    arguments = [a for i, a in enumerate(arguments) if "--seeds" not in arguments[max(0, i - 1) : i + 1]]
    out = tmp_path / "out"
    out.mkdir()
    options = vars(segment.parse(arguments)) | {"batch_size": 8}
    named = {k: v for k, v in options.items() if k in segment.parse(arguments).names}
    (out / "config.yaml").write_text(yaml.safe_dump({"options": json.loads(json.dumps(named, default=str))}))
    (out / "result.json").write_text("{}")
    assert compare.state(compare.Asked("metaformer", 1, out, arguments), segment) is None
