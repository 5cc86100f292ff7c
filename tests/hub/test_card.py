"""The card says what the header says, in YAML that the Hub's own client reads."""

import random
import re
import sys
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from families import HOSTS
from fuzz_cards import TEXTS, metadata, readme

import adaptkit
import adaptkit.hub.card as card_module
from adaptkit.core.hierarchical import HierarchicalSpec
from adaptkit.core.printable import printable
from adaptkit.hub.card import BEGIN, END, check_metadata, is_hub_id, merged, model_card

ModelCard = pytest.importorskip("huggingface_hub").ModelCard


@pytest.fixture(scope="module")
def header():
    model = adaptkit.attach(HOSTS["timm-vit"].build(), "sfp", head=("linear", {"num_classes": 3}))
    found = model.header()
    found["backbone"].update(source="timm/vit_base_patch14_dinov2.lvd142m", mean=[0.5] * 3, std=[0.5] * 3)
    return found


def card(header, repo_id="acme/segmenter", **metadata):
    return model_card({**header, "metadata": metadata}, repo_id)


def test_the_front_matter_links_adapter_and_backbone(header):
    data = ModelCard(card(header, task="semantic-segmentation", license="apache-2.0")).data.to_dict()
    assert data == {
        "library_name": "adaptkit",
        "base_model": "timm/vit_base_patch14_dinov2.lvd142m",
        "base_model_relation": "adapter",
        "pipeline_tag": "image-segmentation",
        "tags": ["adaptkit", "sfp", "base_model:adapter:timm/vit_base_patch14_dinov2.lvd142m"],
        "license": "apache-2.0",
    }


def test_results_are_a_model_index_that_the_client_reads(header):
    said = card(header, task="segmentation", dataset="ade20k", metrics={"mIoU": 0.43, "accuracy": 1})
    results = ModelCard(said).data.eval_results
    assert [(r.task_type, r.dataset_name, r.metric_type, r.metric_value) for r in results] == [
        ("image-segmentation", "ade20k", "mIoU", 0.43),
        ("image-segmentation", "ade20k", "accuracy", 1.0),
    ]
    assert ModelCard(said).data.model_name == "acme/segmenter"
    assert "| ade20k | mIoU | 0.43 |" in said


def test_results_on_several_data_sets(header):
    said = card(header, task="depth", metrics={"nyu": {"rmse": 0.4}, "kitti": {"rmse": 2.5}})
    assert {(r.dataset_type, r.metric_value) for r in ModelCard(said).data.eval_results} == {
        ("nyu", 0.4),
        ("kitti", 2.5),
    }
    assert ModelCard(said).data.datasets == ["nyu", "kitti"]


@pytest.mark.parametrize("nasty", ["yes", "a: b", "- x", "'", '"', "#c", "{x}", "é\n---\n", "*", "null", "1.0"])
def test_the_yaml_is_valid_whatever_the_names_are(header, nasty):
    said = card(header, license="other", license_name=nasty, license_link=nasty, datasets=[nasty])
    data = ModelCard(said).data.to_dict()
    assert (data["license_name"], data["license_link"], data["datasets"]) == (nasty, nasty, [nasty])


@pytest.mark.parametrize("source", ["", "/data/dinov2", "vit_tiny_patch16_224.augreg", "a/b/c", "./x"])
def test_a_backbone_that_is_not_on_the_hub_is_not_linked(header, source):
    data = ModelCard(card({**header, "backbone": {**header["backbone"], "source": source}})).data.to_dict()
    assert "base_model" not in data
    assert data["tags"] == ["adaptkit", "sfp"]


def test_a_folder_that_exists_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("runs/city")
    (tmp_path / "runs" / "city").mkdir(parents=True)
    assert not is_hub_id("runs/city")
    assert not any(is_hub_id(x) for x in ("city", "a/b/c", "/abs", "~/x", "../x", "hf-hub:a/b", Path("acme/x"), None))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            {"task": "segmenting"},
            "task='segmenting' is none that the Hub knows .*; choose one of .*semantic-segmentation",
        ),
        ({"license": "other"}, "license='other' needs license_name="),
        ({"metrics": {"mIoU": 0.4}, "task": "depth"}, "give task= and dataset= beside metrics"),
        ({"metrics": {"mIoU": 0.4}, "dataset": "x"}, "give task= and dataset= beside metrics"),
        ({"metrics": {"mIoU": 0.4}, "task": "depth", "datasets": ["x", "y"]}, "for several data sets"),
        ({"metrics": 0.4, "task": "depth", "dataset": "x"}, r"metrics=0\.4 is no dict of values"),
    ],
)
def test_metadata_that_no_card_could_say_is_a_clear_error(metadata, message):
    with pytest.raises(ValueError, match=message):
        check_metadata(metadata)


def test_saving_never_fails_for_the_cards_sake(header):
    data = ModelCard(card(header, task="segmenting", metrics={"mIoU": 0.4})).data.to_dict()
    assert "pipeline_tag" not in data
    assert "model-index" not in data


def test_a_hierarchical_host_and_a_head_of_ones_own_have_a_snippet_too(header):
    spec = HierarchicalSpec("timm-swin", (8, 16), (2, 2), (4, 8))._asdict()
    said = card(
        {**header, "backbone": {**header["backbone"], "spec": spec}, "head": {"name": None, "class": "my.Head"}}
    )
    code = re.search(r"```python\n(.*?)```", said, re.DOTALL)[1]
    compile(code, "card", "exec")
    assert "head = ...  # the my.Head" in code
    assert 'adaptkit.from_pretrained("acme/segmenter", head=head)' in code


def test_a_backbone_without_a_name_is_asked_for(header):
    said = card({**header, "backbone": {**header["backbone"], "source": ""}})
    assert 'adaptkit.attach(backbone, "acme/segmenter")' in said


EDITED = f"""---
language: en
license: mit
tags: [roads, adaptkit]
base_model: someone/else
---
Written by hand.

{BEGIN}
old
{END}

Below, too.
"""


def test_what_a_person_wrote_stays_when_the_card_is_written_again(header):
    said = merged(card(header, task="segmentation"), EDITED)
    data = ModelCard(said).data.to_dict()
    assert data["language"] == "en"
    assert data["license"] == "mit"
    assert data["base_model"] == "timm/vit_base_patch14_dinov2.lvd142m"
    assert data["tags"] == ["roads", "adaptkit", "sfp", "base_model:adapter:timm/vit_base_patch14_dinov2.lvd142m"]
    text = ModelCard(said).text
    assert text.strip().startswith("Written by hand.")
    assert text.rstrip().endswith("Below, too.")
    assert "\nold\n" not in text
    assert text.count(BEGIN) == text.count(END) == 1


@pytest.mark.parametrize("old", ["", "no front matter at all\n", "---\n---\nonly text\n", "---\nlicense: mit\n---"])
def test_a_card_without_the_marks_keeps_all_its_text(header, old):
    said = merged(card(header), old)
    assert old.partition("---\n---\n")[2] in said
    assert ("no front matter at all" in said) == ("no front" in old)
    assert ModelCard(said).data.to_dict().get("license") == ("mit" if "mit" in old else None)
    assert said.count(BEGIN) == 1


def test_the_same_card_again_changes_nothing(header):
    once = merged(card(header), EDITED)
    assert merged(card(header), once) == once
    assert merged(card(header), card(header)) == card(header)


@pytest.mark.parametrize("front", ["a: b: c", "just words"])
def test_front_matter_that_is_broken_is_a_clear_error(header, front):
    with pytest.raises(ValueError, match=r"front matter of the README\.md that is there is (?s:.*)Mend it"):
        merged(card(header), f"---\n{front}\n---\n")


# ------------------------------------------------------------------------------------------ whatever the world has in it


OURS = (
    "is none that the Hub knows|license_name=|give metrics=|give task=|"
    r"front matter of the README\.md that is there is|has the mark"
)


def in_our_words(call, *args):
    """What it returns, or a ``ValueError`` that says what to do; any other error is raised."""
    try:
        return call(*args)
    except ValueError as error:
        return error if re.search(OURS, str(error)) else pytest.fail(f"{error}")


def survives(header, seed):
    """One random header and README.md: a valid card, and a merge that is refused in our words or stable."""
    g = random.Random(seed)
    backbone = {**header["backbone"], "source": g.choice(["timm/vit", *TEXTS]), "class": g.choice(["a.B", *TEXTS])}
    adapter = {"name": g.choice(["sfp", *TEXTS]), "config": {g.choice(TEXTS): g.choice(TEXTS)}}
    said = {**header, "backbone": backbone, "adapters": [adapter], "metadata": metadata(g)}
    in_our_words(check_metadata, said["metadata"])
    card, old = model_card(said, g.choice(["acme/x", ""])), readme(g)
    front, text = card_module._split(card)
    assert front["library_name"] == "adaptkit"
    assert text.count(BEGIN) == text.count(END) == 1
    once = in_our_words(merged, card, old)
    if isinstance(once, ValueError):
        return False
    assert once.encode().decode() == once
    assert merged(card, once) == once
    assert set(card_module._split(old)[0]) <= set(card_module._split(once)[0])
    return True


@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.full) for n in range(300, 9000, 300))])
def test_cards_survive_any_metadata_and_any_front_matter(header, first):
    merges = [survives(header, seed) for seed in range(first, first + 300)]
    assert 100 < sum(merges) < 300


@pytest.mark.parametrize("text", ["\x1b[31m", "\u202e", "\ud800", "a\nb", "\x85", "\u2028"])
def test_what_acts_on_a_terminal_or_a_page_is_written_out(header, text):
    backbone = {**header["backbone"], "source": f"<b>|{text}`"}
    said = card({**header, "backbone": backbone}, task="depth", metrics={f"{text}<b>|": {"x": 1.0}})
    title = next(line for line in said.splitlines() if line.startswith("# "))
    assert printable(text).isascii() == (not text.isprintable())
    assert title == f"# sfp for &lt;b>\\|{printable(text)}'"
    assert f"| {printable(text)}&lt;b>\\| | x | 1.0 |" in said


@pytest.mark.parametrize("text", ["é", "漢字", "e\u0301", "a b", "\\x"])
def test_letters_of_every_language_stay(text):
    assert printable(text) == text
