"""Every kind of file that a recipe writes is loaded, predicted with and exported by one command each."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import adaptkit
from adaptkit.cli import main
from adaptkit.create import create_backbone
from adaptkit.export.detectors import Detections, nms, paste
from adaptkit.networks import build
from adaptkit.networks.graphs import unmatched

transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SAID = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
THINGS = [{"id": i + 1, "name": f"thing {i}", "isthing": i % 2} for i in range(3)]
DETECTOR = {"size": (64, 96), "width": 64, "anchor": 4.0, "categories": [{"id": 7}, {"id": 9}], **SAID}
QUERIES = {"width": 32, "queries": 6, "layers": [1, 1], "points": 64}
DETECTORS = ("fcos", "retinanet", "faster-rcnn", "mask-rcnn")
QUERY_NAMES = "class_queries_logits, masks_queries_logits"
#: kind of file -> adapters, head or recipe, metadata, and the outputs named in what the command says
FILES = {
    **{name: ("sfp", {"network": name, **DETECTOR}, {}, "boxes, scores, labels") for name in DETECTORS},
    "segment upernet": ("sfp", {"network": "upernet", "width": 32, "categories": [0, 1, 2]}, SAID, "logits"),
    "segment mask2former": ("sfp", {"network": "mask2former", "categories": [0, 1, 2], **QUERIES}, SAID, QUERY_NAMES),
    "panoptic mask2former": ("sfp", {"network": "mask2former", "categories": THINGS, **QUERIES}, SAID, QUERY_NAMES),
    "segment fpn": ("sfp", ("fpn", {"num_classes": 3, "channels": 32}), {"task": "segmentation"}, "logits"),
    "segment linear": ("lora", ("linear", {"num_classes": 3}), {"task": "segmentation"}, "logits"),
    "segment plain-mask": ("lora", ("plain-mask", {"num_classes": 3, "num_q": 4, "num_blocks": 1}),
                           {"task": "segmentation"}, QUERY_NAMES),
    "panoptic plain-mask": ("lora", ("plain-mask", {"num_classes": 3, "num_q": 4, "num_blocks": 1,
                                                    "task": "panoptic", "things": [0, 2]}),
                            {"task": "panoptic", "categories": THINGS}, QUERY_NAMES),
    "detect plain-mask": ("lora", ("plain-mask", {"num_classes": 3, "num_q": 4, "num_blocks": 1,
                                                  "task": "instance"}),
                          {"task": "detection", "categories": THINGS}, QUERY_NAMES),
    "classify": ("lora", ("classifier", {"num_classes": 3}), {"task": "classification", "size": 64}, "logits"),
    "adavit": ("adavit", ("classifier", {"num_classes": 3}), {"task": "classification", "size": 64}, "logits"),
    "depth": ("sfp", ("depth", {"max_depth": 10.0, "bins": 4, "channels": 32}), {"task": "depth"}, "logits"),
}  # fmt: skip
QUICK = ("retinanet", "segment plain-mask")


def stirred(model, scale=0.05):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn(p.shape))
            if name.endswith("cls_logits.bias"):  # which says that almost nothing is an object
                p.zero_()
    return model.eval()


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    path = tmp_path_factory.mktemp("backbone")
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes, image_size=64, patch_size=16)).save_pretrained(path)
    return str(path)


def made(kind, backbone):
    """A file's model, and what its file says."""
    adapter, recipe, said, _ = FILES[kind]
    torch.manual_seed(0)
    if isinstance(recipe, dict):
        return stirred(build(adaptkit.attach(create_backbone(backbone), adapter), recipe)), said
    return stirred(adaptkit.attach(create_backbone(backbone), adapter, head=recipe)), {**SAID, **said}


def of_file(path, image):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["image"]
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(None, {"image": image.numpy()})), strict=True))


def each(kinds):
    return [pytest.param(k, id=k, marks=() if k in QUICK else pytest.mark.full) for k in kinds]


@pytest.mark.parametrize("kind", each(FILES))
def test_every_kind_of_file_is_predicted_with_and_exported_by_one_command_each(kind, backbone, tmp_path, capsys):
    model, said = made(kind, backbone)
    model.save(tmp_path / "file", **said)
    picture = np.random.default_rng(0).integers(0, 256, (61, 90, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    file, here = str(tmp_path / "file"), ["--backbone", backbone]
    assert main(["predict", file, str(tmp_path / "a.png"), "--out", str(tmp_path / "answers"), *here]) == 0
    assert any((tmp_path / "answers").iterdir())

    one, outputs = kind in DETECTORS, FILES[kind][-1]
    named = [] if isinstance(FILES[kind][1], dict) else ["--outputs", *outputs.split(", ")]
    out = str(tmp_path / "model.onnx")
    capsys.readouterr()
    assert main(["export", file, "--out", out, "--size", "64", "96", *named, *here]) == 0, capsys.readouterr().err
    shown = " ".join(capsys.readouterr().out.split())
    assert "agrees with the model" in shown
    assert outputs in shown
    assert f"image, {'1' if one else 'batch'} x 3 x 64 x 96" in shown

    image = torch.rand(1 if one else 3, 3, 64, 96)
    found = of_file(out, image)
    with torch.no_grad():
        if one:
            wanted = model([image[0]])[0]
            real = found["scores"] > 0
            assert len(wanted["scores"]) > 10
            assert unmatched({k: x[real] for k, x in found.items()}, wanted, 0.0, 1e-4) <= 0.02 * len(real)
            assert all(not x[~real].any() for x in found.values())
            return
        wanted = model(image)
    wanted = wanted if hasattr(wanted, outputs.split(", ")[0]) else wanted.logits
    for name, x in found.items():
        torch.testing.assert_close(x, getattr(wanted, name), atol=1e-4, rtol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["retinanet", "mask-rcnn", "segment upernet", "panoptic mask2former"])
def test_a_program_of_torch_says_what_the_network_says(kind, backbone, tmp_path):
    model, _ = made(kind, backbone)
    path = adaptkit.export.to_exported_program(model, tmp_path / "model.pt2", (64, 96))
    extra = {"adaptkit.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    said = json.loads(extra["adaptkit.json"])
    assert said["size"] == ("1,3,64,96" if kind in DETECTORS else "any,3,64,96")
    assert said["mean"] == ("[0.0, 0.0, 0.0]" if kind in DETECTORS else said["mean"])
    image = torch.rand(1, 3, 64, 96)
    found = dict(zip(said["outputs"].split(","), program(image), strict=True))
    with torch.no_grad():
        wanted = model([image[0]])[0] if kind in DETECTORS else model(image)
    if kind in DETECTORS:
        real = found["scores"] > 0
        assert unmatched({k: x[real] for k, x in found.items()}, wanted, 0.0, 1e-4) <= 0.02 * len(real)
    else:
        for name, x in found.items():
            torch.testing.assert_close(x, wanted[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [*DETECTORS[:3], pytest.param("mask-rcnn", marks=pytest.mark.full)])
@torch.no_grad()
def test_the_detections_of_the_graph_are_torchvisions_at_any_proportion_and_threshold(kind, backbone):
    network = made(kind, backbone)[0].network
    for size, threshold in (((61, 90), 0.0), ((128, 70), 0.4)):
        (network.roi_heads if "rcnn" in kind else network).score_thresh = threshold
        graph, image = Detections(network, size), torch.rand(3, *size)
        found, wanted = graph(image[None]), network([image])[0]
        real = found["scores"] > 0
        assert list(found) == [*["boxes", "scores", "labels"], *(["masks"] if kind == "mask-rcnn" else [])]
        assert int(real.sum()) == len(wanted["scores"]) > 0
        assert unmatched({k: x[real] for k, x in found.items()}, wanted, 0.0, 1e-5) == 0
        assert all(not x[~real].any() for x in found.values())


def test_masks_are_pasted_as_torchvision_pastes_them():
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    low = torch.rand(20, 2) * 50
    boxes = torch.cat([low, low + torch.rand(20, 2) * 60], 1)
    boxes[0] = torch.tensor([5.0, 6.0, 5.2, 6.1])  # smaller than a pixel
    masks = torch.rand(20, 28, 28)
    wanted = paste_masks_in_image(masks[:, None], boxes, (64, 96))[:, 0]
    torch.testing.assert_close(paste(masks, boxes, (64, 96)), wanted, atol=1e-4, rtol=0)


def test_suppression_is_within_a_group_among_what_is_allowed():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [1, 0, 11, 10], [0, 0, 10, 10]])
    scores, groups = torch.tensor([0.9, 0.8, 0.7, 1.0]), torch.tensor([0, 0, 1, 0])
    allowed = torch.tensor([True, True, True, False])
    assert nms(boxes, scores, groups, allowed, 0.5).tolist() == [True, False, True, False]
    assert nms(boxes, scores, groups, torch.zeros(4, dtype=torch.bool), 0.5).tolist() == [False] * 4


def test_a_detection_without_a_partner_is_counted():
    one = {"boxes": torch.tensor([[0.0, 0, 10, 10], [5, 5, 9, 9]]), "scores": torch.tensor([0.9, 0.3]), "labels": torch.tensor([1, 2])}  # fmt: skip
    assert unmatched(one, {k: x.flip(0) for k, x in one.items()}, 0.05, 1e-4) == 0  # in any order
    assert unmatched(one, {**one, "labels": torch.tensor([1, 1])}, 0.05, 1e-4) == 2  # one on each side
    assert unmatched(one, {**one, "boxes": one["boxes"] + 0.1}, 0.05, 1e-4) == 4
    assert unmatched(one, {k: x[:1] for k, x in one.items()}, 0.05, 1e-4) == 1
    assert unmatched(one, {k: x[:1] for k, x in one.items()}, 0.3, 1e-4) == 0  # at the threshold


@pytest.mark.parametrize("kind", ["segment upernet", "panoptic mask2former", "fcos"])
def test_the_outputs_of_a_network_have_names_and_are_chosen(kind, backbone):
    model, names = made(kind, backbone)[0], FILES[kind][-1].split(", ")
    assert adaptkit.export.output_names(model, (64, 96)) == names
    assert adaptkit.export.output_names(model, (64, 96), names[-1:]) == names[-1:]
    with pytest.raises(ValueError, match=f"this model has no 'maps'.*; its outputs are {FILES[kind][-1]}"):
        adaptkit.export.output_names(model, (64, 96), ["maps"])


def test_a_file_that_was_compared_on_nothing_but_empty_images_says_so(backbone):
    model, _ = made("retinanet", backbone)
    model.network.score_thresh = 0.999
    graph = model.graph((64, 96))
    nothing = [torch.zeros(300, 4), torch.zeros(300), torch.zeros(300, dtype=torch.int64)]
    image = graph.seen((1, 3, 64, 96), 1)[0]
    with torch.no_grad():
        graph(image)
        graph.compare(nothing, image, 1e-4)
    with pytest.warns(UserWarning, match="finds nothing in the images that the file was compared on"):
        graph.finish()
    nothing[1][0] = 1.0  # a detection that the model does not have
    with torch.no_grad(), pytest.raises(RuntimeError, match="1 of 0 detections in the file differ from the model"):
        graph.compare(nothing, image, 1e-4)


def test_a_detector_of_any_size_is_refused(backbone, tmp_path):
    model, _ = made("retinanet", backbone)
    with pytest.raises(ValueError, match="a detector's anchors are of one image size in a graph; leave it out"):
        adaptkit.export.to_onnx(model, tmp_path / "model.onnx", (64, 96), dynamic_size=True)
    assert not list(tmp_path.iterdir())
