"""Who runs a call of ms_deform_attn, how the C kernel is built, and what happens where it cannot be."""

import importlib.util
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from adaptkit.ops import build, ms_deform_attn, set_backend, use_backend

PACKAGE = "adaptkit.ops.ms_deform_attn"
backends, c = (importlib.import_module(f"{PACKAGE}.{name}") for name in ("_backends", "_c"))

SHAPES = [(3, 4), (2, 1)]


def compiler_is_missing():
    try:
        build._compiler()
    except build.BuildError:
        return True
    return False


needs_compiler = pytest.mark.skipif(compiler_is_missing(), reason="no C compiler, or not Linux")


def inputs(heads=2, dim=4, queries=5, points=3):
    g = torch.Generator().manual_seed(0)
    sizes = (1, 14, heads, dim), (1, queries, heads, 2, points, 2), (1, queries, heads, 2, points)
    return [torch.rand(n, generator=g) for n in sizes]


def call(backend="auto", **sizes):
    value, locations, weights = inputs(**sizes)
    return ms_deform_attn(value, SHAPES, locations, weights, backend=backend)


def taken(backend="auto", **sizes):
    """What `auto` takes for such a call: a plain form, or the module inside of the operator."""
    value, _, weights = inputs(**sizes)
    name = backends.choose(backend, value, weights)
    return name if name in ("gather", "grid_sample") else backends.implementation(name, value, weights).__name__


@pytest.fixture(autouse=True)
def nothing_chosen():
    with use_backend("auto"):
        yield


@pytest.fixture
def no_kernel(monkeypatch):
    monkeypatch.setattr(c, "_library", lambda dtype: (None, "no C compiler"))


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache, and a process that has not looked for the kernel yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_reasons", [])
    c._library.cache_clear()
    yield tmp_path / "adaptkit"
    c._library.cache_clear()


# -------- choice


def test_a_choice_holds_until_it_is_given_back():
    with use_backend("grid_sample"):
        assert taken() == "grid_sample"
        with use_backend("gather"):
            assert taken() == "gather"
        assert taken() == "grid_sample"
        assert taken("embedding_bag").endswith("_bag")  # the call's own word counts
        set_backend("gather")
        assert taken() == "gather"
    assert backends._default == "auto"


def test_the_choice_holds_inside_of_compiled_code():
    def attend(value, locations, weights):
        return ms_deform_attn(value, SHAPES, locations, weights)

    graphs = []
    torch._dynamo.reset()
    compiled = torch.compile(attend, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    for name in ("auto", "embedding_bag"):
        with use_backend(name):
            compiled(*inputs())
    assert [[node.args[-1] for node in graph.graph.nodes if "adaptkit" in str(node.target)] for graph in graphs] == [
        ["auto"],
        ["embedding_bag"],
    ]


def test_an_export_uses_plain_operators_whatever_was_chosen():
    class Attend(torch.nn.Module):
        def forward(self, *tensors):
            return ms_deform_attn(tensors[0], SHAPES, *tensors[1:])

    with use_backend("embedding_bag"):
        program = torch.export.export(Attend(), tuple(inputs()))
    assert not any("adaptkit" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("backend", ["cuda", ""])
def test_an_unknown_choice_is_refused_at_once(backend):
    with pytest.raises(ValueError, match=rf"backend='{backend}' is unknown; choose one of auto, c, triton"):
        set_backend(backend)
    with pytest.raises(ValueError, match="is unknown"), use_backend(backend):
        pass


def test_an_unknown_name_in_the_environment_is_named_with_its_variable(monkeypatch):
    monkeypatch.setenv("ADAPTKIT_OPS", "fast")
    fresh = importlib.util.module_from_spec(backends.__spec__)
    backends.__spec__.loader.exec_module(fresh)
    assert fresh.choose("gather", *inputs()[::2]) == "gather"
    with pytest.raises(ValueError, match="variable ADAPTKIT_OPS='fast' is unknown; choose one of auto, c, triton"):
        fresh.choose("auto", *inputs()[::2])


def test_without_the_kernel_auto_takes_embedding_bag_and_grid_sample_for_tiny_calls(no_kernel):
    assert taken(queries=500, dim=64).endswith("_bag")
    assert taken() == "grid_sample"


def test_a_backend_asked_for_by_name_says_why_it_cannot_run(no_kernel):
    with pytest.raises(RuntimeError, match="backend='c' cannot run: no C compiler; use backend='auto'"):
        call("c")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs on the CPU")
def test_triton_is_refused_on_the_cpu():
    pytest.importorskip("triton")
    with pytest.raises(RuntimeError, match="backend='triton' cannot run: it runs on CUDA, and value is on cpu"):
        call("triton")


def test_a_missing_triton_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, f"{PACKAGE}._triton", raising=False)
    with pytest.raises(RuntimeError, match="backend='triton' cannot run: .*triton"):
        call("triton")


@needs_compiler
def test_more_points_than_the_kernel_takes_go_elsewhere():
    assert taken(points=256, queries=50).endswith("_c")
    assert taken(points=257, queries=50).endswith("_bag")
    with pytest.raises(RuntimeError, match=r"L \* P = 514 points of a query, and it takes up to 512"):
        call("c", points=257)


# -------- build


@needs_compiler
def test_the_kernel_is_compiled_once_and_leaves_nothing_else(cache):
    expected = call("embedding_bag")
    torch.testing.assert_close(call("c"), expected)
    (library,) = cache.iterdir()
    written = library.stat().st_mtime_ns
    c._library.cache_clear()
    call("c")
    assert [file.stat().st_mtime_ns for file in cache.iterdir()] == [written]
    assert cache.stat().st_mode & 0o077 == 0


def test_fake_tensors_compile_nothing(cache):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        value, locations, weights = [mode.from_tensor(tensor) for tensor in inputs()]
        out = ms_deform_attn(value, SHAPES, locations, weights)
    assert out.shape == (1, 5, 8)
    assert not cache.exists()


@needs_compiler
def test_many_may_compile_at_the_same_time(cache, monkeypatch):
    source = cache.parent / "small" / "small.c"
    source.parent.mkdir()
    source.write_text("int answer(void) { return VALUE; }")
    paths, barrier = [], threading.Barrier(4)

    def compile_it():
        barrier.wait()
        paths.append(build.shared_library(source, {"VALUE": "42"}))

    threads = [threading.Thread(target=compile_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [str(file) for file in cache.iterdir()] == list(set(paths))
    assert len(paths) == 4
    assert c.ctypes.CDLL(paths[0]).answer() == 42


@needs_compiler
def test_another_source_flag_or_cpu_is_another_library(cache, monkeypatch):
    source = cache.parent / "small.c"
    source.write_text("int answer(void) { return VALUE; }")
    paths = {build.shared_library(source, {"VALUE": "1"}), build.shared_library(source, {"VALUE": "2"})}
    source.write_text("int answer(void) { return -VALUE; }")
    paths.add(build.shared_library(source, {"VALUE": "1"}))
    monkeypatch.setattr(build, "_cpu", lambda: "another")
    paths.add(build.shared_library(source, {"VALUE": "1"}))
    assert len(paths) == 4


def no_compiler(monkeypatch, cache):
    monkeypatch.setenv("CC", "no-such-compiler -O2")


def broken_compiler(monkeypatch, cache):
    compiler = cache.parent / "compiler"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo internal error >&2; exit 3; }')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))


def cache_of_others(monkeypatch, cache):
    cache.mkdir()
    cache.chmod(0o777)


def no_folder(monkeypatch, cache):
    cache.write_text("a file where the folder should be")


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (no_compiler, "no C compiler: none of no-such-compiler is on the PATH; install gcc"),
        (broken_compiler, "failed with status 3: internal error"),
        pytest.param(
            cache_of_others, r"can be written by others \(mode 777\): delete it \(rm -r ", marks=needs_compiler
        ),
        pytest.param(no_folder, "cannot be made.*set XDG_CACHE_HOME", marks=needs_compiler),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="compiled on Linux only")
def test_where_the_kernel_cannot_be_built_auto_goes_on_and_the_log_says_why(
    trouble, reason, cache, monkeypatch, caplog
):
    trouble(monkeypatch, cache)
    with caplog.at_level(logging.INFO):
        assert taken(queries=500, dim=64).endswith("_bag")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "slower" in caplog.text
    with pytest.raises(RuntimeError, match=f"backend='c' cannot run: .*{reason}"):
        call("c")


@needs_compiler
@pytest.mark.parametrize(
    ("right", "wrong"), [("out[e] += (", "out[e] -= ("), ("= above * upper", "= upper"), ("inside - after", "inside")]
)
def test_a_kernel_that_computes_something_else_is_not_used(right, wrong, cache, monkeypatch, caplog):
    text = c.SOURCE.read_text()
    assert right in text
    source = cache.parent / "kernel.c"
    source.write_text(text.replace(right, wrong))
    monkeypatch.setattr(c, "SOURCE", source)
    assert taken(queries=500, dim=64).endswith("_bag")
    assert "self-test" in caplog.text


SHARED = """
import torch
from adaptkit.ops import ms_deform_attn

def libraries():
    return {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line or "libomp" in line}

(torch.rand(999, 999) @ torch.rand(999, 999)).sum()
before = libraries()
value, points, weights = torch.rand(1, 4, 1, 8), torch.rand(1, 3, 1, 1, 2, 2), torch.rand(1, 3, 1, 1, 2)
ms_deform_attn(value, [(2, 2)], points, weights, backend="c")
print(before == libraries(), len(before))
"""


@needs_compiler
def test_the_kernel_shares_the_threads_of_torch():
    # in a process of its own: other packages that tests import bring an OpenMP library each
    done = subprocess.run([sys.executable, "-c", SHARED], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "1"]


def test_importing_compiles_nothing():
    code = f"import sys, adaptkit.ops; assert not {{'{PACKAGE}._c', '{PACKAGE}._triton', 'triton'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# -------- Triton, in its interpreter


def test_triton_passes_the_tests_of_all_backends():
    """Kernels are interpreted or not from their import on, so they need a process of their own."""
    pytest.importorskip("triton")
    tests = Path(__file__).with_name("test_ms_deform_attn.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tests)]
    selected = (
        "triton and (grid_sample or any_number or whole_coordinates or finite_diff or values_are or nan_location"
        " or every_configuration or any_address or 64_bits)"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, "-k", selected], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) >= 22
