"""A kernel that cannot be built is said, and torch does without it; a library that is not what was built never runs."""

import ctypes
import json
import logging
import os
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from adaptkit.ops import build

sys.path.insert(0, str(Path(__file__).parent))
from broken_libraries import CASES

SOURCE = "int one(void) { return 1; }"
ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or not any(map(shutil.which, build._COMPILERS)), reason="no C compiler, or not Linux"
)


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A file to compile, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_reasons", [])
    (tmp_path / "one").mkdir()
    path = tmp_path / "one" / "one.c"
    path.write_text(SOURCE)
    return path


def run_apart(*command):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen([sys.executable, *map(str, command)], env=env, stdout=-1, stderr=-1, text=True)


def test_a_compiler_that_hangs_is_stopped(source, tmp_path, monkeypatch):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\nexec tail -f /dev/null\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setattr(build, "_SECONDS", 0.1)
    with pytest.raises(build.BuildError, match="did not end in .* minutes and was stopped"):
        build.shared_library(source, {})


@pytest.fixture(scope="module")
def fared(tmp_path_factory):
    """Exit status of a process for each bad library, and what was said."""
    done = run_apart(Path(__file__).with_name("broken_libraries.py"), tmp_path_factory.mktemp("broken"))
    said, errors = done.communicate()
    assert done.returncode == 0, errors
    return dict(map(json.loads, said.splitlines())), errors


@needs_compiler
@pytest.mark.parametrize("case", CASES)
def test_a_bad_library_is_compiled_again_and_never_run(fared, case):
    if case == "a trap of another user" and os.getuid():
        pytest.skip("only root may give a file away")
    results, errors = fared
    assert results[case] == 0, errors[-5000:]


@needs_compiler
def test_the_trap_of_these_cases_is_one(fared):
    assert fared[0]["the trap of this user alone was run"] == 1


@needs_compiler
def test_four_processes_that_compile_at_once_leave_one_good_library(source, tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from adaptkit.ops import build\n"
        "sys.stdout.write('ready\\n'); sys.stdout.flush(); sys.stdin.readline()\n"
        "assert build.load(Path(sys.argv[1]), {}, {'one': None}).one is not None\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    four = [
        subprocess.Popen([sys.executable, "-c", code, str(source)], env=env, stdin=-1, stdout=-1, stderr=-1, text=True)
        for _ in range(4)
    ]
    for process in four:
        assert process.stdout.readline() == "ready\n"
    for process in four:
        process.stdin.write("go\n")
        process.stdin.flush()
    errors = [process.communicate()[1] for process in four]
    assert [process.returncode for process in four] == [0] * 4, errors
    (library,) = (tmp_path / "cache" / "adaptkit").iterdir()
    assert ctypes.CDLL(build.shared_library(source, {})).one() == 1
    assert build._fault(library, library.stem.rpartition("-")[2]) is None


@needs_compiler
def test_a_library_without_the_function_is_an_error_that_names_it(source):
    with pytest.raises(build.BuildError, match="two"):
        build.load(source, {}, {"one": None, "two": None})


@needs_compiler
def test_a_full_disk_is_an_error_and_leaves_no_half_a_library(source, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(build.BuildError):
            build.shared_library(source, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "cache" / "adaptkit").iterdir()) == []
    assert build.load(source, {}, {"one": ctypes.c_int}).one() == 1


def test_a_compiler_that_is_no_command_line_is_an_error_that_says_so(source, monkeypatch):
    monkeypatch.setenv("CC", "gcc '-O2")
    with pytest.raises(build.BuildError, match="CC=.* is no command line: No closing quotation; quote it"):
        build.shared_library(source, {})


@needs_compiler
def test_a_version_of_bytes_that_are_no_text_is_no_error(source, tmp_path, monkeypatch):
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && { printf "\\377\\376"; exit; }\nexec gcc "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert build.load(source, {}, {"one": ctypes.c_int}).one() == 1


def test_one_warning_of_a_process_says_why_it_is_slow(source, caplog):
    with caplog.at_level(logging.INFO):
        build.warn_slow("no C compiler")
        build.warn_slow("no C compiler")
    assert [record.levelname for record in caplog.records][0 if sys.platform == "linux" else 1 :] == (
        ["WARNING", "INFO"] if sys.platform == "linux" else ["INFO"]
    )
    assert "slower: no C compiler" in caplog.text


@needs_compiler
def test_a_folder_that_others_can_write_is_to_be_deleted(source, tmp_path):
    build.shared_library(source, {})
    (tmp_path / "cache" / "adaptkit").chmod(0o777)
    with pytest.raises(build.BuildError, match=r"mode 777.*delete it \(rm -r "):
        build.shared_library(source, {})
