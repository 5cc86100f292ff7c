"""What README and the pages that it links say that code can say."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import fits

import adaptkit
from recipes.ablation import table

ROOT = Path(__file__).parents[1]
PAGES = {str(p.relative_to(ROOT)): p.read_text() for p in (ROOT / "README.md", *sorted(ROOT.glob("recipes/**/*.md")))}
README = PAGES["README.md"]


def said_to_fit():
    return README[README.index(fits.START) + len(fits.START) : README.index(fits.STOP)].strip()


@pytest.mark.full
def test_the_table_of_what_fits_what_is_what_attaching_says():
    assert said_to_fit() == fits.table(), "python tests/fits.py prints the table of today"


def test_the_table_of_what_fits_what_is_true_of_one_backbone_of_each_class():
    """Of every fourth cell, along rows and columns."""
    names = [name for name in adaptkit.list_adapters() if "toy" not in name]
    header, _, *lines = said_to_fit().splitlines()
    assert header == "| | " + " | ".join(f"`{name}`" for name in names) + " |"
    of_class = {f"{library} {cls}": group[0] for (library, cls), group in fits.classes().items()}
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines}
    assert list(cells) == list(of_class)
    for i, (title, row) in enumerate(cells.items()):
        for name, cell in list(zip(names, row, strict=True))[i % 4 :: 4]:
            assert cell == "some" or fits.fits(name, of_class[title]) == (cell == "yes"), (title, name)


def blocks(language):
    """The blocks of code in a language: (page, text)."""
    found = [(page, re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)) for page, text in PAGES.items()]
    return [(page, block) for page, those in found for block in those]


def test_every_python_block_is_python():
    assert len(blocks("python")) > 3
    for page, block in blocks("python"):
        compile(block, page, "exec")


def commands():
    """Every command that starts a recipe or a benchmark: its module, and the words behind it."""
    for _, block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:2] == ["adaptkit", "train"] and len(words) > 2:
                yield f"recipes.{words[2]}", words[3:]
            elif words[:2] == ["python", "-m"] and words[2].startswith("recipes."):
                yield words[2], words[3:]


@pytest.mark.parametrize(("module", "words"), commands(), ids=lambda v: v if isinstance(v, str) else "")
def test_the_options_of_every_command_are_known(module, words, monkeypatch):
    recipe = importlib.import_module(module)
    known = getattr(recipe, "parse", None) or getattr(recipe, "arguments", None)
    if known is None:
        pytest.skip(f"{module} takes its options in main")
    monkeypatch.setattr(sys, "argv", [module, *words])
    asked = known(words) if known.__code__.co_argcount else known()
    if isinstance(asked, tuple):  # the rest is for the recipe that it starts
        args, rest = asked
        started = table(args.table).recipe if module == "recipes.ablate" else "segment"
        rest += ["--train=a", "--val=b"] if started == "segment" else []
        importlib.import_module(f"recipes.{started}").parse(rest)


def anchors(text):
    """The names that GitHub gives to the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_every_link_within_the_project_leads_somewhere():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, name = target.partition("#")
            if "://" in target:
                continue
            there = (ROOT / page).parent / path if path else ROOT / page
            assert there.exists(), f"{page}: {target}"
            assert not name or name in anchors(there.read_text()), f"{page}: {target}"


def attributes():
    """Every ``adaptkit.a.b`` that a page writes, but the name of the entry points; and the packages by themselves."""
    text = "\n".join(PAGES.values()).replace('"adaptkit.plugins"', "")
    written = re.findall(r"\badaptkit((?:\.[A-Za-z_]\w*)+)", text)
    packages = (".accounting", ".export", ".inspect", ".interop", ".losses", ".mixers", ".models", ".ops")
    return sorted({*written, *packages})


def test_what_a_page_writes_as_an_attribute_is_there_after_importing_adaptkit_alone():
    # One fork for each name: what one of them imports must not help the next.
    code = """
import operator, os, sys
import peft, timm, torch  # by us nothing yet
import adaptkit
for path in sys.argv[1:]:
    if not os.fork():
        operator.attrgetter(path[1:])(adaptkit)
        os._exit(0)
    if os.wait()[1]:
        print(path)
"""
    assert {".attach", ".interop.to_peft", ".ops.pool.release"} <= set(attributes())
    done = subprocess.run([sys.executable, "-c", code, *attributes()], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("", 0), done.stderr[-2000:]


def test_the_packages_are_listed_and_another_name_is_an_attribute_error():
    assert {"analysis", "attach", "export", "interop", "losses"} <= set(dir(adaptkit))
    assert not hasattr(adaptkit, "no_such_module")
