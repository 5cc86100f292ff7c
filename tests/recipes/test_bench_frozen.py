"""The bench of frozen methods: how rates are found, what is run, and what is shown."""

import math
from pathlib import Path

import datasets
import pytest

from recipes import segment
from recipes.bench import frozen


@pytest.mark.parametrize(
    ("best", "asked"),
    [
        (1e-3, [3e-4, 1e-3, 3e-3]),
        (9e-3, [3e-4, 1e-3, 3e-3, 9.5e-3, 3e-2]),
        (1e-4, [3e-4, 1e-3, 3e-3, 9.5e-5, 3e-5]),
        (1.0, [3e-4, 1e-3, 3e-3, 9.5e-3, 3e-2]),  # and no further
    ],
)
def test_a_best_rate_at_the_end_of_the_grid_asks_for_the_next(best, asked):
    tried = []

    def scores(rates):
        tried.extend(rates)
        return [-abs(math.log(rate / best)) for rate in rates]

    found = frozen.tuned(scores)
    assert tried == pytest.approx(asked, rel=0.02)
    assert found == max(tried, key=lambda rate: -abs(math.log(rate / best)))


def test_rates_are_found_on_images_that_come_after_those_that_are_trained_on(tmp_path):
    datasets.Dataset.from_dict({"n": list(range(11))}).to_parquet(str(tmp_path / "train.parquet"))
    fit, held = frozen.split(str(tmp_path / "train.parquet"), tmp_path)
    parts = [datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "c"))["n"] for path in (fit, held)]
    assert [list(part) for part in parts] == [list(range(8)), list(range(8, 11))]


@pytest.mark.parametrize("window", [None, [32, 32]])
@pytest.mark.parametrize("method", frozen.METHODS)
def test_every_method_is_a_run_that_the_recipe_takes(method, window, tmp_path):
    common = ["--num-classes", "3", "--backbone", "test_vit", "--size", "64", "64"]
    caches = frozen.caches_of({method: frozenset([3])} if window and method in frozen.READS else {})
    bench = frozen.Bench(tmp_path, common, window, 1, caches)
    data = {"train": "a.parquet", "val": "b.parquet", "steps": 7}
    first, second = (bench.asked("steps", method, f"seed{n}", {**data, "lr": "1.0e-03", "seed": n}) for n in range(2))
    args = segment.parse(first.arguments)
    assert (args.steps, args.lr, args.seed, args.train) == (7, 1e-3, 0, "a.parquet")
    assert bool(args.cache_features) == (window is not None and method in frozen.READS)
    assert segment.parse(second.arguments).out != args.out
    assert args.cache_features is None or segment.parse(second.arguments).cache_features != args.cache_features


def test_a_cache_serves_every_method_whose_blocks_it_holds_and_is_filled_first():
    caches = frozen.caches_of({"linear": {11}, "extractors": {5, 11}, "vit-split": {2, 11}, "sfp": {11}})
    assert caches == {"extractors": "5-11", "vit-split": "2-11", "linear": "5-11", "sfp": "5-11"}
    bench = frozen.Bench(Path(), [], [32, 32], 1, caches)
    assert bench.ordered(["lora", "linear", "vit-split", "extractors"]) == ["extractors", "vit-split", "linear", "lora"]


@pytest.mark.parametrize("method", frozen.READS)
def test_a_method_is_asked_which_blocks_it_reads(method):
    common = ["--num-classes", "3", "--backbone", "demo", "--size", "64", "64"]
    assert frozen.reads(method, common) == ({11} if method in ("linear", "fpn", "sfp") else {2, 5, 8, 11})


def test_a_table_has_means_spreads_and_costs():
    def result(miou, steps, seconds):
        return {"miou": miou, "steps": steps, "seconds": seconds, "trained_parameters": 2_500_000, "peak_memory_mib": 9}

    steps = {"linear": [result(40.0, 10, 5.0), result(42.0, 10, 7.0)]}
    seconds = {"linear": [result(44.0, 20, 11.0)]}
    row = frozen.table({"linear": 3e-3}, steps, seconds).splitlines()[-1]
    assert [c.strip() for c in row.split("|")[1:-1]] == [
        "`linear`", "3e-03", "41.0 ± 1.4", "44.0", "20", "2.50 M", "0.60", "9",
    ]  # fmt: skip
