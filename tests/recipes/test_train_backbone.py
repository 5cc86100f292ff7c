"""Parts of the backbone in the recipes: trained with layer decay, saved, and the same score when attached again."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).parent))

from runs import QUICK, write_folder  # noqa: E402

import adaptkit  # noqa: E402
from adaptkit.create import create_backbone  # noqa: E402
from recipes.optimising import parameter_groups  # noqa: E402
from recipes.segment import main  # noqa: E402


def test_a_run_trains_and_saves_what_is_named(tmp_path, capsys):
    folder = str(write_folder(tmp_path / "data"))
    out = tmp_path / "run"
    more = ["--steps", "3", "--train-backbone", "blocks.5", "norm", "--layer-decay", "0.5", "--adapter", "sfp"]
    main(["--train", folder, "--val", folder, "--out", str(out), *QUICK[:-2], *more])
    file = adaptkit.load(out / "adapter")
    assert file.header["train_backbone"] == ["blocks.5", "norm"]
    fresh = create_backbone("test_vit", pretrained=False).state_dict()
    kept = {k.removeprefix("backbone."): v for k, v in file.tensors.items() if k.startswith("backbone.")}
    assert set(kept) == {k for k in fresh if k.startswith(("blocks.5.", "norm."))}
    norms = [k for k in kept if "norm" in k]  # ones and zeros in whatever is fresh
    assert len(norms) == 6
    assert all(not torch.equal(kept[k], fresh[k]) for k in norms)


def test_the_rate_falls_from_block_to_block():
    model = adaptkit.attach(
        adaptkit.demo_backbone(False), "sfp", train_backbone=("blocks.9", "blocks.11", "patch_embed")
    )
    groups = parameter_groups(model, 0.1, lr=1.0, layer_decay=0.5)
    rate = {id(p): g.get("lr", 1.0) for g in groups for p in g["params"]}
    copies = model.set_of("default").backbone.copies
    assert rate[id(copies.get_parameter("blocks.11.norm1.weight"))] == 1.0
    assert rate[id(copies.get_parameter("blocks.9.mlp.fc1.weight"))] == 0.25
    assert rate[id(copies.get_parameter("patch_embed.proj.weight"))] == 0.5**12
    assert {rate[id(p)] for p in model.adapters.parameters()} == {1.0}
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in model.parameters())
    assert all(g["weight_decay"] == (0.1 if g["params"][0].ndim > 1 else 0.0) for g in groups)


def test_copied_blocks_learn_at_a_tenth_of_the_rate():
    model = adaptkit.attach(adaptkit.demo_backbone(False), "vit-split")
    groups = parameter_groups(model, 0.1, lr=1.0)
    rate = {id(p): g.get("lr", 1.0) for g in groups for p in g["params"]}
    adapter = model.adapters["vit-split"]
    copies = {id(p) for p in adapter.split_head.parameters()}
    assert {rate[i] for i in copies} == {0.1}
    assert {rate[id(p)] for p in adapter.parameters() if id(p) not in copies} == {1.0}


def test_what_a_frozen_backbone_said_is_not_kept_of_one_that_is_trained(tmp_path, capsys):
    folder = str(write_folder(tmp_path / "data"))
    with pytest.raises(SystemExit):
        main(["--train", folder, "--val", folder, *QUICK, "--train-backbone", "norm", "--views", "1",
              "--cache-features", str(tmp_path / "cache")])  # fmt: skip
    assert "--train-backbone changes it" in capsys.readouterr().err
