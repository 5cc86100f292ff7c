"""One thread per process: the models are tiny, and two workers on two cores should not fight over them."""

import torch

torch.set_num_threads(1)
