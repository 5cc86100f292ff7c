"""Images of one, four and thirteen channels: read, trained, gone on with, predicted and scored like any other."""

import io
import json
import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import reset

import adaptkit
from adaptkit import bands
from adaptkit.cli import main as adaptkit_main
from adaptkit.pictures import colours, read
from adaptkit.predict.pixels import pixels, shown
from recipes import augment, channels, classify, coco, depth, detect, detection_data, panoptic, segment, shapes

RNG = np.random.default_rng(0)


def stored(array, form="npy"):
    """(H, W, C) -> the bytes of a file."""
    file = io.BytesIO()
    if form == "npy":
        np.save(file, array)
    else:
        tifffile = pytest.importorskip("tifffile")
        geo = [(33550, "d", 3, (10.0, 10.0, 0.0), True), (33922, "d", 6, (0.0, 0.0, 0.0, 3e5, 5e6, 0.0), True)]
        planar = "contig" if array.shape[2] > 1 else None
        tifffile.imwrite(file, array, photometric="minisblack", planarconfig=planar, extratags=geo)
    return file.getvalue()


def pair_of(count, kind, size=(40, 48)):
    """An image whose channels say the class of a pixel, far from 0 in units of its own, and the mask."""
    mask = RNG.integers(0, 3, (size[0] // 8, size[1] // 8)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    rows = RNG.integers(500, 3000, (3, count))
    image = rows[mask] + RNG.integers(0, 100, (*size, count))
    return (image / 10 - 40 if kind == "float32" else image).astype(kind), mask


def write_set(path, form, count=13, kind="uint16", images=5, size=(40, 48)):
    for folder in ("images", "masks"):
        (path / folder).mkdir(parents=True)
    for i in range(images):
        image, mask = pair_of(count, kind, size)
        (path / "images" / f"{i}.{form}").write_bytes(stored(image, form))
        np.save(path / "masks" / f"{i}.npy", mask.astype(np.int64))
    return path


def command(data, out, *more):
    return ["--train", str(data), "--val", str(data), "--out", str(out), "--num-classes", "3", "--backbone", "demo",
            "--adapter", "none", "--head", "linear", "--size", "32", "32", "--batch-size", "2", "--steps", "4",
            "--save-every", "2", *more]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ read


@pytest.mark.parametrize("form", ["npy", "tif"])
@pytest.mark.parametrize("count", [1, 4, 13])
@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_a_file_gives_the_values_that_it_holds(form, count, kind):
    array = (RNG.random((10, 14, count)) * {"uint8": 255, "uint16": 65535, "float32": 1}[kind]).astype(kind)
    white = {"uint8": 1, "uint16": 65535, "float32": 1}[kind]
    expected = torch.from_numpy(array.astype(np.float32) / white).permute(2, 0, 1)
    found = colours(read(stored(array, form), "it", channels=count))
    assert torch.equal(found.float(), expected)
    assert read(stored(array, form), "it", pixels=False, channels=count).upright == (10, 14)
    # predict reads a file and the array of it alike, (H, W, C) as well as (C, H, W)
    scaled = expected / 255 if kind == "uint8" else expected
    for given in (stored(array, form), array, np.ascontiguousarray(array.transpose(2, 0, 1))):
        torch.testing.assert_close(pixels(given, count), scaled, rtol=1e-6, atol=0)


def test_thirteen_bands_keep_their_unit_and_a_picture_must_be_in_zero_to_one():
    array = RNG.normal(-12, 5, (8, 9, 13)).astype(np.float32)
    torch.testing.assert_close(pixels(array, 13), torch.from_numpy(array).permute(2, 0, 1), rtol=0, atol=0)
    assert pixels(stored(array), 13).equal(pixels(array, 13))
    assert pixels(pixels(array, 13), 13).equal(pixels(array, 13))
    signed = array.astype(np.int16)
    assert pixels(stored(signed), 13).equal(torch.from_numpy(signed).permute(2, 0, 1).float())
    with pytest.raises(ValueError, match=r"3 channels is of 8 or 16 bits without a sign, or of floats in 0\.\.1"):
        pixels(stored(array[..., :3]), 3)
    array[2, 3, 4] = np.nan
    with pytest.raises(ValueError, match="1 values that are NaN or infinite"):
        pixels(stored(array), 13)


def test_what_has_another_number_of_channels_says_both():
    array = np.zeros((8, 9, 13), np.uint16)
    with pytest.raises(ValueError, match=r"shape \(8, 9, 13\), and the backbone takes 3 channels.* --channels N"):
        pixels(stored(array), 3)
    grey, rgb, rgba = (io.BytesIO() for _ in range(3))
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(grey, "png")
    Image.fromarray(RNG.integers(0, 9, (8, 8, 3), dtype=np.uint8)).save(rgb, "png")
    alpha = RNG.integers(0, 255, (8, 8, 4), dtype=np.uint8)
    Image.fromarray(alpha).save(rgba, "png")
    torch.testing.assert_close(pixels(grey.getvalue(), 1), torch.arange(64.0).reshape(1, 8, 8) / 255)
    torch.testing.assert_close(pixels(rgba.getvalue(), 4), torch.from_numpy(alpha).permute(2, 0, 1) / 255)
    with pytest.raises(ValueError, match="has colours, and the backbone takes one channel"):
        pixels(rgb.getvalue(), 1)
    with pytest.raises(ValueError, match="has 3 channels .* and the backbone takes 13"):
        pixels(rgb.getvalue(), 13)


def test_a_torn_array_and_one_of_objects_are_refused_before_anything_is_allocated():
    whole = stored(np.zeros((8, 9, 13), np.uint16))
    with pytest.raises(ValueError, match="it is torn: shape"):
        read(whole[:-1], "it", channels=13)
    huge = whole.replace(b"(8, 9, 13)", b"(8, 9999999999, 13)".ljust(10))
    with pytest.raises(ValueError, match="torn|no array that can be read"):
        read(huge, "it", channels=13)
    file = io.BytesIO()
    np.save(file, np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="holds object"):
        read(file.getvalue(), "it")


def test_a_tiff_of_many_bands_without_a_reader_says_what_to_install(monkeypatch):
    def missing(*_):
        raise ModuleNotFoundError("No module named 'tifffile'", name="tifffile")

    monkeypatch.setattr(bands, "_by_tifffile", missing)
    monkeypatch.setattr(bands, "_by_rasterio", missing)
    with pytest.raises(ValueError, match="tifffile or rasterio reads: pip install tifffile"):
        bands.array_of_tiff(b"II*\0", "a.tif")


@pytest.mark.parametrize("more", [{}, {"bigtiff": True}, {"byteorder": ">"}, {"planarconfig": "separate"}])
def test_tiffs_of_all_layouts_are_read_in_silence(more, caplog):
    tifffile = pytest.importorskip("tifffile")
    array, file = RNG.integers(0, 60000, (13, 10, 14)).astype(np.uint16), io.BytesIO()
    given = array if "planarconfig" in more else np.ascontiguousarray(array.transpose(1, 2, 0))
    tifffile.imwrite(file, given, **{"photometric": "minisblack", "planarconfig": "contig", **more})
    assert bands.pages_of_tiff(file.getvalue()) == (13, False)
    assert torch.equal(pixels(file.getvalue(), 13), torch.from_numpy(array.astype(np.float32) / 65535))
    with pytest.raises(ValueError, match=r"and the backbone takes 3 channels"):
        pixels(file.getvalue(), 3)
    with pytest.raises(ValueError, match="that can be read whole"):
        pixels(file.getvalue()[:300], 13)
    assert not [one for one in caplog.records if one.name.startswith("PIL")]
    pages = io.BytesIO()
    tifffile.imwrite(pages, array, photometric="minisblack")  # a page for each channel, as microscopes write
    assert bands.pages_of_tiff(pages.getvalue()) == (1, True)
    assert torch.equal(pixels(pages.getvalue(), 13), pixels(file.getvalue(), 13))


def test_bands_are_shown_by_their_first_three():
    image = torch.randn(13, 20, 30) * 7 - 3
    seen = shown(image)
    assert seen.shape == (20, 30, 3)
    assert seen.min() == 0
    assert seen.max() == 255
    assert (shown(torch.rand(1, 4, 4)).std(-1) == 0).all()


# ------------------------------------------------------------------------------------------------------------ train


def test_mean_and_deviation_are_those_of_all_pixels_and_a_dead_channel_is_named(tmp_path):
    data = write_set(tmp_path / "set", "npy", kind="float32")
    rows = segment.open_dataset(str(data), "train")
    whole = np.concatenate([np.load(f).reshape(-1, 13) for f in sorted((data / "images").iterdir())]).astype(np.float64)
    mean, std, count = channels.measured(rows, 13, "--train")
    assert count == 5
    np.testing.assert_allclose(mean, whole.mean(0), rtol=1e-5)
    np.testing.assert_allclose(std, whole.std(0), rtol=1e-5)
    for file in (data / "images").iterdir():
        array = np.load(file)
        array[..., 7] = 4
        np.save(file, array)
    with pytest.raises(ValueError, match=r"--train: channel 7 \(from 0\) is 4 in every pixel of 5 images"):
        channels.measured(rows, 13, "--train")


def test_colours_are_augmented_of_three_channels_alone():
    assert [type(t).__name__ for t in augment.colours("medium")] == ["ColorJitter"]
    assert augment.colours("medium", 13) == []
    image = torch.rand(13, 20, 20)
    assert augment.of_images("strong", 16, 0.5, 13)[1](image).shape == (13, 20, 20)
    with pytest.raises(ValueError, match="--augment rand changes red, green and blue, and these images have 4"):
        augment.of_pixels("rand", (16, 16), 255, 4)


class Killed(Exception):
    pass


@pytest.mark.parametrize("form", ["npy", "tif"])
def test_a_set_of_thirteen_bands_trains_resumes_predicts_and_scores(form, tmp_path, capsys, monkeypatch):
    data, more = write_set(tmp_path / "set", form), ("--channels", "13", "--expand", "mean")
    result = segment.main(command(data, tmp_path / "whole", *more))
    assert "mean and std of 13 channels, measured on 5 images" in capsys.readouterr().out
    assert result["miou"] == result["miou_reattached"]

    real = segment.loss
    calls = []

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return real(*arguments)

    task = segment.TASK
    monkeypatch.setattr(segment, "TASK", task.__class__(**{**vars(task), "loss": dies}))
    with pytest.raises(Killed):
        segment.main(command(data, tmp_path / "killed", *more))
    monkeypatch.setattr(segment, "TASK", task)
    reset()
    segment.main(command(data, tmp_path / "killed", *more, "--resume"))
    files = [tmp_path / run / "adapter" / "adapter_model.safetensors" for run in ("whole", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()

    file = adaptkit.load(files[0].parent)
    said = file.header["backbone"]
    assert said["expanded"] == {"how": "mean", "wavelengths": None}
    assert len(file.header["metadata"]["mean"]) == 13 == len(said["mean"])
    assert [k for k in file.tensors if k.endswith("new_channels")]
    model = adaptkit.from_pretrained(files[0].parent, strict=True)
    assert model.vit.spec.channels == 13
    image = sorted((data / "images").iterdir())[0]
    answer = model.predict(image)
    assert answer.mask.shape == (40, 48)
    if form == "npy":
        assert (model.predict(np.load(image)).mask == answer.mask).all()

    adaptkit_main(["predict", str(files[0].parent), str(data / "images"), "--out", str(tmp_path / "said")])
    assert (np.asarray(Image.open(tmp_path / "said" / f"{image.stem}.png")) == answer.mask).all()
    assert (tmp_path / "said" / f"{image.stem}_overlay.png").is_file()
    capsys.readouterr()
    ended = adaptkit_main(["eval", str(files[0].parent), "--data", str(data), "--json"])
    said = capsys.readouterr()
    assert ended == 0, said.err
    found = json.loads(said.out.splitlines()[-1])
    assert found["miou"] == pytest.approx(result["miou"] / 100, abs=1e-4)


def test_class_folders_of_four_channels_train_and_the_user_says_how_they_are_normalised(tmp_path):
    for name, low in (("dark", 0), ("light", 128)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(4):
            np.save(tmp_path / "set" / name / f"{i}.npy", RNG.integers(low, low + 128, (24, 24, 4), dtype=np.uint8))
    argv = ["--train", str(tmp_path / "set"), "--val", str(tmp_path / "set"), "--backbone", "demo", "--size", "32",
            "--adapter", "linear", "--channels", "4", "--steps", "3", "--batch-size", "4", "--out", str(tmp_path / "o"),
            "--mean", "0.5", "--std", "0.25", "0.25", "0.25", "0.3"]  # fmt: skip
    result = classify.main(argv)
    assert result["top1"] == result["top1_reattached"]
    model = adaptkit.from_pretrained(tmp_path / "o" / "adapter")
    assert model.transform.mean == (0.5,) * 4
    assert model.transform.std == (0.25, 0.25, 0.25, 0.3)
    answer = model.predict(tmp_path / "set" / "dark" / "0.npy")
    assert answer.probabilities.sum() == pytest.approx(1, abs=1e-5)


def test_options_that_do_not_fit_say_so():
    def args(**more):
        return Namespace(**{"backbone": "demo", "random_backbone": True, "channels": 13, "expand": None,
                            "wavelengths": None, "cache_features": None, **more})  # fmt: skip

    assert channels.trained_parts(channels.backbone_of(args()), Namespace(train_backbone=[])) == [channels.NEW]
    assert channels.trained_parts(channels.backbone_of(args(channels=3)), Namespace(train_backbone=[])) == []
    with pytest.raises(ValueError, match="--cache-features keeps what a frozen backbone says"):
        channels.backbone_of(args(cache_features="there"))
    with pytest.raises(ValueError, match="--channels 1: demo reads 3, and three are expanded to more"):
        channels.backbone_of(args(channels=1))
    with pytest.raises(ValueError, match="it needs them"):
        channels.backbone_of(args(expand="wavelength"))


def test_a_backbone_of_one_channel_and_a_stream_need_no_options(tmp_path):
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(0)
    build = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2, "in_chans": 1, "num_classes": 0}
    host = timm.create_model("vit_tiny_patch16_224", patch_size=8, **build)
    save_for_hf(host, str(tmp_path / "host"), model_args={**build, "patch_size": 8}, safe_serialization=True)
    data = write_set(tmp_path / "set", "npy", 1, "uint16")
    argv = [*command(data, tmp_path / "run", "--streaming", "--mean", "0.02", "--std", "0.01"), "--backbone",
            str(tmp_path / "host")]  # fmt: skip
    result = segment.main(argv)
    assert result["miou"] == result["miou_reattached"]
    model = adaptkit.from_pretrained(tmp_path / "run" / "adapter", backbone=str(tmp_path / "host"))
    assert model.transform.mean == (0.02,)
    assert model.predict(data / "images" / "0.npy").mask.shape == (40, 48)


# --------------------------------------------------------------------------------------------- depth, boxes, panoptic


SIDES = ["--size", "32", "48", "--batch-size", "2", "--steps", "2", "--save-every", "0"]
NETWORK = [*SIDES, "--backbone", "demo", "--adapter", "sfp", "--channels", "13", "--width", "64"]


def shapes_of(path, form, count=13):
    """A set in COCO's formats with pictures of many bands: its colours, mixed, in units of their own."""
    shapes.write(path, 3, 32, 48)
    mix = RNG.integers(1, 20, (3, count))
    for file in sorted((path / "images").iterdir()):
        many = (np.asarray(Image.open(file)).astype(np.int64) @ mix).astype(np.uint16)
        file.with_suffix(f".{form}").write_bytes(stored(many, form))
        file.unlink()
    for name in ("annotations.json", "panoptic.json"):
        said = json.loads((path / name).read_text())
        for one in said["images"]:
            one["file_name"] = one["file_name"].replace(".png", f".{form}")
        (path / name).write_text(json.dumps(said))
    return path


def comes_back(out, image, scored, capsys, data):
    """The file of a run opens with its new rows, predicts, and ``eval`` says of it what the run said."""
    file = adaptkit.load(out / "adapter")
    assert [k for k in file.tensors if k.endswith("new_channels")]
    assert len(file.header["metadata"]["mean"]) == 13
    model = adaptkit.from_pretrained(out / "adapter", strict=True)
    assert model.vit.spec.channels == 13
    answer = model.predict(image)
    capsys.readouterr()
    ended = adaptkit_main(["eval", str(out / "adapter"), "--data", str(data), "--json", *scored[2:]])
    said = capsys.readouterr()
    assert ended == 0, said.err
    assert json.loads(said.out.splitlines()[-1])[scored[0]] == pytest.approx(scored[1], abs=1e-4)
    return answer


@pytest.mark.parametrize("form", ["npy", pytest.param("tif", marks=pytest.mark.full)])
def test_depths_of_thirteen_bands(form, tmp_path, capsys):
    data = write_set(tmp_path / "set", form, images=3, size=(32, 48))
    (data / "depth").mkdir()
    for file in (data / "masks").iterdir():
        Image.fromarray((np.load(file) * 2000 + 1000).astype(np.uint16)).save(data / "depth" / f"{file.stem}.png")
    shutil.rmtree(data / "masks")
    result = depth.main(["--train", str(data), "--val", str(data), "--out", str(tmp_path / "run"), "--max-depth", "10",
                         "--backbone", "demo", "--adapter", "sfp", "--channels", "13", *SIDES])  # fmt: skip
    assert "mean and std of 13 channels, measured on 3 images" in capsys.readouterr().out
    assert result["delta1"] == result["delta1_reattached"]
    scored = ("delta1", result["delta1"] / 100)
    answer = comes_back(tmp_path / "run", data / "images" / f"0.{form}", scored, capsys, data)
    assert answer.depth.shape == (32, 48)


@pytest.mark.parametrize(("form", "model"), [("npy", "fcos"), ("tif", "plain-mask")])
def test_boxes_of_thirteen_bands(form, model, tmp_path, capsys):
    pytest.importorskip("faster_coco_eval")
    data = shapes_of(tmp_path / "set", form)
    told = [] if model == "fcos" else ["--adapter", "none", "--queries", "6", "--points", "64"]
    argv = ["--train", str(data), "--val", str(data), "--out", str(tmp_path / "run"), "--model", model, *NETWORK]
    result = detect.main([*argv, *told])
    assert "mean and std of 13 channels, measured on 3 images" in capsys.readouterr().out
    score = "box_ap" if model == "fcos" else "mask_ap"
    assert result[score] == result[f"{score}_reattached"]
    comes_back(tmp_path / "run", data / "images" / f"00000.{form}", (score, result[score] / 100), capsys, data)


def test_segments_of_thirteen_bands(tmp_path, capsys):
    pytest.importorskip("scipy")
    data = shapes_of(tmp_path / "set", "npy")
    argv = ["--train", str(data), "--val", str(data), "--out", str(tmp_path / "run"), *NETWORK, "--queries", "6",
            "--layers", "1", "1", "--points", "64", "--object-threshold", "0.2"]  # fmt: skip
    result = panoptic.main(argv)
    assert "mean and std of 13 channels, measured on 3 images" in capsys.readouterr().out
    assert result["pq"] == result["pq_reattached"]
    scored = ("pq", result["pq"] / 100)
    answer = comes_back(tmp_path / "run", data / "images" / "00000.npy", scored, capsys, data)
    assert answer.segments.shape == (32, 48)


@pytest.mark.parametrize("form", ["npy", "tif"])
def test_what_has_more_channels_than_were_asked_for_says_which_option(form, tmp_path):
    pytest.importorskip("faster_coco_eval")
    data = shapes_of(tmp_path / "set", form)
    argv = ["--train", str(data), "--val", str(data), "--out", str(tmp_path / "run"), *SIDES, "--backbone", "demo"]
    for recipe in (detect, panoptic):
        with pytest.raises(ValueError, match=r"the shape \(32, 48, 13\).* takes 3 channels.* --channels N"):
            recipe.build(recipe.parse(argv))


def test_values_of_many_bands_are_not_coloured_and_move_with_their_boxes(tmp_path):
    pytest.importorskip("faster_coco_eval")
    data = shapes_of(tmp_path / "set", "npy")
    found = coco.read_instances(data / "images", data / "annotations.json", False, "--train", channels=13)
    rows, plain = detection_data.Detection(found, False, 1, train=True), detection_data.Detection(found, False)
    mirrored = 0
    for i in range(3):
        for epoch in range(4):
            (image, target), (whole, true) = rows[epoch, i], plain[i]
            if image.equal(whole):
                assert target["boxes"].equal(true["boxes"])
                continue
            mirrored += 1
            assert image.equal(whole.flip(-1))
            assert target["boxes"][:, [0, 2]].equal(48 - true["boxes"][:, [2, 0]])
    assert 0 < mirrored < 12
