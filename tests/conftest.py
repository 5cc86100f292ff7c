"""One thread per process: the models are tiny, and two workers on two cores should not fight over them.

Processes that tests start inherit this. Every test starts from the same seed and with one thread, whichever ran before it
in its process. Garbage is collected less often: graphs and fake tensors are made by the hundred thousand, and looking
through them all took a tenth of the time.
"""

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, here and in the processes of tests

import pytest
import torch

torch.set_num_threads(1)
gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True)
def the_same_start():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a command with --threads sets its own
