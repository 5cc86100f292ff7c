"""A header says where a method that is not adaptkit's own comes from; an error says how to get it."""

import pytest
import timm
from timm.models import VisionTransformer

from adaptkit.adapters.sfp import SimpleFeaturePyramid
from adaptkit.hub.packages import needs, origin_of


class Mine:
    """Of no package."""


def test_our_own_say_nothing_and_what_is_installed_names_its_distribution():
    assert origin_of(SimpleFeaturePyramid) == {}
    assert origin_of(VisionTransformer) == {"package": timm.__name__}


def test_a_module_that_no_package_holds_is_named_and_not_to_be_installed():
    said = origin_of(Mine)
    assert said == {"module": Mine.__module__.partition(".")[0]}
    assert (
        needs(said) == f". It was registered by the module {said['module']}, which no package holds: import that first"
    )


def test_a_module_here_is_not_the_installed_one_of_the_same_name(tmp_path, monkeypatch):
    import sys
    import types

    here = types.ModuleType("yaml")
    here.__file__ = str(tmp_path / "yaml.py")
    monkeypatch.setitem(sys.modules, "yaml", here)
    assert origin_of(type("Mine", (), {"__module__": "yaml.mine"})) == {"module": "yaml"}


@pytest.mark.parametrize("package", ["x; rm -rf ~", "a b", "--index-url=x", "", None, 3, "-x", "x" * 200, "x\n"])
def test_what_is_no_name_of_a_package_is_not_suggested(package):
    assert needs({"package": package}) == ""


def test_a_package_is_a_pointer_and_no_more():
    assert needs({"package": "my-plug.in_2"}).endswith("if you trust it, pip install my-plug.in_2")
    assert needs({}) == ""
