"""What is installed is what is in the tree."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest

import adaptkit._namesake as namesake
from adaptkit.version import DISTRIBUTION

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]


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
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    top = {f.partition("/")[0] for f in tracked if not f.startswith(".")}
    assert top <= {"adaptkit", "recipes", "tests", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"}


def test_no_requirement_is_listed_twice():
    for listed in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        names = [re.match(r"[\w-]+", one)[0].lower() for one in listed]
        assert sorted(set(names)) == sorted(names)


# ------------------------------------------------------------------------------------------------------------ the name


def test_the_name_to_install_by_is_written_once_and_the_command_keeps_its_own():
    assert PROJECT["name"] == DISTRIBUTION
    assert PROJECT["description"] == namesake.SUMMARY
    assert PROJECT["scripts"] == {"adaptkit": "adaptkit.cli:main"}


#: to install, by pip or another tool, or with extras, what the package index has under the import name
RECOMMENDS = re.compile(r"(?:\binstall\b[^\n&;#]*?[\s\"'`]adaptkit(?![\w.-]))|\badaptkit\[")


@pytest.mark.parametrize("text", ["pip install adaptkit", "uv pip install -U 'adaptkit'", "`pip install adaptkit[a]`"])
def test_a_recommendation_is_recognised(text):
    assert RECOMMENDS.search(text)
    assert not RECOMMENDS.search(text.replace("adaptkit", DISTRIBUTION))


def test_no_text_recommends_to_install_another_projects_code():
    files = [ROOT / "README.md", ROOT / "pyproject.toml"]
    files += [f for folder in ("adaptkit", "recipes") for f in (ROOT / folder).rglob("*") if f.suffix in TEXTS]
    assert len(files) > 100
    found = {
        f"{f.relative_to(ROOT)}: {line}"
        for f in files
        for line in f.read_text().splitlines()
        if RECOMMENDS.search(line)
    }
    assert found == set()


TEXTS = (".py", ".md", ".yaml", ".toml")


def installed(folder, name, summary):
    """Lay an installed distribution into a folder."""
    info = folder / f"{name.replace('-', '_')}-0.1.0.dist-info"
    info.mkdir(parents=True)
    said = "" if summary is None else f"Summary: {summary}\n"
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n{said}")
    (info / "RECORD").write_text("adaptkit/__init__.py,,\n")


def imported(folder):
    """Import the package with this folder on the path."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(folder)))}
    return subprocess.run([sys.executable, "-c", "import adaptkit"], env=env, capture_output=True, text=True)


def test_an_environment_that_holds_the_other_project_too_is_an_error_at_import(tmp_path):
    installed(tmp_path, "adaptkit", "Adapters for something else")
    done = imported(tmp_path)
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert said.startswith("ImportError: the installed distribution 'adaptkit' 0.1.0 (Adapters for something else) in ")
    assert said.endswith(f"pip uninstall -y adaptkit {DISTRIBUTION}, then pip install {DISTRIBUTION}")


def test_this_project_by_its_old_name_and_by_its_new_one_is_no_error(tmp_path):
    installed(tmp_path, "adaptkit", namesake.SUMMARY)
    installed(tmp_path, DISTRIBUTION, "whatever it says")
    assert imported(tmp_path).returncode == 0


@pytest.mark.parametrize("summary", [None, "", "Small trainable modules"])
def test_what_does_not_say_that_it_is_this_project_is_another(tmp_path, summary):
    installed(tmp_path, "Adaptkit", summary)
    with pytest.raises(ImportError, match="is another project; it has the import name of this one, 'adaptkit-vit'"):
        namesake.check(distributions(name=namesake.NAME, path=[str(tmp_path)]))


def test_a_folder_without_metadata_is_no_distribution(tmp_path):
    (tmp_path / "adaptkit").mkdir()
    namesake.check(distributions(name=namesake.NAME, path=[str(tmp_path)]))
