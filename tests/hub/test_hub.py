"""Push, load and from_pretrained, through the real client against a Hub on loopback."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS
from hub_server import Hub, Repo

import adaptkit
from adaptkit.core.registry import view
from adaptkit.create import create_backbone
from adaptkit.hub.file import CARD, CONFIG, WEIGHTS

hf = pytest.importorskip("huggingface_hub")
pytest.importorskip("transformers")

TOKEN = "hf_good"
x = torch.randn(2, 3, 42, 56, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub of its own for each test, and the client in this process pointed at it, with an empty cache."""
    from huggingface_hub import constants

    with Hub() as hub:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "no-token"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_PROGRESS_BARS": True,
        }.items():
            monkeypatch.setattr(constants, name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield hub
        assert not hub.leaked, "a token was shown to the CDN"


def randomise(model):
    """Move every trainable parameter off its initial value."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=g))
    return model.eval()


def host():
    return HOSTS["hf-dinov2"].build()


@pytest.fixture
def model():
    model = adaptkit.attach(host(), ("metaformer", {"width": 8}), "sfp", head=("linear", {"num_classes": 3}))
    return randomise(model)


def same(a, b):
    return torch.equal(a.logits, b.logits) and all(torch.equal(m, n) for m, n in zip(a.maps, b.maps, strict=True))


# -------- push and load


@torch.no_grad()
def test_what_is_pushed_is_loaded_bitwise(hub, model):
    commit = model.push("acme/roads", token=TOKEN, task="semantic-segmentation", license="mit")
    assert commit.url == f"{hub.url}/acme/roads/commit/{commit.sha}"
    assert set(hub.files("acme/roads", commit.sha)) == {".gitattributes", WEIGHTS, CONFIG, CARD}
    assert hub.repos["acme/roads"].messages == ["initial commit", "Upload metaformer + sfp with adaptkit"]
    again = adaptkit.attach(host(), "acme/roads")
    assert not again.training
    assert same(again(x), model(x))


def test_only_the_adapters_own_files_are_downloaded(hub, model):
    model.push("acme/roads", token=TOKEN)
    hub.put("acme/roads", {"huge.bin": b"0" * 1000, "notes.txt": b"notes"})
    hub.log.clear()
    adaptkit.load("acme/roads")
    read = {line.split("/")[-1] for line in hub.log if line.startswith("GET") and "/resolve/" in line}
    assert read == {CONFIG}  # the weights are redirected to the CDN
    assert sum("/cdn/" in line for line in hub.log if line.startswith("GET")) == 1
    assert not any("huge" in line or "notes" in line for line in hub.log)


def test_other_files_of_the_repository_stay(hub, model):
    hub.put("acme/roads", {"train.py": b"print(1)", "old.bin": b"123"})
    model.push("acme/roads", token=TOKEN)
    files = hub.files("acme/roads")
    assert files["train.py"] == b"print(1)"
    assert files["old.bin"] == b"123"


def test_what_a_person_wrote_into_the_card_stays(hub, model):
    model.push("acme/roads", token=TOKEN)
    card = hub.files("acme/roads")[CARD].decode()
    hub.put(
        "acme/roads", {CARD: card.replace("library_name", "language: en\nlibrary_name", 1).encode() + b"By hand.\n"}
    )
    model.push("acme/roads", token=TOKEN, task="segmentation")
    card = hf.ModelCard(hub.files("acme/roads")[CARD].decode())
    assert card.data.language == "en"
    assert card.data.pipeline_tag == "image-segmentation"
    assert card.text.rstrip().endswith("By hand.")


def test_results_that_would_go_stale_are_not_kept_without_a_word(hub, model):
    model.push("acme/roads", token=TOKEN, task="segmentation", dataset="camvid", metrics={"mIoU": 0.43})
    with pytest.warns(UserWarning, match="the card of acme/roads reports results of what was there before"):
        model.push("acme/roads", token=TOKEN)
    assert hf.ModelCard(hub.files("acme/roads")[CARD].decode()).data.eval_results[0].metric_value == 0.43


def test_the_same_again_makes_no_commit(hub, model):
    first = model.push("acme/roads", token=TOKEN)
    assert model.push("acme/roads", token=TOKEN) == first
    assert len(hub.repos["acme/roads"].messages) == 2


def test_an_edit_during_a_push_is_not_overwritten(hub, model):
    model.push("acme/roads", token=TOKEN)
    hub.raced = lambda: hub.put("acme/roads", {CARD: b"edited meanwhile"})
    with pytest.raises(OSError, match=r"acme/roads was changed by somebody else .*: push again"):
        model.push("acme/roads", token=TOKEN, task="depth")
    assert hub.files("acme/roads")[CARD] == b"edited meanwhile"


@torch.no_grad()
def test_every_revision_stays_what_it_was(hub, model):
    before = model(x)
    first = model.push("acme/roads", token=TOKEN)
    for p in model.head.parameters():
        p.zero_()
    model.push("acme/roads", token=TOKEN)
    model.push("acme/roads", token=TOKEN, revision="v2", task="depth", commit_message="as a branch")
    assert hub.repos["acme/roads"].messages[-1] == "as a branch"
    assert same(adaptkit.attach(host(), adaptkit.load("acme/roads", revision=first.sha))(x), before)
    assert not adaptkit.attach(host(), "acme/roads")(x).logits.any()
    assert adaptkit.load("acme/roads", revision="v2").header["metadata"] == {"task": "depth"}
    assert adaptkit.load("acme/roads").header["metadata"] == {}


@torch.no_grad()
def test_a_subfolder_holds_an_adapter_too(hub, model, tmp_path):
    folder = model.save(tmp_path / "many" / "a")
    hub.put("acme/many", {f"a/{f.name}": f.read_bytes() for f in folder.iterdir()})
    for many in ("acme/many", tmp_path / "many"):
        assert same(adaptkit.attach(host(), adaptkit.load(many, subfolder="a"))(x), model(x))


def test_a_weights_file_alone_is_enough_on_the_hub_too(hub, model, tmp_path):
    hub.put("acme/alone", {WEIGHTS: (model.save(tmp_path / "a") / WEIGHTS).read_bytes()})
    assert adaptkit.load("acme/alone").header["head"]["name"] == "linear"


@torch.no_grad()
def test_a_path_that_exists_wins(hub, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.push("acme/roads", token=TOKEN, task="depth")
    model.save("acme/roads", note="mine")
    hub.log.clear()
    assert adaptkit.load("acme/roads").header["metadata"] == {"note": "mine"}
    with pytest.raises(ValueError, match="acme/roads is read from this disk, and revision='main' is for ids"):
        adaptkit.load("acme/roads", revision="main")
    assert same(adaptkit.attach(host(), "acme/roads")(x), model(x))
    assert not hub.log


def test_a_private_repository_needs_its_token(hub, model):
    model.push("acme/secret", token=TOKEN, private=True)
    assert hub.repos["acme/secret"].private
    with pytest.raises(FileNotFoundError, match=r"no folder .*'acme/secret' here.* if it is private, log in"):
        adaptkit.load("acme/secret")
    assert adaptkit.load("acme/secret", token=TOKEN).header["head"]["name"] == "linear"


def test_private_is_not_ignored_where_the_repository_is_public(hub, model):
    model.push("acme/roads", token=TOKEN)
    with pytest.raises(ValueError, match=r"is public, you asked for private=True: .*Nothing was uploaded"):
        model.push("acme/roads", token=TOKEN, private=True, task="depth")
    assert len(hub.repos["acme/roads"].messages) == 2


# -------- what goes wrong


def offline(monkeypatch, hub, model):
    monkeypatch.setattr(hf.constants, "HF_HUB_OFFLINE", True)
    hf.utils.close_session()


def gone(monkeypatch, hub, model):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client tries again, and again
    hub.server.shutdown()
    hub.server.server_close()


def other_files(monkeypatch, hub, model):
    hub.put("acme/roads", {"config.json": b"{}", "model.safetensors": b"123"})


def gated(monkeypatch, hub, model):
    model.push("acme/roads", token=TOKEN)
    hub.repos["acme/roads"].gated = True


def pushed(monkeypatch, hub, model):
    model.push("acme/roads", token=TOKEN)
    hub.repos["acme/roads"].refs["tidy"] = hub.repos["acme/roads"].refs["main"]


def cut(monkeypatch, hub, model):
    model.push("acme/roads", token=TOKEN)
    hub.cut[WEIGHTS] = 1000


def damaged(monkeypatch, hub, model):
    model.push("acme/roads", token=TOKEN)
    hub.put("acme/roads", {WEIGHTS: hub.files("acme/roads")[WEIGHTS][:1000]})


@pytest.mark.parametrize(
    ("before", "options", "error", "message"),
    [
        (None, {}, FileNotFoundError, r"no folder or file is named 'acme/roads' here, and http\S+ has no model repository"),
        (offline, {}, FileNotFoundError, r"acme/roads is not in the cache .*cache; HF_HUB_OFFLINE is set: unset it"),
        (pushed, {"local_files_only": True}, FileNotFoundError, "not in the cache .*; local_files_only=True: leave it out"),
        (gone, {}, FileNotFoundError, r"not in the cache .*; the Hub at http\S+ did not answer \(.*\): check the conn"),
        (pushed, {"revision": "v9"}, FileNotFoundError, "no revision 'v9'; its branches and tags are main, tidy, or give"),
        (pushed, {"token": "hf_bad"}, PermissionError, "wants a token that it knows .*Invalid credentials"),
        (gated, {}, PermissionError, r"acme/roads is gated .*: ask for access at http\S+/acme/roads, then log in"),
        (other_files, {}, FileNotFoundError, r"no adapter_model\.safetensors among its files config\.json, model\.safe"),
        (pushed, {"subfolder": "b"}, FileNotFoundError, r"there is no b/adapter_model\.safetensors among"),
        (cut, {}, OSError, r"the download of adapter_model\.safetensors from acme/roads did not complete: .*Try again"),
        (damaged, {}, ValueError, r"not a complete safetensors file.*it came from acme/roads: force_download=True"),
    ],
)  # fmt: skip
def test_a_load_that_fails_says_what_and_why(hub, model, monkeypatch, before, options, error, message):
    if before is not None:
        before(monkeypatch, hub, model)
    with pytest.raises(error, match=f"(?s){message}") as caught:
        adaptkit.load("acme/roads", **options)
    assert type(caught.value) is error
    hf.utils.close_session()


def test_a_download_that_was_cut_off_is_not_taken_for_whole_the_next_time(hub, model, monkeypatch):
    cut(monkeypatch, hub, model)
    with pytest.raises(OSError, match="did not complete"):
        adaptkit.load("acme/roads")
    hub.cut.clear()
    assert adaptkit.load("acme/roads").header["head"]["name"] == "linear"


@pytest.mark.parametrize(
    ("before", "repo", "options", "error", "message"),
    [
        (None, "roads", {}, ValueError, "repo_id='roads' is no repository; give 'user/name'"),
        (None, "acme/roads", {"task": "sing"}, ValueError, "task='sing' is none that the Hub knows"),
        (None, "acme/roads", {"token": None}, PermissionError, "log in with `hf auth login`"),
        (None, "acme/roads", {"token": "hf_bad"}, PermissionError, "wants a token that it knows"),
        (None, "other/roads", {}, PermissionError, "refused access to other/roads .*rights to create a model"),
        (offline, "acme/roads", {}, ConnectionError, "cannot ask the Hub for acme/roads: HF_HUB_OFFLINE is set"),
        (gone, "acme/roads", {}, ConnectionError, r"cannot reach the Hub at http\S+ for acme/roads: .*Check the conn"),
    ],
)
def test_a_push_that_fails_says_what_and_why(hub, model, monkeypatch, before, repo, options, error, message):
    if before is not None:
        before(monkeypatch, hub, model)
    with pytest.raises(error, match=f"(?s){message}"):
        model.push(repo, **{"token": TOKEN, **options})
    assert not hub.repos
    hf.utils.close_session()


def test_a_name_that_is_neither_adapter_nor_id_is_the_error_it_was(hub):
    with pytest.raises(ValueError, match="no adapter is named 'vit-adaptor' and no file is there"):
        adaptkit.attach(host(), "vit-adaptor")
    with pytest.raises(FileNotFoundError, match="no adapter at nowhere"):
        adaptkit.load("nowhere")
    assert not hub.log


# -------- from_pretrained


def edited(folder, **backbone):
    """Change what a file says of its backbone."""
    with safe_open(folder / WEIGHTS, "pt") as f:
        header, tensors = json.loads(f.metadata()["adaptkit"]), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    header["backbone"].update(backbone)
    save_file(tensors, folder / WEIGHTS, {"adaptkit": json.dumps(header)})
    return folder


@pytest.fixture(scope="module")
def backbone_files(tmp_path_factory):
    """A tiny DINOv2 as transformers saves it: a backbone that a Hub can serve."""
    folder = tmp_path_factory.mktemp("backbone")
    host().save_pretrained(folder)
    return {f.name: f.read_bytes() for f in folder.iterdir()}


@torch.no_grad()
def test_from_pretrained_builds_the_recorded_backbone_at_the_recorded_revision(hub, backbone_files, tmp_path):
    from transformers import Dinov2Model

    sha = hub.put("meta/tiny-dinov2", backbone_files)
    backbone = create_backbone("meta/tiny-dinov2")
    model = randomise(adaptkit.attach(backbone, "sfp", head=("linear", {"num_classes": 3})))
    model.push("acme/roads", token=TOKEN)
    hub.put("meta/tiny-dinov2", {"config.json": b"{}", "model.safetensors": b"another model, one commit later"})
    again = adaptkit.from_pretrained("acme/roads", strict=True, cache_dir=tmp_path / "another cache")
    assert again.vit.source().revision == sha
    assert type(again.backbone) is Dinov2Model
    assert not again.training
    assert same(again(x), model(x))
    assert list((tmp_path / "another cache").glob(f"models--meta--tiny-dinov2/snapshots/{sha}/model.safetensors"))
    assert hf.ModelCard(hub.files("acme/roads")[CARD].decode()).data.base_model == "meta/tiny-dinov2"


def test_the_backbone_comes_with_the_normalisation_of_its_image_processor(hub, backbone_files, tmp_path):
    said = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    hub.put("meta/tiny-dinov2", {**backbone_files, "preprocessor_config.json": json.dumps(said).encode()})
    for download in ({}, {"cache_dir": tmp_path / "another cache"}):
        source = view(create_backbone("meta/tiny-dinov2", **download)).source()
        assert (source.mean, source.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_a_backbone_without_an_image_processor_says_nothing_of_normalisation(hub, backbone_files):
    hub.put("meta/tiny-dinov2", backbone_files)
    assert view(create_backbone("meta/tiny-dinov2")).source().mean == ()


@torch.no_grad()
@pytest.mark.parametrize("channels", [3, 4])
def test_from_pretrained_of_a_timm_model_on_the_hub(hub, tmp_path, channels):
    import timm
    from timm.models import save_for_hf

    args = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8}
    tiny = timm.create_model("vit_tiny_patch16_224", num_classes=0, **args)
    save_for_hf(tiny, str(tmp_path / "tiny"), model_args=args, safe_serialization=True)
    sha = hub.put("timm-user/tiny", {f.name: f.read_bytes() for f in (tmp_path / "tiny").iterdir()})
    # timm makes the kernel of four channels of the three that are on the Hub
    backbone = timm.create_model(f"hf-hub:timm-user/tiny@{sha}", pretrained=True, in_chans=channels)
    hub.put("timm-user/tiny", {"model.safetensors": b"one commit later"})
    model = randomise(adaptkit.attach(backbone, "sfp"))
    assert model.vit.source()[:2] == ("timm-user/tiny", sha)
    folder = model.save(tmp_path / "saved")
    again = adaptkit.from_pretrained(folder, strict=True)
    image = torch.randn(1, channels, 40, 32)
    assert all(torch.equal(a, b) for a, b in zip(again(image).maps, model(image).maps))


@torch.no_grad()
def test_from_pretrained_of_a_local_backbone_takes_it_from_the_user_and_not_from_the_file(backbone_files, tmp_path):
    from transformers import Dinov2Model

    (tmp_path / "dinov2").mkdir()
    for name, data in backbone_files.items():
        (tmp_path / "dinov2" / name).write_bytes(data)
    backbone = Dinov2Model.from_pretrained(tmp_path / "dinov2")
    model = randomise(adaptkit.attach(backbone, "sfp"))
    folder = model.save(tmp_path / "saved")
    expected = model(x)
    for given in (host(), str(tmp_path / "dinov2")):
        again = adaptkit.from_pretrained(folder, backbone=given)
        assert all(torch.equal(a, b) for a, b in zip(again(x).maps, expected.maps))
    with pytest.raises(
        ValueError, match=r"names the backbone .*dinov2', expected org/repo of the Hub.*backbone=\.\.\."
    ):
        adaptkit.from_pretrained(folder)


@pytest.mark.parametrize(
    ("source", "revision"),
    [
        ("local-dir:/tmp/x", ""), ("https://evil.example/model", ""), ("file:///tmp/x", ""), ("../x", ""), ("/etc", ""),
        ("org/../x", ""), ("a/b/c", ""), ("hf-hub:org/x", ""), ("", "main"), ("org/x\n", ""), ("~/x", ""), ("C:\\x", ""),
        ("org/x", "main@evil"), ("org/x", "a b"), ("here/model", ""), ("here", ""),
    ],
)  # fmt: skip
def test_a_file_names_no_path_and_no_url(hub, tmp_path, monkeypatch, source, revision):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    file = adaptkit.attach(host(), "sfp").save(tmp_path / "saved")
    edited(file, source=source, revision=revision)
    hub.log.clear()
    with pytest.raises(ValueError, match=r"backbone="):
        adaptkit.from_pretrained(file)
    assert not hub.log


def test_the_backbone_that_a_file_names_is_printed(hub, backbone_files, tmp_path, capsys):
    sha = hub.put("meta/tiny-dinov2", backbone_files)
    folder = adaptkit.attach(create_backbone("meta/tiny-dinov2"), "sfp").save(tmp_path / "saved")
    adaptkit.from_pretrained(folder)
    assert f"was trained on {hub.url}/meta/tiny-dinov2 at {sha}" in capsys.readouterr().err


@torch.no_grad()
def test_from_pretrained_of_the_demo_backbone(tmp_path):
    model = randomise(adaptkit.attach(adaptkit.demo_backbone(), ("metaformer", {"width": 4}))).eval()
    folder = model.save(tmp_path)
    image = torch.randn(1, 3, 32, 48)
    assert torch.equal(adaptkit.from_pretrained(folder, strict=True)(image).tokens, model(image).tokens)


def test_from_pretrained_of_a_backbone_without_a_name_says_what_to_do(tmp_path):
    folder = adaptkit.attach(HOSTS["timm-vit"].build(), "sfp").save(tmp_path)
    with pytest.raises(ValueError, match=r"did not know where its weights came from.*adaptkit\.attach\(model"):
        adaptkit.from_pretrained(folder)


def test_a_classifier_that_is_not_in_the_file_is_not_made_up(tmp_path):
    import timm

    backbone = timm.create_model("vit_tiny_patch16_224", num_classes=7)
    backbone.pretrained_cfg = {"architecture": "vit_tiny_patch16_224", "tag": "adaptkit_demo"}
    folder = adaptkit.attach(backbone, ("metaformer", {"width": 4})).save(tmp_path)
    with pytest.raises(ValueError, match="with a classifier of 7 classes, which is not in the file; demo has 0"):
        adaptkit.from_pretrained(folder)


# -------- a hostile backbone


class Evil:
    """Unpickled, it would write a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def pickled(path, **tensors):
    data = io.BytesIO()
    torch.save({**tensors, "evil": Evil(path)}, data)
    return data.getvalue()


REMOTE = "import pathlib; pathlib.Path({!r}).touch()\nclass Model: pass\nclass Config: pass\n"
CUSTOM = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
VIT = {
    "architecture": "vit_tiny_patch16_224",
    "num_classes": 0,
    "model_args": {"depth": 1, "embed_dim": 32, "num_heads": 2},
}


def hostile(kind, path):
    """Files of a repository that runs code in whoever trusts it, and the class of the model it says it has."""
    transformers, timm = "transformers.models.dinov2.modeling_dinov2.Dinov2Model", VIT_CLASS
    tiny = json.loads(host().config.to_json_string())
    return {
        "timm, pytorch_model.bin": ({"config.json": VIT, "pytorch_model.bin": pickled(path)}, timm),
        "timm, a named file": (
            {"config.json": {**VIT, "pretrained_cfg": {"hf_hub_filename": "w.pth"}}, "w.pth": pickled(path)}, timm,
        ),
        "timm, custom load": (
            {
                "config.json": {**VIT, "pretrained_cfg": {"hf_hub_filename": "w.npz", "custom_load": "hf"}},
                "w.npz": pickled(path),
            },
            timm,
        ),
        "timm, a path": (
            {"config.json": {**VIT, "pretrained_cfg": {"file": str(path) + ".pth", "url": "file://" + str(path) + ".pth"}}}, timm,
        ),
        "transformers, pytorch_model.bin": ({"config.json": tiny, "pytorch_model.bin": pickled(path)}, transformers),
        "transformers, auto_map": ({"config.json": {**tiny, "auto_map": CUSTOM, "model_type": "evil"},
                                    "code.py": REMOTE.format(str(path)).encode()}, "transformers.models.evil.Model"),
        "transformers, auto_map of a known class": (
            {"config.json": {**tiny, "auto_map": CUSTOM}, "code.py": REMOTE.format(str(path)).encode()}, transformers,
        ),
    }[kind]  # fmt: skip


VIT_CLASS = "timm.models.vision_transformer.VisionTransformer"
HOSTILE = [
    "timm, pytorch_model.bin", "timm, a named file", "timm, custom load", "timm, a path",
    "transformers, pytorch_model.bin", "transformers, auto_map", "transformers, auto_map of a known class",
]  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_code_of_a_hostile_backbone_runs(hub, tmp_path, kind):
    files, cls = hostile(kind, tmp_path / "ran")
    (tmp_path / "ran.pth").write_bytes(pickled(tmp_path / "ran"))
    hub.put("evil/backbone", {k: v if isinstance(v, bytes) else json.dumps(v).encode() for k, v in files.items()})
    source = "evil/backbone"
    folder = adaptkit.attach(host(), "sfp").save(tmp_path / "saved")
    edited(folder, **{"source": source, "revision": "", "class": cls})
    with pytest.raises(ValueError, match=r"was trained on evil/backbone .*cannot be built here: (?s:.+)If you have it"):
        adaptkit.from_pretrained(folder)
    assert any("evil/backbone" in line for line in hub.log)
    assert not (tmp_path / "ran").exists()


def test_the_pickle_of_these_tests_is_hostile(tmp_path):
    torch.load(io.BytesIO(pickled(tmp_path / "ran")), weights_only=False)
    assert (tmp_path / "ran").exists()


# -------- another process, as people use it

READ = """
import sys, torch, adaptkit
model = adaptkit.from_pretrained("acme/roads", strict=True)
image = torch.randn(2, 3, 42, 56, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    torch.save(tuple(model(image).maps), sys.argv[1])
adaptkit.load("acme/roads", cache_dir=sys.argv[1] + ".nowhere")
"""


def run(code, env, *argv):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), clean.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", code, *argv],
        env={**clean, **env, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )


@torch.no_grad()
def test_the_cards_snippet_runs_and_what_it_cached_runs_offline(hub, backbone_files, tmp_path):
    from transformers import Dinov2Model

    hub.put("meta/small-dinov2", backbone_files)
    backbone = Dinov2Model.from_pretrained("meta/small-dinov2")
    model = randomise(adaptkit.attach(backbone, "sfp", head=("linear", {"num_classes": 3})))
    model.push("acme/roads", token=TOKEN)
    snippet = re.search(r"```python\n(.*?)```", hub.files("acme/roads")[CARD].decode(), re.DOTALL)[1]
    env = hub.env(tmp_path / "home")
    online = run(snippet, env)
    assert online.returncode == 0, online.stderr
    assert "torch.Size([1, 3, 224, 224])" in online.stdout
    hub.log.clear()
    offline = run(READ, {**env, "HF_HUB_OFFLINE": "1"}, str(tmp_path / "maps.pt"))
    assert not hub.log
    maps = torch.load(tmp_path / "maps.pt")
    assert all(torch.equal(a, b) for a, b in zip(maps, model(x).maps, strict=True))
    assert (
        "FileNotFoundError: no folder or file is named 'acme/roads' here, and acme/roads is not in the"
        in offline.stderr
    )
    assert "maps.pt.nowhere; HF_HUB_OFFLINE is set: unset it" in offline.stderr


def test_the_hub_of_these_tests_refuses_what_the_real_one_refuses(hub):
    """A server that says yes to everything would prove nothing."""
    api = hf.HfApi(token="hf_bad")
    with pytest.raises(hf.errors.HfHubHTTPError, match="Invalid credentials"):
        api.create_repo("acme/roads")
    hub.repos["acme/roads"] = Repo()
    hub.put("acme/roads", {})
    with pytest.raises(ValueError, match="Invalid metadata in README"):
        hf.HfApi(token=TOKEN).upload_file(
            path_or_fileobj=b"---\na: b: c\n---\n", path_in_repo=CARD, repo_id="acme/roads"
        )
