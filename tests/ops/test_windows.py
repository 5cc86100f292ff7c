"""Windows: every cell in one, none empty, and back."""

import pytest
import torch

from adaptkit.ops.windows import Windows


@pytest.mark.parametrize(("grids", "counts"), [(((5, 7),), (2, 3)), (((8, 6), (4, 3), (2, 2)), (2, 2)), (((1, 4),), (1, 4))])  # fmt: skip
def test_cells_come_back_to_their_places_and_every_window_has_some(grids, counts):
    n = sum(h * w for h, w in grids)
    windows = Windows.of(grids, counts, torch.device("cpu"))
    x = torch.arange(n).float().view(1, 1, n, 1)
    assert torch.equal(windows.scatter(windows.gather(x)), x)
    assert windows.valid.any(1).all()
    assert windows.valid.sum() == n
