"""A process may fork while its threads compute: no child waits for a lock whose holder does not exist there."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from adaptkit.ops.forks import Lock

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nothing forks on Windows")
ROOT = Path(__file__).parents[2]
HANGS = 300  # seconds after which a child is taken to hang: far more than a busy machine needs


def ends(pid):
    """Whether a child ends well; one that hangs is killed."""
    deadline = time.monotonic() + HANGS
    while time.monotonic() < deadline:
        if (ended := os.waitpid(pid, os.WNOHANG))[0]:
            return ended[1] == 0
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def test_a_lock_that_a_thread_holds_is_open_in_the_child_and_still_held_in_the_parent():
    lock, held, let_go = Lock(), threading.Event(), threading.Event()

    def hold():
        with lock:
            held.set()
            let_go.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    pid = os.fork()
    if pid == 0:
        with lock:
            os._exit(0)
    try:
        assert ends(pid)
        assert lock._lock.locked()
    finally:
        let_go.set()
        thread.join()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("adaptkit.ops.pool", "_lock"),
        ("adaptkit.ops.ms_deform_attn._c", "_lock"),
        ("adaptkit.ops.ms_deform_attn._triton", "_tuning"),
        ("adaptkit._cpu.attention", "_lock"),
    ],
)
def test_every_lock_is_one_of_these(module, name):
    if module.endswith("_triton"):
        pytest.importorskip("triton")
    assert isinstance(getattr(importlib.import_module(module), name), Lock)


def test_no_other_lock_is_made_in_the_library():
    makers = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "adaptkit").rglob("*.py")
        if re.search(r"threading\.(R?Lock|Condition)|from threading import .*\b(R?Lock|Condition)\b", path.read_text())
    ]
    assert makers == ["adaptkit/ops/forks.py"]


@pytest.mark.parametrize("children", [40, pytest.param(200, marks=pytest.mark.full)])
def test_children_forked_while_threads_infer_all_end(children):
    command = [sys.executable, str(Path(__file__).with_name("forking.py")), str(children), str(HANGS)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"hung": 0, "failed": 0}, done.stderr[-3000:]
