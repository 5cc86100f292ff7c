"""The mixer comparison: equal parameters are equal, and the whole runs at toy size."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from adaptkit import Spec  # noqa: E402
from recipes.mixers import count, expected_range, main, matched, parse, rows, verdict  # noqa: E402

SPEC = Spec("timm-vit", 192, 12, 3, 16, 1)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for i in range(4):
        mask = rng.integers(0, 3, (4, 6)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        Image.fromarray(np.stack([mask * 80, 255 - mask * 80, mask * 40], -1)).save(tmp_path / "data" / "images" / f"{i}.png")  # fmt: skip
        Image.fromarray(mask).save(tmp_path / "data" / "masks" / f"{i}.png")
    return str(tmp_path / "data")


def arguments(*more):
    return parse(["--train", "x", "--val", "x", "--num-classes", "3", *more])


def test_bottlenecks_are_widened_until_the_totals_match():
    planned = [r for r in rows(arguments(), SPEC) if r["table"] != "mixer, equal width" and r["options"]]
    totals = [r["parameters"] for r in planned]
    assert max(totals) / min(totals) < 1.05
    assert {r["options"]["width"] for r in planned} != {32}


def test_at_equal_width_all_have_the_width_asked_for():
    planned = [r for r in rows(arguments("--width", "24"), SPEC) if r["table"] == "mixer, equal width"]
    assert {r["options"]["width"] for r in planned} == {24}


def test_the_nearest_even_width_is_found():
    target = count(SPEC, {"mixer": "pool", "width": 46})
    assert matched(SPEC, {"mixer": "pool"}, target)["width"] == 46
    assert matched(SPEC, {"mixer": "pool"}, target + 100)["width"] == 46


@pytest.mark.parametrize(("worst", "seeds", "said"), [
    (34.0, 2, "the structure matters more"),
    (39.9, 2, "the mixer matters more"),
    (39.0, 2, "cannot be told"),
    (34.0, 1, "One seed does not tell"),
])  # fmt: skip
def test_the_verdict_compares_mixers_with_structure_and_with_chance(worst, seeds, said):
    row = {"spread": 0.2, "options": {}, "scores": [0.0] * seeds}
    mixers = [{"table": "mixer, equal parameters", "name": n, "mean": m, **row} for n, m in (("pool", 40.0), ("conv", 41.0))]  # fmt: skip
    structure = {"table": "structure, equal parameters", "name": "pool, no norm", "mean": worst, **row}
    assert said in verdict([*mixers, structure])


def test_the_range_of_two_normals_is_that_of_the_textbook():
    assert abs(expected_range(2) - 1.128) < 0.02


def test_the_comparison_runs_from_a_folder_to_a_table_and_a_chart(folder, tmp_path):
    out = tmp_path / "run"
    main(["--train", folder, "--val", folder, "--num-classes", "3", "--size", "32", "48", "--steps", "2", "--width", "4",
          "--batch-size", "2", "--mixers", "pool", "conv", "--seeds", "0", "1", "--out", str(out)])  # fmt: skip
    results = json.loads((out / "results.json").read_text())["rows"]
    assert [r["name"] for r in results] == ["pool", "conv", "pool", "conv", "pool, no residual", "pool, no MLP",
                                            "pool, no norm", "pool, none of the three", "no adapter"]  # fmt: skip
    assert all(len(r["scores"]) == 2 for r in results)
    assert "| no adapter | - | 0 |" in (out / "table.md").read_text()
    assert Image.open(out / "chart.png").size[0] > 100
