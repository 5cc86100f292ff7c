"""``import adaptkit`` imports nothing heavy; each public name and each module is there when it is asked for."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import adaptkit

ROOT = Path(adaptkit.__file__).parent
HEAVY = ("torch", "numpy", "timm", "transformers", "peft", "rich", "safetensors")


def loaded(code):
    """Run code in a fresh interpreter; return its output and which heavy packages it imported."""
    code += f"\nimport sys, json\nprint('\\n' + json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, _, names = done.stdout.rstrip().rpartition("\n")
    return said, json.loads(names)


@pytest.mark.parametrize("argv", [[], ["--help"], ["--version"], ["train", "--help"], ["list", "-h"]])
def test_help_and_version_import_nothing_heavy(argv):
    code = f"""
from adaptkit.cli import main
try:
    status = main({argv})
except SystemExit as left:
    status = left.code
assert status == 0, status
"""
    said, heavy = loaded(code)
    assert "adaptkit" in said
    assert heavy == []


def test_the_package_alone_imports_nothing_heavy_and_attach_imports_torch():
    assert loaded("import adaptkit; dir(adaptkit)")[1] == []
    assert "torch" in loaded("import adaptkit; adaptkit.attach")[1]


def test_from_an_empty_start_built_in_methods_and_backbones_are_found():
    said, _ = loaded("""
import adaptkit
model = adaptkit.attach(adaptkit.demo_backbone(pretrained=False), "vit-adapter", head=("linear", {"num_classes": 2}))
print(type(model).__name__, *adaptkit.list_heads())
""")
    assert said.split() == ["AdaptedModel", "classifier", "depth", "fpn", "linear", "plain-mask", "upsample"]


def test_the_table_of_names_the_imports_for_editors_and_all_say_the_same():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    [checked] = [n for n in tree.body if isinstance(n, ast.If)]
    imported = {a.name: n.module.removeprefix("adaptkit.") for n in checked.body for a in n.names}
    assert imported == adaptkit._NAMES
    assert {*adaptkit._NAMES, "__version__"} == set(adaptkit.__all__)
    assert adaptkit.__all__ == sorted(adaptkit.__all__)


@pytest.mark.parametrize("name", adaptkit.__all__)
def test_every_public_name_is_what_its_module_has(name):
    assert name in dir(adaptkit)
    module = adaptkit._NAMES.get(name, "version")
    assert getattr(adaptkit, name) is getattr(importlib.import_module(f"adaptkit.{module}"), name)


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'adaptkit' has no attribute 'atach'"):
        adaptkit.atach


@pytest.mark.full
@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="forks one interpreter for each module")
def test_every_module_can_be_the_first_that_is_imported():
    """No order of imports is needed: nothing relies on what ``import adaptkit`` once imported for it."""
    code = f"""
import os, sys, torch, timm, transformers, peft, adaptkit
bad = []
for path in sorted(__import__("pathlib").Path({str(ROOT)!r}).rglob("*.py")):
    name = ".".join(["adaptkit", *path.relative_to({str(ROOT)!r}).with_suffix("").parts]).removesuffix(".__init__")
    if name.endswith("__main__"):
        continue
    child = os.fork()
    if not child:
        try:
            __import__(name)
        except BaseException as error:
            print(name, repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        bad.append(name)
assert not bad, bad
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
