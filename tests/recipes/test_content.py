"""The digest of a set: by what it holds, not by where it lies or how it is packed."""

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from recipes import content
from recipes.order import undecoded

FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})


def bytes_of(seed):
    held = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)).save(held, "PNG")
    return held.getvalue()


def digest(images, labels=None):
    rows = {"image": images, "label": labels or list(range(len(images)))}
    return content.digest(undecoded(datasets.Dataset.from_dict(rows, features=FEATURES)))


@pytest.fixture
def files(tmp_path):
    for seed in range(70):  # more than are read at once
        (tmp_path / f"{seed}.png").write_bytes(bytes_of(seed))
    return [str(tmp_path / f"{seed}.png") for seed in range(70)]


def test_files_and_bytes_of_the_same_pictures_are_one_set(files):
    packed = [{"bytes": bytes_of(seed), "path": f"of-another-name-{seed}.png"} for seed in range(70)]
    assert digest(files) == digest(packed)


@pytest.mark.parametrize("what", ["a byte", "a label", "the order", "one row less"])
def test_any_change_gives_another(what, files):
    before = digest(files)
    if what == "a byte":
        held = bytearray(Path(files[66]).read_bytes())
        held[-20] ^= 1
        Path(files[66]).write_bytes(held)
        after = digest(files)
    elif what == "a label":
        after = digest(files, [*range(69), 0])
    elif what == "the order":
        after = digest([*files[:-2], files[-1], files[-2]], [*range(68), 69, 68])
    else:
        after = digest(files[:-1])
    assert after != before
