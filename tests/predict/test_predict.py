"""``model.predict``: pictures of any kind, at their own size, by every kind of head."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import stirred

import adaptkit
from adaptkit.cli import main
from adaptkit.create import create_backbone
from adaptkit.predict.answers import Segmentation
from adaptkit.predict.pixels import pixels

FPN = ("fpn", {"num_classes": 5, "channels": 16})
COMMON = {"mean": [0.5] * 3, "std": [0.25] * 3, "size": [48, 64]}


def backbone():
    torch.manual_seed(0)
    return create_backbone("test_vit", pretrained=False).eval()


@pytest.fixture(scope="module")
def picture():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8).repeat(4, 0).repeat(3, 1))  # 80 x 90


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file of each kind of head."""
    folder = tmp_path_factory.mktemp("files")
    heads = {
        "seg": (("sfp",), FPN),
        "depth": (("sfp",), ("depth", {"max_depth": 10.0, "bins": 8, "channels": 16})),
        "class": (("lora",), ("classifier", {"num_classes": 7})),
    }
    for name, (adapters, head) in heads.items():
        model = stirred(adaptkit.attach(backbone(), *adapters, head=head))
        more = {"classes": [f"c{i}" for i in range(5)]} if name == "seg" else {}
        model.save(folder / name, **{**COMMON, **({"size": 32} if name == "class" else {})}, **more)
    return folder


def opened(files, name):
    return adaptkit.from_pretrained(files / name, backbone=backbone())


# ------------------------------------------------------------------------------------------------------- pictures


def test_pictures_of_every_kind_are_the_same_picture(files, picture, tmp_path):
    model = opened(files, "seg")
    picture.save(tmp_path / "picture.png")
    array = np.asarray(picture)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    kinds = [tmp_path / "picture.png", str(tmp_path / "picture.png"), (tmp_path / "picture.png").read_bytes(), array,
             array.transpose(2, 0, 1), tensor, tensor / 255, tensor.double(), array.astype(np.float32) / 255]  # fmt: skip
    expected = model.predict(picture).mask
    assert expected.shape == (80, 90)
    assert expected.dtype == np.uint8
    for kind in kinds:
        assert np.array_equal(model.predict(kind).mask, expected)
    batch = model.predict(torch.stack([tensor, tensor]))
    assert [np.array_equal(one.mask, expected) for one in batch] == [True, True]
    assert len(model.predict([picture, tmp_path / "picture.png"])) == 2


def test_grey_sixteen_bits_and_alpha():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    assert torch.equal(pixels(grey), pixels(np.stack([grey] * 3, -1)))
    assert torch.equal(pixels(Image.fromarray(grey)), pixels(grey))
    deep = (np.arange(90).reshape(3, 6, 5) * 700).astype(np.uint16)
    torch.testing.assert_close(pixels(deep), torch.from_numpy(deep.astype(np.float32)) / 65535)
    rgba = np.concatenate([np.stack([grey] * 3, -1), np.full((3, 4, 1), 255, np.uint8)], -1)
    assert torch.equal(pixels(rgba), pixels(grey))
    assert pixels(np.ones((13, 6, 5), np.float32), 13).shape == (13, 6, 5)
    assert pixels(np.ones((3, 5, 13), np.float32), 13).shape == (13, 3, 5)
    narrow = torch.arange(36.0).reshape(3, 3, 4) / 36  # of a tensor the channels are first, where both sides could be
    assert torch.equal(pixels(narrow), narrow)


def test_rounding_does_not_turn_one_scale_into_another():
    """torch's antialiased resizing of a white region gives 1.0000002."""
    white = torch.zeros(3, 64, 80)
    white[:, :32] = 1
    resized = F.interpolate(white[None], (33, 47), mode="bilinear", antialias=True)[0]
    assert resized.max() > 1
    assert torch.equal(pixels(resized), resized.clamp(0, 1))
    assert torch.equal(pixels(resized * 255 + 1e-4), (resized * 255 + 1e-4).clamp(max=255) / 255)


@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
def test_arrays_of_either_byte_order_and_buffers_are_pictures(picture, dtype, tmp_path):
    array = np.asarray(picture).astype(dtype)
    assert torch.equal(pixels(array.astype(array.dtype.newbyteorder(">"))), pixels(array))
    picture.save(tmp_path / "picture.png")
    data = (tmp_path / "picture.png").read_bytes()
    assert torch.equal(pixels(bytearray(data)), pixels(picture))
    assert torch.equal(pixels(memoryview(data)), pixels(picture))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.randn(3, 8, 8) - 1, "normalised already, call the model itself"),
        (torch.full((3, 8, 8), float("nan")), "pixels are in"),
        (torch.ones(5, 8, 8), "5 channels, and this backbone takes 3"),
        (torch.ones(3, 8, 8, dtype=torch.int64), "int64"),
        (torch.ones(2), r"shape \(2,\): expected"),
        (torch.linspace(0, 1.2, 64).expand(3, 8, 64), r"more than 0\.\.1, and too dark for 0\.\.255"),
        (3, "a path, a PIL image"),
    ],
)
def test_what_is_no_picture_is_refused(files, image, message):
    with pytest.raises((ValueError, TypeError), match=message):
        opened(files, "seg").predict(image)


def test_a_file_that_cannot_be_read_is_named(files, tmp_path):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match=r"torn\.png"):
        opened(files, "seg").predict(tmp_path / "torn.png")
    with pytest.raises(ValueError, match=r"none\.png"):
        opened(files, "seg").predict(tmp_path / "none.png")


# -------------------------------------------------------------------------------------------------------- answers


def test_the_mask_is_that_of_the_logits_brought_to_the_pictures_size(files, picture):
    model = opened(files, "seg")
    seen = model.transform(picture)[None]
    assert seen.shape == (1, 3, 48, 54)  # the shorter side as trained, the other in proportion
    with torch.no_grad():
        logits = F.interpolate(model(seen).logits, (80, 90), mode="bilinear", align_corners=False)
    answer = model.predict(picture, probabilities=True, confidence=True)
    assert np.array_equal(answer.mask, logits.argmax(1)[0].numpy())
    np.testing.assert_allclose(answer.probabilities, logits.softmax(1)[0], atol=1e-5)
    np.testing.assert_allclose(answer.confidence, answer.probabilities.max(0), atol=1e-6)
    assert np.array_equal(np.asarray(answer), answer.mask)
    assert answer.json()["classes"][0]["name"].startswith("c")
    assert sum(c["share"] for c in answer.json()["classes"]) == pytest.approx(1)


def test_scales_and_mirror_average_probabilities(files, picture):
    model = opened(files, "seg")
    image = pixels(picture)
    total = 0
    for scale in (0.75, 1.5):
        for mirrored in (False, True):
            x = model.transform.normalise(model.transform.frame(image, scale))
            with torch.no_grad():
                made = model((x.flip(-1) if mirrored else x)[None]).logits
            made = F.interpolate(made, (80, 90), mode="bilinear", align_corners=False).softmax(1)[0]
            total = total + (made.flip(-1) if mirrored else made)
    answer = model.predict(picture, scales=(0.75, 1.5), flip=True, probabilities=True)
    np.testing.assert_allclose(answer.probabilities, total / 4, atol=1e-5)


def test_sliding_looks_at_the_picture_at_its_own_size(files, picture):
    model = opened(files, "seg")
    native = model.transform.resized(None)(picture)
    assert native.shape[-2:] == (80, 90)
    with torch.no_grad():
        tiles = {x: model(native[None, :, :, x : x + 64]).logits[0] for x in (0, 26)}
    total, count = torch.zeros(5, 80, 90), torch.zeros(90)
    for x, tile in tiles.items():
        total[:, :, x : x + 64] += tile
        count[x : x + 64] += 1
    answer = model.predict(picture, slide=(80, 64), stride=(80, 42))
    assert np.array_equal(answer.mask, (total / count).argmax(0).numpy())


def test_depths_and_classes(files, picture):
    model = opened(files, "depth")
    answer = model.predict(picture)
    with torch.no_grad():
        depth = F.interpolate(model(model.transform(picture)[None]).logits, (80, 90), mode="bilinear")
    np.testing.assert_allclose(answer.depth, depth[0, 0], rtol=1e-5)
    model = opened(files, "class")
    assert model.transform(picture).shape == (3, 32, 32)
    with torch.no_grad():
        shares = model(model.transform(picture)[None]).logits.softmax(-1)[0]
    answer = model.predict([picture, picture.resize((50, 40))])[0]
    np.testing.assert_allclose(answer.probabilities, shares, atol=1e-6)
    assert answer.label == int(shares.argmax())
    assert answer.top(2)[0] == (str(answer.label), answer.score)


def test_a_mirror_or_more_scales_change_a_class_by_their_average(files, picture):
    model = opened(files, "class").eval()
    image = model.transform(picture)  # framed before it is mirrored: the middle of an odd rest lies one pixel aside
    with torch.no_grad():
        plain, mirrored = (model(x[None]).logits.softmax(-1)[0].numpy() for x in (image, image.flip(-1)))
    assert abs(plain - mirrored).max() > 1e-3
    both = model.predict(picture, flip=True).probabilities
    np.testing.assert_allclose(both, (plain + mirrored) / 2, atol=1e-5)


def test_predicting_leaves_the_model_in_the_mode_that_it_was_in(files, picture):
    model = opened(files, "seg").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.predict(picture)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters())


def test_what_cannot_be_predicted_says_why(picture):
    with pytest.raises(TypeError, match="attach with head="):
        adaptkit.attach(backbone(), "sfp").predict(picture)
    own = adaptkit.attach(backbone(), "lora", head=Own())
    with pytest.raises(TypeError, match="nobody says what the head Own predicts"):
        own.predict(picture)
    Own.answers = "classification"
    try:
        assert own.predict(picture).probabilities.shape == (1,)
    finally:
        del Own.answers


class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, features):
        return features.tokens.mean((1, 2), keepdim=True)[:, 0] * self.weight


@pytest.mark.parametrize(
    "ways",
    [
        {"slide": (0, 4)},
        {"stride": (4, 4)},
        {"slide": (8, 8), "stride": (9, 9)},
        {"scales": ()},
        {"resize": "big"},
        {"resize": 0},
        {"resize": np.int64(-5)},
        {"resize": (64, 64)},
        {"scales": (float("inf"),)},
        {"blend": "x"},
        {"batch_size": 0},
    ],
)
def test_ways_that_make_no_sense_are_refused(files, picture, ways):
    with pytest.raises(ValueError, match=next(iter(ways))):
        opened(files, "seg").predict(picture, **ways)


def test_a_class_is_seen_without_padding_at_another_size(files):
    """The crop goes with the resize: 32 of 37 pixels, and none at the picture's own size."""
    model = opened(files, "class")
    seen = []
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    white = torch.ones(3, 40, 60)
    for ways, size in (({}, (32, 32)), ({"resize": 20}, (17, 17)), ({"resize": "native"}, (40, 60))):
        model.predict(white, **ways)
        assert seen[-1].shape[-2:] == size
        torch.testing.assert_close(seen[-1], torch.full_like(seen[-1], (1 - 0.5) / 0.25))


@pytest.mark.parametrize(("size", "framed"), [([32, 32], (37, 32)), ([32, 48], ((32, 48), None))])
def test_a_class_keeps_the_sides_that_its_file_says(tmp_path, size, framed):
    model = adaptkit.attach(backbone(), "lora", head=("classifier", {"num_classes": 7}))
    model.save(tmp_path, task="image-classification", **{**COMMON, "size": size})
    transform = adaptkit.from_pretrained(tmp_path, backbone=backbone()).transform
    assert (transform.size, transform.crop) == framed


def test_what_is_for_maps_is_refused_for_a_class(files, picture):
    with pytest.raises(ValueError, match="slide"):
        opened(files, "class").predict(picture, slide=(32, 32))


# ---------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The backbone as a folder of timm's."""
    import timm
    from timm.models import save_for_hf

    folder = tmp_path_factory.mktemp("backbone") / "vit"
    save_for_hf(backbone(), folder, model_config={"num_classes": 0})
    assert timm.create_model(f"local-dir:{folder}", num_classes=0, pretrained=True) is not None
    return folder


def test_the_command_writes_masks_overlays_and_json(files, picture, local, tmp_path, capsys):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    picture.save(tmp_path / "in" / "one.png")
    picture.resize((33, 21)).save(tmp_path / "in" / "deep" / "two.jpg")
    argv = [
        "predict",
        str(files / "seg"),
        str(tmp_path / "in"),
        "--backbone",
        str(local),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*argv, "--slide", "64", "64", "--device", "cpu"]) == 0
    mask = Image.open(tmp_path / "out" / "one.png")
    assert (mask.mode, mask.size) == ("L", picture.size)
    model = adaptkit.from_pretrained(files / "seg", backbone=str(local))
    assert np.array_equal(np.asarray(mask), model.predict(picture, slide=(64, 64)).mask)
    assert Image.open(tmp_path / "out" / "deep" / "two.png").size == (33, 21)
    assert Image.open(tmp_path / "out" / "one_overlay.png").width > picture.width  # the legend beside it
    said = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [entry["file"] for entry in said] == ["deep/two", "one"]
    assert said[1]["classes"][0]["name"].startswith("c")


@pytest.mark.parametrize("ignored", [255, 65535, -1, -100])
def test_what_is_ignored_is_not_coloured(ignored):
    from adaptkit.predict.draw import laid

    mask = np.zeros((8, 8), np.int64)
    mask[4:] = ignored
    drawn = np.asarray(
        laid(np.full((8, 8, 3), 100, np.uint8), Segmentation((8, 8), ["a", "b"], [(255, 0, 0), (0, 0, 255)], mask=mask))
    )
    assert drawn[6, 6].tolist() == [100, 100, 100]
    assert drawn[1, 1].tolist() != [100, 100, 100]


def test_mistakes_of_the_command_are_one_line(files, picture, local, tmp_path, capsys):
    for name in ("one", "drawn/a", "drawn/a_overlay"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture.save(tmp_path / f"{name}.png")
    for name in ("a.png", "a.jpg"):
        (tmp_path / "two").mkdir(exist_ok=True)
        picture.save(tmp_path / "two" / name)
    argv = ["predict", str(files / "seg"), "--backbone", str(local), "--out"]
    for more, message in (
        ([str(tmp_path / "out"), str(tmp_path / "none.png")], "there is no file, folder or pattern"),
        ([str(tmp_path), str(tmp_path / "one.png")], "would overwrite a picture"),
        ([str(tmp_path / "out"), str(tmp_path / "drawn")], "would both be answered in a_overlay.png"),
        ([str(tmp_path / "out"), str(tmp_path / "two")], "rename one, or run twice"),
        ([str(tmp_path / "out"), str(tmp_path / "one.png"), "--scales", "inf"], "scales"),
        ([str(tmp_path / "out"), str(tmp_path / "one.png"), "--device", "nothing"], "nothing"),
        ([str(tmp_path / "out"), str(tmp_path / "one.png"), "--resize", "large"], "--resize large"),
    ):
        assert main([argv[0], argv[1], more[1], *argv[2:], more[0], *more[2:]]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
