"""The benchmark of a GPU, without one: every part of it runs, tiny, and it says what it lacks."""

import pytest
import torch

from recipes.bench import gpu


def cells(text):
    return [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


@pytest.mark.full
def test_a_dry_run_prints_every_part_of_the_table(capsys):
    assert gpu.main(["--dry-run", "--minutes", "60"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("DRY RUN, its figures say nothing")
    table = cells(text)
    assert {len(row) for row in table} == {6}
    groups = {row[0]: [other for other in table if other[0] == row[0]] for row in table[2:]}
    assert [row[1] for row in groups["check"]] == gpu.adaptkit.list_adapters()
    vit = "vit_tiny_patch16_224"
    parts = ["operator inj S, float32", "operator inj S, bfloat16", "deit_tiny_patch16_224 with AdaViT, batch 2",
             f"{vit}, 2 tasks at 64", f"{vit} at 64, bfloat16", f"{vit} at 64, bfloat16, compiled"]  # fmt: skip
    for part in parts:
        assert all(float(row[2]) > 0 and float(row[3]) > 0 for row in groups[part]), part
    assert [row[1] for row in groups[parts[4]]] == list(gpu.step.MODES)
    assert any("adaptkit triton" in row[1] and "not here" in row[5] for row in groups["operator"])
    assert "Not measured" not in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_exits_with_2(capsys):
    assert gpu.main([]) == 2
    said = capsys.readouterr()
    assert not said.out
    assert "needs a GPU, and torch finds none; --dry-run" in said.err


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_an_adapter_that_computes_something_else_on_the_device_is_wrong(factor, monkeypatch):
    outcome, calls = gpu.outcome, []

    def second_is_off(model, image):
        calls.append(model)
        found = outcome(model, image)
        return [tensor * factor for tensor in found] if len(calls) == 2 else found

    monkeypatch.setattr(gpu, "outcome", second_is_off)
    monkeypatch.setattr(gpu.adaptkit, "list_adapters", lambda: ["sfp"])
    (row,) = gpu.checks(gpu.TINY)
    assert row.wrong
    assert "WRONG: off by" in str(row)


def test_a_wrong_row_is_exit_code_1(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "checks", lambda plan: iter([gpu.Row("check", "sfp", note="off by 1", wrong=True)]))
    monkeypatch.setattr(gpu, "operator_rows", lambda *arguments: iter(()))
    assert gpu.main(["--dry-run", "--minutes", "0"]) == 1


def test_what_comes_too_late_is_named(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "checks", lambda plan: iter(()))
    assert gpu.main(["--dry-run", "--minutes", "0"]) == 0
    text = capsys.readouterr().out
    assert "Not measured within 0 minutes: operator inj S, bfloat16" in text
    assert "Not measured within 0 minutes: vit_tiny_patch16_224 at 64, bfloat16, compiled, injectors" in text
    assert not any(row[2] for row in cells(text)[2:])


def test_an_operator_that_is_off_is_not_timed(monkeypatch):
    def broken(*inputs):
        return 2 * gpu.ops.ms_deform_attn(*inputs)

    monkeypatch.setattr(gpu.ops, "available", lambda device: ({"broken": broken}, {}))
    (row,) = gpu.operator_rows(gpu.TINY, False, gpu.Deadline(60))
    assert row.wrong
    assert row.ms is None
    assert "broken is off by" in row.note


def test_a_step_that_fails_is_a_note_and_stops_nothing(monkeypatch):
    def too_large(args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(gpu.step.MODES, "injectors", too_large)
    row = gpu.one_step("group", "injectors", "vit_tiny_patch16_224", 64, gpu.TINY, None)
    assert (row.ms, row.note) == (None, "OutOfMemoryError: CUDA out of memory")
