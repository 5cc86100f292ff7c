"""A file that was exported gives what the model gives, on a batch (and a size) it was not traced with."""

import json
import sys

import pytest
import torch

import adaptkit
from adaptkit.cli import main
from adaptkit.export import output_names, to_aot_package, to_exported_program, to_onnx

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 5}
PLAIN = ("metaformer", {"width": 4, "mixer": "identity"})


slow = pytest.mark.full


def vit():
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**SMALL)


def dinov3():
    """Rotary positions, no table."""
    from timm.models.eva import Eva

    rope = {"rope_type": "dinov3", "rope_temperature": 100, "rope_rotate_half": True, "use_rot_pos_emb": True}
    return Eva(**SMALL, **rope, use_abs_pos_emb=False, num_reg_tokens=4, use_fc_norm=False, init_values=0.5)


def hf(kind, config, **options):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    made = getattr(transformers, config)(**{**sizes, "image_size": 32, "patch_size": 8, **options})
    return getattr(transformers, kind)(made)


def hf_vit():
    return hf("ViTModel", "ViTConfig")


def hf_dinov2():
    return hf("Dinov2Model", "Dinov2Config", mlp_ratio=2, image_size=56, patch_size=14)


def attached(host, *adapters, **options):
    torch.manual_seed(0)
    model = adaptkit.attach(host(), *adapters, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return model.eval()


def run(path, image):
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(None, {"image": image.numpy()})), strict=True))


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


VIT_ADAPTER = ("vit-adapter", {"conv_inplane": 8, "interaction_indexes": [[0, 1]], "deform_num_heads": 1, "n_points": 2,
                               "extra_extractors": 0})  # fmt: skip
PYRAMID = ["map_4", "map_8", "map_16", "map_32"]


@pytest.mark.parametrize(
    ("host", "adapters", "head", "size", "names"),
    [
        pytest.param(dinov3, [VIT_ADAPTER], None, (32, 40), [*PYRAMID, "tokens", "prefix", "logits"], id="vit-adapter"),
        pytest.param(vit, ["adavit", ("metaformer", {"width": 8, "mixer": ("global", "window")}), "sfp"],
                     ("linear", {"num_classes": 3}), (40, 56), [*PYRAMID, "tokens", "prefix", "logits"], id="stacked", marks=slow),
        pytest.param(vit, [("lora", {"target_modules": "all-linear"}), "sfp"], None, (32, 32),
                     [*PYRAMID, "tokens", "prefix", "logits"], id="lora"),
        pytest.param(hf_dinov2, [("dat", {"blocks": 1})], None, (42, 70), ["tokens", "prefix"], id="dat", marks=slow),
    ],
)  # fmt: skip
@torch.no_grad()
def test_onnx_gives_what_the_model_gives_on_any_batch(host, adapters, head, size, names, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model = attached(host, *adapters, head=head)
    path = to_onnx(model, tmp_path / "model.onnx", size)
    assert [f.name for f in tmp_path.iterdir()] == ["model.onnx"]
    image = torch.randn(5, 3, *size)
    said, wanted = run(path, image), model(image)
    assert list(said) == names
    close(said["tokens"], wanted.tokens)
    close(said["prefix"], wanted.prefix)
    for stride, wanted_map in zip((4, 8, 16, 32), wanted.maps):
        close(said[f"map_{stride}"], wanted_map)
    if wanted.logits is not None:
        close(said["logits"], wanted.logits)
    graph = onnx.load(path)
    assert not any("lora" in weight.name for weight in graph.graph.initializer)  # it is in the weights
    assert not any(node.op_type == "GridSample" for node in graph.graph.node)
    metadata = {p.key: p.value for p in graph.metadata_props}
    assert [a["name"] for a in json.loads(metadata["adaptkit"])["adapters"]] == list(model.adapters)
    assert metadata["size"] == f"any,3,{size[0]},{size[1]}"


@torch.no_grad()
def test_onnx_leaves_the_size_open_where_the_positions_allow_it(tmp_path):
    pytest.importorskip("onnxscript")
    model = attached(hf_vit, PLAIN)
    path = to_onnx(model, tmp_path / "model.onnx", (64, 64), dynamic_size=True)
    for size in ((64, 160), (128, 96)):
        image = torch.randn(1, 3, *size)
        close(run(path, image)["tokens"], model(image).tokens)


def vit_of_96():
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**{**SMALL, "img_size": 96})


@pytest.mark.parametrize(
    ("host", "sizes"),
    [pytest.param(vit, ((64, 64), (128, 96)), marks=slow), (vit_of_96, ((96, 96), (64, 160)))],
)
@torch.no_grad()
def test_onnx_resamples_antialiased_positions_itself_at_any_size(host, sizes, tmp_path):
    """Larger and smaller than the table, and its own size, where the backbone resamples nothing."""
    pytest.importorskip("onnxscript")
    model = attached(host, PLAIN)
    path = to_onnx(model, tmp_path / "model.onnx", (64, 96), dynamic_size=True, outputs=["tokens"])
    for size in sizes:
        image = torch.randn(2, 3, *size)
        said = run(path, image)
        assert list(said) == ["tokens"]
        close(said["tokens"], model(image).tokens)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "sizes", [(4, 4, 4, 4), (4, 5, 9, 7), (14, 14, 5, 31), (16, 16, 3, 2), (37, 37, 20, 20), (1, 3, 2, 1)]
)
def test_matrices_resample_as_torch_does(sizes, mode):
    from adaptkit.export.resampled import AntialiasByMatrices, resample

    h, w, height, width = sizes
    x = torch.randn(1, 3, h, w, dtype=torch.float64)
    wanted = torch.nn.functional.interpolate(x, size=(height, width), mode=mode, antialias=True)
    torch.testing.assert_close(resample(x, (height, width), mode), wanted, rtol=1e-9, atol=1e-9)
    with AntialiasByMatrices():
        again = torch.nn.functional.interpolate(x, size=(height, width), mode=mode, antialias=True)
        plain = torch.nn.functional.interpolate(x, size=(height, width), mode=mode)
    torch.testing.assert_close(again, wanted, rtol=1e-9, atol=1e-9)
    assert torch.equal(plain, torch.nn.functional.interpolate(x, size=(height, width), mode=mode))


def test_a_backbone_that_closes_the_size_while_it_is_traced_asks_for_a_fixed_one(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    sizes = {"mlp_ratio": 2, "image_size": 64, "patch_size": 16}
    model = attached(lambda: hf("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **sizes), PLAIN)
    with pytest.raises(ValueError, match=r"Dinov2WithRegistersModel.*one file for each size"):
        to_onnx(model, tmp_path / "model.onnx", (64, 96), dynamic_size=True)
    assert not list(tmp_path.iterdir())


def test_open_axes_have_names_and_outputs_are_chosen(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model = attached(vit, "sfp", head=("linear", {"num_classes": 3}))
    path = to_onnx(model, tmp_path / "model.onnx", (64, 96), dynamic_size=True, outputs=["logits", "maps"])
    graph = onnx.load(path).graph
    said = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*graph.input, *graph.output)
    }
    assert said == {
        "image": ["batch", 3, "height", "width"],
        **{f"map_{s}": ["batch", 32, f"height/{s}", f"width/{s}"] for s in (4, 8, 16, 32)},
        "logits": ["batch", 3, "height", "width"],
    }
    assert output_names(model, (64, 96), ["prefix"]) == ["prefix"]


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        (["logit"], r"no 'logit' \(did you mean 'logits'\?\); its outputs are maps, map_4"),
        ([], "leaves nothing to compute"),
    ],
)
def test_an_output_that_does_not_exist_is_answered_before_any_tracing(outputs, said, tmp_path):
    model = attached(vit, "sfp")
    with pytest.raises(ValueError, match=said):
        to_exported_program(model, tmp_path / "model.pt2", (32, 32), outputs=outputs)


@torch.no_grad()
def test_a_program_gives_what_the_model_gives_and_leaves_the_model_as_it_was(tmp_path):
    model = attached(vit, ("metaformer", {"width": 4, "mixer": "pool"}), "sfp").train()
    model.adapters["sfp"].eval()
    modes = [module.training for module in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    path = to_exported_program(model, tmp_path / "model.pt2", (40, 32))
    with pytest.raises(ValueError, match="zz"):
        to_exported_program(model, tmp_path / "none.pt2", (40, 32), outputs=["zz"])
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    extra = {"adaptkit.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    image = torch.randn(1, 3, 40, 32)
    said = dict(zip(json.loads(extra["adaptkit.json"])["outputs"].split(","), program(image), strict=True))
    wanted = model.eval()(image)
    close(said["map_4"], wanted.maps[0])
    close(said["tokens"], wanted.tokens)


def test_a_half_precision_backbone_is_exported_in_float32_and_stays_as_it_is(tmp_path):
    model = attached(vit, PLAIN)
    model.backbone.bfloat16()
    program = torch.export.load(to_exported_program(model, tmp_path / "model.pt2", (32, 32))).module()
    assert program(torch.randn(1, 3, 32, 32))[0].dtype == torch.float32
    assert model.backbone.norm.weight.dtype == torch.bfloat16


def test_a_file_that_does_not_agree_is_not_put_in_place(tmp_path):
    path = tmp_path / "model.pt2"
    path.write_bytes(b"the old one")
    with pytest.raises(RuntimeError, match="tokens in the file differs from the model by .*nothing was written"):
        to_exported_program(attached(vit, PLAIN), path, (32, 32), tolerance=-1.0)
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "size", "options", "error", "message"),
    [
        ("model.pt2", (32, 32), {}, ValueError, r"model\.pt2 does not end in \.onnx"),
        ("no/model.onnx", (32, 32), {}, FileNotFoundError, "there is no folder .*no to write model.onnx to"),
        ("model.onnx", (0, 64), {}, ValueError, "at least 1"),
        ("model.onnx", (64, 72), {"dynamic_size": True}, ValueError, "in multiples of 32 pixels; .*at least 64"),
    ],
)
def test_what_cannot_be_written_is_said_before_the_work(name, size, options, error, message, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    with pytest.raises(error, match=message):
        to_onnx(attached(vit, PLAIN), tmp_path / name, size, **options)


def test_without_the_packages_it_says_which_extra_brings_them(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"onnxscript is needed: pip install 'adaptkit-vit\[export\]'"):
        to_onnx(attached(vit, PLAIN), tmp_path / "model.onnx", (32, 32))


def test_without_a_compiler_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match="there is no no-such-compiler on this computer: install one"):
        to_aot_package(attached(vit, PLAIN), tmp_path / "model.pt2", (32, 32))


@slow
@torch.no_grad()
def test_an_aot_package_gives_what_the_model_gives(tmp_path):
    model = attached(vit, PLAIN)
    path = to_aot_package(model, tmp_path / "model.pt2", (32, 32))
    image = torch.randn(3, 3, 32, 32)
    close(torch._inductor.aoti_load_package(str(path))(image)[0], model(image).tokens)


def test_the_command_line_exports_a_saved_folder(tmp_path, capsys):
    hf_dinov2().save_pretrained(tmp_path / "backbone")
    backbone = adaptkit.create.create_backbone(str(tmp_path / "backbone"))
    adaptkit.attach(backbone, PLAIN).save(tmp_path / "saved")
    out = tmp_path / "model.pt2"
    here = ["--backbone", str(tmp_path / "backbone")]  # a path that a file names is not followed
    assert (
        main(
            [
                "export",
                str(tmp_path / "saved"),
                "--out",
                str(out),
                "--size",
                "56",
                "56",
                "--outputs",
                "prefix",
                "tokens",
                *here,
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "agrees with the model" in said
    assert "tokens, prefix" in said
    assert out.is_file()
    assert main(["export", str(tmp_path / "saved"), "--out", "model.tflite", *here]) == 2
    assert "give a name that ends in .onnx or .pt2" in capsys.readouterr().err
