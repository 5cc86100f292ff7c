"""Whose mean and standard deviation: the user's, a saved file's, the backbone's; and nobody's is an error."""

import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

import adaptkit
from adaptkit.core.view import Source
from adaptkit.create import create_backbone
from recipes import depth, detect, fewshot, native, network, normalisation, segment, shapes
from recipes.data import SegmentationData
from recipes.normalisation import source_of


class View:
    """A backbone that knows this much of itself."""

    def __init__(self, **known):
        self.known = Source("org/some", **known)

    def source(self):
        return self.known


def args(mean=None, std=None):
    return Namespace(mean=mean, std=std, backbone="org/some")


def test_the_user_goes_before_a_saved_file_and_that_before_the_backbone():
    view, trained = View(mean=(0.1,) * 3, std=(0.2,) * 3), ((0.3,) * 3, (0.4,) * 3)
    assert source_of(view, args())[2:4] == ((0.1,) * 3, (0.2,) * 3)
    assert source_of(view, args(), trained)[2:4] == trained
    assert source_of(view, args([0.5, 0.6, 0.7], [0.8]), trained)[2:4] == ((0.5, 0.6, 0.7), (0.8,) * 3)


@pytest.mark.parametrize(
    ("view", "given", "message"),
    [
        (View(), args(), "org/some does not say how its images are normalised; pass --mean R G B --std R G B"),
        (View(mean=(0.5,) * 4, std=(0.5,) * 4), args(), r"says mean .* and a picture is read as 3 channels"),
        (View(), args([0.5]), "--mean .* and --std None: give both"),
        (View(), args([0.5, 0.5], [0.5]), "--mean has 2 numbers; give 3, or one for all channels"),
        (View(), args([0.5], [0.0]), "a standard deviation is above 0"),
    ],
)
def test_what_is_not_known_is_an_error_that_says_what_to_pass(view, given, message):
    with pytest.raises(ValueError, match=message):
        source_of(view, given)


@pytest.fixture
def silent(monkeypatch):
    """A timm backbone that does not say how its images are normalised."""
    real = create_backbone

    def forgetful(*arguments, **options):
        backbone = real(*arguments, **options)
        backbone.pretrained_cfg = {"architecture": "test_vit"}
        return backbone

    for recipe in ("channels", "fewshot", "mixers", "adavit_model"):
        monkeypatch.setattr(f"recipes.{recipe}.create_backbone", forgetful)


@pytest.fixture
def folder(tmp_path):
    path, rng = tmp_path / "set", np.random.default_rng(0)
    for kind in ("images", "masks"):
        (path / kind).mkdir(parents=True)
    for i in range(2):
        mask = rng.integers(0, 3, (4, 6), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(mask * 80).convert("RGB").save(path / "images" / f"{i}.png")
        Image.fromarray(mask).save(path / "masks" / f"{i}.png")
    shapes.write(tmp_path / "shapes", 2, 32, 48)
    return tmp_path


SMALL = ["--backbone", "test_vit", "--random-backbone", "--batch-size", "2", "--steps", "1", "--adapter", "none"]
CHOSEN = ["--mean", "0.25", "0.5", "0.75", "--std", "0.2"]


def command(folder, kind, *more):
    common = [f"--train={folder / kind}", f"--val={folder / kind}", "--out", str(folder / "run"), *SMALL, *more]
    return [*common, "--size", "32", "48"]


@pytest.mark.parametrize(
    ("main", "kind", "more"),
    [(segment.main, "set", ["--num-classes", "3"]), (detect.main, "shapes", ["--adapter", "sfp", "--width", "16"])],
)
def test_a_backbone_that_does_not_say_ends_the_run_before_training(folder, silent, main, kind, more):
    with pytest.raises(ValueError, match="does not say how its images are normalised; pass --mean R G B --std R G B"):
        main(command(folder, kind, *more))


def test_what_the_user_says_is_used_and_recorded(folder, silent):
    argv = command(folder, "set", "--num-classes", "3", *CHOSEN)
    given = segment.parse(argv)
    model = segment.build(given)
    image, _ = segment.data(given, model, False)[0]
    mean = torch.tensor([0.25, 0.5, 0.75])[:, None, None]
    pixels = torch.from_numpy(np.array(Image.open(folder / "set" / "images" / "0.png"))).permute(2, 0, 1) / 255
    torch.testing.assert_close(image, pixels)
    transform = native.predictor(model, given).transform
    torch.testing.assert_close(transform.normalise(image), (pixels - mean) / 0.2)
    segment.main(argv)
    header = adaptkit.load(folder / "run" / "adapter").header
    for said in (header["metadata"], header["backbone"]):
        assert (said["mean"], said["std"]) == ([0.25, 0.5, 0.75], [0.2] * 3)
    backbone = create_backbone("test_vit", pretrained=False)
    again = source_of(
        adaptkit.view(backbone), args(), normalisation.recorded(adaptkit.load(folder / "run" / "adapter"))
    )
    assert again.mean == (0.25, 0.5, 0.75)


@pytest.mark.filterwarnings("error::adaptkit.hub.fits.OtherNormalisation")
def test_a_run_with_other_means_than_the_backbone_says_is_not_told_to_follow_its_own_file(folder):
    segment.main(command(folder, "set", "--num-classes", "3", *CHOSEN))
    detect.main(command(folder, "shapes", "--adapter", "sfp", "--width", "16", "--overwrite", *CHOSEN))


def test_a_detector_is_built_again_with_the_mean_it_was_trained_with(folder, silent):
    detect.main(command(folder, "shapes", "--adapter", "sfp", "--width", "16", "--model", "retinanet", *CHOSEN))
    torch.manual_seed(0)
    loaded = network.load(folder / "run" / "adapter", create_backbone("test_vit", pretrained=False))
    assert loaded.network.transform.image_mean == [0.25, 0.5, 0.75]
    assert loaded.network.transform.image_std == [0.2] * 3


def test_the_demo_backbone_knows_its_own():
    given = depth.parse(["--train", "drawn:2", "--val", "drawn:2", "--max-depth", "10", "--size", "32", "48"])
    rows = depth.data(given, depth.build(given), False)
    assert rows.transform.transforms[-1].mean == rows.transform.transforms[-1].std == [0.5] * 3


def test_fewshot_normalises_as_the_adapter_was_trained(folder, monkeypatch):
    segment.main(command(folder, "set", "--num-classes", "3", *CHOSEN))
    (folder / "list.txt").write_text("set/images/0.png 0\nset/images/1.png 1")
    seen = []
    real = fewshot.LabelledData
    monkeypatch.setattr(fewshot, "LabelledData", lambda data, size, source, *a, **k: seen.append(source) or real(data, size, source, *a, **k))  # fmt: skip
    listed = str(folder / "list.txt")
    torch.manual_seed(0)
    fewshot.main(["--train", listed, "--val", listed, "--backbone", "test_vit", "--random-backbone", "--size", "32",
                  "--adapter", str(folder / "run" / "adapter"), "--shots", "1", "--seeds", "0", "--out", str(folder / "f")])  # fmt: skip
    assert [s.mean for s in seen] == [(0.25, 0.5, 0.75)] * 2
    assert json.loads((folder / "f" / "result.json").read_text())["rows"]


def test_samples_of_an_unknown_source_are_refused():
    with pytest.raises(ValueError, match="does not say how its images are normalised"):
        SegmentationData([], (16, 16), Source())
