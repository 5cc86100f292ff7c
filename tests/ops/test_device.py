"""Where the quick ways of a CPU are taken."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from adaptkit.ops.device import eager_cpu, reference


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
