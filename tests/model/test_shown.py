"""Model, features and file show themselves in about ten lines, and in a notebook."""

import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS
from fits import hierarchical

import adaptkit
from adaptkit.core.shown import as_html, as_text

HEAD = ("fpn", {"num_classes": 4})


def model(*adapters, **options):
    torch.manual_seed(0)
    return adaptkit.attach(HOSTS["timm-vit"].build(), *(adapters or ("vit-adapter",)), **options)


def test_a_model_says_what_is_frozen_what_is_trained_and_by_what():
    shown = model(("vit-adapter", {"injector": False}), head=HEAD)
    said = repr(shown)
    frozen = sum(p.numel() for p in shown.backbone.parameters())
    trained = sum(p.numel() for n, p in shown.named_parameters() if not n.startswith("backbone."))
    assert said.startswith("AdaptedModel on VisionTransformer\n")
    for fact in (f"{frozen:,} parameters", f"{trained:,} parameters", "4 blocks of width 32", "injector=False",
                 "fpn: num_classes=4", "4, 8, 16, 32", "mode      training"):  # fmt: skip
        assert fact in said
    assert len(said.splitlines()) <= 12


def test_every_module_is_still_to_be_had():
    assert "(spm): SpatialPrior(" in nn.Module.__repr__(model())
    assert "(blocks): Sequential(" in repr(model().backbone)


@pytest.mark.parametrize("name", ["timm-vit", "hf-dinov2"])
def test_every_kind_of_backbone_is_shown(name):
    assert "4 blocks of width 32" in repr(adaptkit.attach(HOSTS[name].build(), "metaformer"))


def test_a_backbone_with_stages_is_shown():
    said = [repr(adaptkit.attach(host, "lora", target_modules="all-linear")) for host in hierarchical()]
    assert all("16, 24, 32, 64" in one for one in (said[0], said[2])), said
    assert "16, 32, 64, 128" in said[1]


def test_sets_modes_and_parts_of_the_backbone_are_shown():
    shown = model("lora", name="first", train_backbone=("norm",))
    shown.add_adapter("sfp", name="second")
    said = repr(shown.eval())
    assert "first (active), second" in said
    assert "of the backbone: norm" in said
    assert "mode         evaluation" in said
    shown.set_adapter("second")
    assert "sfp: defaults" in repr(shown)
    with shown.disable_adapter():
        assert "adapters disabled" in repr(shown)
    shown.delete_adapter("first")
    shown.delete_adapter("second")
    assert "all were deleted" in repr(shown)
    shown.detach()
    assert repr(shown).startswith("AdaptedModel (detached)")


def test_it_is_short_inside_another_module_too():
    assert len(repr(nn.Sequential(model())).splitlines()) <= 14


def test_features_show_shapes_and_no_values():
    said = repr(model(head=HEAD)(torch.randn(2, 3, 40, 48)))
    assert said.startswith("Features of images of 40 x 48 pixels, 5 x 6 patches\n")
    assert "2 x 30 x 32, float32, cpu" in said
    assert "2 x 4 x 40 x 48" in said
    assert "tensor(" not in said
    assert len(said.splitlines()) <= 8


def test_a_file_says_what_it_holds(tmp_path):
    said = repr(adaptkit.load(model(head=HEAD).save(tmp_path / "run", note="<b>mine</b>\x1b[31m")))
    for fact in (
        f"AdapterFile {tmp_path / 'run'}",
        "adapter vit-adapter",
        "head fpn",
        '"num_classes": 4',
        "patch_size=8",
    ):
        assert fact in said
    assert "\x1b" not in said
    assert len(said.splitlines()) <= 16


class _Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)


def test_the_page_of_a_notebook_says_the_same_and_does_nothing_that_a_file_says(tmp_path):
    shown = model(head=HEAD)
    file = adaptkit.load(shown.save(tmp_path / "run", note="<script>alert(1)</script>"))
    for one in (shown, shown(torch.randn(2, 3, 32, 32)), file):
        page = one._repr_html_()
        assert set(_Tags(page).tags) == {"div", "b", "table", "tr", "th", "td"}
        assert page.count("<tr>") == len(one._shown()[1])
    assert "&lt;script&gt;" in file._repr_html_()


def test_a_long_cell_is_cut_and_its_lines_stand_in_their_column():
    lines = as_text("t", [("name", "word " * 200)]).splitlines()
    assert lines[0] == "t"
    assert all(line.startswith("  name  word") or line.startswith(" " * 8 + "word") for line in lines[1:])
    assert lines[-1].endswith(" ...")
    assert as_html("t", [("a", "b")]).count("<tr>") == 1
