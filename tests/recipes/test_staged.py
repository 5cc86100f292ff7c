"""Segmentation and detection on backbones of four stages, named as on the command line: timm's and transformers' folders."""

import json
import sys
from pathlib import Path

import pytest
import timm
import torch

pytest.importorskip("faster_coco_eval")
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from families import randomise
from runs import reset, write_folder
from towers import POOLFORMER, SWIN

import adaptkit
from adaptkit.create import create_backbone
from adaptkit.export import to_exported_program
from adaptkit.networks.network import build
from recipes import detect, network, segment, shapes

DAT = {"dim_stem": 8, "dims": [8, 16, 32, 64], "depths": [2, 2, 2, 2], "heads": [1, 2, 2, 4], "groups": [-1, -1, 2, 2]}
DAT |= {"img_size": 64, "window_sizes": [4, 3, 2, 2]}
WIDTH = ["--adapter", "metaformer", "--adapter-options", '{"width": 4}']


def write_dat(path):
    import adaptkit.models  # noqa: F401  its names

    torch.manual_seed(0)
    timm.models.save_for_hf(randomise(timm.create_model("dat_tiny", num_classes=0, **DAT)), str(path), model_args=DAT)


def write_processor(path):
    """As it lies beside weights on the Hub."""
    said = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "do_normalize": True}
    (path / "preprocessor_config.json").write_text(json.dumps(said | {"size": {"height": 64, "width": 64}}))


def write_swin(path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    randomise(transformers.SwinModel(transformers.SwinConfig(**SWIN))).save_pretrained(path)
    write_processor(path)


def write_poolformer(path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    randomise(transformers.PoolFormerModel(transformers.PoolFormerConfig(**POOLFORMER))).save_pretrained(path)
    write_processor(path)


FAMILIES = {"dat": write_dat, "swin": write_swin, "poolformer": write_poolformer}


@pytest.fixture(scope="module", params=FAMILIES)
def backbone(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    FAMILIES[request.param](path)
    return path


def test_segmentation_trains_and_scores_alike_when_attached_again(backbone, tmp_path):
    reset()
    data, out = write_folder(tmp_path / "data"), tmp_path / "run"
    result = segment.main(["--train", str(data), "--val", str(data), "--num-classes", "3", "--size", "32", "64",
                           "--backbone", str(backbone), "--batch-size", "2", "--steps", "2", "--save-every", "0",
                           "--out", str(out), *WIDTH])  # fmt: skip
    assert result["miou"] == result["miou_reattached"]


@pytest.mark.full  # the longest is to trace
@pytest.mark.parametrize("kind", ["adapter", "detector"])
def test_it_is_exported(backbone, tmp_path, kind):
    torch.manual_seed(0)
    model = adaptkit.attach(create_backbone(str(backbone)), ("metaformer", {"width": 4}))
    if kind == "detector":
        recipe = {
            "network": "fcos",
            "categories": [{"id": 1, "name": "it"}],
            "size": [64, 64],
            "width": 64,
            "anchor": 8.0,
        }
        model = build(model, recipe | {"mean": [0.5] * 3, "std": [0.5] * 3})
    assert to_exported_program(randomise(model), tmp_path / "model.pt2", (64, 64)).is_file()


def test_a_detector_trains_and_comes_back_from_its_file(backbone, tmp_path):
    reset()
    shapes.write(tmp_path / "train", 2, 64, 64, seed=0)
    data = str(tmp_path / "train")
    result = detect.main(["--train", data, "--val", data, "--model", "retinanet", "--size", "64", "64", "--width", "16",
                          "--backbone", str(backbone), "--batch-size", "2", "--steps", "1", "--save-every", "0",
                          "--out", str(tmp_path / "run"), *WIDTH])  # fmt: skip
    assert result["box_ap"] == result["box_ap_reattached"]
    file = adaptkit.load(tmp_path / "run/adapter")
    model = network.load(file, create_backbone(str(backbone)))
    held, saved = model.network.state_dict(), file.tensors_of("head")
    assert len(saved) > 10
    assert all(torch.equal(held[k], v) for k, v in saved.items())
    assert {"boxes", "labels", "scores"} == model([torch.rand(3, 60, 50)])[0].keys()
