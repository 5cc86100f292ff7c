"""What is installed is what is in the tree."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def packages(folder, name):
    """Every folder with Python files below ``folder``, as a package of this name."""
    found = {f.parent.relative_to(ROOT / folder) for f in (ROOT / folder).rglob("*.py")}
    return {".".join([name, *path.parts]) for path in found}


def test_every_package_is_listed():
    assert set(SETUPTOOLS["packages"]) == packages("adaptkit", "adaptkit") | packages("recipes", "adaptkit.recipes")


def test_every_file_that_is_no_python_is_listed():
    for name, folder in (("adaptkit", "adaptkit"), ("adaptkit.recipes", "recipes")):
        listed = {f for pattern in SETUPTOOLS["package-data"][name] for f in (ROOT / folder).glob(pattern)}
        there = {f for f in (ROOT / folder).rglob("*") if f.is_file() and f.suffix not in (".py", ".pyc")}
        assert there == listed


def test_the_top_of_the_tree_is_as_it_was_agreed():
    import subprocess

    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    top = {f.partition("/")[0] for f in tracked if not f.startswith(".")}
    assert top <= {"adaptkit", "recipes", "tests", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"}
