"""The operator benchmark, small: one table with every implementation, in it or named as missing."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recipes.bench import ops

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small(monkeypatch):
    """Few implementations, the reference among them, and one that is not installed."""
    monkeypatch.setitem(sys.modules, "torch_ms_deform_attn", None)
    for name in ("transformers (grid_sample core)", "deformops"):
        monkeypatch.delitem(ops.IMPLEMENTATIONS, name)


def test_it_prints_one_table_and_names_what_is_missing(small, capsys):
    ops.main(
        ["--shapes", "inj S", "ext B", "--size", "32", "--batch", "1", "--rounds", "1", "--threads", "1", "--no-memory"]
    )
    lines = capsys.readouterr().out.splitlines()
    table = [line.split("|")[1:-1] for line in lines if line.startswith("|")]
    assert [cell.strip() for cell in table[0]] == ["", "inj S", "ext B"]
    assert {len(row) for row in table} == {3}
    named = {row[0].strip() for row in table[2:]}
    missing = {line.removeprefix("Not here: ").split(" (")[0] for line in lines if line.startswith("Not here")}
    assert "torch-ms-deform-attn" in missing
    assert "adaptkit embedding_bag" in named
    assert named | missing == set(ops.IMPLEMENTATIONS)
    assert "(1.0x / 1.0x)" in table[2][1]


def test_the_core_is_an_implementation_of_the_same_operator():
    pytest.importorskip("transformers")
    ops.check("core", ops.core(), ops.inputs("inj B", 32, 1, "cpu"))


def test_an_operator_that_computes_something_else_is_not_timed():
    def doubled(*inputs):
        return 2 * ops.ms_deform_attn(*inputs)

    with pytest.raises(RuntimeError, match="doubled is off by"):
        ops.check("doubled", doubled, ops.inputs("ext S", 32, 1, "cpu"))


HUNGRY = """
import torch
from recipes.bench import ops

def hungry(value, shapes, places, weights):
    held = torch.ones(64 * 2**18)  # 64 MiB: more than malloc ever keeps for later
    return ops.ms_deform_attn(value, shapes, places, weights) + 0 * held.sum()

ops.IMPLEMENTATIONS["hungry"] = lambda: hungry
print(ops.peak(ops.arguments(["--size", "32", "--batch", "1", "--cell", "hungry", "inj S", "forward"])))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_memory_counts_what_a_call_holds_at_once():
    """In a process of its own: here the system may take back what earlier tests left, at any moment."""
    done = subprocess.run([sys.executable, "-c", HUNGRY], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 62 < float(done.stdout) < 72


def test_shapes_are_those_of_the_adapter():
    value, shapes, places, weights = ops.inputs("ext B", 64, 2, "cpu")
    assert (value.shape, shapes) == ((2, 16, 12, 32), [(4, 4)])
    assert weights.shape == (2, 84, 12, 1, 4)
    assert places.shape == (2, 84, 12, 1, 4, 2)
    torch.testing.assert_close(weights.sum((3, 4)), torch.ones(2, 84, 12))


def test_a_size_that_is_no_multiple_of_32_is_refused(capsys):
    with pytest.raises(SystemExit):
        ops.arguments(["--size", "100"])
    assert "--size is 100, expected a multiple of 32" in capsys.readouterr().err
