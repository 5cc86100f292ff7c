"""A kernel that cannot be built is said, and torch does without it."""

import logging
import stat

import pytest

from adaptkit.ops import build

SOURCE = "int one(void) { return 1; }"


def test_a_compiler_that_hangs_is_stopped_with_a_warning(tmp_path, monkeypatch, caplog):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\nexec tail -f /dev/null\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    source = tmp_path / "one.c"
    source.write_text(SOURCE)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_SECONDS", 0.1)
    with caplog.at_level(logging.WARNING), pytest.raises(build.BuildError, match="did not end"):
        build.shared_library(source, {})
    assert "was stopped" in caplog.text
