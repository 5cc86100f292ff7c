"""Recipes that run in the test's own process must not inherit another one's accelerator, nor what it has read."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from runs import reset, write_folder


@pytest.fixture(autouse=True)
def fresh():
    reset()  # a fixture of the module may have run a recipe
    yield
    reset()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Five images with masks of three classes, 40 x 56 pixels."""
    return str(write_folder(tmp_path_factory.mktemp("pictures") / "data"))
