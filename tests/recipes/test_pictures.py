"""What a file holds is what comes out: depth of values, direction, colours; and what cannot be read is named."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from adaptkit import pictures
from adaptkit.core.view import Source
from adaptkit.pictures import class_ids, colours, pair, read
from recipes import coco, shapes
from recipes.coco import read_instances
from recipes.data import SegmentationData, open_dataset
from recipes.detection_data import Detection
from recipes.labelled import LabelledData, open_images, open_labelled
from recipes.order import Stream
from recipes.panoptic_data import PanopticData, locate, read_segments

PLAIN = Source(mean=(0.0,) * 3, std=(1.0,) * 3)  # samples are the pixels themselves, in 0..1
RNG = np.random.default_rng(0)


def stored(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return {"bytes": file.getvalue(), "path": None}


def with_turn(image, form, turn):
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = turn
    return stored(image, form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))


def png16(values, kind):
    """A PNG of 16 bits, which Pillow does not write in colours: values (H, W, C), kind 0 grey, 2 RGB, 4 LA, 6 RGBA."""

    def chunk(tag, data):
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    height, width = values.shape[:2]
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return {"bytes": data, "path": None}


def unit(values):
    return torch.from_numpy(values.astype(np.float32) / 65535)


# ---------------------------------------------------------------------------------------------------- deep values


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey_keep_their_values_in_all_three_channels(form):
    values = RNG.integers(0, 65536, (6, 9), dtype=np.uint16)
    image = colours(read(stored(Image.fromarray(values), form)))
    assert torch.equal(image, unit(values).expand(3, -1, -1))


def test_big_endian_greys_are_the_same_greys():
    values = RNG.integers(0, 65536, (6, 9), dtype=np.uint16)
    big = Image.frombytes("I;16B", (9, 6), values.astype(">u2").tobytes())
    assert torch.equal(colours(read(big))[0], unit(values))


@pytest.mark.parametrize(("kind", "channels"), [(2, 3), (6, 4), (4, 2)])
def test_sixteen_bits_of_colour_in_a_png_keep_their_values(kind, channels):
    values = RNG.integers(0, 65536, (5, 7, channels), dtype=np.uint16)
    if channels in (2, 4):
        values[..., -1] = 65535  # opaque
    image = colours(read(png16(values, kind)))
    want = unit(values[..., :3] if channels > 2 else values[..., :1].repeat(3, -1)).permute(2, 0, 1)
    assert torch.equal(image, want)


def test_floating_point_values_in_zero_to_one_are_taken_as_they_are():
    values = RNG.random((6, 9), dtype=np.float32)
    assert torch.equal(colours(read(stored(Image.fromarray(values), "TIFF")))[2], torch.from_numpy(values))


@pytest.mark.parametrize("worst", [255.0, -0.1, np.nan, np.inf])
def test_floating_point_values_elsewhere_are_refused_with_their_range(worst):
    values = np.full((4, 4), 0.5, np.float32)
    values[1, 2] = worst
    with pytest.raises(
        ValueError, match=r"row 3 holds floating-point values .*read as 0\.\.1: divide by what is white"
    ):
        colours(read(stored(Image.fromarray(values), "TIFF"), "row 3"))


def test_integers_of_32_bits_are_sixteen_bits_where_they_can_be_and_refused_where_they_cannot():
    values = RNG.integers(300, 65536, (6, 9), dtype=np.int32)
    assert torch.equal(colours(read(stored(Image.fromarray(values), "TIFF")))[0], unit(values))
    for wrong in (-values, values + 65536, values % 255 + 1):
        with pytest.raises(ValueError, match=r"row 3 holds 32-bit integers .*nothing says which of them is white"):
            colours(read(stored(Image.fromarray(wrong.astype(np.int32)), "TIFF"), "row 3"))


def test_a_sample_of_a_16_bit_file_has_its_values(tmp_path):
    values = RNG.integers(0, 65536, (8, 12), dtype=np.uint16)
    for kind, image in (("images", values), ("masks", np.zeros((8, 12), np.uint8))):
        (tmp_path / kind).mkdir()
        Image.fromarray(image).save(tmp_path / kind / "a.png")
    rows = SegmentationData(open_dataset(str(tmp_path), "train"), (8, 12), PLAIN)
    torch.testing.assert_close(rows[0][0], unit(values).expand(3, -1, -1))
    (tmp_path / "list.txt").write_text("images/a.png 0\nimages/a.png 1")
    data, _ = open_images(str(tmp_path / "list.txt"), "train")
    sample = LabelledData(data, 8, PLAIN, 0, "none", False)[0][0]
    assert 0.4 < sample.mean() < 0.6  # resized; through 8 bits 99.5 % of it would be white
    assert open_labelled(str(tmp_path / "list.txt"), "train", 8).images.max() <= 1


# --------------------------------------------------------------------------------------------------------- colours


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_shows_white_and_what_is_not_its_colour(mode):
    seen = Image.new("RGBA", (2, 1), (40, 40, 40, 255))
    seen.putpixel((1, 0), (0, 0, 0, 0))
    assert colours(read(seen.convert(mode)))[:, 0].T.tolist() == [[40] * 3, [255] * 3]


@pytest.mark.parametrize("transparency", [1, b"\xff\x00"])
def test_a_palette_with_a_transparent_colour_shows_white_there(transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([200, 10, 20, 0, 0, 0])
    image.putpixel((1, 0), 1)
    assert colours(read(stored(image, "PNG", transparency=transparency)))[:, 0].T.tolist() == [[200, 10, 20], [255] * 3]


def test_a_colour_that_a_png_calls_transparent_shows_white():
    image = Image.new("RGB", (2, 1), (9, 8, 7))
    image.putpixel((1, 0), (0, 0, 0))
    assert colours(read(stored(image, "PNG", transparency=(0, 0, 0))))[:, 0].T.tolist() == [[9, 8, 7], [255] * 3]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX", "RGB"])
def test_other_modes_are_the_colours_that_pillow_sees(mode):
    image = Image.fromarray(RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)).convert(mode)
    assert torch.equal(colours(read(image)).permute(1, 2, 0), torch.from_numpy(np.array(image.convert("RGB"))))


# ------------------------------------------------------------------------------------------------------- direction


ARROW = np.arange(12, dtype=np.uint8).reshape(3, 4)
UPRIGHT = {1: ARROW, 2: ARROW[:, ::-1], 3: ARROW[::-1, ::-1], 4: ARROW[::-1], 5: ARROW.T, 6: np.rot90(ARROW, -1),
           7: ARROW[::-1, ::-1].T, 8: np.rot90(ARROW)}  # fmt: skip


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_turns_an_image_and_the_mask_of_its_stored_pixels_alike(turn, form):
    grey = Image.fromarray(ARROW)
    mask = read(stored(grey, "PNG"))
    image, ids = pair(read(with_turn(grey.convert("RGB"), form, turn)), mask, class_ids(mask), "a mask")
    assert np.array_equal(image[0], UPRIGHT[turn])
    assert np.array_equal(ids, UPRIGHT[turn])


@pytest.mark.parametrize("turn", [5, 6, 7, 8])
def test_a_mask_that_is_upright_already_stays(turn):
    mask = read(Image.fromarray(np.ascontiguousarray(UPRIGHT[turn])))
    image, ids = pair(read(with_turn(Image.fromarray(ARROW), "JPEG", turn)), mask, class_ids(mask), "a mask")
    assert image.shape[-2:] == ids.shape == (4, 3)
    assert np.array_equal(ids, UPRIGHT[turn])


def test_a_mask_with_an_orientation_of_its_own_follows_that():
    mask = read(with_turn(Image.fromarray(ARROW), "PNG", 6))
    _, ids = pair(read(Image.new("RGB", (3, 4))), mask, class_ids(mask), "a mask")
    assert np.array_equal(ids, UPRIGHT[6])


@pytest.mark.parametrize("of", ["upright", "stored"])
def test_boxes_are_in_the_frame_whose_size_the_json_gives(tmp_path, of):
    """The image lies on its side; COCO's entry gives the size of one of the two frames."""
    path = shapes.write(tmp_path, 1, 32, 48)
    with Image.open(path / "images" / "00000.png") as image:
        drawn = image.convert("RGB")
    side = drawn if of == "stored" else drawn.transpose(Image.Transpose.ROTATE_90)  # which orientation 6 undoes
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = 6
    side.save(path / "images" / "00000.png", exif=exif)
    read_instances.cache_clear()
    rows = Detection(read_instances(path / "images", path / "annotations.json", True, "--val"), masks=True)
    image, target = rows[0]
    assert image.shape[-2:] == target["masks"].shape[-2:] == (32, 48)
    assert torch.equal((image * 255).round().byte().permute(1, 2, 0), torch.from_numpy(np.array(drawn)))


def test_a_picture_of_neither_size_is_refused(tmp_path):
    path = shapes.write(tmp_path, 1, 32, 48)
    Image.new("RGB", (30, 30)).save(path / "images" / "00000.png")
    row = {"path": path / "images" / "00000.png", "id": 1, "height": 32, "width": 48, "instances": []}
    data = coco.Instances([row], [], {})
    with pytest.raises(ValueError, match=r"00000.png is 30 x 30 pixels .*its entry says 32 x 48"):
        Detection(data, masks=False)[0]


# --------------------------------------------------------------------------------------------- sizes and torn files


@pytest.fixture
def folder(tmp_path):
    for kind, mode in (("images", "RGB"), ("masks", "L")):
        (tmp_path / kind).mkdir()
        for i in range(3):
            pixels = RNG.integers(0, 3, (16, 24), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(tmp_path / kind / f"{i}.png")
    return tmp_path


def rows_of(path, **more):
    return SegmentationData(open_dataset(str(path), "train"), (16, 24), PLAIN, **more)


def test_a_mask_of_another_size_names_both_files_with_and_without_augmentation(folder):
    Image.new("L", (12, 8)).save(folder / "masks" / "1.png")
    for train in (True, False):
        with pytest.raises(ValueError, match=r"masks/1.png: a mask is 8 x 12 .*images/1.png is 16 x 24"):
            rows_of(folder, train=train)[0, 1]


TORN = {
    "empty": (lambda file: file.write_bytes(b""), r"is empty \(0 bytes\); copy or download it again"),
    "torn": (lambda file: file.write_bytes(file.read_bytes()[:60]), "is not an image that can be read whole"),
    "text": (lambda file: file.write_text("404"), "is not an image .*no format that Pillow knows"),
    "gone": (lambda file: file.unlink(), "cannot be read .*No such file"),
}


@pytest.mark.parametrize("kind", ["images", "masks"])
@pytest.mark.parametrize("how", TORN)
def test_a_file_that_cannot_be_read_is_named(folder, kind, how):
    rows = rows_of(folder)
    change, message = TORN[how]
    change(folder / kind / "2.png")
    with pytest.raises(ValueError, match=rf"{kind}/2.png {message}"):
        rows[2]


def test_a_file_that_cannot_be_read_is_named_by_a_worker_too(folder):
    (folder / "images" / "2.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"images/2.png is not an image that can be read whole"):
        list(DataLoader(rows_of(folder), 1, num_workers=1))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_of_a_parquet_file_is_named_with_its_column(folder, tmp_path, streaming):
    import datasets

    good = (folder / "images" / "0.png").read_bytes()
    images = [{"bytes": good, "path": "0.png"}, {"bytes": good[:60], "path": "1.png"}]
    masks = [{"bytes": (folder / "masks" / "0.png").read_bytes(), "path": None}] * 2
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    datasets.Dataset.from_dict({"image": images, "label": masks}, features=features).to_parquet(tmp_path / "a.parquet")
    data = open_dataset(str(tmp_path / "a.parquet"), "train", streaming=streaming)
    rows = SegmentationData(data, (16, 24), PLAIN, name="--train")
    samples = iter(Stream(rows, 1, endless=False)) if streaming else (rows[i] for i in range(2))
    next(samples)
    with pytest.raises(ValueError, match=r"--train: row 1, column 'image' \(1.png\) is not an image that can be read"):
        next(samples)


def test_a_row_without_its_picture_is_named(folder):
    rows = rows_of(folder)
    rows.data = [{"image": {"bytes": None, "path": None}, "mask": None}]
    with pytest.raises(ValueError, match=r"row 0, column 'image' holds no picture"):
        rows[0]
    rows.data = [{"image": Image.new("RGB", (4, 4)), "mask": None}]
    with pytest.raises(ValueError, match=r"row 0, column 'mask' holds nothing"):
        rows[0]


def test_a_mask_of_fractions_is_refused_and_one_of_whole_floats_is_not():
    whole = np.array([[0, 1], [2, 255]], np.float32)
    assert class_ids(read(Image.fromarray(whole))).tolist() == [[0, 1], [2, 255]]
    with pytest.raises(ValueError, match="a mask holds fractions; store one class id per pixel"):
        class_ids(read(Image.fromarray(whole / 2)))


@pytest.mark.parametrize("mode", ["L", "I;16"])
def test_a_mask_of_classes_is_no_panoptic_map(tmp_path, mode):
    path = shapes.write(tmp_path, 2, 32, 48)
    Image.new(mode, (48, 32)).save(path / "panoptic" / "00001.png")
    read_segments.cache_clear()
    with pytest.raises(ValueError, match=r"00001.png has the mode .*colours of 8 bits .*is it a mask of classes"):
        read_segments(*locate(str(path), None, None, "--val"), "--val")


def test_a_panoptic_map_that_shrinks_after_it_was_checked_is_named(tmp_path):
    path = shapes.write(tmp_path, 2, 32, 48)
    read_segments.cache_clear()
    rows = PanopticData(read_segments(*locate(str(path), None, None, "--val"), "--val"), (32, 48), PLAIN)
    Image.new("RGB", (20, 20)).save(path / "panoptic" / "00001.png")
    with pytest.raises(ValueError, match=r"00001.png is 20 x 20 pixels, its image 32 x 48"):
        rows[1]
