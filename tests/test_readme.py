"""What README says that code can say."""

import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import fits

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_table_of_what_fits_what_is_what_attaching_says():
    said = README[README.index(fits.START) + len(fits.START) : README.index(fits.STOP)].strip()
    assert said == fits.table(), "python tests/fits.py prints the table of today"


def test_every_python_block_of_readme_is_python():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) > 3
    for block in blocks:
        compile(block, "README.md", "exec")


def attributes():
    """Every ``adaptkit.a.b`` that README writes, but the name of the entry points; and the packages by themselves."""
    written = re.findall(r"\badaptkit((?:\.[A-Za-z_]\w*)+)", README.replace('"adaptkit.plugins"', ""))
    packages = (".accounting", ".export", ".inspect", ".interop", ".losses", ".mixers", ".models", ".ops")
    return sorted({*written, *packages})


def test_what_readme_writes_as_an_attribute_is_there_after_importing_adaptkit_alone():
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
    import adaptkit

    assert {"analysis", "attach", "export", "interop", "losses"} <= set(dir(adaptkit))
    assert not hasattr(adaptkit, "no_such_module")
