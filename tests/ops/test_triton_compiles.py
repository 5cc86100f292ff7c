"""Every Triton kernel, compiled for GPUs that need not be here: how many registers does a thread take, what spills?"""

import importlib
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

sys.path.insert(0, str(Path(__file__).parents[1]))
from dealt import dealt

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

kernels = importlib.import_module("adaptkit.ops.ms_deform_attn._triton")

REGISTERS = 168  # twelve warps on a multiprocessor of 65536
LEVELS = {1: [(8, 8)], 3: [(16, 16), (8, 8), (4, 4)], 4: [(16, 16), (8, 8), (4, 4), (2, 2)]}
DTYPES = [torch.float32, torch.bfloat16]
WAYS = ["forward", "backward"]


def compiled(monkeypatch, way, arch, config=None, *, dim=32, levels=3, points=4, dtype=torch.float32, places=None):
    """What a call launches, compiled for an architecture: the arguments are those of the call itself."""
    shapes, heads, queries = LEVELS[levels], 3, 5
    value = torch.zeros(2, sum(h * w for h, w in shapes), heads, dim, dtype=dtype)
    locations = torch.zeros(2, queries, heads, levels, points, 2, dtype=places or dtype)
    weights = torch.zeros(2, queries, heads, levels, points, dtype=places or dtype)
    sides = [side for shape in shapes for side in shape]
    config = config or fitting(dtype)[0]
    with compiling_for(monkeypatch, arch) as found:
        if way == "forward":
            kernels.forward(value, locations, weights, sides, config)
        else:
            grad = torch.zeros(2, queries, heads * dim, dtype=dtype)
            kernels.backward(grad, value, locations, weights, sides, config)
    (kernel,) = found
    return kernel


@contextmanager
def compiling_for(monkeypatch, arch):
    """Inside, a launch compiles, and runs nothing; gives the list of what was compiled."""
    found = []

    def compile_only(launch):
        def run(*arguments, grid, warmup, **options):
            found.append(launch(*arguments, grid=grid, warmup=True, **options))

        return run

    device = {
        "get_current_target": lambda: GPUTarget("cuda", arch, 32),
        "get_current_device": lambda: arch,
        "get_current_stream": lambda device: 0,
    }
    with monkeypatch.context() as patch:
        patch.setattr(driver, "_active", SimpleNamespace(**device))
        for kernel in (kernels._forward_kernel.fn, kernels._backward_kernel.fn):
            patch.setattr(kernel, "run", compile_only(kernel.run))
        yield found


def fitting(dtype):
    """The configurations that a call with values of this dtype chooses from."""
    return kernels.configs_for(torch.empty(0, dtype=dtype))


def resources(kernel, tmp_path):
    """Registers of a thread, and bytes of its stack and of local memory, where spilled registers go."""
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", binary]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))


def assert_lean(kernel, tmp_path):
    registers, stack, local = resources(kernel, tmp_path)
    assert (stack, local) == (0, 0)
    assert registers <= REGISTERS


@pytest.mark.parametrize(
    ("way", "arch", "dim", "levels", "dtype"), dealt(WAYS, [80, 90], [32, 48, 64], LEVELS, DTYPES, share=4)
)
def test_no_kernel_spills(way, arch, dim, levels, dtype, monkeypatch, tmp_path):
    assert_lean(compiled(monkeypatch, way, arch, dim=dim, levels=levels, dtype=dtype), tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("places", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("dim", [32, 48, 64])
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("way", WAYS)
def test_no_configuration_spills(way, arch, dim, levels, dtype, places, monkeypatch, tmp_path):
    for config in fitting(dtype):
        kernel = compiled(monkeypatch, way, arch, config, dim=dim, levels=levels, dtype=dtype, places=places)
        assert_lean(kernel, tmp_path)


@pytest.mark.parametrize("way", WAYS)
def test_rows_are_read_sixteen_bytes_at_once(way, monkeypatch):
    text = compiled(monkeypatch, way, 90).asm["ptx"]
    rows = 4 * 4 if way == "forward" else 4 + 1  # of four points, unrolled; of one point and of the gradient
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", text)) == rows


def test_gradients_are_added_sixteen_bytes_at_once_on_hopper(monkeypatch):
    text = compiled(monkeypatch, "backward", 90, dtype=torch.bfloat16).asm["ptx"]
    added = re.findall(r"\b(?:red|atom)\.global\S+", text)
    assert len(added) == 4
    assert all("v4.f32" in name for name in added)


@pytest.mark.parametrize("way", WAYS)
def test_images_of_another_size_need_no_other_kernel(way, monkeypatch):
    first = compiled(monkeypatch, way, 80)
    monkeypatch.setitem(LEVELS, 3, [(1, 16), (5, 7), (1, 1)])
    assert compiled(monkeypatch, way, 80).hash == first.hash


# -------- tuning


@pytest.fixture
def tuning(monkeypatch):
    """Tune the forward kernel where nothing can be timed: gives how often which configuration was looked at."""
    looked, kernel = [], kernels._forward_kernel

    def milliseconds(call, quantiles):
        call()
        looked.append(len(looked))
        return [1.0 if len(looked) == 2 else 2.0] * 3  # the second is the fastest

    monkeypatch.setattr(kernel, "cache", {})
    monkeypatch.setattr(kernel, "cache_results", False)
    monkeypatch.setattr(kernel, "_do_bench", milliseconds)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return looked


def attend(queries=5, dtype=torch.float32):
    value = torch.zeros(2, 64, 3, 32, dtype=dtype)
    kernels.forward(value, torch.zeros(2, queries, 3, 1, 4, 2), torch.zeros(2, queries, 3, 1, 4), [8, 8])


def test_the_first_call_of_a_kind_tries_every_configuration_and_the_next_take_the_fastest(tuning, monkeypatch):
    with compiling_for(monkeypatch, 90) as found:
        attend()
        assert len(tuning) == len(fitting(torch.float32))
        assert kernels._forward_kernel.best_config is fitting(torch.float32)[1]
        attend(queries=300)
        assert len(tuning) == len(fitting(torch.float32))
        assert found[-1].metadata.num_warps == fitting(torch.float32)[1].num_warps
        attend(dtype=torch.bfloat16)
        assert len(tuning) == len(fitting(torch.float32)) + len(fitting(torch.bfloat16))


def test_a_graph_that_is_captured_takes_the_first_configuration(tuning, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(kernels._forward_kernel, "_do_bench", kernels._milliseconds)
    with compiling_for(monkeypatch, 90) as found:
        attend()
    assert len(found) == 1
    assert found[0].metadata.num_warps == kernels.CONFIGS[0].num_warps
