"""The benchmarks that measure ourselves, small: each prints its tables."""

from pathlib import Path

import pytest

import adaptkit
from recipes.bench import adavit, load, serve, serve_http, step


def cells(text):
    return [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def test_serving_compares_the_outputs_and_prints_a_row_for_each_number_of_tasks(capsys):
    serve.main(["--backbone", "vit_tiny_patch16_224", "--size", "64", "--batch", "1", "--tasks", "1", "2", "--rounds", "1",
                "--threads", "1", "--adapter", "sfp"])  # fmt: skip
    table = cells(capsys.readouterr().out)
    assert [row[0] for row in table[2:]] == ["1", "2"]
    assert all(float(row[3]) > 0 and row[4] == "1" for row in table[2:])


def test_loading_prints_imports_and_adapters(capsys):
    load.main(["--backbones", "vit_tiny_patch16_224", "--adapters", "sfp", "lora", "--rounds", "1", "--threads", "1"])
    table = cells(capsys.readouterr().out)
    assert [row[0] for row in table if row[0] in ("torch", "adaptkit")] == ["torch", "adaptkit"]
    assert [row[1] for row in table[-2:]] == ["sfp", "lora"]
    assert all(float(row[2]) > 0 for row in table[-2:])


def test_a_step_compares_the_maps_and_prints_every_mode(capsys):
    step.main(["--backbone", "vit_tiny_patch16_224", "--size", "64", "--batch", "2", "--rounds", "1", "--threads", "1",
               "--no-memory"])  # fmt: skip
    table = cells(capsys.readouterr().out)
    assert [row[0] for row in table[2:]] == list(step.MODES)
    assert all(float(row[1]) > 0 for row in table[2:])
    assert table[2][2] == "1.00"


def test_a_step_with_reference_says_beside_each_of_our_modes_what_the_text_takes(capsys, monkeypatch):
    said, reference = [], adaptkit.reference
    monkeypatch.setattr(step.adaptkit, "reference", lambda: said.append(1) or reference())
    modes = ["authors' data flow", "injectors", "extractors only, cached"]
    step.main(["--backbone", "vit_tiny_patch16_224", "--size", "64", "--batch", "1", "--rounds", "1", "--threads", "1",
               "--no-memory", "--reference", "--modes", *modes])  # fmt: skip
    table = cells(capsys.readouterr().out)
    assert table[0] == ["mode", "ms per step", "times faster", "with reference()"]
    assert [row[0] for row in table[2:]] == modes
    assert table[2][3] == ""
    assert all(float(row[3]) > 0 for row in table[3:])
    assert len(said) == 2 * 2  # two of our modes, to warm up and to be timed


@pytest.mark.parametrize("more", [[], ["--reference"]])
def test_adavit_prints_a_row_for_each_policy_and_batch(more, capsys):
    adavit.main(["--backbone", "deit_tiny_patch16_224", "--size", "64", "--batches", "2", "--images", "2", "--rounds",
                 "1", *more])  # fmt: skip
    table = cells(capsys.readouterr().out)
    assert [row[0] for row in table[2:]] == list(adavit.POLICIES)
    ways = ["packed with reference()", "auto with reference()", "masked with reference()"]
    assert table[0][11:] == (ways if more else [])
    assert {len(row) for row in table} == {14 if more else 11}
    assert all(float(cell.rstrip("x")) > 0 for row in table[2:] for cell in row[11:])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")
@pytest.mark.full
def test_a_step_measures_memory_in_a_process_of_its_own():
    args = step.arguments(["--backbone", "vit_tiny_patch16_224", "--size", "96", "--threads", "1"])
    assert step.memory(args, "injectors") > 0


def test_a_step_refuses_to_compare_what_is_not_the_same(monkeypatch):
    args = step.arguments(["--backbone", "vit_tiny_patch16_224", "--threads", "1"])
    monkeypatch.setattr(
        step.OfficialFlow, "forward", lambda self, image: [m * 2 for m in step.adapted(args)(image).maps]
    )
    with pytest.raises(RuntimeError, match="nothing to compare"):
        step.check(args)


@pytest.mark.full
def test_serving_over_http_compares_the_answers_and_prints_a_row_for_each_way(capsys):
    pytest.importorskip("uvicorn")
    serve_http.main(["--size", "32", "--clients", "2", "--requests", "3", "--images", "2", "--threads", "1"])
    table = cells(capsys.readouterr().out)
    assert [row[0] for row in table[2:]] == ["off", "exact"]
    assert all(float(row[1]) > 0 and 0 < int(row[4]) <= int(row[5]) == 6 for row in table[2:])
