"""What the values of a mask mean: numbers, palettes, colours, black and white; each read right or refused by name."""

import json

import numpy as np
import pytest
from PIL import Image

from adaptkit.pictures import read
from recipes import evaluate, names, segment
from recipes.labels import Reading, check_range, palette_of, reading

RGB = [(0, 0, 0), (128, 64, 128), (0, 0, 142)]
HEX = ["#000000", "#804080", "#00008e"]
IDS = np.array([[0, 1, 2, 1], [2, 2, 0, 0]], np.uint8)
SMALL = ["--backbone", "demo", "--adapter", "none", "--batch-size", "2", "--steps", "1",
         "--size", "32", "48", "--save-every", "0"]  # fmt: skip


def coloured(ids=IDS, colours=RGB, mode="RGB"):
    return Image.fromarray(np.array(colours, np.uint8)[ids]).convert(mode)


def paletted(ids=IDS, colours=RGB):
    image = Image.fromarray(ids, "P")
    image.putpalette([v for colour in colours for v in colour])
    return image


def ids(how, image):
    return how.ids(read(image, "m.png")).tolist()


def how(palette=(), found=None, mapping=None, reduce=False, classes=3):
    return reading(mapping or {}, reduce, 255, classes, palette, found)


# ---------------------------------------------------------------------------------------------------------- colours


@pytest.mark.parametrize("image", [coloured(), coloured(mode="RGBA"), paletted(), paletted(2 - IDS, RGB[::-1])])
def test_a_palette_reads_the_colours_that_are_seen_whatever_the_mode(image):
    assert ids(how(HEX), image) == IDS.tolist()
    assert ids(how(["0,0,0", "128, 64, 128", "0 0 142"]), image) == IDS.tolist()
    assert ids(how(mapping=dict(zip(HEX, (0, 1, 2)))), image) == IDS.tolist()


def test_colours_of_the_data_set_read_masks_of_colours_and_leave_numbers_as_they_are():
    assert ids(how(found=[list(c) for c in RGB]), coloured()) == IDS.tolist()
    assert ids(how(found=[list(c) for c in RGB]), Image.fromarray(IDS)) == IDS.tolist()
    assert ids(how(found=[list(c) for c in RGB]), paletted()) == IDS.tolist()
    assert ids(how(found=[[1, 2, 3]] * 3), Image.fromarray(IDS)) == IDS.tolist()  # drawn alike: for the eye


def test_a_palette_whose_numbers_and_colours_say_different_classes_is_refused():
    swapped = paletted(IDS, [RGB[1], RGB[0], RGB[2]])
    with pytest.raises(ValueError, match=r"m.png: entry 0 of the mask's palette has the colour #804080, .* class 1"):
        ids(how(found=[list(c) for c in RGB]), swapped)
    assert ids(how(), swapped) == IDS.tolist()


def test_an_unknown_colour_names_the_file_the_colour_and_the_remedy():
    image = coloured()
    image.putpixel((0, 0), (9, 9, 9))
    for known in (how(HEX), how(found=[list(c) for c in RGB]), how(mapping=dict(zip(HEX, (0, 1, 2))))):
        with pytest.raises(ValueError, match=r"m.png: the mask holds the colour #090909 in 1 pixels.*--label-map"):
            ids(known, image)


def test_colours_without_a_palette_are_an_error_that_lists_them_for_the_command_line():
    with pytest.raises(
        ValueError, match=r"m.png: the mask is colour-coded .*3 colours.*--palette '#000000'.*--label-map"
    ):
        ids(Reading(), coloured())


def test_a_colour_may_be_ignored_and_label_zero_left_out():
    assert ids(how(mapping={HEX[0]: 255, HEX[1]: 0, HEX[2]: 1}), coloured())[0] == [255, 0, 1, 0]
    assert ids(how(HEX, reduce=True, classes=2), coloured())[0] == [255, 0, 1, 0]


def test_three_equal_channels_are_one():
    assert ids(Reading(), Image.fromarray(IDS).convert("RGB")) == IDS.tolist()
    assert ids(Reading(), Image.fromarray(IDS).convert("RGBA")) == IDS.tolist()


@pytest.mark.parametrize("image", [Image.fromarray(IDS > 0), paletted(np.minimum(IDS, 1), [(0, 0, 0), (255,) * 3])])
def test_black_and_white_of_one_bit_is_zero_and_one(image):
    assert ids(Reading(), image) == np.minimum(IDS, 1).tolist()


def test_a_mask_in_jpeg_is_refused(tmp_path):
    Image.fromarray(IDS.repeat(8, 0).repeat(8, 1) * 80).save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"a.jpg: JPEG changes the labels that it stores"):
        Reading().ids(read(tmp_path / "a.jpg"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"palette": HEX[:2]}, "has 2 colours, and there are 3 classes"),
        ({"palette": [HEX[0], HEX[1], HEX[0]]}, "gives the colour #000000 to two classes"),
        ({"palette": HEX, "mapping": {"#000000": 0}}, "maps labels or colours, not both"),
        ({"mapping": {"#000000": 0, "7": 1}}, "maps labels or colours, not both"),
        ({"mapping": {"red": 0}}, "'red' is no label of a mask"),
        ({"mapping": {"256,0,0": 0}}, "'256,0,0' is no label of a mask"),
    ],
)
def test_a_palette_that_cannot_be_meant_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        how(**arguments)


def test_a_palette_is_read_from_a_file(tmp_path):
    (tmp_path / "p.txt").write_text("0,0,0\n128,64,128\n#00008E\n")
    (tmp_path / "p.json").write_text(json.dumps([{"name": "a", "color": list(c)} for c in RGB]))
    assert palette_of([str(tmp_path / "p.txt")]) == palette_of([str(tmp_path / "p.json")]) == HEX
    with pytest.raises(ValueError, match="give colours, '#804080' or"):
        palette_of(["nowhere.txt"])


# ------------------------------------------------------------------------------------------------------ from a folder


def write(path, images):
    for kind in ("images", "masks"):
        (path / kind).mkdir(parents=True)
    for i, mask in enumerate(images):
        Image.new("RGB", mask.size, (60 * i, 90, 20)).save(path / "images" / f"{i}.png")
        mask.save(path / "masks" / f"{i}.png")
    return path


def large(values=IDS):
    return values.repeat(16, 0).repeat(12, 1)


LISTS = {
    "classes.json": json.dumps([{"name": n, "color": list(c)} for n, c in zip("abc", RGB)]),
    "class_dict.csv": "name,r,g,b\n" + "".join(f"{n}, {r}, {g}, {b}\n" for n, (r, g, b) in zip("abc", RGB)),
    "labelmap.txt": "# label:color_rgb:parts:actions\n"
    + "".join(f"{n}:{r},{g},{b}::\n" for n, (r, g, b) in zip("abc", RGB)),
}


@pytest.mark.parametrize("file", LISTS)
def test_colours_that_lie_with_the_data_are_found_and_recorded(tmp_path, file):
    path = write(tmp_path / "set", [coloured(large())])
    (path / file).write_text(LISTS[file])
    args = segment.parse([f"--train={path}", f"--val={path}", *SMALL, "--num-classes", "3", "--augment", "none"])
    rows = segment.data(args, segment.build(args), True)
    assert np.array_equal(rows[0, 0][1], large())
    assert names.to_record(args)["classes"] == ["a", "b", "c"]
    assert names.to_record(args)["palette"] == [list(c) for c in RGB]


def test_a_list_of_another_number_of_classes_is_passed_over(tmp_path):
    path = write(tmp_path / "set", [coloured(large())])
    (path / "class_dict.csv").write_text(LISTS["class_dict.csv"])
    args = segment.parse([f"--train={path}", f"--val={path}", *SMALL, "--num-classes", "2"])
    assert args.named == {}
    with pytest.raises(ValueError, match=r"masks/0.png: the mask is colour-coded"):
        segment.data(args, segment.build(args), True)


@pytest.mark.parametrize("given", [["--palette", *HEX], ["--label-map", json.dumps(dict(zip(HEX, range(3))))]])
def test_an_evaluation_reads_the_colours_as_the_training_did(tmp_path, given):
    """The score of masks of colours is that of the same masks as numbers."""
    colours = write(tmp_path / "colours", [coloured(large()), coloured(large(2 - IDS))])
    numbers = write(tmp_path / "numbers", [Image.fromarray(large()), Image.fromarray(large(2 - IDS))])
    argv = [*SMALL, "--num-classes", "3", "--out"]
    result = segment.main([f"--train={colours}", f"--val={colours}", *argv, str(tmp_path / "run"), *given])
    plain = segment.main([f"--train={numbers}", f"--val={numbers}", *argv, str(tmp_path / "plain")])
    assert result["miou"] == result["miou_reattached"] == plain["miou"]
    assert result["file_sha256"] != plain["file_sha256"]  # it says how its masks were read
    found, same = (
        evaluate.evaluate(evaluate.parse([str(tmp_path / "run" / "adapter"), "--data", str(path), *more]))
        for path, more in ((colours, []), (numbers, ["--label-map", '{"0": 0, "1": 1, "2": 2}']))
    )
    assert found["confusion"] == same["confusion"]
    assert sum(map(sum, found["confusion"])) == 2 * large().size
    with pytest.raises(ValueError, match=r"colours/masks/0.png: the mask is colour-coded"):
        evaluate.evaluate(evaluate.parse([str(tmp_path / "plain" / "adapter"), "--data", str(colours)]))


def test_an_evaluation_of_black_and_white_masks_does_not_score_the_background_alone(tmp_path):
    white = write(tmp_path / "white", [Image.fromarray((large() > 0).astype(np.uint8) * 255)])
    ones = write(tmp_path / "ones", [Image.fromarray((large() > 0).astype(np.uint8))])
    segment.main([f"--train={ones}", f"--val={ones}", *SMALL, "--num-classes", "2", "--out", str(tmp_path / "run")])
    file = str(tmp_path / "run" / "adapter")
    with pytest.raises(ValueError, match="hold 0 and 255 alone"):
        evaluate.evaluate(evaluate.parse([file, "--data", str(white)]))
    mapped = evaluate.evaluate(evaluate.parse([file, "--data", str(white), "--label-map", '{"0": 0, "255": 1}']))
    assert mapped["confusion"] == evaluate.evaluate(evaluate.parse([file, "--data", str(ones)]))["confusion"]


def test_a_model_is_not_told_to_have_more_classes():
    with pytest.raises(
        ValueError, match=r"outside 0\.\.1 .*pass --label-map for the classes of the model, or --ignore"
    ):
        check_range(np.array([[0, 7]]), 2, 255, "--data, row 0", of_model=True)
    with pytest.raises(ValueError, match=r"pass --num-classes 8 or --ignore-index 7"):
        check_range(np.array([[0, 7]]), 2, 255, "--train, row 0")
