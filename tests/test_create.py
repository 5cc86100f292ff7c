"""A backbone from its name, offline."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from families import HOSTS

from adaptkit.core.registry import view
from adaptkit.create import create_backbone


def test_a_timm_name_builds_the_timm_model():
    assert view(create_backbone("vit_tiny_patch16_224", pretrained=False)).spec.embed_dim == 192


def test_a_folder_that_transformers_saved(tmp_path):
    host = HOSTS["hf-dinov2"].build()
    host.save_pretrained(tmp_path)
    again = create_backbone(str(tmp_path))
    assert type(again) is type(host)
    assert all(torch.equal(v, host.state_dict()[k]) for k, v in again.state_dict().items())


def test_a_folder_that_timm_saved(tmp_path):
    import timm
    from timm.models import save_for_hf

    host = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    save_for_hf(host, str(tmp_path), safe_serialization=True)
    again = create_backbone(str(tmp_path))
    assert all(torch.equal(v, host.state_dict()[k]) for k, v in again.state_dict().items())


def test_timm_builds_for_other_channels_and_nobody_else_does(tmp_path):
    assert view(create_backbone("test_vit", pretrained=False, in_chans=4)).spec.channels == 4
    HOSTS["hf-dinov2"].build().save_pretrained(tmp_path)
    for name in (str(tmp_path), "demo"):
        with pytest.raises(ValueError, match=r"expand_channels\(backbone, 4\)"):
            create_backbone(name, in_chans=4)


@pytest.mark.parametrize("name", ["no_such_model", "vit_no_such"])
def test_an_unknown_name_says_what_was_tried(name):
    with pytest.raises(ValueError, match=f"no backbone is named '{name}': it is no timm model"):
        create_backbone(name)


def test_an_empty_folder_says_what_was_expected(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        create_backbone(str(tmp_path))


def test_a_name_without_weights_says_how_a_file_becomes_a_folder_and_so_it_does(tmp_path):
    import timm

    with pytest.raises(ValueError, match=r"'dat_tiny' names no weights.*--random-backbone.*save_for_hf") as caught:
        create_backbone("dat_tiny")
    host = create_backbone("dat_tiny", pretrained=False, classifier=True)
    torch.save({"model": host.state_dict()}, tmp_path / "weights.pth")
    said = str(caught.value).partition("which is then the name: ")[2]
    said = said.replace("'weights.pth'", repr(str(tmp_path / "weights.pth"))).replace(
        "./dat_tiny", str(tmp_path / "dat")
    )
    eval(said, {"timm": timm})
    again = create_backbone(str(tmp_path / "dat"), classifier=True)
    assert all(torch.equal(v, host.state_dict()[k]) for k, v in again.state_dict().items())
