"""A run starts from what another has trained: adapters, and the head where it is the same; else a warning says why."""

import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import adaptkit
from recipes import network, segment
from recipes.initial import initialise
from recipes.prepare import prepare
from recipes.validation import evaluate

sys.path.insert(0, str(Path(__file__).parent))
from runs import TINY, argv


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    segment.main(argv(pictures, out, "--steps", "3", "--lr", "0.01"))
    return out / "adapter"


def built(*options):
    """The model of a run with these options, and what was warned of."""
    args = segment.parse(["--train", "t", *TINY, "--size", "32", "48", "--batch-size", "2", *options])
    task = segment.semantic.task(segment.TASK, args.head) if args.head in network.BUILDERS else segment.TASK
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.manual_seed(0)
        model = task.build(args)
        initialise(model, args)
    return model, " ".join(str(w.message) for w in said)


SAME = ["--adapter", "metaformer", "--adapter-options", '{"width": 8}', "--head", "linear"]


@pytest.mark.parametrize("how", ["--init", "--adapter"])
def test_adapter_and_head_go_on_from_the_file(trained, how):
    options = [*SAME, "--init", str(trained)] if how == "--init" else ["--adapter", str(trained), "--head", "linear"]
    model, said = built("--num-classes", "3", *options)
    file = adaptkit.load(trained)
    tensors = model.adapter_state_dict()
    assert tensors.keys() == file.tensors.keys()
    assert all(torch.equal(tensors[k], v) for k, v in file.tensors.items())
    assert "head" not in said


@pytest.mark.parametrize(
    "options",
    [[*SAME, "--init"], ["--head", "linear", "--adapter"], ["--adapter"]],
    ids=["init", "adapter", "adapter, its own head"],
)
def test_a_run_from_a_file_starts_at_its_score(trained, pictures, options):
    """The right value, with the trained head: not that of a fresh one."""
    line = ["--train", pictures, "--val", pictures, "--num-classes", "3", *TINY, "--size", "32", "48"]
    args, accelerator = segment.parse([*line, "--batch-size", "2", *options, str(trained)]), Accelerator(cpu=True)
    there = prepare(segment.TASK, args, accelerator)
    score = evaluate(segment.TASK, there.model, there.val, accelerator, args)["miou"]
    assert score == adaptkit.load(trained).header["metadata"]["miou"]


@pytest.mark.parametrize("how", ["--init", "--adapter"])
@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--num-classes", "4", "--head", "linear"], "num_classes=3"),
        (["--num-classes", "3", "--head", "fpn"], "linear"),
    ],
)
def test_a_head_that_does_not_fit_is_left_out_with_a_warning_that_says_why(trained, how, options, why):
    first = ["--init", str(trained), *SAME[:4]] if how == "--init" else ["--adapter", str(trained)]
    model, said = built(*first, *options)
    assert re.search(why, said), said
    assert re.search("trained head", said)
    assert str(trained) in said
    tensors = model.adapter_state_dict()
    file = adaptkit.load(trained).tensors
    kept = [k for k in file if not k.startswith("head.")]
    assert kept
    assert all(torch.equal(tensors[k], file[k]) for k in kept)


@pytest.mark.parametrize("how", ["--init", "--adapter"])
def test_a_network_around_the_pyramid_goes_on_too(how, pictures, tmp_path):
    pytest.importorskip("transformers")
    options = ["--adapter", "sfp", "--head", "upernet", "--width", "32", "--num-classes", "3"]
    torch.manual_seed(7)
    first, _ = built(*options)
    torch.nn.init.normal_(next(p for n, p in first.network.named_parameters() if "decode_head" in n))
    network.save(first, tmp_path / "file")
    file = adaptkit.load(tmp_path / "file")
    if how == "--init":
        model, said = built(*options, "--init", str(tmp_path / "file"))
    else:
        model, said = built("--adapter", str(tmp_path / "file"), *options[2:])
    assert "left out" not in said
    mine = {f"head.{k}": v for k, v in model.pyramid.beside(model.network).items()}
    mine |= model.pyramid.model.adapter_state_dict()
    assert all(torch.equal(mine[k], v) for k, v in file.tensors.items())


@pytest.mark.parametrize("how", ["--init", "--adapter"])
def test_a_head_of_ours_is_left_out_of_a_network_with_a_warning(how, tmp_path):
    pytest.importorskip("transformers")
    torch.manual_seed(7)
    first, _ = built("--adapter", "sfp", "--head", "fpn", "--num-classes", "3")
    first.save(tmp_path / "file")
    options = ["--adapter", "sfp", "--init"] if how == "--init" else ["--adapter"]
    model, said = built(*options, str(tmp_path / "file"), "--head", "upernet", "--width", "32", "--num-classes", "3")
    assert "the trained head is left out and this run's starts fresh, for it is fpn and this run trains" in said
    mine, file = model.pyramid.model.adapter_state_dict(), adaptkit.load(tmp_path / "file").tensors
    assert all(torch.equal(v, file[k]) for k, v in mine.items())


def test_other_adapters_than_the_file_has_are_an_error_that_names_both(trained):
    with pytest.raises(ValueError, match="--init .* holds metaformer, and this run has sfp"):
        built("--num-classes", "3", "--adapter", "sfp", "--head", "fpn", "--init", str(trained))
    with pytest.raises(ValueError, match="holds width=8, and this run has width="):
        built("--num-classes", "3", "--adapter", "metaformer", "--head", "linear", "--init", str(trained))
