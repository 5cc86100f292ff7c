"""Grids of cases of which a part comes with each run of the tests, and all of them with ``-m full``."""

from itertools import product

import pytest


def dealt(*axes, share=2):
    """Every combination as ``pytest.param``: one of ``share`` without a mark, the others ``full``.

    Along any axis the unmarked ones are every ``share``-th, so that each value meets values of all the other axes.
    """
    cases = []
    for places in product(*(enumerate(axis) for axis in axes)):
        chosen = sum(i for i, _ in places) % share == 0
        values = [value for _, value in places]
        name = "-".join(map(str, values))
        cases.append(pytest.param(*values, id=name, marks=[] if chosen else pytest.mark.full))
    return cases
