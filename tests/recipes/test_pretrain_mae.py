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


@pytest.mark.parametrize("growth", ["split", pytest.param("identity", marks=pytest.mark.full)])
def test_a_resumed_run_is_the_uninterrupted_run(growth, tmp_path, monkeypatch):
    options = ["--steps", "3", "--growth", growth]
    whole = pretrain(monkeypatch, tmp_path / "whole", *options)
    part = pretrain(monkeypatch, tmp_path / "part", *options, "--minutes", "0")  # stops after one step
    resumed = pretrain(monkeypatch, tmp_path / "part", *options, "--resume")
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


def shallow(size: float) -> torch.nn.ModuleList:
    """Twelve blocks of which the first four add something, of this size, and the others nothing."""
    torch.manual_seed(0)
    blocks = torch.nn.ModuleList(timm.models.vision_transformer.Block(16, 2, qkv_bias=True) for _ in range(12)).double()
    for index, block in enumerate(blocks):
        for layer in (block.attn.proj, block.mlp.fc2):
            torch.nn.init.normal_(layer.bias)
            for parameter in layer.parameters():
                parameter.data.mul_(size if index < 4 else 0.0)
    return blocks


def stack(blocks: torch.nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x = block(x)
    return x


@torch.no_grad()
def test_each_block_becomes_three_that_add_a_third_and_nearly_the_same_network():
    x = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    apart = []
    for size in (0.02, 0.01):
        blocks = shallow(size)
        before, first = stack(blocks, x), blocks[1].mlp.fc2.bias.clone()
        pretrain_mae.split(blocks, torch.optim.AdamW(blocks.parameters()))
        assert all(torch.allclose(blocks[i].mlp.fc2.bias, first / 3) for i in (3, 4, 5))
        apart.append((stack(blocks, x) - before).abs().max().item())
    assert apart[0] > 0
    assert apart[1] / apart[0] == pytest.approx(1 / 4, rel=0.2)  # what a shorter step changes is of second order


def test_what_an_optimiser_remembers_of_blocks_that_are_split_is_forgotten():
    blocks, other = shallow(0.1), torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([*blocks.parameters(), other])
    (stack(blocks, torch.randn(1, 3, 16).double()).sum() + other.sum()).backward()
    optimizer.step()
    pretrain_mae.split(blocks, optimizer)
    assert list(optimizer.state) == [other]


def test_patches_are_taken_row_by_row():
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert pretrain_mae.patchify(image, 2)[0, 1].tolist() == [2, 3, 6, 7]
