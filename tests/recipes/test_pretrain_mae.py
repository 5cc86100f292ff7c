"""The pretraining recipe: it runs from the command line, and a resumed run is the run that was never stopped."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from recipes import pretrain_mae
from recipes.folder import name_run, run_of

ROOT = Path(__file__).parents[2]
TINY = ["--batch-size", "2", "--image-size", "64", "--canvases", "2", "--reuse", "2", "--save-every", "100"]


def pretrain(monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> dict[str, torch.Tensor]:
    """Run the recipe in this process and return the weights it publishes."""
    monkeypatch.setattr(sys, "argv", ["pretrain_mae", "--out", str(out), *TINY, *options])
    pretrain_mae.main()
    return load_file(out / "demo_backbone.safetensors")


def test_the_command_line_makes_weights_and_a_card(tmp_path):
    command = [sys.executable, "-m", "recipes.pretrain_mae", "--steps", "2", "--out", str(tmp_path), *TINY]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    model = timm.create_model(pretrain_mae.ARCHITECTURE, num_classes=0)
    model.load_state_dict(load_file(tmp_path / "demo_backbone.safetensors"))
    assert "4 crops of 64 x 64 pixels" in (tmp_path / "README.md").read_text()


def test_a_resumed_run_is_the_uninterrupted_run(tmp_path, monkeypatch):
    whole = pretrain(monkeypatch, tmp_path / "whole", "--steps", "3")
    part = pretrain(monkeypatch, tmp_path / "part", "--steps", "3", "--minutes", "0")  # stops after one step
    resumed = pretrain(monkeypatch, tmp_path / "part", "--steps", "3", "--resume")
    assert any(not torch.equal(whole[name], part[name]) for name in whole)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_folder_of_another_run_is_refused_and_its_checkpoint_is_not_gone_on_with(tmp_path, monkeypatch):
    pretrain(monkeypatch, tmp_path, "--steps", "2", "--minutes", "0")
    with pytest.raises(
        ValueError, match=r"earlier run \(checkpoint, demo_backbone.safetensors, README.md\): go on with"
    ):
        pretrain(monkeypatch, tmp_path, "--steps", "2")
    name_run(tmp_path, "another")
    with pytest.raises(ValueError, match="is of run .* is the folder of run another"):
        pretrain(monkeypatch, tmp_path, "--steps", "2", "--resume")
    pretrain(monkeypatch, tmp_path, "--steps", "2", "--overwrite")
    assert json.loads((tmp_path / "checkpoint" / "run.json").read_text())["run"] == run_of(tmp_path) != "another"


@pytest.mark.full
def test_a_compiled_run_trains_and_publishes_under_the_same_names(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_mae, "BACKEND", "eager")
    plain = pretrain(monkeypatch, tmp_path / "plain", "--steps", "4")
    torch.compiler.reset()
    compiled = pretrain(monkeypatch, tmp_path / "compiled", "--steps", "4", "--compile")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(compiled, plain, atol=2e-3, rtol=0)  # stored in fp16
    kept = tmp_path / "compiled" / "checkpoint"
    resumed = pretrain(monkeypatch, tmp_path / "compiled", "--steps", "4", "--compile", "--resume")
    assert kept.is_dir()
    assert all(torch.equal(resumed[name], compiled[name]) for name in compiled)
    torch.compiler.reset()


def test_blocks_start_as_the_identity():
    model = timm.create_model(pretrain_mae.ARCHITECTURE, num_classes=0)
    pretrain_mae.initialise(model)
    x = torch.randn(1, 5, 192)
    assert torch.equal(model.blocks(x), x)


def test_patches_are_taken_row_by_row():
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert pretrain_mae.patchify(image, 2)[0, 1].tolist() == [2, 3, 6, 7]
