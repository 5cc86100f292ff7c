"""What a large picture costs: the memory of a process that predicts it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT = 4 * 2**30

PREDICTS = """
import resource, sys, warnings
import numpy as np
import adaptkit

warnings.simplefilter("ignore")
folder, height, width, *slide = sys.argv[1:]
backbone = adaptkit.demo_backbone()
model = adaptkit.attach(backbone, "sfp", head=("fpn", {"num_classes": 11}))
model.save(folder, size=[240, 320])
model = adaptkit.from_pretrained(folder)
rng = np.random.default_rng(0)
image = rng.integers(0, 256, (int(height) // 50, int(width) // 50, 3), np.uint8).repeat(50, 0).repeat(50, 1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
mask = model.predict(image, **({"slide": (int(slide[0]), int(slide[1]))} if slide else {})).mask
assert mask.shape == image.shape[:2]
print(before * 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def predicted(folder, height, width, *slide):
    """Resident bytes before and at the highest."""
    if sys.platform != "linux":
        pytest.skip("ru_maxrss has other units")
    argv = [sys.executable, "-c", PREDICTS, str(folder), *map(str, (height, width, *slide))]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    before, most = map(int, done.stdout.split()[-2:])
    return before, most


def test_an_aerial_picture_at_its_own_size_stays_below_four_gib(tmp_path):
    """Its logits alone would be 1 GiB; 6000 x 4000 pixels, looked at as a whole."""
    assert predicted(tmp_path, 4000, 6000)[1] < LIMIT


@pytest.mark.full
def test_an_aerial_picture_by_windows_stays_below_four_gib(tmp_path):
    assert predicted(tmp_path, 4000, 6000, 512, 512)[1] < LIMIT


@pytest.mark.full
def test_logits_are_not_kept_for_the_whole_picture(tmp_path):
    """Ten times the height costs less than the logits of what came on top: 1.5 million pixels x 11 x 4 bytes = 63 MiB
    more would be kept, twice over where they are averaged; the picture itself is 6 bytes a pixel, 13 as floats."""
    low, high = (predicted(tmp_path, h, 320, 160, 160) for h in (500, 5000))
    pixels = 4500 * 320
    assert (high[1] - high[0]) - (low[1] - low[0]) < pixels * (11 * 4)
