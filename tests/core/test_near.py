"""A wrong name is answered with the one that was meant; a path that does not exist is never asked of the Hub."""

import contextlib
import re
import socket
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS

import adaptkit
from adaptkit.cli import main
from adaptkit.core.arguments import Parser
from adaptkit.core.near import beside, hint, looks_like_path, nearest
from adaptkit.create import create_backbone

ADAPTERS = ["adavit", "dat", "lora", "metaformer", "sfp", "vit-adapter"]


@pytest.mark.parametrize(
    ("said", "meant"),
    [("vit_adapter", "vit-adapter"), ("ViT-Adapter", "vit-adapter"), ("VITADAPTER", "vit-adapter"),
     ("vit-adaptor", "vit-adapter"), ("LoRA", "lora"), ("metaforme", "metaformer"), ("resnet", None), ("", None)],
)  # fmt: skip
def test_case_and_hyphens_make_no_difference_and_a_slip_little(said, meant):
    assert nearest(said, ADAPTERS) == meant
    assert hint(said, ADAPTERS) == ("" if meant is None else f" (did you mean {meant!r}?)")


def test_the_name_itself_is_no_hint():
    assert hint("lora", ADAPTERS) == ""


def attach(*args, **options):
    return lambda: adaptkit.attach(HOSTS["timm-vit"].build(), *args, **options)


@pytest.mark.parametrize(
    ("call", "meant"),
    [
        (attach("vit_adapter"), "vit-adapter"),
        (attach("vit-adapter", n_point=4), "n_points"),
        (attach("lora", lora_alfa=4), "lora_alpha"),
        (attach("sfp", head=("Linear", {"num_classes": 2})), "linear"),
        (attach("sfp", head=("linear", {"num_clases": 2})), "num_classes"),
        (attach("metaformer", mixer="pol"), "pool"),
        (attach("vit-adapter", norm="btach"), "batch"),
        (lambda: attach("sfp", name="seg")().set_adapter("Seg"), "seg"),
        (lambda: create_backbone("vit_tiny_patch16_244", pretrained=False), "vit_tiny_patch16_224"),
        (lambda: adaptkit.hub.card.check_metadata({"task": "semantic_segmentation"}), "semantic-segmentation"),
    ],
)
def test_every_name_that_a_user_gives_is_answered_with_the_nearest(call, meant):
    with pytest.raises(ValueError, match=re.escape(f"(did you mean {meant!r}?)")):
        call()


def test_a_file_is_looked_for_among_its_neighbours(tmp_path):
    (tmp_path / "city_scapes").mkdir()
    assert beside(tmp_path / "cityscapes") == f" (did you mean {str(tmp_path / 'city_scapes')!r}?)"
    assert beside(tmp_path / "nowhere" / "x") == ""
    with pytest.raises(FileNotFoundError, match="did you mean .*city_scapes"):
        adaptkit.load(tmp_path / "cityscapes")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--stps", "3"], "--stps: did you mean --steps?"),
        (["--step", "3"], None),  # argparse takes what is no more than shortened
        (["--kind", "Fast"], "(did you mean 'fast'?)"),
        (["--nothing-like-it"], "unrecognized arguments: --nothing-like-it\n"),
    ],
)
def test_the_parser_says_which_option_or_choice_was_meant(argv, said, capsys):
    parser = Parser(prog="x")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--kind", choices=["fast", "slow"])
    if said is None:
        assert parser.parse_args(argv).steps == 3
        return
    with pytest.raises(SystemExit) as left:
        parser.parse_args(argv)
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def test_a_misspelt_option_is_named_where_the_right_one_is_required(capsys):
    parser = Parser(prog="x")
    parser.add_argument("--train", required=True)
    with pytest.raises(SystemExit):
        parser.parse_args(["--trian", "t"])
    assert capsys.readouterr().err.endswith("required: --train; --trian: did you mean --train?\n")


@pytest.mark.parametrize(
    ("argv", "said"),
    [(["demo", "--stps", "2"], "--stps: did you mean --steps?"), (["trian"], "(did you mean 'train'?)"),
     (["train", "segmnt"], "no task is named 'segmnt' (did you mean 'segment'?)")],
)  # fmt: skip
def test_the_command_line_says_it_too(argv, said, capsys):
    with contextlib.suppress(SystemExit):
        assert main(argv) == 2
    assert said in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ paths

PATHS = ["./a", "../a", "/a/b", "~/a", "a\\b", "a/b/c", ".", "..", "./a/b", "here/a"]


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A folder with one folder in it, and no network: whoever opens a connection fails the test."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    def refuse(*args):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tmp_path


@pytest.mark.parametrize("name", PATHS)
def test_what_can_only_be_a_path_is_one(name, offline):
    assert looks_like_path(name)


@pytest.mark.parametrize("name", ["a", "org/name", "timm/vit", "", None, 3])
def test_a_name_is_no_path(name, offline):
    assert not looks_like_path(name)


@pytest.mark.parametrize("name", [p for p in PATHS if p not in (".", "..")])
def test_a_missing_path_never_asks_the_hub(name, offline):
    with pytest.raises(FileNotFoundError, match="no adapter at"):
        adaptkit.load(name)
    with pytest.raises(FileNotFoundError, match="no adapter at"):
        adaptkit.from_pretrained(name)
    with pytest.raises(FileNotFoundError, match="no adapter at"):
        attach(name)()
    with pytest.raises(ValueError, match="there is no folder .*: the Hub is not asked"):
        create_backbone(name)


def test_home_is_expanded_in_reading_and_writing(offline):
    model = attach("sfp")()
    model.save("~/runs/a")
    assert (offline / "runs" / "a" / "adapter_model.safetensors").is_file()
    assert adaptkit.load("~/runs/a").header["adapters"][0]["name"] == "sfp"
    assert "sfp" in attach("~/runs/a")().adapters
