"""A run that is killed, and goes on each time, ends as one that was left alone: the adapter, and cached features."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from runs import write_folder

ROOT = Path(__file__).parents[2]


def run(script, *arguments):
    """Run a script beside this file and return what it printed."""
    command = [sys.executable, str(Path(__file__).parent / script), *map(str, arguments)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.full
@pytest.mark.parametrize("ranks", [1, 2])
def test_three_kills_at_random_moments_change_no_byte_of_the_adapter(ranks, tmp_path):
    folder = write_folder(tmp_path / "data")
    said = run("killing.py", ranks, folder, tmp_path, random.randrange(10**6))
    assert said.count("kill ") == 3
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        whole, cut = (tmp_path / run / "adapter" / file for run in ("whole", "cut"))
        assert whole.read_bytes() == cut.read_bytes(), said


def test_a_kill_loses_one_batch_of_features_and_changes_no_byte_of_the_cache(tmp_path):
    """One rank killed twice, two ranks killed once."""
    folder = write_folder(tmp_path / "data")
    said = run("killing_cache.py", folder, tmp_path, random.randrange(10**6))
    left, found = (list(map(int, re.findall(words, said))) for words in (r"(\d+) kept", r"(\d+) were there"))
    assert found == [0, *left], said  # the run that was left alone had nothing, the others all that was on the disk
    files = [{f.name: f.read_bytes() for f in (tmp_path / run).glob("[!.]*")} for run in ("whole", "cut", "two")]
    assert set(files[0]) == {"cache.json", *(f"features-{i:05d}.safetensors" for i in range(2))}
    assert files[0] == files[1] == files[2]
