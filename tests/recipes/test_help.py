"""``adaptkit train TASK --help``: options in groups, each with its default, in every recipe."""

import importlib
import re

import pytest

from recipes import help as shown
from recipes import options

RECIPES = ("segment", "classify", "depth", "detect", "panoptic", "fewshot", "mixers", "adavit")


def help_of(recipe, capsys):
    with pytest.raises(SystemExit) as left:
        importlib.import_module(f"recipes.{recipe}").parse(["--help"])
    assert left.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("recipe", RECIPES)
def test_groups_come_in_order_and_every_option_once(recipe, capsys):
    said = help_of(recipe, capsys)
    titles = [t for t in (shown.REST, *shown.GROUPS) if f"\n{t}:\n" in said]
    assert {"data", "model", "run"} <= set(titles)
    assert [said.index(f"\n{t}:\n") for t in titles] == sorted(said.index(f"\n{t}:\n") for t in titles)
    flags = re.findall(r"^  (?:-h, )?(--[\w-]+)", said, re.MULTILINE)
    assert len(flags) == len(set(flags))
    assert {"--backbone", "--out", "--help"} <= set(flags)
    assert len(said.partition("\n\n")[0].splitlines()) <= 2  # usage names what must be given, no wall of options


def test_defaults_are_those_of_the_recipe(capsys):
    said = " ".join(help_of("segment", capsys).split())
    assert "--size H W (default: 240 320)" in said
    assert "--lr LR (default: 0.001)" in said
    assert "--adapter NAME [NAME ...] one or several, see `adaptkit list` (default: vit-adapter)" in said
    assert "from the newest checkpoint (default: no)" in said
    assert "(default: None)" not in said
    assert "--out OUT (default: runs/segment)" in said


def test_no_option_is_in_two_groups():
    names = [name for group in shown.GROUPS.values() for name in group]
    assert sorted(names) == sorted(set(names))


def test_an_option_of_every_recipe_is_in_a_group():
    """A new option of ``recipes.options`` is to be shown under a title, not as a peculiarity of each task."""
    everywhere = options.parser("mine", "Mine.")
    assert shown.REST not in everywhere._grouped()


def test_what_no_group_names_is_the_tasks_own(capsys):
    p = options.parser("mine", "Mine.")
    p.add_argument("--peculiar", default="100%", help="of mine")
    said = p.format_help()
    assert f"{shown.REST}:\n  --peculiar PECULIAR " in said
    assert "of mine (default: 100%)" in said
    assert p._actions[-1].help == "of mine"  # showing changes nothing


def test_a_misspelt_option_of_a_recipe_is_answered(capsys):
    with pytest.raises(SystemExit):
        importlib.import_module("recipes.segment").parse(["--trian", "x", "--num-classes", "2"])
    said = capsys.readouterr().err
    assert said.endswith("--trian: did you mean --train?\n")
    assert said.count("\n") == 2
