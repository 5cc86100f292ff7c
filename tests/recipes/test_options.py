"""Options of the recipes: a mistake is said before anything is trained, and a file says how it was scored."""

import argparse
import json

import pytest

from recipes import adavit, batches, depth, names, options, segment
from recipes.optimising import blocks_above

SEGMENT = ["--train", "a.parquet", "--val", "b.parquet", "--num-classes", "3"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--stride", "341", "341"], "stride=.341, 341. is of a window: give slide"),
        (["--slide", "64", "64", "--stride", "96", "96"], "larger than the window"),
        (["--resize", "half"], "--resize half: give the shorter side in pixels, or native"),
        (["--scales", "0"], "give factors above 0"),
        (["--batch-size", "auto", "--scales", "-1"], "give factors above 0"),
    ],
)
def test_ways_of_looking_that_are_none_end_no_run_that_was_trained(more, message):
    with pytest.raises(ValueError, match=message):
        segment.parse([*SEGMENT, *more])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--clip", "0"], "the largest norm of a gradient is above 0"),
        (["--warmup", "500"], "--warmup 500.0: a share of the steps"),
        (["--eval-every", "-1"], "are numbers of steps, or 0"),
        (["--save-every", "-5"], "are numbers of steps, or 0"),
        (["--layer-decay", "0.8"], "--layer-decay has nothing to act on"),
        (["--cache-dtype", "int8"], "--cache-dtype has nothing to act on"),
        (["--expand", "mean"], "--expand has nothing to act on"),
    ],
)
def test_options_that_would_spoil_the_training_or_change_nothing_are_refused(more, message, capsys):
    with pytest.raises(SystemExit):
        segment.parse([*SEGMENT, *more])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("ignored", [0, -1, 255, 7])
def test_the_label_that_is_ignored_is_in_the_file_whatever_its_number(ignored):
    args = segment.parse([*SEGMENT, "--ignore-index", str(ignored)])
    assert names.to_record(args)["labels"]["ignore_index"] == ignored


def test_one_split_is_not_trained_on_and_scored():
    with pytest.raises(ValueError, match="org/set@train is one split.*give --val org/set"):
        options.validation(argparse.Namespace(train="org/set@train", val=None))
    assert options.validation(argparse.Namespace(train="org/set@train", val="org/set@test")) == "org/set@test"
    assert options.validation(argparse.Namespace(train="org/set", val=None)) == "org/set"


@pytest.mark.parametrize("kind", ["crops:", "placed:", ""])
def test_adavit_is_not_scored_on_what_it_was_trained_on(kind, tmp_path):
    rows = depth.rooms(4, seed=0, scale=1000.0)  # some file with images and masks
    path = tmp_path / "train.parquet"
    rows.rename_column("mask", "label").to_parquet(str(path))
    with pytest.raises(ValueError, match="has no splits, and a score on training data says little"):
        adavit.main(["--data", f"{kind}{path}", "--size", "32", "--steps", "1", "--out", str(tmp_path / "out")])


def test_drawn_rooms_can_be_streamed(tmp_path):
    more = ["--size", "32", "48", "--steps", "1", "--batch-size", "2", "--max-depth", "10", "--save-every", "0"]
    result = depth.main(["--train", "drawn:4", "--val", "drawn:2", "--streaming", *more, "--out", str(tmp_path)])
    assert result["rmse"] > 0


class Several:
    """Rows of several sizes."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return index

    @staticmethod
    def collate(rows):
        return rows


def test_with_shards_every_rank_reads_every_image_of_several_sizes():
    args = argparse.Namespace(shard=True, streaming=False, batch_size=2, workers=0)
    accelerator = argparse.Namespace(device=argparse.Namespace(type="cpu"), process_index=1, num_processes=2)
    loader = batches.validation_batches(Several(), argparse.Namespace(collate=None), accelerator, args)
    assert isinstance(loader, batches.OwnShare)
    assert list(loader) == [[0, 1], [2]]


@pytest.mark.parametrize(
    ("name", "part", "above"),
    [
        ("swin_tiny_patch4_window7_224", "layers.3.blocks.1.mlp.fc1.weight", 0),
        ("swin_tiny_patch4_window7_224", "layers.2.blocks.4.norm1.weight", 3),
        ("swin_tiny_patch4_window7_224", "layers.1.downsample.norm.weight", 9),
        ("swin_tiny_patch4_window7_224", "patch_embed.proj.weight", 12),
        ("test_vit", "blocks.4.norm1.weight", 1),
        ("test_vit", "norm.weight", 0),
        ("test_vit", "pos_embed", 6),
    ],
)
def test_blocks_are_counted_from_the_last_of_all_stages(name, part, above):
    import timm

    import adaptkit

    model = adaptkit.attach(
        timm.create_model(name, num_classes=0), *(["metaformer"] if "swin" in name else []), train_backbone=(part,)
    )
    assert list(blocks_above(model).values()) == [above]


def test_an_evaluation_may_leave_out_what_the_training_left_out(tmp_path):
    from recipes import evaluate

    args = evaluate.parse([str(tmp_path), "--data", "boxes.json", "--skip-degenerate"])
    assert args.skip_degenerate
    assert json.dumps(vars(evaluate.parse([str(tmp_path), "--data", "boxes.json"])), default=str)
