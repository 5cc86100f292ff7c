"""One thread per process: the models are tiny, and two workers on two cores should not fight over them.

Every test starts from the same seed, whichever ran before it in its process.
"""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def the_same_seed():
    torch.manual_seed(0)
