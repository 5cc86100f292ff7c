"""What test_build.py runs: ``python broken_libraries.py FOLDER`` prints how a process fares with each bad library.

Each case is a fork, for a library that is loaded although it is broken kills the process. The kernel is compiled once:
from then on the compiler is a script that copies the result.
"""

import json
import os
import random
import shutil
import sys
import traceback
from pathlib import Path

import torch

from adaptkit.ops import build, ms_deform_attn
from adaptkit.ops.ms_deform_attn import _c

SHAPES = [(3, 4), (2, 1)]
TRAP = '__attribute__((constructor)) static void run(void) { fclose(fopen(MARK, "w")); }'
COMPILER = """#!/bin/sh
[ "$1" = --version ] && exit
while [ "$1" != -o ]; do shift; done
cat "{plain}" > "$2"
"""


def cut(share):
    return lambda good, path, _: path.write_bytes(good[: int(share * len(good))])


def flipped(share):
    def plant(good, path, _):
        at = int(share * (len(good) - 1))
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x5A]) + good[at + 1 :])

    return plant


def zeroed(share):
    def plant(good, path, _):
        at = int(share * (len(good) - 256))
        path.write_bytes(good[:at] + bytes(256) + good[at + 256 :])

    return plant


def garbled(share):
    def plant(good, path, _):
        at, noise = int(share * (len(good) - 64)), random.Random(share).randbytes(64)
        path.write_bytes(good[:at] + noise + good[at + 64 :])

    return plant


def written(content):
    return lambda good, path, _: path.write_bytes(content(good))


def moded(mode):
    def plant(good, path, trap):
        shutil.copy(trap, path)
        build._seal(path, key_of(path))
        path.chmod(mode)

    return plant


def owned(good, path, trap):
    shutil.copy(trap, path)
    build._seal(path, key_of(path))
    os.chown(path, 65534, -1)


def trapped(good, path, trap):
    shutil.copy(trap, path)


def trapped_for_another_key(good, path, trap):
    shutil.copy(trap, path)
    build._seal(path, "0" * 20)


def linked(target):
    def plant(good, path, trap):
        elsewhere = trap.with_name("sealed.so")
        shutil.copy(trap, elsewhere)
        build._seal(elsewhere, key_of(path))
        path.symlink_to({"sealed": elsewhere, "nothing": "nowhere.so", "itself": path, "folder": "/tmp"}[target])

    return plant


def in_an_open_folder(good, path, trap):
    shutil.copy(trap, path)
    build._seal(path, key_of(path))
    path.parent.chmod(0o777)


SHARES = [i / 22 for i in range(22)]
CASES = {
    **{f"cut at {s:.3f}": cut(s) for s in [*SHARES, 0.9999]},
    **{f"one byte at {s:.3f}": flipped(s) for s in [*SHARES, 1.0]},
    **{f"zeros at {s:.3f}": zeroed(s) for s in [*SHARES, 1.0]},
    **{f"noise at {s:.3f}": garbled(s) for s in [*SHARES, 1.0]},
    **{f"{n} bytes more": written(lambda good, n=n: good + b"\0" * n) for n in (1, 32, 4096)},
    **{f"the first {n} bytes": written(lambda good, n=n: good[:n]) for n in (1, 4, 16, 31, 32, 33, 63, 64, 120)},
    "empty": written(lambda good: b""),
    "text": written(lambda good: b"#!/bin/sh\nexit 1\n"),
    "twice": written(lambda good: good * 2),
    "without its digest": written(lambda good: good[:-32]),
    "another digest": written(lambda good: good[:-32] + bytes(32)),
    "backwards": written(lambda good: good[::-1]),
    "a header alone": written(lambda good: good[:64] + bytes(len(good) - 64)),
    "text of the same length": written(lambda good: b"x" * len(good)),
    "a trap": trapped,
    "a trap sealed for another name": trapped_for_another_key,
    **{f"a trap of mode {mode:o}": moded(mode) for mode in (0o666, 0o620, 0o602, 0o777, 0o622)},
    "a trap of another user": owned,
    **{f"a link to {target}": linked(target) for target in ("sealed", "nothing", "itself", "folder")},
    "a folder": lambda good, path, _: path.mkdir(),
    "a pipe": lambda good, path, _: os.mkfifo(path),
    "a trap in an open folder": in_an_open_folder,
}


def key_of(path):
    return path.stem.rpartition("-")[2]


def fares(path, good, plant, trap, check):
    """Put a bad library in place, call the kernel in a fork, and return its exit status, or the signal below zero."""
    shutil.rmtree(path.parent, ignore_errors=True)
    path.parent.mkdir(mode=0o700)
    plant(good, path, trap)
    pid = os.fork()
    if pid == 0:
        try:
            check()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(folder):
    torch.set_num_threads(1)  # a fork has none of the threads of its parent
    mark, trap, plain = (folder / name for name in ("mark", "trap.so", "plain.so"))
    source = folder / "trap.c"
    source.write_text(f"#include <stdio.h>\n{TRAP}")
    build._run([*build._compiler(), "-shared", "-fPIC", f'-DMARK="{mark}"', str(source), "-o", str(trap)])
    os.environ["XDG_CACHE_HOME"] = str(folder / "first")
    plain.write_bytes(Path(build.shared_library(_c.SOURCE, {"REAL": "float"})).read_bytes()[:-32])
    compiler = folder / "cc"
    compiler.write_text(COMPILER.format(plain=plain))
    compiler.chmod(0o755)
    os.environ.update(CC=str(compiler), XDG_CACHE_HOME=str(folder / "cache"))
    path = Path(build.shared_library(_c.SOURCE, {"REAL": "float"}))
    good = path.read_bytes()

    g = torch.Generator().manual_seed(0)
    value, locations, weights = (
        torch.rand(n, generator=g) for n in ((1, 14, 2, 64), (1, 500, 2, 2, 3, 2), (1, 500, 2, 2, 3))
    )
    expected = ms_deform_attn(value, SHAPES, locations, weights, backend="grid_sample")
    ms_deform_attn(value.requires_grad_(), SHAPES, locations, weights, backend="embedding_bag").sum().backward()
    value.requires_grad_(False)  # what a first call imports is there before the forks

    def check():
        torch.testing.assert_close(ms_deform_attn(value, SHAPES, locations, weights), expected)
        assert not mark.exists(), "the planted library was run"
        if path.is_file() and path.parent.stat().st_mode & 0o022 == 0:
            assert path.read_bytes() == good, "it was not compiled again"
            assert _c._library(torch.float32)[0] is not None, "the kernel is not used"

    for name, plant in CASES.items():
        print(json.dumps([name, fares(path, good, plant, trap, check)]), flush=True)
    # The trap does run where it may: what the cases say of it is not empty.
    assert fares(path, good, moded(0o600), trap, lambda: build.load(_c.SOURCE, {"REAL": "float"}, {})) == 0
    print(json.dumps(["the trap of this user alone was run", int(mark.exists())]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
