"""One HTML page about one run or several: ``adaptkit report RUN... --out page.html``.

``run.py`` reads what a run recorded, ``groups.py`` puts runs together that differ in their seed alone, ``facts.py``,
``by_class.py`` and ``figures.py`` find what the page says and shows, ``charts.py`` draws and ``page.py`` fills
``page.html``. The page holds everything that it shows and asks for nothing: no server, no script, no address elsewhere.
"""

from adaptkit.report.groups import Group, grouped
from adaptkit.report.page import Extra, page, write
from adaptkit.report.run import Run, found, read

__all__ = ["Extra", "Group", "Run", "found", "grouped", "page", "read", "write"]
