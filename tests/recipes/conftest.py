"""Recipes that run in the test's own process must not inherit another one's accelerator."""

import pytest


@pytest.fixture(autouse=True)
def fresh_accelerator():
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
