"""How a transformers model wants its images, read from the folder or the cache that it was loaded from."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS

import adaptkit
from adaptkit.backbones._processor import normalisation
from adaptkit.core.registry import view

transformers = pytest.importorskip("transformers")

HALF = (0.5, 0.5, 0.5)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

#: host -> its image processor, options of that, and what a source must say
PROCESSORS = {
    "hf-siglip": ("SiglipImageProcessor", {}, (HALF, HALF)),
    "hf-clip": ("CLIPImageProcessor", {}, CLIP),
    "hf-beit": ("BeitImageProcessor", {}, (HALF, HALF)),
    "hf-vit": ("ViTImageProcessor", {}, (HALF, HALF)),
    "hf-deit": ("DeiTImageProcessor", {}, (HALF, HALF)),
    "hf-vit-mae": ("ViTImageProcessor", {"image_mean": IMAGENET[0], "image_std": IMAGENET[1]}, IMAGENET),
    "hf-dinov2": ("BitImageProcessor", {"image_mean": IMAGENET[0], "image_std": IMAGENET[1]}, IMAGENET),
}


def saved(name, folder):
    """A tiny model and its processor, as transformers saves them; returns the model as it is loaded from there."""
    host = HOSTS[name].build()
    host.save_pretrained(folder)
    cls, options, _ = PROCESSORS[name]
    getattr(transformers, cls)(**options).save_pretrained(folder)
    return type(host).from_pretrained(folder)


def write(folder, **said):
    folder.mkdir(exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return str(folder)


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_source_says_what_the_processor_in_the_folder_says(name, tmp_path):
    source = view(saved(name, tmp_path)).source()
    assert (source.mean, source.std) == PROCESSORS[name][2]


@pytest.mark.parametrize("name", PROCESSORS)
def test_an_image_normalised_so_is_what_the_processor_makes(name, tmp_path):
    source = view(saved(name, tmp_path)).source()
    pixels = torch.randint(0, 256, (3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    made = processor(pixels, return_tensors="pt", do_resize=False, do_center_crop=False).pixel_values[0]
    mean, std = (torch.tensor(v)[:, None, None] for v in (source.mean, source.std))
    torch.testing.assert_close((pixels / 255 - mean) / std, made, rtol=1e-5, atol=1e-5)


def test_the_file_keeps_it(tmp_path):
    model = adaptkit.attach(saved("hf-siglip", tmp_path / "backbone"), "sfp")
    model.save(tmp_path / "adapter")
    backbone = adaptkit.load(tmp_path / "adapter").header["backbone"]
    assert (backbone["mean"], backbone["std"]) == ([0.5] * 3, [0.5] * 3)


def test_another_normalisation_than_the_files_is_a_warning(tmp_path):
    backbone = saved("hf-siglip", tmp_path / "backbone")
    adaptkit.attach(backbone, "sfp").save(tmp_path / "adapter")
    write(tmp_path / "backbone", image_mean=[0, 0, 0], image_std=[1, 1, 1])
    with pytest.warns(UserWarning, match=r"normalised by mean \[0\.5, 0\.5, 0\.5\]"):
        adaptkit.attach(type(backbone).from_pretrained(tmp_path / "backbone"), str(tmp_path / "adapter"))


@pytest.mark.parametrize("name", ["hf-siglip", "hf-clip"])
@pytest.mark.parametrize("given", ["whole", "tower", "AutoModel", "create_backbone", "PeftModel"])
def test_the_image_half_of_a_pair_of_models_is_told_by_the_whole(name, given, tmp_path):
    kind = {"hf-siglip": "Siglip", "hf-clip": "CLIP"}[name]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ids = {"vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    parts = {"text_config": {**sizes, **ids}, "vision_config": {**sizes, "image_size": 32, "patch_size": 8}}
    whole = getattr(transformers, f"{kind}Model")
    whole(getattr(transformers, f"{kind}Config")(**parts)).save_pretrained(tmp_path)
    getattr(transformers, PROCESSORS[name][0])().save_pretrained(tmp_path)
    if given == "whole":
        host = whole.from_pretrained(tmp_path)
    elif given == "tower":
        host = getattr(transformers, f"{kind}VisionModel").from_pretrained(tmp_path)
    elif given == "AutoModel":
        host = transformers.AutoModel.from_pretrained(tmp_path)
    elif given == "PeftModel":
        import peft

        inner = getattr(transformers, f"{kind}VisionModel").from_pretrained(tmp_path)
        host = peft.get_peft_model(inner, peft.LoraConfig(target_modules=["q_proj"]))
    else:
        host = adaptkit.create.create_backbone(str(tmp_path))
    source = view(host).source()
    assert (source.mean, source.std) == PROCESSORS[name][2]
    assert source.id == str(tmp_path)


def test_a_model_that_was_not_loaded_knows_nothing():
    source = view(HOSTS["hf-siglip"].build()).source()
    assert (source.id, source.mean, source.std) == ("", (), ())


def test_a_folder_without_a_processor_knows_nothing(tmp_path):
    host = HOSTS["hf-dinov2"].build()
    host.save_pretrained(tmp_path)
    source = view(type(host).from_pretrained(tmp_path)).source()
    assert (source.id, source.mean, source.std) == (str(tmp_path), (), ())


@pytest.mark.parametrize(
    ("said", "channels", "wanted"),
    [
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}, 3, ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))),
        ({"image_mean": 0.5, "image_std": 0.25}, 1, ((0.5,), (0.25,))),
        ({"image_mean": [0.5], "image_std": [0.25]}, 4, ((0.5,) * 4, (0.25,) * 4)),
        ({"image_mean": [0.1, 0.2, 0.3, 0.4], "image_std": 0.5}, 4, ((0.1, 0.2, 0.3, 0.4), (0.5,) * 4)),
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}, 4, ((), ())),
        ({"do_normalize": False, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}, 3, ((0.0,) * 3, (1.0,) * 3)),
        ({"do_normalize": False}, 1, ((0.0,), (1.0,))),
        ({"do_normalize": True}, 3, ((), ())),
        ({"image_mean": [0.5] * 3}, 3, ((), ())),
        ({}, 3, ((), ())),
        ({"rescale_factor": 1 / 127.5, "image_mean": [1.0], "image_std": [1.0]}, 3, (HALF, HALF)),
        ({"rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False}, 3, (HALF, HALF)),
        ({"do_rescale": False, "image_mean": 127.5, "image_std": 51}, 3, (HALF, (0.2,) * 3)),
        ({"do_rescale": False, "image_mean": 0.5, "image_std": 0.5}, 3, (HALF, HALF)),
        ({"do_rescale": False, "do_normalize": False}, 3, ((), ())),
    ],
)
def test_what_a_file_says_is_brought_to_values_between_0_and_1(said, channels, wanted, tmp_path):
    found = normalisation(write(tmp_path, **said), "", channels)
    for values, right in zip(found, wanted):
        assert values == pytest.approx(right, rel=1e-12)


def test_a_processor_of_several_parts_holds_the_image_processor_inside(tmp_path):
    folder = write(tmp_path, image_mean=0.1, image_std=0.1)
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps({"image_processor": {"image_mean": 0.5, "image_std": 0.5}, "image_seq_length": 4}))
    assert normalisation(folder, "", 3) == (HALF, HALF)
    path.write_text(json.dumps({"image_seq_length": 4}))  # as older versions write it
    assert normalisation(folder, "", 3) == ((0.1,) * 3, (0.1,) * 3)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"image_mean": [0.5,', "cannot be read as JSON"),
        ("\xff", "cannot be read as JSON"),
        ("[1, 2]", "holds list and no object"),
        ('{"image_mean": ["a", 1, 2], "image_std": 1}', r"has image_mean=\['a', 1, 2\], which are no numbers"),
        ('{"image_mean": 0.5, "image_std": NaN}', "has image_std=nan, which are no numbers"),
        ('{"image_mean": 0.5, "image_std": [1, 0, 1]}', r"has image_std=\[1, 0, 1\], and nothing can be divided"),
        ('{"image_mean": 0.5, "image_std": 0.5, "rescale_factor": 0}', r"has rescale_factor=0\.0"),
    ],
)
def test_a_damaged_file_is_named_before_anything_is_attached(text, what, tmp_path):
    host = saved("hf-siglip", tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"preprocessor_config\.json says how .*{what}.*mean and std yourself"):
        adaptkit.attach(host, "sfp")
    assert all(p.requires_grad for p in host.parameters())


# ------------------------------------------------------------------------------------------------ the Hub's cache


def cached(cache, commit, **said):
    folder = cache / "models--acme--eyes" / "snapshots" / commit
    folder.mkdir(parents=True)
    write(folder, **said)


def test_the_cache_is_read_at_the_commit_that_was_loaded(tmp_path):
    cached(tmp_path, "a" * 40, image_mean=0.5, image_std=0.5)
    cached(tmp_path, "b" * 40, image_mean=0.1, image_std=0.1)
    assert normalisation("acme/eyes", "a" * 40, 3, str(tmp_path)) == (HALF, HALF)
    assert normalisation("acme/eyes", "c" * 40, 3, str(tmp_path)) == ((), ())


def test_where_the_commit_is_not_known_all_that_are_cached_must_agree(tmp_path):
    cached(tmp_path, "a" * 40, image_mean=0.5, image_std=0.5)
    cached(tmp_path, "b" * 40, image_mean=[0.5] * 3, image_std=0.5)
    assert normalisation("acme/eyes", "", 3, str(tmp_path)) == (HALF, HALF)
    cached(tmp_path, "c" * 40, image_mean=0.1, image_std=0.5)
    assert normalisation("acme/eyes", "", 3, str(tmp_path)) == ((), ())


# ------------------------------------------------------------------------------------- timm inside transformers


def wrapper(**cfg):
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    more = {"pretrained_cfg": cfg} if cfg else {}
    config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=args, **more)
    return transformers.TimmWrapperModel(config)


def test_a_timm_model_in_transformers_is_told_by_the_config_of_its_weights(tmp_path):
    wrapper(architecture="vit_tiny_patch16_224", tag="mine", mean=[0.1] * 3, std=[0.2] * 3).save_pretrained(tmp_path)
    model = transformers.TimmWrapperModel.from_pretrained(tmp_path)
    source = view(model).source()
    assert (source.id, source.mean, source.std) == ("vit_tiny_patch16_224.mine", (0.1,) * 3, (0.2,) * 3)


def test_without_one_the_architectures_default_does_not_stand_in_for_it():
    assert view(wrapper()).source().mean == ()
