"""Hostile files: whatever a file says, it loads right or is refused in a typed error, before anything large is made."""

import copy
import json
import os
import random
import resource
import subprocess
import sys
import typing
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from absurd import KINDS, METHODS, host, read, sound, write

import adaptkit
from adaptkit.cli import main
from adaptkit.core.schema import MOST_BYTES, check, check_pattern, read_json

IMAGE = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    return {method: sound(folder / method, method) for method in METHODS}


def attach(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return adaptkit.attach(host(), adaptkit.load(folder))


# -------- absurd headers


@pytest.mark.parametrize(("method", "change"), [k[1:] for k in KINDS], ids=[k[0] for k in KINDS])
def test_an_absurd_header_is_refused_with_the_files_name(files, tmp_path, method, change):
    header, tensors = files[method]
    header = copy.deepcopy(header)
    change(header)
    folder = write(tmp_path / "file", header, tensors)
    with pytest.raises(ValueError) as refused:
        attach(folder)
    assert type(refused.value) is ValueError
    assert str(folder) in str(refused.value)


def all_absurd(folder):
    """In a process of its own: try every kind, and print by how many MiB memory ever grew."""
    saved = {method: sound(folder / method, method) for method in METHODS}
    for method in METHODS:
        attach(folder / method)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for kind, method, change in KINDS:
        header = copy.deepcopy(saved[method][0])
        change(header)
        write(folder / "absurd", header, saved[method][1])
        try:
            attach(folder / "absurd")
        except ValueError:
            continue
        raise AssertionError(f"{kind} was taken")
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)


def test_absurd_headers_are_refused_before_anything_large_is_allocated(tmp_path):
    paths = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    code = "import sys, pathlib, test_hostile; test_hostile.all_absurd(pathlib.Path(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 300


# -------- what is said of it


@pytest.mark.parametrize(
    ("method", "change", "said"),
    [
        ("sfp", lambda h: h.update(format="1"), r"format is '1', expected an integer from 1 to 2"),
        ("sfp", lambda h: h.update(head=7), r"header\.head: found 7, expected an object.* or null"),
        ("sfp", lambda h: h.pop("adapters"), r"header: found no field 'adapters', expected format, "),
        ("sfp", lambda h: h["backbone"]["spec"].update(depth="4"), r'spec\.depth: found "4", expected an integer'),
        (
            "vit-adapter",
            lambda h: h["adapters"][0]["config"].update(conv_inplane=96),
            r"adapter 'vit-adapter': \S+ has shape .*, this model needs",
        ),
        (
            "vit-adapter",
            lambda h: h["adapters"][0]["config"].update(extra_extractors=10**4),
            r"adapter 'vit-adapter': its config makes more layers than the file's \d+ tensors are for",
        ),
        (
            "lora",
            lambda h: h["adapters"][0]["config"]["options"].update(target_modules="(a+)+b"),
            r"target_modules: found the regular expression .*expected one of.*LoraConfig\(target_modules=\.\.\.\)",
        ),
        ("lora", lambda h: h["adapters"][0]["config"]["options"].update(r=60000), r"makes more values than the file's"),
    ],
)
def test_a_refusal_names_field_found_and_expected(files, tmp_path, method, change, said):
    header, tensors = files[method]
    header = copy.deepcopy(header)
    change(header)
    with pytest.raises(ValueError, match=said):
        attach(write(tmp_path / "file", header, tensors))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 10**6, "more than 64 levels deep"),
        ('{"a":' * 10**5, "more than 64 levels deep"),
        ("[" + "[]," * 10**6 + "[]]", "lists and objects"),
        ('{"a": "' + "x" * MOST_BYTES + '"}', "characters, expected at most"),
        ('{"format": 1, "format": 2}', "'format' is there twice"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ('{"a": 1e999}', "too large for 64 bits"),
        ('{"a": ' + "9" * 400 + "}", "too large for 64 bits"),
        ('{"a": ' + "9" * 5000 + "}", "damaged"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
        ("[]", "found a list of 0, expected an object"),
        ("", "Expecting value"),
        ('"' + '\\"' * 10**5, "Unterminated string"),
    ],
    ids=lambda v: v[:20],
)
def test_json_is_bounded_before_it_is_parsed(tmp_path, text, said):
    with pytest.raises(ValueError, match=said):
        read_json(text, "here")
    with pytest.raises(ValueError, match=said):
        adaptkit.load(write(tmp_path / "file", text, {"sfp.a": torch.ones(1)}))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (typing.Dict, {"a": [1]}), (typing.List, [1]), (tuple, [1, "a"]), (Path, "here"), (Path | None, 5), (float, 1),  # noqa: UP006
        (dict[str, tuple[int, ...]], {"a": [1, 2]}), (int | None, None), (typing.Any, object()),
    ],
)  # fmt: skip
def test_what_json_has_and_an_annotation_allows_is_taken(kind, value):
    check(value, kind, "here")


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        (int, True, "here: found true, expected an integer"),
        (bool, 1, "here: found 1, expected true or false"),
        (int, 1.0, "here: found 1.0, expected an integer"),
        (float, "1", 'here: found "1", expected a number'),
        (int | None, "a", 'here: found "a", expected an integer or null'),
        (typing.Literal["a", 1], True, "here: found true, expected 'a' or 1"),
        (dict[str, tuple[int, ...]], {"a": [1, "b"]}, r'here\.a\[1\]: found "b", expected an integer'),
        (tuple[int, int], [1], "here: found a list of 1, expected a list of 2"),
        (str, "x" * 5000, r"here: found .*\.\.\. \(5002 characters\), expected a text"),
    ],
)
def test_another_value_is_refused_by_its_place(kind, value, said):
    with pytest.raises(ValueError, match=f"^{said}$"):
        check(value, kind, "here")


def test_brackets_in_a_text_are_no_levels():
    assert read_json(json.dumps({"a": "[" * 1000 + '"\\'}), "here") == {"a": "[" * 1000 + '"\\'}


@pytest.mark.parametrize(
    "pattern", [r".*\.(q_proj|v_proj)", r"blocks\.\d+\.attn\.qkv", r"^blocks\.[0-9]+\.mlp.*(?:1|2)$"]
)
def test_a_plain_pattern_of_a_file_is_taken(pattern):
    check_pattern(pattern, "target_modules")


def test_a_pattern_that_a_file_may_not_say_is_taken_from_the_user(files, tmp_path):
    from peft import LoraConfig

    pattern = r"((blocks)\.\d+\.attn\.qkv)+"
    config = LoraConfig(r=2, target_modules=pattern)
    folder = adaptkit.attach(host(), config).save(tmp_path / "own")
    with pytest.raises(ValueError, match="regular expression"):
        adaptkit.attach(host(), folder)
    model = adaptkit.attach(host(), LoraConfig(r=2, target_modules=pattern))
    model.load_adapter_state_dict(adaptkit.load(folder).tensors)
    assert set(model.adapter_state_dict()) == set(adaptkit.load(folder).tensors)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_an_error_unless_asked_for(files, tmp_path, value):
    header, tensors = files["sfp"]
    tensors = {k: v.clone() for k, v in tensors.items()}
    tensors["sfp.outputs.2.0.weight"].view(-1)[5] = value
    folder = write(tmp_path / "file", header, tensors)
    with pytest.raises(ValueError, match=r"sfp\.outputs\.2\.0\.weight holds 1 values .*allow_nonfinite=True"):
        adaptkit.load(folder)
    file = adaptkit.load(folder, allow_nonfinite=True)
    assert not file.tensors["sfp.outputs.2.0.weight"].isfinite().all()


def test_a_sum_that_overflows_is_not_taken_for_weights_that_do(files, tmp_path):
    header, tensors = files["sfp"]
    large = {k: torch.full_like(v, 6e4).half() if v.is_floating_point() else v for k, v in tensors.items()}
    assert adaptkit.load(write(tmp_path / "file", header, large)).tensors["sfp.outputs.2.0.weight"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fn, torch.int64])
def test_a_tensor_of_another_kind_of_number_is_not_cast(files, tmp_path, dtype):
    header, tensors = files["sfp"]
    changed = {**tensors, "sfp.outputs.2.0.weight": tensors["sfp.outputs.2.0.weight"].to(dtype)}
    with pytest.raises(ValueError, match=rf"outputs\.2\.0\.weight has {dtype}, this model needs torch\.float32"):
        attach(write(tmp_path / "file", header, changed))
    changed = {**tensors, "head.norm.num_batches_tracked": tensors["head.norm.num_batches_tracked"].float()}
    with pytest.raises(ValueError, match="num_batches_tracked has torch.float32, this model needs torch.int64"):
        attach(write(tmp_path / "other", header, changed))


def test_one_floating_point_type_stands_for_another(files, tmp_path):
    header, tensors = files["sfp"]
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in tensors.items()}
    model = attach(write(tmp_path / "file", header, half))
    loaded = model.adapter_state_dict()["sfp.outputs.2.0.weight"]
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, half["sfp.outputs.2.0.weight"].float())


@pytest.mark.parametrize(
    "config",
    [
        "{", "[]", "[" * 10**5, '{"peft_type": []}', '{"peft_type": "LORA", "r": 1000000000}',
        '{"peft_type": "LORA", "r": "2"}', '{"peft_type": "LORA", "target_modules": {"a": 1}}',
        '{"peft_type": "LORA", "lora_alpha": null, "rank_pattern": {"qkv": 1e9}}', '{"peft_type": "NO_SUCH"}',
        '{"peft_type": "LORA", "base_model_name_or_path": 5}', '{"peft_type": "LORA", "target_modules": "(a+)+b"}',
        '{"peft_type": "LOKR", "decompose_factor": "x"}', '{"peft_type": "LORA", "no_such": 1}',
    ],
)  # fmt: skip
def test_a_hostile_config_of_peft_is_refused_with_its_folder(tmp_path, config):
    from safetensors.torch import save_file

    save_file({"base_model.model.blocks.0.attn.qkv.lora_A.weight": torch.ones(2, 32)}, tmp_path / WEIGHTS)
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(ValueError) as refused:
        attach(tmp_path)
    assert str(tmp_path) in str(refused.value)


def test_a_plug_ins_config_is_refused_with_the_files_name(tmp_path, monkeypatch):
    import dataclasses

    from adaptkit.adapters.sfp import SimpleFeaturePyramid
    from adaptkit.core import registry

    @dataclasses.dataclass(frozen=True)
    class Config:
        strides: tuple[int, ...] = (4, 8, 16, 32)
        path: Path = Path()

        def __post_init__(self):
            object.__setattr__(self, "path", Path(self.path))

    monkeypatch.setitem(registry.adapters(), "plug-in", registry.Entry("plug-in", SimpleFeaturePyramid, Config))
    header, tensors = sound(tmp_path / "sfp", "sfp")
    tensors = {k.replace("sfp.", "plug-in.", 1): v for k, v in tensors.items()}
    header["adapters"] = [{"name": "plug-in", "config": {"path": "here"}}]
    assert "plug-in" in attach(write(tmp_path / "file", header, tensors)).adapters
    header["adapters"][0]["config"] = {"path": 5}
    with pytest.raises(ValueError, match=r"file.*adapter 'plug-in': cannot be built as the header says: TypeError"):
        attach(write(tmp_path / "file", header, tensors))


# -------- a fuzzer


def damaged(data, rng):
    """Flip bits, cut, double or insert bytes; half of the time in the header."""
    data = bytearray(data)
    end = min(len(data), 8 + int.from_bytes(data[:8], "little")) if rng.random() < 0.7 else len(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        at = rng.randrange(end)
        what = rng.random()
        if what < 0.6:
            data[at] = rng.randrange(256)
        elif what < 0.7:
            data[at : at + 1] = b'"[]{}:,0-9e'[rng.randrange(11)].to_bytes(1, "little")
        elif what < 0.8:
            del data[at : at + rng.choice((1, 4, 1000))]
        elif what < 0.9:
            data[at:at] = data[at : at + rng.choice((1, 4, 100))]
        else:
            del data[rng.randrange(len(data)) :]
            break
        end = min(end, len(data))
        if not end:
            break
    return bytes(data)


VALUES = [
    None, True, False, 0, 1, -1, 2, 2**31, 2**63, 2**70, 10**9, -(10**9), 0.5, -0.5, 1e-320, 1e308, "", "x", "\u0000", "é" * 9,
    [], {}, [[]], [1, 2], [None], ["a"], {"a": 1}, {"": {}}, [[0, 10**9]], "(a+)+$", "../../etc/passwd", "x" * 10**5,
]  # fmt: skip


def places(value, path=()):
    """Every place in a value, outermost first."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def retyped(header, rng):
    """Change, remove, rename or swap fields of a header."""
    header = copy.deepcopy(header)
    short = {**header, "backbone": {**header["backbone"], "digest": {}, "sums": {}}}  # else nearly all are in these
    where = [p for p in places(short if rng.random() < 0.9 else header) if p]
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        *outer, last = rng.choice(where)
        inside = header
        try:
            for key in outer:
                inside = inside[key]
            match rng.randrange(6):
                case 0 | 1 | 2:
                    inside[last] = copy.deepcopy(rng.choice(VALUES))
                case 3:
                    del inside[last]
                case 4:
                    inside[rng.choice(("name", "config", "head", "r", "depths", "é"))] = inside.pop(last)
                case 5:
                    other = rng.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
                    inside[last], inside[other] = inside[other], inside[last]
        except (AttributeError, KeyError, IndexError, TypeError):  # an earlier change took it away
            continue
    return header


def rewritten(text, rng):
    """What JSON can be made to say."""
    at = rng.choice([i for i, c in enumerate(text) if c in ":,"]) + 1
    odd = rng.choice(
        ["NaN", "-Infinity", "1e999", "[" * 10**4, '"\\ud800"', "9" * 5000, '{"a":' * 200, '"format":1,', "//"]
    )
    return text[:at] + odd + ("" if rng.random() < 0.5 else ",") + text[at:]


DTYPES = [
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.int64,
    torch.bool,
    torch.float8_e4m3fn,
    torch.complex64,
]


def other_tensors(tensors, rng):
    tensors = dict(tensors)
    for _ in range(rng.choice((1, 1, 3))):
        key = rng.choice(sorted(tensors))
        tensor = tensors[key]
        match rng.randrange(7):
            case 0:
                tensors[key] = tensor.to(rng.choice(DTYPES))
            case 1:
                tensors[key] = torch.zeros([rng.choice((0, 1, n, n + 1)) for n in tensor.shape], dtype=tensor.dtype)
            case 2:
                tensors[key] = tensor.unsqueeze(0)
            case 3:
                tensors[rng.choice(("x", "sfp.x", "head.", "", "backbone.norm.weight"))] = tensors.pop(key)
            case 4 if tensor.is_floating_point() and tensor.numel():
                odd = tensor.clone()
                odd.view(-1)[rng.randrange(odd.numel())] = rng.choice((float("nan"), float("inf")))
                tensors[key] = odd
            case 5:
                other = rng.choice(sorted(tensors))
                tensors[key], tensors[other] = tensors[other], tensor
            case _:
                if len(tensors) > 1:
                    del tensors[key]
    return tensors


def fuzz(files, folder, seeds):
    """Write a mutated file for each seed and use it; returns how often what came of it."""
    images = {}
    outcomes = dict.fromkeys(("refused", "the same", "other weights or options"), 0)
    for seed in seeds:
        rng = random.Random(seed)
        method = rng.choice(sorted(files))
        header, tensors = files[method]
        match rng.randrange(5):
            case 0:
                data = write(folder / "file", header, tensors) / WEIGHTS
                data.write_bytes(damaged(data.read_bytes(), rng))
            case 1 | 2:
                write(folder / "file", retyped(header, rng), tensors)
            case 3:
                write(folder / "file", rewritten(json.dumps(header), rng), tensors)
            case 4:
                write(folder / "file", header, other_tensors(tensors, rng))
        try:
            model = attach(folder / "file")
        except ValueError as error:
            assert type(error) is ValueError, (seed, error)  # noqa: PT017
            assert str(folder / "file") in str(error), (seed, error)  # noqa: PT017
            outcomes["refused"] += 1
            continue
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error
        with torch.no_grad():
            out = model.eval()(IMAGE)
            if method not in images:
                images[method] = attach(write(folder / "sound", header, tensors)).eval()(IMAGE)
        right = images[method]
        assert [m.shape for m in out.maps] == [m.shape for m in right.maps] or out.maps != right.maps, seed
        assert out.tokens.shape == right.tokens.shape, seed
        same_header, same_tensors = read(folder / "file")
        unchanged = same_header["adapters"] == header["adapters"] and same_header["head"] == header["head"]
        unchanged &= same_tensors.keys() == tensors.keys()  # a layer of LoRA may be called otherwise and mean the same
        if unchanged and all(torch.equal(same_tensors[k], tensors[k]) for k in tensors):
            assert torch.equal(out.tokens, right.tokens), seed
            assert all(torch.equal(a, b) for a, b in zip(out.maps, right.maps, strict=True)), seed
            outcomes["the same"] += 1
        else:
            outcomes["other weights or options"] += 1
    return outcomes


@pytest.mark.parametrize("count", [100, pytest.param(10_000, marks=pytest.mark.full)])
def test_a_mutated_file_is_refused_or_loads_right(files, tmp_path, count):
    outcomes = fuzz(files, tmp_path, range(count))
    assert sum(outcomes.values()) == count
    assert outcomes["refused"] > count // 2
    assert outcomes["the same"] + outcomes["other weights or options"] > 0


def test_inspect_refuses_in_one_line(files, tmp_path, capsys):
    header, tensors = files["sfp"]
    write(tmp_path / "file", {**header, "backbone": None}, tensors)
    assert main(["inspect", str(tmp_path / "file")]) == 2
    assert "header.backbone: found null, expected an object" in capsys.readouterr().err
