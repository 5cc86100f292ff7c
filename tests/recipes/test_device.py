"""How the loop treats a device: it does not wait for it in a step, feeds it from pinned memory, and may be compiled."""

import sys
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from fake_cuda import Questions, Stalls

import adaptkit
from recipes import batches, classify, depth, devices, engine, prepare, segment, semantic, validation
from recipes.order import Rows

SMALL = ["--backbone", "test_vit", "--random-backbone", "--batch-size", "2", "--save-every", "0"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Four images with masks, of a size that no adapter has to pad."""
    path, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for kind in ("images", "masks"):
        (path / kind).mkdir()
    for i in range(4):
        mask = rng.integers(0, 3, (4, 8), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(np.stack([mask * 80, 255 - mask * 80, mask * 40], -1)).save(path / "images" / f"{i}.png")
        Image.fromarray(mask).save(path / "masks" / f"{i}.png")
    return str(path)


def segmentation(pictures, *more):
    return [*SMALL, "--train", pictures, "--val", pictures, "--num-classes", "3", "--size", "32", "64", *more]


# ---------------------------------------------------------------------------------------------------- a training step


def asked(main, argv, steps, out, monkeypatch):
    """Questions of so many steps, the last of which alone is looked at, without the evaluation behind them."""
    monkeypatch.setattr(engine, "evaluate", lambda task, *rest: {task.score: 0.0})
    with adaptkit.reference(), Stalls(engine.train) as stalls:  # the text, which is what a GPU runs
        main([*argv, "--steps", str(steps), "--out", str(out)])
    return stalls.asked


TASKS = {
    "segment": (segment.main, ["--adapter", "vit-adapter", "--adapter-options", '{"conv_inplane": 8}']),
    "segment, averaged": (segment.main, ["--adapter", "none", "--ema", "0.9", "--accumulate", "2"]),
    "segment, windows": (segment.main, ["--adapter", "sfp", "--crop-features", "16", "32", "--flip-features"]),
    "segment, upernet": (segment.main, ["--adapter", "sfp", "--head", "upernet", "--width", "32"]),
    "classify": (classify.main, ["--train", "digits", "--size", "32", "--adapter", "lora"]),
    "depth": (depth.main, ["--train", "drawn:4", "--val", "drawn:2", "--max-depth", "10", "--bins", "8", "--size", "32", "64", "--adapter", "sfp"]),
}  # fmt: skip


@pytest.mark.parametrize("case", TASKS)
def test_training_asks_the_device_at_its_looks_at_the_loss_alone(case, pictures, tmp_path, monkeypatch):
    main, own = TASKS[case]
    argv = [*(segmentation(pictures) if main is segment.main else SMALL), *own]
    assert asked(main, argv, 5, tmp_path, monkeypatch) == ["__int__", "item"]  # whether it was finite; for the log


def test_a_loss_that_is_read_in_each_step_is_seen(pictures, tmp_path, monkeypatch):
    loss = segment.TASK.loss
    monkeypatch.setitem(segment.TASK.__dict__, "loss", lambda *args: loss(*args) + 0 * loss(*args).item())
    found = asked(segment.main, segmentation(pictures, "--adapter", "none"), 5, tmp_path, monkeypatch)
    assert found == ["item"] * 5 + ["__int__", "item"]


def test_a_loss_that_is_not_finite_is_found_at_the_next_look_and_named(pictures, tmp_path, monkeypatch):
    loss, calls = segment.TASK.loss, []

    def second_is_infinite(*args):
        calls.append(1)
        return loss(*args) * (float("inf") if len(calls) == 2 else 1.0)

    monkeypatch.setitem(segment.TASK.__dict__, "loss", second_is_infinite)
    argv = segmentation(pictures, "--adapter", "none", "--steps", "20", "--out", str(tmp_path))
    with pytest.raises(
        SystemExit, match=r"not finite at step 1: stopped after step 9, and nothing of steps 1\.\.9 was"
    ):
        segment.main(argv)
    assert len(calls) == 10
    assert not (tmp_path / "metrics.jsonl").read_text()
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("look", ["--save-every", "--eval-every"])
def test_nothing_is_saved_or_scored_that_a_loss_without_a_number_has_trained(look, pictures, tmp_path, monkeypatch):
    loss, seen = segment.TASK.loss, []
    monkeypatch.setitem(segment.TASK.__dict__, "loss", lambda *args: loss(*args) * float("nan"))
    monkeypatch.setattr(engine, "evaluate", lambda *args: seen.append("scored"))
    monkeypatch.setattr(engine, "save_checkpoint", lambda *args: seen.append("saved"))
    argv = segmentation(pictures, "--adapter", "none", "--steps", "9", look, "3", "--out", str(tmp_path))
    with pytest.raises(
        SystemExit, match="not finite at step 0: stopped after step 2, .* no checkpoint was written yet"
    ):
        segment.main(argv)
    assert seen == []


SCORES = {
    "classify": (classify, ["--train", "digits", "--num-classes", "10"], (2, 10), (2,)),
    "depth": (depth, ["--train", "drawn:1", "--max-depth", "10"], (2, 1, 4, 6), (2, 1, 4, 6)),
}


@pytest.mark.parametrize("case", SCORES)
def test_a_score_is_read_once_however_many_batches_it_adds_up(case):
    module, argv, prediction, target = SCORES[case]
    asked = []
    for count in (1, 4):
        loaded = [
            (torch.rand(prediction) + 1, torch.randint(3, target) if len(target) == 1 else 3 * torch.rand(target))
            for _ in range(count)
        ]
        task = Namespace(metric=module.metric, predict=lambda model, batch, args: batch, ragged=False)
        there = Namespace(device=torch.device("cpu"), autocast=nullcontext, gather_for_metrics=lambda pair: pair)
        with Questions() as questions:
            validation.evaluate(task, torch.nn.Identity(), loaded, there, module.parse(argv))
        asked.append(questions.asked)
    assert asked[0] == asked[1]


def test_classes_of_an_image_are_masks_of_their_own_and_found_with_one_question():
    mask = torch.full((2, 4, 6), 255)
    mask[0, :2], mask[0, 2:] = 2, 0
    given = {}

    def model(image, **targets):
        given.update(targets)
        return Namespace(loss=torch.ones(1))

    with Questions() as questions:
        semantic.set_loss(model, [torch.zeros(2, 3, 4, 6), mask], Namespace(ignore_index=255, num_classes=3))
    assert questions.asked.count("cpu") == 1
    assert [labels.tolist() for labels in given["class_labels"]] == [[0, 2], []]
    assert torch.equal(given["mask_labels"][0], torch.stack([mask[0] == 0, mask[0] == 2]).float())
    assert given["mask_labels"][1].shape == (0, 4, 6)


# ------------------------------------------------------------------------------------------------------------ batches


class Numbers(Rows):
    def make(self, row):
        return torch.tensor(float(row["n"])), row["n"]


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), ("cpu", False)])
@pytest.mark.parametrize("streaming", [True, False])
def test_batches_for_a_gpu_come_from_pinned_memory_and_workers_end_with_their_pass(
    device, pinned, streaming, monkeypatch
):
    import datasets

    data = datasets.Dataset.from_dict({"n": [0, 1, 2]})
    rows = Numbers(data.to_iterable_dataset(num_shards=2) if streaming else data)
    made, loader = [], batches.DataLoader
    monkeypatch.setattr(batches, "DataLoader", lambda *args, **kwargs: made.append(loader(*args, **kwargs)) or made[-1])
    there = Namespace(
        device=torch.device(device), num_processes=1, process_index=0, non_blocking=True, prepare=lambda x: x
    )
    args = Namespace(batch_size=1, workers=2, streaming=streaming, accumulate=1, steps=2, seed=0, shuffle_buffer=0)
    task = Namespace(collate=None)
    batches.validation_batches(rows, task, there, args)
    batches.training_batches(rows, 0, task, there, args)
    assert [(x.pin_memory, x.persistent_workers, x.num_workers) for x in made] == [(pinned, False, 2)] * 2


def test_copies_to_a_gpu_do_not_wait(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(prepare, "together", lambda kind, **options: seen.update(options) or kind(cpu=True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = Namespace(out=str(tmp_path), mixed_precision="no", accumulate=1, tracker=None, shard=False)
    prepare.start(segment.TASK, args)
    assert seen["dataloader_config"].non_blocking


# ------------------------------------------------------------------------------------------------------------ compile


def weights(out):
    return adaptkit.load(Path(out) / "adapter").tensors


def trained(pictures, out, *more):
    return segment.main(segmentation(pictures, "--adapter", "metaformer", "--adapter-options", '{"width": 8}',
                                     "--head", "linear", "--out", str(out), *more))  # fmt: skip


@pytest.fixture
def graphs(monkeypatch):
    """Compiled graphs run as they are, and are listed: inductor takes its time."""
    found = []

    def backend(graph, inputs, **options):
        found.append(options)
        return graph.forward

    monkeypatch.setattr(devices, "BACKEND", backend)
    torch.compiler.reset()
    yield found
    torch.compiler.reset()


def test_a_compiled_run_trains_what_a_plain_one_trains_under_the_same_names(graphs, pictures, tmp_path):
    argv = ["--steps", "3", "--save-every", "2"]
    trained(pictures, tmp_path / "plain", *argv)
    assert graphs == []
    result = trained(pictures, tmp_path / "compiled", *argv, "--compile", "reduce-overhead")
    assert len(graphs) >= 2  # for training and for evaluation
    assert all(options["mode"] == "reduce-overhead" for options in graphs)
    assert result["miou"] == result["miou_reattached"]
    torch.testing.assert_close(weights(tmp_path / "compiled"), weights(tmp_path / "plain"), atol=1e-6, rtol=1e-5)
    kept = adaptkit.load(tmp_path / "compiled" / "checkpoints" / "step-00000002" / "adapter").tensors
    assert kept.keys() == weights(tmp_path / "plain").keys()


@pytest.mark.full
def test_a_compiled_run_goes_on_where_it_was_killed(graphs, pictures, tmp_path, monkeypatch):
    argv = ["--steps", "4", "--save-every", "2", "--mixed-precision", "bf16", "--ema", "0.9", "--compile"]
    trained(pictures, tmp_path / "whole", *argv)
    loss, calls = segment.TASK.loss, []

    def until(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss(*args)

    with monkeypatch.context() as patch:
        patch.setitem(segment.TASK.__dict__, "loss", until)
        with pytest.raises(KeyboardInterrupt):
            trained(pictures, tmp_path / "cut", *argv)
    trained(pictures, tmp_path / "cut", *argv, "--resume")
    whole = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(tmp_path / "cut").items())


@pytest.mark.parametrize("more", [["--cache-features", "CACHE", "--views", "1"], ["--crop-features", "16", "32"]])
def test_features_that_were_kept_are_trained_on_compiled(graphs, more, pictures, tmp_path):
    more = [str(tmp_path / "cache") if word == "CACHE" else word for word in more]
    result = trained(pictures, tmp_path / "run", "--adapter", "none", "--adapter-options", "{}", "--steps", "2",
                     "--compile", *more)  # fmt: skip
    assert graphs
    assert result["miou"] == result["miou_reattached"]


def test_a_network_around_the_pyramid_is_not_compiled(graphs):
    argv = ["--train", "unused", *SMALL, "--num-classes", "3", "--adapter", "sfp", "--head", "upernet", "--width", "32"]
    model = semantic.build(segment.parse(argv))
    devices.compile_adapted(model, "default")
    compiled = [part for part in model.modules() if part._compiled_call_impl is not None]
    assert compiled == [model.pyramid.model]


@pytest.mark.full
def test_a_run_through_inductor(pictures, tmp_path):
    result = trained(pictures, tmp_path, "--steps", "2", "--compile")
    assert result["miou"] == result["miou_reattached"]
