"""--backbone-dtype: trained, cached, planned and read again in fewer bits; refused where its weights are trained."""

import json
import sys
from pathlib import Path

import pytest
from accelerate.utils import set_seed

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).parent))
from runs import TINY, reset, write_folder  # noqa: E402

import adaptkit  # noqa: E402
import adaptkit.cli as cli  # noqa: E402
from recipes import segment  # noqa: E402
from recipes.order import folded  # noqa: E402

LIBRARY = {"bfloat16": "torch", "int8": "torchao", "nf4": "bitsandbytes"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "set", count=5)


def arguments(folder, out, *more):
    return ["--train", str(folder), "--val", str(folder), "--num-classes", "3", *TINY,
            "--size", "32", "48", "--adapter", "vit-adapter", "--adapter-options",
            '{"conv_inplane": 8, "injector": false}', "--batch-size", "2", "--steps", "2", "--save-every", "0", "--out",
            str(out), *more]  # fmt: skip


@pytest.mark.parametrize(
    "dtype", [pytest.param(name, marks=() if name == "int8" else pytest.mark.full) for name in LIBRARY]
)
def test_a_run_trains_caches_and_reads_its_file_again_which_fits_full_precision(dtype, folder, tmp_path):
    pytest.importorskip(LIBRARY[dtype])
    keep = ["--views", "1", "--cache-features", str(tmp_path / "cache")]
    argv = arguments(folder, tmp_path / "run", "--backbone-dtype", dtype, *keep)
    result = segment.main(argv)
    assert result["miou_reattached"] == result["miou"]
    set_seed(folded(0, 31))  # as the run does before it builds its random backbone
    full = segment.build(segment.parse(arguments(folder, tmp_path / "other"))).detach()
    adaptkit.attach(full, tmp_path / "run" / "adapter", strict=True)
    reset()
    with pytest.raises(ValueError, match="were made with backbone whose checksum was"):
        segment.main(arguments(folder, tmp_path / "full", *keep))


def test_the_plan_knows_its_bytes(folder, tmp_path, capsys):
    pytest.importorskip("torchao")
    said = []
    for dtype in ("float32", "bfloat16", "int8"):
        reset()
        assert (
            cli.main(["plan", "segment", *arguments(folder, tmp_path / "run", "--backbone-dtype", dtype), "--json"])
            == 0
        )
        said.append(json.loads(capsys.readouterr().out))
    vit = segment.build(segment.parse(arguments(folder, tmp_path / "run"))).backbone
    weights = sum(p.numel() for p in vit.parameters())
    peaks = [one["peak_memory_bytes"] for one in said]
    assert peaks[0] - peaks[1] > 1.5 * weights  # and activations in bfloat16
    assert peaks[1] > peaks[2]
    assert {one["parameters"] for one in said} == {said[0]["parameters"]}


def test_what_is_trained_in_the_backbone_is_refused(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        segment.parse(arguments(folder, tmp_path, "--backbone-dtype", "nf4", "--train-backbone", "norm"))
    assert "--backbone-dtype nf4 is for frozen weights" in capsys.readouterr().err
    with pytest.raises(
        ValueError, match="--backbone-dtype bfloat16 is for frozen weights, and the rows of --channels 5"
    ):
        segment.build(segment.parse(arguments(folder, tmp_path, "--backbone-dtype", "bfloat16", "--channels", "5")))
