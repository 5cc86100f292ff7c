"""What a tensor is: plain, packed, or a stand-in; each is exactly one."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from adaptkit.core.tensors import is_packed, is_plain, stands_in

PLAIN, PACKED, STAND_IN = "plain", "packed", "stand-in"


def fake():
    with FakeTensorMode():
        return torch.nn.Parameter(torch.empty(2, 2))


def shard():
    """As FSDP2 keeps a weight, of a group of one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        return torch.nn.Parameter(distribute_tensor(torch.zeros(2, 2), mesh, [Shard(0)]))
    finally:
        torch.distributed.destroy_process_group()


def bitsandbytes():
    nn = pytest.importorskip("bitsandbytes").nn
    return nn.Params4bit(torch.zeros(4, 1, dtype=torch.uint8), requires_grad=False)


def torchao():
    quantization = pytest.importorskip("torchao.quantization")
    layer = torch.nn.Sequential(torch.nn.Linear(32, 32))
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    return layer[0].weight


CASES = {
    "float32": (lambda: torch.nn.Parameter(torch.zeros(2, 2)), PLAIN),
    "bfloat16": (lambda: torch.zeros(2, 2, dtype=torch.bfloat16), PLAIN),
    "meta": (lambda: torch.zeros(2, 2, device="meta"), PLAIN),
    "float8": (lambda: torch.zeros(2, 2).to(torch.float8_e4m3fn), PACKED),
    "int8": (lambda: torch.zeros(2, 2, dtype=torch.int8), PACKED),
    "bitsandbytes": (bitsandbytes, PACKED),
    "torchao": (torchao, PACKED),
    "fake": (fake, STAND_IN),
    "shard": (shard, STAND_IN),
}


@pytest.mark.parametrize("case", CASES)
def test_each_is_one_of_three(case):
    make, kind = CASES[case]
    tensor = make()
    assert (is_plain(tensor), is_packed(tensor), stands_in(tensor)) == (kind == PLAIN, kind == PACKED, kind == STAND_IN)
