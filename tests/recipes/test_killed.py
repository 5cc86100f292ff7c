"""A run that is killed at three random moments, and goes on each time, ends as one that was left alone."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_segment import write_folder

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("ranks", [1, 2])
def test_three_kills_at_random_moments_change_no_byte_of_the_adapter(ranks, tmp_path):
    folder = write_folder(tmp_path / "data")
    script = Path(__file__).parent / "killing.py"
    command = [sys.executable, str(script), str(ranks), str(folder), str(tmp_path), str(random.randrange(10**6))]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("kill ") == 3
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        whole, cut = (tmp_path / run / "adapter" / file for run in ("whole", "cut"))
        assert whole.read_bytes() == cut.read_bytes(), done.stdout
