"""What tests of the recipes share: small data on disk, a command line, a fresh start, a run that is cut off."""

import contextlib
import importlib
from pathlib import Path

import numpy as np
from PIL import Image

# Six blocks of 64 channels: quicker than the twelve of 192 of the demo backbone.
TINY = ["--backbone", "test_vit", "--random-backbone"]
QUICK = ["--num-classes", "3", *TINY, "--size", "32", "48", "--batch-size", "2",
         "--adapter-options", '{"conv_inplane": 8}']  # fmt: skip


def reset():
    """A process has one Accelerator state, and the files of a set are read once: each run is to start as in its own."""
    from accelerate.state import AcceleratorState, GradientState

    from recipes import coco, panoptic_data

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    coco.read_instances.cache_clear()
    panoptic_data.read_segments.cache_clear()


def write_folder(path, count=5, classes=3, size=(40, 56), bad=None):
    rng = np.random.default_rng(0)
    (path / "images").mkdir(parents=True)
    (path / "masks").mkdir()
    for i in range(count):
        mask = rng.integers(0, classes, (size[0] // 8, size[1] // 8)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        image = np.stack([mask * 80, 255 - mask * 80, mask * 40], -1) + rng.integers(0, 15, (*size, 3), dtype=np.uint8)
        if i == bad:
            mask[0, 0] = 9
        Image.fromarray(image.astype(np.uint8)).save(path / "images" / f"{i}.jpg")
        Image.fromarray(mask).save(path / "masks" / f"{i}.png")
    return path


def write_masks(path, count=4):
    """Images of 32 x 48 pixels whose colours are their masks: three classes, and two rows without a label."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (path / name).mkdir(parents=True)
    for i in range(count):
        mask = rng.integers(0, 3, (4, 6)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        mask[:2] = 255  # unlabelled
        image = np.stack([mask * 80, 255 - mask * 80, mask * 40], -1).astype(np.uint8)
        Image.fromarray(image).save(path / "images" / f"{i}.png")
        Image.fromarray(mask).save(path / "masks" / f"{i}.png")
    return path


def argv(pictures, out, *more):
    return ["--train", pictures, "--val", pictures, "--out", str(out), *QUICK[:-2], "--adapter", "metaformer",
            "--adapter-options", '{"width": 8}', "--head", "linear", *more]  # fmt: skip


def tree(folder):
    """Every file of a folder with its bytes, but for the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def cut_off(real, at):
    """``real``, which is interrupted in its ``at``-th call."""
    calls = []

    def until(*args, **kwargs):
        calls.append(0)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    return until


def ended_by(monkeypatch, call):
    """Let ``call(command)`` stand for the processes of `adaptkit compare` and `adaptkit train ablate`."""
    for name in ("recipes.compare", "adaptkit.recipes.compare"):  # of a clone, installed
        with contextlib.suppress(ImportError):
            monkeypatch.setattr(importlib.import_module(name), "ended", call)
