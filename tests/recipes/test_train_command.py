"""``adaptkit train``: finds the recipes, forwards what it is given; every configuration that ships is sound."""

import importlib
from pathlib import Path

import pytest

import adaptkit.cli as cli
from adaptkit.cli.train import recipes
from adaptkit.core import registry

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
RECIPE = {"ade20k": "segment", "cityscapes": "segment", "imagenet1k": "classify", "vtab": "vtab", "nyu": "depth"}
RECIPE |= {"coco": "detect", "panoptic": "panoptic", "camvid": "segment"}
GIVEN = {"camvid": ["--train", "t"], "vtab": ["--data", "d"], "depth": ["--train", "t"]}


def test_alone_it_lists_the_tasks(capsys):
    assert cli.main(["train"]) == 0
    said = capsys.readouterr().out
    for task in ("segment", "classify", "fewshot", "depth", "vtab"):
        assert task in said
    assert "engine" not in said  # what has no main is no task


def test_it_forwards_every_argument_untouched(monkeypatch):
    package, _ = recipes()
    seen = []
    monkeypatch.setattr(importlib.import_module(f"{package}.classify"), "main", seen.append)
    assert cli.main(["train", "classify", "--train", "x", "--adapter", "lora", "dat", "--help", "--", "y"]) == 0
    assert seen == [["--train", "x", "--adapter", "lora", "dat", "--help", "--", "y"]]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nope"], "no task is named 'nope'; the tasks are ablate, adavit, classify"),
        (
            ["segment", "--train", "nowhere.parquet", "--num-classes", "3", "--random-backbone"],
            "there is no file nowhere.parquet",
        ),
    ],
)
def test_a_mistake_is_one_line_and_status_two(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *argv]) == 2
    assert message in capsys.readouterr().err


def test_without_recipes_it_says_where_it_looked(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["train"]) == 2
    assert "the recipes are neither in adaptkit.recipes nor beside" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_configuration_that_ships_is_read_and_names_options_that_exist(path):
    prefix = path.stem.split("-")[0]
    if prefix not in RECIPE:
        pytest.skip("of another recipe")
    recipe = importlib.import_module(f"recipes.{RECIPE[prefix]}")
    args = recipe.parse([*GIVEN.get(prefix, GIVEN.get(RECIPE[prefix], [])), "--config", path.stem])
    assert args.steps >= 1000
    for adapter in importlib.import_module("recipes.options").adapters(args):
        name, options = adapter if isinstance(adapter, tuple) else (adapter, {})
        registry.adapters()[name].configure(options)
