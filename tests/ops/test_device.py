"""Where the quick ways of a CPU are taken, and numbers of the host on a GPU."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from adaptkit.ops.device import eager_cpu, pair, pairs, reference


def test_a_cpu_is_quick_where_operators_run_one_by_one():
    x, seen = torch.ones(1), []
    assert eager_cpu(x)
    torch.compile(lambda x: (seen.append(eager_cpu(x)), x)[1], backend="eager")(x)
    assert seen == [False]
    with reference():
        assert not eager_cpu(x)
    assert eager_cpu(x)
    with FakeTensorMode():
        assert not eager_cpu(torch.empty(1, device="cuda"))


def test_numbers_of_the_host_have_the_dtype_and_the_device_of_a_tensor():
    x = torch.ones(1, dtype=torch.float64)
    assert torch.equal(pair(3, 0.5, x), torch.tensor([3, 0.5], dtype=torch.float64))
    assert torch.equal(pairs([(3, 4), (5, 6)], x), torch.tensor([[3, 4], [5, 6]], dtype=torch.float64))
    with reference():
        assert torch.equal(pair(3, 0.5, x), torch.tensor([3, 0.5], dtype=torch.float64))
        assert torch.equal(pairs([(3, 4), (5, 6)], x), torch.tensor([[3, 4], [5, 6]], dtype=torch.float64))
    with FakeTensorMode():
        y = torch.empty(1, device="cuda", dtype=torch.bfloat16)
        for made, shape in ((pair(3, 4, y), (2,)), (pairs([(3, 4), (5, 6), (7, 8)], y), (3, 2))):
            assert (made.shape, made.device, made.dtype) == (shape, y.device, y.dtype)
