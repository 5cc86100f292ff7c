"""Metadata are written as JSON has them; what it cannot say is an error that names the key."""

import dataclasses
import enum
import json
from collections import OrderedDict, namedtuple
from datetime import UTC, date, datetime, timedelta
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch

import adaptkit
from adaptkit.hub.metadata import plain
from adaptkit.hub.repository import push


class Level(enum.Enum):
    LOW = "low"


class Number(enum.IntEnum):
    TWO = 2


class Word(enum.StrEnum):
    ROAD = "road"


@dataclasses.dataclass
class Recipe:
    size: tuple
    where: Path


CONVERTED = [
    (np.float32(0.5), 0.5),
    (np.float64(0.43), 0.43),
    (np.int64(3), 3),
    (np.bool_(True), True),
    (np.str_("road"), "road"),
    (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
    (np.array(7), 7),
    (np.array([Path("a/b"), None], dtype=object), [str(Path("a/b")), None]),
    (np.datetime64("2024-05-01"), "2024-05-01"),
    (torch.tensor(2), 2),
    (torch.tensor([0.5, 0.25], dtype=torch.bfloat16, requires_grad=True), [0.5, 0.25]),
    (torch.nn.Parameter(torch.ones(2)), [1.0, 1.0]),
    (torch.Size([2, 3]), [2, 3]),
    (torch.float16, "float16"),
    (torch.device("cpu"), "cpu"),
    (PurePosixPath("/data/city"), "/data/city"),
    ((1, (2, 3)), [1, [2, 3]]),
    (range(3), [0, 1, 2]),
    ({3, 1, 2}, [1, 2, 3]),
    (frozenset({"b", "a"}), ["a", "b"]),
    (namedtuple("Pair", "a b")(1, 2), [1, 2]),
    (datetime(2024, 5, 1, 12, tzinfo=UTC), "2024-05-01T12:00:00+00:00"),
    (date(2024, 5, 1), "2024-05-01"),
    (timedelta(minutes=2), 120.0),
    (Level.LOW, "low"),
    (Number.TWO, 2),
    (Word.ROAD, "road"),
    (Recipe((3, 4), PurePosixPath("x")), {"size": [3, 4], "where": "x"}),
    (OrderedDict(a=np.float32(1)), {"a": 1.0}),
    ({0: "sky", np.int64(1): "road"}, {"0": "sky", "1": "road"}),
    (float("nan"), None),
    ({"iou": [0.5, np.float32("nan"), float("-inf"), torch.tensor(float("inf"))]}, {"iou": [0.5, None, None, None]}),
    (None, None),
    (True, True),
    ("ö", "ö"),
]


@pytest.mark.parametrize(("given", "said"), CONVERTED, ids=lambda v: type(v).__name__)
def test_a_value_is_written_as_json_has_it(given, said):
    found = plain({"key": given})
    assert found == {"key": said}
    assert type(found["key"]) is type(said)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"recipe": {"steps": [1, object()]}}, r"recipe\.steps\[1\] is a builtins\.object"),
        ({"model": torch.nn.Linear(1, 1)}, r"model is a torch\.nn\.modules\.linear\.Linear"),
        ({"raw": b"bytes"}, "raw is a builtins.bytes"),
        ({"raw": np.bytes_(b"x")}, "raw is a numpy.bytes_"),
        ({"z": 1 + 2j}, "z is a builtins.complex"),
        ({"z": np.array([1j])}, r"z\[0\] is a builtins.complex"),
        ({"z": torch.ones(1, dtype=torch.complex64)}, "z is a torch.complex64 tensor"),
        ({"z": torch.ones(1, device="meta")}, "z is a .* tensor on meta"),
        ({"f": len}, "f is a builtins.builtin_function_or_method"),
        ({"kind": Recipe}, "kind is a builtins.type"),
        ({"sets": {"a": {1: 2, "1": 3}}}, r"sets\.a\.1 is there twice"),
        ({"d": {(1, 2): 3}}, r"d\.\(1, 2\) has the key \(1, 2\)"),
        ({"d": {None: 3}}, r"d\.None has the key None"),
        ({"text": "\ud800"}, "text is no text that UTF-8 can write"),
    ],
)
def test_what_json_cannot_say_is_named(given, where):
    with pytest.raises(ValueError, match=f"^metadata {where}"):
        plain(given)


def test_a_list_inside_itself_is_named():
    endless = [1]
    endless.append({"again": endless})
    with pytest.raises(ValueError, match=r"metadata x\[1\]\.again holds itself"):
        plain({"x": endless})


def test_one_list_under_two_keys_is_written_twice():
    shared = [1, 2]
    assert plain({"a": shared, "b": [shared, shared]}) == {"a": [1, 2], "b": [[1, 2], [1, 2]]}


def test_what_is_given_stays_as_it_is():
    given = {"a": (1, 2), "b": {"c": {3}}}
    plain(given)
    assert given == {"a": (1, 2), "b": {"c": {3}}}


# ------------------------------------------------------------------------------------------------------ names in push


@pytest.mark.parametrize(
    ("name", "meant"), [("licence", "license"), ("data_set", "dataset"), ("Metrics", "metrics"), ("comit_message", "commit_message")]
)  # fmt: skip
def test_a_name_that_nothing_reads_is_refused_with_the_one_that_was_meant(name, meant):
    with pytest.raises(ValueError, match=rf"{name}= is no metadata .*\(did you mean '{meant}'\?\).*extra="):
        push(object(), "you/name", **{name: "x"})


def test_names_of_ones_own_go_into_extra():
    class Model:
        def save(self, folder, **metadata):
            raise RuntimeError(str(metadata))

    with pytest.raises(RuntimeError, match="{'licence': 'x', 'task': 'depth'}"):
        push(Model(), "you/name", extra={"licence": "x"}, task="depth")


def test_what_from_pretrained_opened_is_saved_with_what_the_file_said(tmp_path):
    said = {
        "classes": ["road", "car"],
        "task": "segmentation",
        "recipe": {"model": "x"},
        "mean": [0.1] * 3,
        "std": [0.2] * 3,
    }
    head = ("linear", {"num_classes": 2})
    adaptkit.attach(adaptkit.demo_backbone(pretrained=False), "lora", head=head).save(tmp_path / "a", **said)
    again = adaptkit.from_pretrained(tmp_path / "a", backbone=adaptkit.demo_backbone(pretrained=False))
    assert adaptkit.load(again.save(tmp_path / "b")).header["metadata"] == said
    assert adaptkit.load(again.save(tmp_path / "c", task="depth")).header["metadata"] == {**said, "task": "depth"}
    assert adaptkit.load(tmp_path / "b").header["backbone"]["mean"] == [0.1] * 3
