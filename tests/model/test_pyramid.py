"""``as_pyramid``: an adapted model as the backbone of smp, transformers and torchvision, none of them changed."""

import copy
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import DIM, HOSTS

import adaptkit
from adaptkit import as_pyramid

SMALL = {"conv_inplane": 8}
LABELS = 3


def rand(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def adapted(seed=0, adapter=("vit-adapter", SMALL)):
    """The frozen weights are always the same; ``seed`` draws the adapter."""
    host = HOSTS["timm-vit"].build()
    torch.manual_seed(seed)
    return adaptkit.attach(host, adapter).train()


def swin():
    from timm.models.swin_transformer import SwinTransformer

    torch.manual_seed(0)
    sizes = {"patch_size": 4, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4), "window_size": 4}
    return SwinTransformer(img_size=64, num_classes=0, **sizes)


# ------------------------------------------------------------------------------------------------- the backbones
# name -> (build(pyramid) -> network, loss(network, image) -> scalar, predict(network, image) -> tensors, form)


def smp_network(name):
    def build(pyramid):
        import segmentation_models_pytorch as smp
        from segmentation_models_pytorch.base import SegmentationHead, SegmentationModel
        from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
        from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

        assert smp  # the package itself, as its users import it

        class Network(SegmentationModel):
            requires_divisible_input_shape = name != "unet"

            def __init__(self):
                super().__init__()
                self.encoder, channels = pyramid, pyramid.out_channels
                if name == "unet":
                    self.decoder, width, up = UnetDecoder(channels, decoder_channels=(16, 16, 8, 8, 8)), 8, 1
                elif name == "fpn":
                    self.decoder = FPNDecoder(channels, pyramid_channels=16, segmentation_channels=32)
                    width, up = 32, 4
                else:
                    self.decoder, width, up = UPerNetDecoder(channels, decoder_channels=16), 16, 4
                self.segmentation_head = SegmentationHead(width, LABELS, kernel_size=1, upsampling=up)
                self.classification_head = None
                self.initialize()

        return Network()

    return build


def pixel_loss(network, image):
    logits = network(image)
    assert logits.shape == (image.shape[0], LABELS, *image.shape[-2:])
    return logits.square().mean()


def stand_in(pyramid):
    """transformers builds a backbone by itself: a tiny one of the pyramid's widths, replaced at once."""
    from transformers import ResNetConfig

    stages = [f"stage{i + 1}" for i in range(len(pyramid.channels))]
    sizes = {"hidden_sizes": pyramid.channels, "depths": [1] * len(stages), "embedding_size": 8}
    return ResNetConfig(layer_type="basic", out_features=stages, **sizes)


def upernet(pyramid):
    from transformers import UperNetConfig, UperNetForSemanticSegmentation

    options = {"hidden_size": 16, "auxiliary_channels": 8, "num_labels": LABELS}
    config = UperNetConfig(backbone_config=stand_in(pyramid), auxiliary_in_channels=pyramid.channels[2], **options)
    network = UperNetForSemanticSegmentation(config)
    network.backbone = pyramid
    return network


def upernet_loss(network, image):
    labels = torch.arange(image[:, 0].numel()).view_as(image[:, 0]) % LABELS
    return network(image, labels=labels).loss


def mask2former(pyramid):
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    width = {
        k: 32 for k in ("feature_size", "mask_feature_size", "hidden_dim", "dim_feedforward", "encoder_feedforward_dim")
    }
    layers = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 5}
    config = Mask2FormerConfig(
        backbone_config=stand_in(pyramid), train_num_points=64, num_labels=LABELS, **width, **layers
    )
    network = Mask2FormerForUniversalSegmentation(config)
    network.model.pixel_level_module.encoder = pyramid
    return network


def mask2former_loss(network, image):
    masks = [torch.zeros(2, *image.shape[-2:]) for _ in image]
    for mask in masks:
        mask[0, :20, :20], mask[1, 20:, 20:] = 1, 1
    return network(image, mask_labels=masks, class_labels=[torch.tensor([0, 2])] * len(image)).loss


def with_fpn(pyramid, extra):
    from torchvision.ops import FeaturePyramidNetwork

    backbone = nn.Sequential(OrderedDict(body=pyramid, fpn=FeaturePyramidNetwork(pyramid.channels, 32, extra)))
    backbone.out_channels = 32
    return backbone


SIZES = {"min_size": 40, "max_size": 64, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}


def mask_rcnn(pyramid):
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

    anchors = AnchorGenerator(tuple((s,) for s in (8, 16, 32, 64, 128)), ((0.5, 1.0, 2.0),) * 5)
    few = {"rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 20, "box_score_thresh": 0.0}
    return MaskRCNN(with_fpn(pyramid, LastLevelMaxPool()), LABELS, rpn_anchor_generator=anchors, **few, **SIZES)


def mask_rcnn_without_fpn(pyramid):
    """All maps of a plain ViT have one width: the detector takes them as they are."""
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    assert pyramid.out_channels == DIM
    anchors = AnchorGenerator(tuple((s,) for s in (8, 16, 32, 64)), ((0.5, 1.0, 2.0),) * 4)
    few = {"rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 20, "box_score_thresh": 0.0}
    return MaskRCNN(pyramid, LABELS, rpn_anchor_generator=anchors, **few, **SIZES)


def dense_detector(name):
    def build(pyramid):
        from torchvision.models import detection
        from torchvision.models.detection.anchor_utils import AnchorGenerator
        from torchvision.ops.feature_pyramid_network import LastLevelP6P7

        anchors = AnchorGenerator(tuple((s,) for s in (8, 16, 32, 64, 128)), ((1.0,),) * 5)
        backbone = with_fpn(pyramid, LastLevelP6P7(32, 32))
        options = {"anchor_generator": anchors, "score_thresh": 0.0, "topk_candidates": 20, **SIZES}
        return getattr(detection, name)(backbone, LABELS, **options)

    return build


def detector_loss(network, image):
    height, width = image.shape[-2:]
    mask = torch.zeros(1, height, width, dtype=torch.uint8)
    mask[:, 5:30, 7:28] = 1
    target = {"boxes": torch.tensor([[7.0, 5.0, 28.0, 30.0]]), "labels": torch.tensor([1]), "masks": mask}
    return sum(network(list(image), [target] * len(image)).values())


def detections(network, image):
    found = network(list(image))
    assert sum(len(f["boxes"]) for f in found) > 0
    return [t for f in found for t in f.values()]


def logits_of(network, image):
    output = network(image)
    return [output] if isinstance(output, torch.Tensor) else [v for k, v in output.items() if "logits" in k]


NETWORKS = {
    "smp-unet": (smp_network("unet"), pixel_loss, logits_of, "smp", (45, 61)),
    "smp-fpn": (smp_network("fpn"), pixel_loss, logits_of, "smp", (64, 96)),
    "smp-upernet": (smp_network("upernet"), pixel_loss, logits_of, "smp", (64, 96)),
    "hf-upernet": (upernet, upernet_loss, logits_of, "list", (45, 61)),
    "hf-mask2former": (mask2former, mask2former_loss, logits_of, "hf", (45, 61)),
    "tv-mask-rcnn": (mask_rcnn, detector_loss, detections, "dict", (45, 61)),
    "tv-mask-rcnn-no-fpn": (mask_rcnn_without_fpn, detector_loss, detections, "dict", (45, 61)),
    "tv-retinanet": (dense_detector("RetinaNet"), detector_loss, detections, "dict", (45, 61)),
    "tv-fcos": (dense_detector("FCOS"), detector_loss, detections, "dict", (45, 61)),
}
PACKAGE = {"smp": "segmentation_models_pytorch", "hf": "transformers", "tv": "torchvision"}


def network_for(name, seed=0):
    pytest.importorskip(PACKAGE[name.partition("-")[0]])
    build, *_, form, _ = NETWORKS[name]
    strides = (8, 16, 32) if name in ("tv-retinanet", "tv-fcos") else None
    pyramid = as_pyramid(adapted(seed), out=form, strides=strides)
    return build(pyramid).train(), pyramid


@pytest.mark.parametrize("name", NETWORKS)
def test_it_trains_inside_the_network_and_comes_back_from_the_file(name, tmp_path):
    network, pyramid = network_for(name)
    _, loss, predict, _, size = NETWORKS[name]
    image = rand(2, 3, *size)
    frozen = {k: v.clone() for k, v in pyramid.model.backbone.state_dict().items()}
    adapter = {k: v.clone() for k, v in pyramid.model.adapter_state_dict().items()}
    assert not pyramid.model.backbone.training
    assert {n for n, p in pyramid.named_parameters() if p.requires_grad} == {
        f"model.{n}" for n, _ in pyramid.model.named_parameters() if ".adapters." in n
    }

    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1e-3)
    torch.manual_seed(0)
    value = loss(network, image)
    assert value.isfinite()
    value.backward()
    gradients = [p.grad for p in pyramid.model.adapters.parameters()]
    reached = [g is not None and bool(g.any()) for g in gradients]
    assert sum(reached) > len(reached) / 2  # with gamma = 0 the injectors' inner weights have a gradient of zero
    assert all(p.grad is None for p in pyramid.model.backbone.parameters())
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)  # as DDP demands it
    optimizer.step()
    now = pyramid.model.adapter_state_dict()
    assert any(not torch.equal(adapter[k], now[k]) for k in adapter)
    assert all(torch.equal(v, frozen[k]) for k, v in pyramid.model.backbone.state_dict().items())

    pyramid.save(tmp_path, network, kind=name)
    network.eval()
    with torch.no_grad():
        before = predict(network, image)
    other, inner = network_for(name, seed=7)
    inner.load(tmp_path, other)
    other.eval()
    with torch.no_grad():
        after = predict(other, image)
    assert len(before) == len(after) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    stored = adaptkit.load(tmp_path)
    assert stored.header["metadata"] == {"kind": name}
    assert not any("backbone" in key.replace("backbone.fpn", "") for key in stored.tensors)


# ---------------------------------------------------------------------------------------------------- the module


def test_every_form_holds_the_same_maps():
    model = adapted().eval()
    image = rand(2, 3, 45, 61)
    with torch.no_grad():
        maps = model(image).maps
        as_list = as_pyramid(model)(image)
        as_dict = as_pyramid(model, out="dict", names=("p2", "p3", "p4", "p5"))(image)
        as_smp = as_pyramid(model, out="smp")(image)
        asked = as_pyramid(model).forward_with_filtered_kwargs(image, output_attentions=None).feature_maps
        as_hf = as_pyramid(model, out="hf")(image).feature_maps
    assert isinstance(as_list, list)
    assert list(as_dict) == ["p2", "p3", "p4", "p5"]
    assert as_smp[0] is image
    assert as_smp[1].shape == (2, 0, 23, 31)
    for form in (as_list, tuple(as_dict.values()), as_smp[2:], asked, as_hf):
        assert all(torch.equal(a, b) for a, b in zip(maps, form, strict=True))


def test_strides_choose_maps_and_are_told_in_every_librarys_words():
    pyramid = as_pyramid(adapted(), strides=(8, 32), names=("fine", "coarse"), out="dict")
    shapes = {k: tuple(v.shape) for k, v in pyramid(rand(1, 3, 64, 96)).items()}
    assert shapes == {"fine": (1, DIM, 8, 12), "coarse": (1, DIM, 2, 3)}
    assert pyramid.channels == [DIM, DIM] == pyramid.feature_info.channels()
    assert pyramid.strides == [8, 32] == pyramid.feature_info.reduction()
    assert pyramid.feature_info.module_name() == ["fine", "coarse"] == pyramid.out_features == pyramid.stage_names
    assert pyramid.out_channels == DIM


def test_a_hierarchical_host_has_one_width_per_stage():
    model = adaptkit.attach(swin(), ("metaformer", {"mixer": "pool"}))
    pyramid = as_pyramid(model)
    assert pyramid.channels == [16, 32, 64, 128]
    assert [m.shape[1] for m in pyramid(rand(1, 3, 64, 64))] == pyramid.channels
    assert not hasattr(pyramid, "out_channels")  # torchvision then says what it misses
    assert as_pyramid(model, out="smp").out_channels == [3, 0, 16, 32, 64, 128]


def test_training_mode_is_that_of_the_adapter_and_never_of_the_backbone():
    pyramid = as_pyramid(adapted())
    for mode in (False, True):
        nn.Sequential(pyramid).train(mode)
        assert pyramid.training is mode
        assert pyramid.model.adapters.training is mode
        assert not pyramid.model.backbone.training


def test_it_follows_the_active_adapters_and_says_when_they_make_no_maps():
    model = adapted().eval()
    model.add_adapter("sfp", name="other")
    model.add_adapter(("metaformer", {"mixer": "pool"}), name="flat")
    pyramid = as_pyramid(model)
    image = rand(1, 3, 32, 32)
    first = pyramid(image)
    model.set_adapter("other")
    second = pyramid(image)
    assert [m.shape for m in first] == [m.shape for m in second]
    assert not torch.equal(first[0], second[0])
    model.set_adapter("flat")
    with pytest.raises(RuntimeError, match=r"active adapters \(metaformer\) make 0 maps"):
        pyramid(image)


def test_lora_under_the_pyramid_is_trained_and_saved_with_it(tmp_path):
    def network(seed):
        torch.manual_seed(seed)
        pyramid = as_pyramid(adaptkit.attach(HOSTS["timm-vit"].build(), ("lora", {"r": 2}), ("vit-adapter", SMALL)))
        return nn.ModuleDict({"body": pyramid, "top": nn.Conv2d(DIM, 2, 1)}).train()

    one, image = network(0), rand(2, 3, 32, 32)
    optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1)
    one["top"](one["body"](image)[0]).square().mean().backward()
    optimizer.step()
    one["body"].save(tmp_path, one)
    assert {k.partition(".")[0] for k in adaptkit.load(tmp_path).tensors} == {"lora", "vit-adapter", "head"}
    other = network(1)
    other["body"].load(tmp_path, other)
    one.eval(), other.eval()
    assert torch.equal(one["top"](one["body"](image)[0]), other["top"](other["body"](image)[0]))


def test_it_can_be_copied():
    pyramid = as_pyramid(adapted().eval(), out="smp")
    image = rand(1, 3, 32, 32)
    assert all(torch.equal(a, b) for a, b in zip(pyramid(image), copy.deepcopy(pyramid)(image)))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: as_pyramid(nn.Linear(1, 1)), TypeError, "takes what attach returns, not Linear"),
        (
            lambda: as_pyramid(adapted(adapter=("metaformer", {"mixer": "pool"}))),
            ValueError,
            "VisionTransformer with metaformer makes no maps: attach 'vit-adapter' or 'sfp' as well",
        ),
        (
            lambda: as_pyramid(adaptkit.attach(HOSTS["timm-vit"].build(), "sfp", head=("fpn", {"num_classes": 2}))),
            ValueError,
            r"has a head \(FPNHead\), .*attach without head=",
        ),
        (lambda: as_pyramid(adapted(), strides=(8, 64)), ValueError, r"strides=\[8, 64\]: .* at strides 4, 8, 16, 32"),
        (lambda: as_pyramid(adapted(), strides=(16, 8)), ValueError, r"strides=\[16, 8\]: .*finest first"),
        (lambda: as_pyramid(adapted(), names=("a", "b")), ValueError, "4 maps need 4 different names"),
        (lambda: as_pyramid(adapted(), out="tuple"), ValueError, "out='tuple': choose one of list, dict, hf, smp"),
        (lambda: as_pyramid(adapted(), out="smp", strides=(8, 16)), ValueError, "strides that double from 4 on"),
    ],
)
def test_what_does_not_fit_is_a_clear_error(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_file_of_another_network_is_refused_and_changes_nothing(tmp_path):
    pyramid = as_pyramid(adapted())
    network = nn.Sequential(OrderedDict(body=pyramid, top=nn.Linear(2, 3)))
    pyramid.save(tmp_path, network)
    other = as_pyramid(adapted(seed=5))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"beside the pyramid: top.weight has shape \(3, 2\)"):
        other.load(tmp_path, nn.Sequential(OrderedDict(body=other, top=nn.Linear(4, 3))))
    with pytest.raises(ValueError, match="2 are not expected"):
        other.load(tmp_path)
    with pytest.raises(ValueError, match="not inside the Linear given"):
        other.load(tmp_path, nn.Linear(2, 3))
    sfp = as_pyramid(adapted(adapter="sfp"))
    with pytest.raises(ValueError, match=r"holds vit-adapter, this model has sfp; attach what the file holds"):
        sfp.load(tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_the_adapter_alone_is_the_models_own_file(tmp_path):
    pyramid = as_pyramid(adapted())
    pyramid.save(tmp_path / "a", task="maps")
    pyramid.model.save(tmp_path / "b", task="maps")
    name = "adapter_model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_attaching_the_file_of_a_network_says_how_it_is_loaded(tmp_path):
    pyramid = as_pyramid(adapted())
    network = nn.Sequential(pyramid, nn.Linear(2, 3))
    pyramid.save(tmp_path, network)
    for head in (None, nn.Identity()):
        with pytest.raises(ValueError, match=r"holds a network around the adapter \(.*Sequential\): build it around"):
            adaptkit.attach(HOSTS["timm-vit"].build(), tmp_path, head=head)
    model = adaptkit.attach(HOSTS["timm-vit"].build(), tmp_path, head=("fpn", {"num_classes": 2}))
    snippet = (tmp_path / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    assert "Sequential that it was trained in" in snippet
    code = snippet.replace("path/to/this/folder", str(tmp_path)).replace("backbone = ...", "backbone = host()")
    made = {"host": HOSTS["timm-vit"].build, "around": lambda p: nn.Sequential(p, nn.Linear(2, 3))}
    exec(code.replace("network = ...", "network = around(pyramid)"), made)
    assert not made["network"].training
    assert torch.equal(made["network"][1].weight, network[1].weight)
    own = pyramid.model.adapter_state_dict()
    assert all(torch.equal(model.adapter_state_dict()[k], v) for k, v in own.items())  # the adapters, without it
