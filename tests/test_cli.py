"""The command line says what it does, and one line where it can not."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from families import HOSTS

import adaptkit
from adaptkit.cli import main
from adaptkit.cli._show import table
from adaptkit.core.arguments import Defaults, Parser
from adaptkit.core.printable import printable


def test_list_names_adapters_heads_and_hosts(capsys):
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    for name in ("vit-adapter", "sfp", "fpn", "linear", "VisionTransformer", "Dinov2Model"):
        assert name in said


def test_doctor_sees_a_hierarchical_host_stage_by_stage(capsys):
    assert main(["doctor", "poolformer_s12"]) == 0
    said = capsys.readouterr().out
    for fact in ("timm-metaformer", "dims=(64, 128, 320, 512)", "no: vit-adapter needs one width"):
        assert fact in said


def test_doctor_says_how_a_backbone_is_seen_and_what_attaches(capsys):
    assert main(["doctor", "vit_tiny_patch16_224"]) == 0
    said = capsys.readouterr().out
    for fact in ("timm-vit", "192, 12, 3", "15x20", "2,438,192 trainable"):
        assert fact in said


def test_inspect_says_what_a_file_holds_and_what_it_fits(tmp_path, capsys):
    adaptkit.attach(HOSTS["timm-vit"].build(), "sfp", head=("linear", {"num_classes": 3})).save(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for fact in ("adapter sfp", "head linear", "embed_dim=32, depth=4, num_heads=2", "patch_size=8"):
        assert fact in said
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["adapters"][0]["name"] == "sfp"


@pytest.mark.parametrize(
    "text", ["[bold]x[/bold]", "[/]", "\x1b[31mred\x1b[0m", "\u202egnp.exe", "\x07", "a\rb", "\x9b2J"]
)
def test_inspect_shows_what_a_file_says_and_does_not_do_it(tmp_path, capsys, text):
    model = adaptkit.attach(HOSTS["timm-vit"].build(), "sfp")
    model.save(tmp_path / "a", note=text)
    assert main(["inspect", str(tmp_path / "a")]) == 0
    assert json.dumps(text).strip('"') in capsys.readouterr().out.replace("\n", "").replace(" ", "")
    header = model.header()
    header["backbone"].update(source=text)
    rows = [("trained on", header["backbone"]["source"]), (text, "x")]
    table(text, rows)
    said = capsys.readouterr().out
    assert said.count(printable(text)) == 3
    assert all(c.isprintable() or c == "\n" for c in said)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inspect", "nowhere"], "no adapter at nowhere"),
        (["doctor", "resnet18"], "no family sees timm.models.resnet.ResNet"),
        (["doctor", "vit_no_such"], "no backbone is named 'vit_no_such'"),
        (["demo", "--steps", "0"], "--steps 0: give at least 1"),
    ],
)
def test_a_mistake_is_one_line_and_status_two(argv, message, capsys):
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_demo_trains_three_ways_and_draws_a_picture(tmp_path, capsys, monkeypatch):
    import adaptkit.demo

    real = adaptkit.demo.scenes
    monkeypatch.setattr(adaptkit.demo, "scenes", lambda split, seed: real(split, seed=seed, size=64, count=8))
    assert main(["demo", "--steps", "2", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    for name in ("linear", "sfp", "vit-adapter"):
        assert name in said
        assert adaptkit.load(tmp_path / "out" / name).header["metadata"]["task"] == "semantic-segmentation"
    from PIL import Image

    assert Image.open(tmp_path / "out" / "predictions.png").size[0] > 5 * 128
    page = (tmp_path / "out" / "index.html").read_text()
    for way in json.loads((tmp_path / "out" / "result.json").read_text())["ways"]:
        assert f"<td>{100 * way['miou']:.1f}</td>" in page
        assert f"<td>{way['trained_parameters']:,}</td>" in page
    assert "data:image/png;base64," in page
    assert "http" not in page
    assert "wire" in page[page.index("Marked with ◆") :]
    assert torch.get_num_threads() == 1


def test_alone_it_prints_its_help(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: adaptkit")
    for command in ("demo", "doctor", "export", "inspect", "list", "serve", "train"):
        assert f"\n    {command} " in said


def test_a_command_is_one_file(tmp_path, monkeypatch, capsys):
    import adaptkit.cli

    (tmp_path / "shout.py").write_text(
        "def add(commands):\n    commands.add_parser('shout', help='loudly').add_argument('word')\n\n\n"
        "def run(args):\n    print(args.word.upper())\n    return 3\n"
    )
    (tmp_path / "_no_command.py").write_text("raise RuntimeError\n")
    monkeypatch.setattr(adaptkit.cli, "__path__", [*adaptkit.cli.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "adaptkit.cli.shout", raising=False)
    assert main(["shout", "here"]) == 3
    assert capsys.readouterr().out == "HERE\n"
    sys.modules.pop("adaptkit.cli.shout")


@pytest.mark.parametrize("module", ["adaptkit", "adaptkit.cli"])
def test_python_dash_m_is_the_command_line(module):
    import subprocess

    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"adaptkit {adaptkit.__version__}\n")


def test_help_tells_a_default_that_is_zero_and_none_that_is_nothing():
    parser = Parser(formatter_class=Defaults)
    parser.add_argument("--port", type=int, default=0, help="to listen on")
    parser.add_argument("--name", help="of it")
    parser.add_argument("--strict", action="store_true", help="refuse")
    said = parser.format_help()
    assert "to listen on (default: 0)" in said
    assert said.count("default") == 1
