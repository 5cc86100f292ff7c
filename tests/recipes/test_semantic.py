"""`recipes/segment.py` with a network of transformers for a head."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2]))

from runs import write_masks

import adaptkit
from adaptkit.create import create_backbone
from recipes import network, segment, semantic

QUICK = ["--num-classes", "3", "--backbone", "test_vit", "--random-backbone", "--adapter-options", '{"conv_inplane": 8}',
         "--size", "32", "48", "--width", "32", "--queries", "6", "--layers", "1", "1", "--points", "64"]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    return write_masks(tmp_path / "data")


@pytest.mark.parametrize("head", ["upernet", "mask2former"])
def test_it_trains_and_scores_the_same_when_it_is_built_again(folder, tmp_path, head):
    if head == "mask2former":
        pytest.importorskip("scipy")
    out = tmp_path / "run"
    result = segment.main(["--train", str(folder), "--val", str(folder), "--out", str(out), "--head", head, *QUICK,
                           "--steps", "4", "--batch-size", "2", "--save-every", "2", "--lr", "3e-3"])  # fmt: skip
    assert result["head"] == head
    assert 0 < result["miou"] == result["miou_reattached"]
    kept = adaptkit.load(out / "checkpoints" / "step-00000002" / "adapter")
    assert kept.header["metadata"]["recipe"]["network"] == head
    assert not any("attn.qkv" in k for k in kept.tensors)
    torch.manual_seed(0)
    loaded = network.load(out / "adapter", create_backbone("test_vit", pretrained=False))
    found = loaded.predict(torch.rand(3, 45, 61))
    assert found.mask.shape == (45, 61)
    assert set(np.unique(found.mask).tolist()) <= {0, 1, 2}


def test_an_image_without_labels_has_a_loss_too():
    args = segment.parse(["--train", "unused", *QUICK, "--head", "mask2former"])
    model = semantic.build(args)
    mask = torch.full((2, 32, 48), 255)
    mask[1, :16] = 1
    loss = semantic.set_loss(model, [torch.randn(2, 3, 32, 48), mask], args)
    loss.backward()
    assert loss.isfinite()


def test_upernet_wants_two_images_for_its_batchnorm(capsys):
    with pytest.raises(SystemExit):
        segment.parse(["--train", "unused", *QUICK, "--head", "upernet", "--batch-size", "1"])
    assert "--batch-size 2 or more" in capsys.readouterr().err
