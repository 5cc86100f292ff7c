"""Saving is all or nothing, whatever the tensors share, whatever stands in the folder, whatever fails on the way."""

import json
import os
import shutil
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS, randomise

import adaptkit
from adaptkit.hub import file as files
from adaptkit.hub.card import BEGIN, END

NAMES = ("adapter_config.json", "README.md", "adapter_model.safetensors")


def host():
    return HOSTS["timm-vit"].build()


def image():
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def model(head=("linear", {"num_classes": 3}), seed=0):
    made = adaptkit.attach(host(), "sfp", head=head)
    randomise(made.sets, seed)
    return made


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else None


# ---------------------------------------------------------------------------------------------------- all or nothing


class Failing:
    """The ``n``-th call of a function raises, and with ``on`` every later one too."""

    def __init__(self, function, n, on):
        self.function, self.left, self.on = function, n, on

    def __call__(self, *args, **options):
        self.left -= 1
        if self.left == 0 or (self.on and self.left < 0):
            raise OSError(28, "No space left on device")
        return self.function(*args, **options)


STEPS = [
    *[("os.replace", n, on) for n in (1, 2, 3) for on in (False, True)],
    *[("os.fsync", n, False) for n in (1, 2, 3)],
    *[("tempfile.mkstemp", n, False) for n in (1, 2, 3, 4, 5)],
    *[("shutil.copy2", n, False) for n in (1, 2)],
]


@pytest.mark.parametrize("there", [True, False], ids=["over another", "new"])
@pytest.mark.parametrize(("function", "n", "on"), STEPS, ids=[f"{f}-{n}{'-on' if on else ''}" for f, n, on in STEPS])
def test_a_step_that_fails_leaves_the_folder_as_it_was(tmp_path, monkeypatch, function, n, on, there):
    folder = tmp_path / "run"
    if there:
        model(seed=1).save(folder, note="first")
        (folder / "notes.txt").write_text("mine")
    elif function == "shutil.copy2" or n > 3:
        pytest.skip("there is nothing to keep")
    before = content(folder)
    second = model(seed=2)
    owner, name = {"os": os, "tempfile": tempfile, "shutil": shutil}[function.split(".")[0]], function.split(".")[1]
    monkeypatch.setattr(owner, name, Failing(getattr(owner, name), n, on))
    with pytest.raises(OSError, match="No space left"):
        second.save(folder, note="second")
    monkeypatch.undo()
    assert content(folder) == before
    second.save(folder, note="second")
    assert adaptkit.load(folder).header["metadata"] == {"note": "second"}
    assert set(os.listdir(folder)) == {*NAMES, *(["notes.txt"] if there else [])}


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_disk_that_fills_up_leaves_the_folder_as_it_was(tmp_path, monkeypatch, n):
    folder = tmp_path / "run"
    model(seed=1).save(folder)
    before = content(folder)
    opened = Path.open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            raise OSError(28, "No space left on device")

    calls = []

    def open_(path, mode="r", *args, **options):
        file = opened(path, mode, *args, **options)
        calls.append(path) if mode == "wb" else None
        return Full(file) if mode == "wb" and len(calls) == n else file

    monkeypatch.setattr(Path, "open", open_)
    with pytest.raises(OSError, match="No space left"):
        model(seed=2).save(folder)
    monkeypatch.undo()
    assert len(calls) == n
    assert content(folder) == before


class ExtraState(nn.Linear):
    def get_extra_state(self):
        return {"step": 3}

    def set_extra_state(self, state):
        pass

    def forward(self, features):
        return super().forward(features.tokens)


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("graph", torch.eye(3).to_sparse())

    def forward(self, features):
        return features.tokens


@pytest.mark.parametrize(
    ("head", "metadata", "said"),
    [
        (ExtraState(32, 3), {}, "head._extra_state is a dict, and a safetensors file holds tensors only"),
        (Sparse(), {}, "head.graph is a Tensor of torch.float32, torch.sparse_coo"),
        (
            ("linear", {"num_classes": 3}),
            {"recipe": {"model": object()}},
            r"metadata recipe\.model is a builtins\.object",
        ),
    ],
)
@pytest.mark.parametrize("there", [True, False], ids=["over another", "new"])
def test_what_cannot_be_written_is_named_before_the_folder_is_touched(tmp_path, head, metadata, said, there):
    folder = tmp_path / "some" / "run"
    if there:
        model(seed=1).save(folder)
    before = content(folder)
    with pytest.raises(ValueError, match=said):
        adaptkit.attach(host(), "sfp", head=head).save(folder, **metadata)
    assert content(folder) == before
    assert there or not folder.parent.exists()


@pytest.mark.parametrize("tensor", [torch.ones(2, device="meta"), torch.eye(2).to_sparse(), "text", None])
def test_a_tensor_without_plain_values_is_named(tensor):
    with pytest.raises(ValueError, match="^head.bias is a "):
        files.serialised({"head.bias": tensor, "head.weight": torch.ones(2)}, {})


# ----------------------------------------------------------------------------------------------------- shared memory


class SharedConv(nn.Module):
    """Levels that share one convolution, as RetinaNet's head does."""

    def __init__(self):
        super().__init__()
        conv = nn.Conv2d(32, 3, 1)
        self.levels = nn.ModuleList([conv, conv])

    def forward(self, features):
        return sum(level(features.maps[i]).mean() for i, level in enumerate(self.levels))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        self.leave.weight = self.enter.weight

    def forward(self, features):
        return self.leave(self.enter(features.tokens))


class Views(nn.Module):
    """Parameters and buffers that are parts of one memory, lie otherwise in it, or are empty."""

    def __init__(self):
        super().__init__()
        memory = torch.randn(64, 32)
        self.a, self.b = nn.Parameter(memory[:32]), nn.Parameter(memory[16:48].T)
        self.register_buffer("one", torch.ones(1).expand(32))
        self.register_buffer("empty", torch.empty(0, 7))
        self.register_buffer("last", torch.randn(1, 4, 3, 3).to(memory_format=torch.channels_last))
        self.register_buffer("number", torch.tensor(3))

    def forward(self, features):
        return features.tokens @ self.a @ self.b * self.one + self.last.sum() + self.number + self.empty.sum()


@pytest.mark.parametrize("kind", [SharedConv, Tied, Views])
def test_tensors_that_share_memory_save_and_load(tmp_path, kind):
    trained = model(kind()).eval()
    expected = trained(image()).logits
    trained.save(tmp_path)
    again = adaptkit.attach(host(), tmp_path, head=kind())
    assert torch.equal(again(image()).logits, expected)
    assert {k: v.shape for k, v in adaptkit.load(tmp_path).tensors_of("head").items()} == {
        k: v.shape for k, v in trained.head.state_dict().items()
    }


def test_what_is_shared_in_the_module_stays_shared(tmp_path):
    model(SharedConv()).save(tmp_path / "a")
    again = adaptkit.attach(host(), tmp_path / "a", head=SharedConv())
    assert again.head.levels[0].weight is again.head.levels[1].weight
    model(Tied()).save(tmp_path / "b")
    again = adaptkit.attach(host(), tmp_path / "b", head=Tied())
    assert again.head.leave.weight is again.head.enter.weight


def test_saving_leaves_the_tensors_as_they_are(tmp_path):
    made = model(Views())
    before = {k: (v.data_ptr(), v.stride()) for k, v in made.head.state_dict().items()}
    made.save(tmp_path)
    assert {k: (v.data_ptr(), v.stride()) for k, v in made.head.state_dict().items()} == before


# ----------------------------------------------------------------------------------------------------- the README.md


@pytest.mark.parametrize(
    "text", [b"# My project\n", b"", b"---\nlicense: mit\n---\n", b"\xff\xfe not UTF-8", b"a\r\nb"]
)
def test_a_readme_that_is_not_ours_stays_as_it_is(tmp_path, text):
    (tmp_path / "README.md").write_bytes(text)
    model().save(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == text
    assert adaptkit.load(tmp_path).header["adapters"][0]["name"] == "sfp"


def test_a_link_to_a_readme_elsewhere_stays(tmp_path):
    (tmp_path / "elsewhere.md").write_text("# My project")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "README.md").symlink_to(tmp_path / "elsewhere.md")
    model().save(tmp_path / "run")
    assert (tmp_path / "run" / "README.md").is_symlink()
    assert (tmp_path / "elsewhere.md").read_text() == "# My project"


def test_words_around_our_part_are_kept_and_our_part_is_new(tmp_path):
    model().save(tmp_path)
    card = tmp_path / "README.md"
    text = card.read_text().replace("---\n\n" + BEGIN, "---\n\nMine, above.\n\n" + BEGIN)
    text = text.replace("library_name:", "language: en\nlibrary_name:").replace(END, END + "\n\nMine, below.")
    card.write_text(text)
    model(("linear", {"num_classes": 7})).save(tmp_path)
    said = card.read_text()
    assert '"num_classes": 7' in said
    assert '"num_classes": 3' not in said
    assert said.index("language: en") < said.index("Mine, above.") < said.index(BEGIN) < said.index("Mine, below.")


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (lambda text: text.replace("library_name:", "a: b: c\nlibrary_name:"), "is no YAML"),
        (lambda text: "---\njust words\n---\n" + text.partition("---\n\n")[2], "not keys and values"),
        (lambda text: text.replace(END, ""), "not the one that ends it"),
    ],
)
def test_a_card_that_was_broken_by_hand_is_kept_and_the_weights_are_saved(tmp_path, edit, why):
    model().save(tmp_path)
    card = tmp_path / "README.md"
    card.write_text(edit(card.read_text()))
    before = card.read_bytes()
    with pytest.warns(UserWarning, match=f"README.md is kept as it is: .*{why}"):
        model().save(tmp_path, note="second")
    assert card.read_bytes() == before
    assert adaptkit.load(tmp_path).header["metadata"] == {"note": "second"}


def test_results_of_before_are_said_to_stay(tmp_path):
    metrics = {"task": "segmentation", "dataset": "ade20k", "metrics": {"mIoU": np.float32(0.5), "rare": np.nan}}
    model().save(tmp_path, **metrics)
    assert "| ade20k | mIoU | 0.5 |" in (tmp_path / "README.md").read_text()
    assert "rare" not in (tmp_path / "README.md").read_text()
    with pytest.warns(UserWarning, match=r"README\.md reports results of what was there before"):
        model().save(tmp_path)


@pytest.mark.parametrize("metadata", [{"task": ["a"]}, {"metrics": 0.4}, {"metrics": {"a": "b"}}, {"dataset": 3}])
def test_no_metadata_cost_the_weights_for_the_cards_sake(tmp_path, metadata):
    model().save(tmp_path, **metadata)
    assert adaptkit.load(tmp_path).header["metadata"] == metadata


# ---------------------------------------------------------------------------------------------------------- metadata


def test_metadata_survive_load_and_save_and_new_keys_win(tmp_path):
    model().save(tmp_path / "a", classes=("road", "car"), path=Path("data/city"), score=np.float32(0.5))
    first = adaptkit.attach(host(), tmp_path / "a").save(tmp_path / "b")
    assert adaptkit.load(first).header["metadata"] == {"classes": ["road", "car"], "path": "data/city", "score": 0.5}
    second = adaptkit.attach(host(), first).save(tmp_path / "c", score=0.7, note="more")
    assert adaptkit.load(second).header["metadata"] == {
        "classes": ["road", "car"],
        "path": "data/city",
        "score": 0.7,
        "note": "more",
    }


def test_the_file_and_the_config_are_json_in_the_narrow_sense(tmp_path):
    model().save(tmp_path, iou=[0.5, float("nan"), np.inf])

    def refuse(constant):
        raise AssertionError(constant)

    header = json.loads((tmp_path / "adapter_config.json").read_text(), parse_constant=refuse)
    assert header["metadata"] == adaptkit.load(tmp_path).header["metadata"] == {"iou": [0.5, None, None]}


def test_each_set_has_metadata_of_its_own_and_a_swap_brings_those_of_its_file(tmp_path):
    for name in ("a", "b", "c"):
        model().save(tmp_path / name, of=name)
    both = adaptkit.attach(host(), tmp_path / "a")
    both.add_adapter(tmp_path / "b", name="second")
    both.add_adapter("sfp", name="third", head=("linear", {"num_classes": 3}))
    said = {n: adaptkit.load(both.save(tmp_path / "out", name=n)).header["metadata"] for n in both.sets}
    assert said == {"default": {"of": "a"}, "second": {"of": "b"}, "third": {}}
    both.hotswap_adapter(tmp_path / "c", name="second")
    assert adaptkit.load(both.save(tmp_path / "out", name="second")).header["metadata"] == {"of": "c"}
    assert adaptkit.load(both.save(tmp_path / "out", name="default")).header["metadata"] == {"of": "a"}


def test_several_files_in_one_set_bring_their_metadata_together(tmp_path):
    model().save(tmp_path / "a", one=1, both="a")
    adaptkit.attach(host(), ("metaformer", {"width": 8})).save(tmp_path / "b", two=2, both="b")
    together = adaptkit.attach(host(), tmp_path / "a", tmp_path / "b").save(tmp_path / "out")
    assert adaptkit.load(together).header["metadata"] == {"one": 1, "two": 2, "both": "b"}


def test_a_pyramid_keeps_metadata_too(tmp_path):
    def pyramid(*adapters):
        return adaptkit.as_pyramid(adaptkit.attach(host(), *(adapters or ("sfp",))))

    class Network(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.pyramid, self.score = inner, nn.Conv2d(32, 2, 1)

    first = Network(pyramid())
    first.pyramid.save(tmp_path / "a", first, recipe={"network": Path("fcos")})
    second = Network(pyramid())
    second.pyramid.load(tmp_path / "a", second)
    second.pyramid.save(tmp_path / "b", second, more=1)
    assert adaptkit.load(tmp_path / "b").header["metadata"] == {"recipe": {"network": "fcos"}, "more": 1}


# ------------------------------------------------------------------------------------------------------ file and host


def test_another_rule_for_positions_is_a_warning_that_says_both(tmp_path):
    model().save(tmp_path)
    file = adaptkit.load(tmp_path)
    file.header["backbone"]["positions"] = "bicubic"
    with pytest.warns(
        UserWarning, match="as 'bicubic', this backbone .*as 'bicubic antialias': results agree at the native"
    ):
        adaptkit.attach(host(), file, strict=True)


def test_the_same_rule_is_no_warning_in_another_library(tmp_path):
    pytest.importorskip("transformers")
    rules = {name: adaptkit.core.registry.view(HOSTS[name].build()).positions for name in HOSTS}
    assert rules["timm-dinov3"] == rules["hf-dinov3"] == "rope"
    assert rules["timm-dinov2-reg"] == rules["hf-dinov2-reg"] == "bicubic antialias"
    assert rules["timm-eva-post-norm"] == rules["timm-vit"] == "bicubic antialias"
    assert rules["timm-eva02"] == "rope, absolute ones bicubic antialias"
    assert rules["hf-vit"] == "bicubic"


def test_each_file_is_read_once(tmp_path, monkeypatch):
    model().save(tmp_path / "a")
    adaptkit.attach(host(), ("metaformer", {"width": 8})).save(tmp_path / "b")
    opened = []
    real = files.safe_open

    def counted(path, *args, **options):
        opened.append(Path(path).parent.name)
        return real(path, *args, **options)

    monkeypatch.setattr(files, "safe_open", counted)
    both = adaptkit.attach(host(), tmp_path / "a", tmp_path / "b")
    assert opened == ["a", "b"]
    both.add_adapter(tmp_path / "b", name="second")
    both.hotswap_adapter(tmp_path / "b", name="second")
    assert opened == ["a", "b", "b", "b"]


def test_an_attached_file_that_says_nothing_new_warns_of_nothing(tmp_path):
    model().save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*does not read all that")
        adaptkit.attach(host(), tmp_path, strict=True).save(tmp_path)


def test_what_is_merged_or_trained_in_the_backbone_is_not_taken_for_its_own_weights(tmp_path):
    made = adaptkit.attach(host(), "lora", head=("linear", {"num_classes": 3}), train_backbone=("blocks.3",))
    own = made.header()["backbone"]
    randomise(made.sets)
    made.eval().merge_adapter()
    made.save(tmp_path)
    assert made.header()["backbone"] == own
    adaptkit.attach(host(), tmp_path, strict=True)


def test_threads_that_save_leave_one_that_runs_alone(tmp_path):
    """LoRA acts in the very layers that a file describes without it."""
    model = adaptkit.attach(
        HOSTS["timm-vit"].build(), ("lora", {"init_lora_weights": False}), train_backbone=("blocks.3",)
    ).eval()
    x, errors = image(), []
    with torch.no_grad():
        wanted = model(x).tokens

    def save(folder):
        try:
            for _ in range(4):
                model.save(folder)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(tmp_path / str(i),)) for i in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # seconds
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            with torch.no_grad():
                assert torch.equal(model(x).tokens, wanted)
    finally:
        sys.setswitchinterval(interval)
        for thread in threads:
            thread.join()
    assert not errors
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "01")
    assert one == other


def test_what_diverged_is_saved_with_a_warning_that_names_it(tmp_path):
    """Nobody loses what was trained, and nobody learns of it from the error of a later day."""
    model = adaptkit.attach(HOSTS["timm-vit"].build(), "adapter-plus")
    with torch.no_grad():
        next(model.adapters["adapter-plus"].parameters()).fill_(float("nan"))
    with pytest.warns(UserWarning, match=r"adapter-plus\..*: NaN or infinite values are saved"):
        model.save(tmp_path)
    with pytest.raises(ValueError, match="allow_nonfinite=True"):
        adaptkit.load(tmp_path)
    assert adaptkit.load(tmp_path, allow_nonfinite=True).tensors
