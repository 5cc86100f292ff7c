"""Old import paths lead to the very modules that have moved."""

import importlib
import subprocess
import sys

import pytest

import adaptkit
from adaptkit._moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_is_the_new_module_and_says_so(old):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} has moved to {MOVED[old]}"):
        module = importlib.import_module(old)
    assert module is importlib.import_module(MOVED[old])
    assert module.__name__ == MOVED[old]
    assert module.__spec__.name == MOVED[old]


def test_old_attributes_and_from_imports_work_in_a_fresh_process():
    code = """
import adaptkit
from adaptkit.vit import Spec
from adaptkit.inspect.kept import kept_patches
from adaptkit import registry
assert adaptkit.accounting.__name__ == "adaptkit.analysis.accounting"
assert adaptkit.inspect.kept_patches is kept_patches
assert Spec is adaptkit.Spec
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_module_of_the_package_is_an_attribute():
    for name in ("core", "hub", "model", "features", "analysis", "interop", "export", "seam", "losses"):
        assert getattr(adaptkit, name).__name__ == f"adaptkit.{name}"
        assert name in dir(adaptkit)
