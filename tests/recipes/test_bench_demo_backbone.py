"""What the demonstration backbone learned, block by block."""

import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from adaptkit.demo.backbone import demo_backbone
from recipes.bench import demo_backbone as bench


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three images of 48 x 64 pixels with labels, and some pixels without, as Parquet."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("street")
    rows = {
        "image": [Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)) for _ in range(3)],
        "label": [Image.fromarray(rng.choice([0, 4, 10, 255], (48, 64)).astype(np.uint8)) for _ in range(3)],
    }
    path = folder / "rows.parquet"
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return ["--train", str(path), "--val", str(path), "--height", "32", "--width", "48", "--steps", "2"]


def rows(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] != "|--"]


def test_a_row_for_each_block_and_the_last_is_the_network(files, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo_backbone", *files, "--seeds", "1", "--blocks"])
    bench.main()
    by_block = [row for row in rows(capsys.readouterr().out) if len(row) == 4][1:]
    assert [row[0] for row in by_block] == [str(block) for block in range(12)]
    monkeypatch.setattr(sys, "argv", ["demo_backbone", *files, "--seeds", "1"])
    bench.main()
    (whole,) = [row for row in rows(capsys.readouterr().out) if row[0] == "demo backbone"]
    assert whole[1] == by_block[-1][1]


@torch.no_grad()
def test_a_block_that_attends_to_all_alike_and_adds_nothing_says_so():
    torch.manual_seed(0)
    backbone, images = demo_backbone(pretrained=False), torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    for parameter in backbone.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.3)
    dull = backbone.blocks[3]
    for layer in (dull.attn.qkv, dull.attn.proj, dull.mlp.fc2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    even, changed = bench.evenness(backbone, images), bench.changes(backbone, images)
    assert even[3] == pytest.approx(1.0, abs=1e-6)
    assert max(even[:3] + even[4:]) < 0.99
    assert changed[3] == 0.0
    assert min(changed[:3] + changed[4:]) > 0.01


@torch.no_grad()
def test_a_block_that_adds_what_it_was_given_changes_it_by_one():
    backbone, images = demo_backbone(pretrained=False), torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)

    class Double(torch.nn.Module):
        def forward(self, x):
            return 2 * x

    backbone.blocks[0] = Double()
    assert bench.changes(backbone, images)[0] == pytest.approx(1.0)
