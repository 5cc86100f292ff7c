"""What README says that code can say."""

import re
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
