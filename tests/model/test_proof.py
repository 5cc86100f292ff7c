"""A view is proven against its backbone: every known one passes untouched, every look-alike is refused or seen as it is."""

import copy
import importlib.util
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import DEPTH, DIM, HEADS, HOSTS, randomise
from timm.layers import Attention, DiffAttention, Mlp
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import Block, VisionTransformer

import adaptkit
from adaptkit.core.registry import view
from adaptkit.model.proof import prove

transformers = pytest.importorskip("transformers")
_spec = importlib.util.spec_from_file_location(
    "hierarchical", Path(__file__).parents[1] / "backbones/test_hierarchical.py"
)
hierarchical = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hierarchical)
EVERY = {name: host.build for name, host in HOSTS.items()} | hierarchical.HOSTS
every = pytest.mark.parametrize("name", sorted(EVERY))
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS, "num_classes": 5}


def vit(cls=VisionTransformer, **options):
    torch.manual_seed(0)
    return randomise(cls(**{**SIZES, **options}))


def with_dropout(host):
    """In training mode, every dropout and stochastic depth at a half."""
    for module in host.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
        for name in ("drop_prob", "attention_dropout"):
            if name in vars(module):
                setattr(module, name, 0.5)
    return host


def everything(host):
    """Each module's own attributes and tensors, by identity where they have one, and values of the tensors."""
    tensors = dict(host.named_parameters()) | dict(host.named_buffers())
    attributes = {
        f"{name}.{key}": (id(value), len(value) if isinstance(value, dict | list) else 0)
        for name, module in host.named_modules()
        for key, value in vars(module).items()
    }
    return attributes, {k: (id(t), t._version, t.dtype, t.requires_grad) for k, t in tensors.items()}


# -- what computes what it seems to --------------------------------------------------------------------------------


@every
def test_every_known_host_is_accepted_and_its_attention_comes_apart_as_before(name):
    seen = view(EVERY[name]())
    splits = getattr(seen, "splits", None)
    prove(seen)
    assert getattr(seen, "splits", None) == splits


@every
def test_a_host_in_training_mode_with_dropout_is_left_as_it_was_to_the_bit(name):
    host = with_dropout(EVERY[name]())
    before, values, rng = everything(host), copy.deepcopy(host.state_dict()), torch.get_rng_state()
    prove(view(host))
    assert everything(host) == before
    assert all(torch.equal(v, values[k]) for k, v in host.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(module.training for module in host.modules())


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_host_in_another_precision_is_accepted(name, dtype):
    host = EVERY[name]().to(dtype)
    prove(view(host))
    assert all(p.dtype == dtype for p in host.parameters())


@pytest.mark.parametrize("name", ["timm-vit", "timm-dinov3", "timm-beit", "hf-dinov2", "hf-clip", "swin"])
def test_hooks_of_the_user_neither_run_nor_vanish(name):
    host = EVERY[name]()
    ran = []
    for module in host.modules():
        module.register_forward_hook(lambda *given: ran.append("after"))
        module.register_forward_pre_hook(lambda *given: ran.append("before"))
    prove(view(host))
    assert not ran
    assert all(module._forward_hooks and module._forward_pre_hooks for module in host.modules())


def test_weights_that_are_nan_are_no_difference():
    host = vit()
    with torch.no_grad():
        host.blocks[1].mlp.fc1.weight[0] = float("nan")
        host.pos_embed[0, 3] = float("nan")
    prove(view(host))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["timm-vit", "timm-dinov3", "timm-beit"])
def test_either_implementation_of_attention_is_accepted(name, fused):
    host = EVERY[name]()
    for block in host.blocks:
        block.attn.fused_attn = fused
    seen = view(host)
    prove(seen)
    assert seen.splits


@pytest.mark.parametrize("name", ["timm-vit", "timm-rope-mixed", "hf-vit", "poolformer"])
def test_a_host_without_weights_is_passed_over(name):
    prove(view(EVERY[name]().to("meta")))


def test_a_host_of_fake_tensors_is_passed_over():
    from torch._subclasses.fake_tensor import FakeTensorMode

    host, mode = vit(), FakeTensorMode()
    for module in host.modules():
        for name, p in module._parameters.items():
            module._parameters[name] = None if p is None else nn.Parameter(mode.from_tensor(p))
    prove(view(host))


@pytest.mark.parametrize("name", ["hf-vit", "hf-vit-mae", "hf-siglip", "hf-clip", "hf-dinov2", "hf-beit"])
def test_a_size_that_is_no_multiple_of_the_patch_is_tried_on_what_the_host_keeps_of_it(name):
    """SigLIP so400m: 384 pixels by patches of 14."""
    config = HOSTS[name].build().config
    config.image_size += config.patch_size // 2
    prove(view(randomise(type(HOSTS[name].build())(config))))


def test_a_size_that_is_no_multiple_of_the_patch_is_tried_in_timm_too():
    prove(view(vit(img_size=38)))
    prove(view(vit(img_size=38, dynamic_img_size=True)))


def test_gradient_checkpointing_is_no_difference():
    host = vit().train()
    host.set_grad_checkpointing(True)
    prove(view(host))
    assert host.grad_checkpointing
    host = HOSTS["hf-vit"].build().train()
    host.gradient_checkpointing_enable()
    prove(view(host))
    assert host.is_gradient_checkpointing


class Renamed(VisionTransformer):
    """Another name, and code of its own that computes the same."""

    def forward_features(self, x, attn_mask=None, is_causal=False):
        x = self.norm_pre(self._pos_embed(self.patch_embed(x)))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, x):
        return {"tokens": self.forward_features(x)}


def test_a_subclass_that_computes_the_same_is_accepted():
    prove(view(vit(Renamed)))


def test_a_method_put_on_one_object_that_computes_the_same_is_accepted():
    host = vit()
    host.forward_features = types.MethodType(Renamed.forward_features, host)
    host.blocks[0].forward = types.MethodType(Block.forward, host.blocks[0])
    prove(view(host))


def test_a_small_model_of_peft_is_accepted():
    import peft

    host = peft.get_peft_model(vit(), peft.LoraConfig(target_modules=["qkv", "fc1"], lora_dropout=0.5))
    seen = view(host.train())
    prove(seen)
    assert seen.splits


# -- what does not -------------------------------------------------------------------------------------------------


class Positions(VisionTransformer):
    def _pos_embed(self, x):
        return super()._pos_embed(x) + 0.02


class OtherPositionsElsewhere(VisionTransformer):
    """The same at its own size; bilinear at another."""

    def _pos_embed(self, x):
        side = self.patch_embed.grid_size[0]
        if x.shape[1:3] == (side, side):
            return super()._pos_embed(x)
        cls, table = self.pos_embed[:, :1], self.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        table = nn.functional.interpolate(table, x.shape[1:3], mode="bilinear").flatten(2).mT
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(1, 2)], 1) + torch.cat([cls, table], 1)


class SkipsTheLast(VisionTransformer):
    def forward_features(self, x):
        x = self.norm_pre(self._pos_embed(self.patch_embed(x)))
        return self.norm(self.blocks[:-1](x))


class Twice(VisionTransformer):
    def forward_features(self, x):
        x = self.norm_pre(self._pos_embed(self.patch_embed(x)))
        for block in self.blocks:
            x = block(block(x))
        return self.norm(x)


class MeanOfTwo(VisionTransformer):
    def forward_features(self, x):
        x = self.norm_pre(self._pos_embed(self.patch_embed(x)))
        outs = []
        for block in self.blocks:
            x = block(x)
            outs.append(x)
        return self.norm((outs[-1] + outs[-2]) / 2)


class Masked(VisionTransformer):
    def forward_features(self, x):
        x = self.norm_pre(self._pos_embed(self.patch_embed(x)))
        n = x.shape[1]
        mask = torch.zeros(n, n).masked_fill(torch.eye(n) > 0, -9.0)
        for index, block in enumerate(self.blocks):
            x = block(x, attn_mask=mask if index == 2 else None)
        return self.norm(x)


class Causal(VisionTransformer):
    def forward_features(self, x):
        return super().forward_features(x, is_causal=True)


class Normalising(VisionTransformer):
    def forward(self, x):
        return super().forward(x * 2 - 1)


class LogitsOfItsOwn(VisionTransformer):
    def forward(self, x):
        return super().forward(x).softmax(-1)


class NormOfItsOwn(VisionTransformer):
    def __init__(self, **options):
        super().__init__(**options)
        self.last = nn.LayerNorm(DIM)

    def forward_features(self, x):
        return self.last(super().forward_features(x))


class EvaPositions(Eva):
    def _pos_embed(self, x):
        x, rope = super()._pos_embed(x)
        return x, None if rope is None else rope.flip(0)


class BeitTwice(Beit):
    def forward_features(self, x):
        return super().forward_features(x) * 1.01


LOOK_ALIKES = {
    "positions": (partial(vit, Positions), "tokens before block 0.* differ by"),
    "positions of the other size": (
        partial(vit, OtherPositionsElsewhere, dynamic_img_size=True),
        "tokens before block 0.*24x40 pixels differ by",
    ),
    "last block skipped": (partial(vit, SkipsTheLast), r"blocks that run \(0, 1, 2; by the view 0, 1, 2, 3\)"),
    "blocks run twice": (partial(vit, Twice), r"blocks that run \(0, 0, 1, 1, 2, 2, 3, 3"),
    "mean of two blocks": (partial(vit, MeanOfTwo), "final norm.* differ by"),
    "a mask for one block": (partial(vit, Masked), "arguments of block 2"),
    "causal": (partial(vit, Causal), "arguments of block 0"),
    "image normalised inside": (partial(vit, Normalising), "what it returns .* differ by"),
    "image normalised inside, no classifier": (
        partial(vit, Normalising, num_classes=0),
        "what it returns .* differ by",
    ),
    "logits of its own": (partial(vit, LogitsOfItsOwn), "what it returns .* differ by"),
    "a norm more": (partial(vit, NormOfItsOwn), "final norm.* differ by"),
    "rope of its own": (partial(vit, EvaPositions, use_rot_pos_emb=True), "arguments of block 0"),
    "beit": (partial(vit, BeitTwice), "differ by 1"),
}


@pytest.mark.parametrize("kind", LOOK_ALIKES)
def test_a_subclass_that_computes_something_else_is_refused(kind):
    build, message = LOOK_ALIKES[kind]
    host = build()
    with pytest.raises(TypeError, match=f"{type(host).__qualname__} is not what .*{message}.*register_family"):
        prove(view(host))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e-5, 1.0])
def test_a_block_with_another_forward_is_refused_however_little_it_adds(scale, dtype):
    class Scaled(Block):
        def forward(self, x):
            x = x + self.ls1(self.attn(self.norm1(x)))
            return x + self.ls2(self.mlp(self.norm1(x)))

    host = VisionTransformer(**SIZES, init_values=scale, block_fn=Scaled).to(dtype)
    with pytest.raises(TypeError, match=r"block 0 \(Scaled\) .* differ by"):
        prove(view(host))


def test_one_block_that_differs_is_named():
    host = vit()
    host.blocks[2].forward = types.MethodType(lambda self, x: Block.forward(self, x) * 1.1, host.blocks[2])
    with pytest.raises(TypeError, match=r"block 2 \(Block\) .* differ by"):
        prove(view(host))


def test_a_forward_put_on_the_object_is_seen():
    host = vit()
    host.forward_features = types.MethodType(Twice.forward_features, host)
    with pytest.raises(TypeError, match="blocks that run"):
        prove(view(host))


def test_a_forward_that_cannot_run_is_refused_with_its_error():
    class Two(VisionTransformer):
        def forward_features(self, x, camera):
            return super().forward_features(x)

    with pytest.raises(TypeError, match=r"could not be run on an image of 32x32 pixels: .*camera.*register_family"):
        prove(view(vit(Two)))


def _hf(name, **methods):
    host = HOSTS[name].build()
    host.__class__ = type("Mine", (type(host),), methods)
    return host


def test_a_transformers_subclass_with_another_forward_is_refused():
    def forward(self, pixel_values, **options):
        return type(self).__mro__[1].forward(self, pixel_values * 2, **options)

    for name in ("hf-vit", "hf-vit-mae", "hf-dinov2", "hf-dinov3", "hf-clip", "hf-siglip", "hf-beit"):
        with pytest.raises(TypeError, match=r"Mine is not what .*tokens before block 0.* differ by"):
            prove(view(_hf(name, forward=forward)))


def test_a_transformers_layer_with_another_forward_is_refused():
    host = HOSTS["hf-vit"].build()
    for layer in host.layers:
        layer.__class__ = type("Mine", (type(layer),), {"forward": lambda self, x, mask=None: self.mlp(x) + x})
    with pytest.raises(TypeError, match=r"block 0 \(Mine\)"):
        prove(view(host))


def test_a_swin_block_of_its_own_is_refused():
    host = hierarchical._swin()
    block = host.layers[1].blocks[1]
    block._attn = types.MethodType(lambda self, x: type(self)._attn(self, x) * 1.1, block)
    with pytest.raises(TypeError, match="block 3 .* differ by"):
        prove(view(host))


def test_a_swin_with_a_forward_of_its_own_is_refused():
    class Mine(SwinTransformer):
        def forward_features(self, x):
            return super().forward_features(x) * 1.1

    host = hierarchical._swin()
    host.__class__ = Mine
    with pytest.raises(
        TypeError, match=r"Mine is not what TimmSwin sees .*adaptkit\.core\.hierarchical\.HierarchicalViT"
    ):
        prove(view(host))


# -- the inside of an attention ------------------------------------------------------------------------------------


class Gated(Attention):
    """A gate for each head that nothing tells the view of."""

    def forward(self, x, attn_mask=None, is_causal=False):
        return super().forward(x) * torch.sigmoid(x)


def _scaled(self, x, attn_mask=None, is_causal=False):
    q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return self.proj(((q @ k.mT * 0.9).softmax(-1) @ v).transpose(1, 2).flatten(2))


def _patched():
    host = vit()
    host.blocks[3].attn.forward = types.MethodType(_scaled, host.blocks[3].attn)
    return host


def _transformers():
    host = HOSTS["hf-dinov2"].build()
    for layer in host.encoder.layer:
        cls = type(layer.attention)
        again = {"forward": lambda self, x, *a, cls=cls, **k: (cls.forward(self, x)[0] * 2, None)}
        layer.attention.__class__ = type("Mine", (cls,), again)
    return host


ATTENTIONS = {
    "differential": partial(vit, attn_layer=DiffAttention),
    "differential, by name": partial(vit, attn_layer="diff"),
    "gated by a subclass": partial(vit, attn_layer=Gated),
    "gated by a subclass, normed": partial(vit, attn_layer=Gated, qk_norm=True),
    "another scale in one block": _patched,
    "of transformers": _transformers,
    "gated EVA": lambda: _gated_eva(),
}


def _gated_eva():
    from timm.models.eva import EvaBlock

    host = HOSTS["timm-eva02"].build()
    for i in range(DEPTH):
        host.blocks[i] = randomise(EvaBlock(DIM, HEADS, gated_attn=True, norm_layer=nn.LayerNorm))
    return host


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_an_attention_that_only_looks_plain_is_run_as_a_whole_and_not_entered(kind):
    seen = view(ATTENTIONS[kind]())
    prove(seen)
    assert not seen.splits


def test_a_beit_whose_attention_is_another_is_refused_for_its_view_computes_it_at_other_sizes():
    host = HOSTS["timm-beit"].build()
    cls = type(host.blocks[0].attn)
    again = {"forward": lambda self, x, shared_rel_pos_bias=None: cls.forward(self, x) * 2}
    host.blocks[1].attn.__class__ = type("Mine", (cls,), again)
    with pytest.raises(TypeError, match="is how this view computes it on other grids"):
        prove(view(host))


def test_a_module_that_is_called_mlp_is_not_taken_for_timms():
    class Squared(Mlp):
        def forward(self, x):
            return super().forward(x) ** 2

    Squared.__name__ = "Mlp"
    seen = view(vit(mlp_layer=Squared))
    prove(seen)
    assert seen.splits
    assert seen.begin(torch.zeros(1, 3, 32, 32))[1][0].mlp_layers() is None


# -- what no view sees ---------------------------------------------------------------------------------------------


def test_parallel_blocks_are_proven_and_their_attention_does_not_come_apart():
    from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock, ParallelThingsBlock

    for kind in (ParallelScalingBlock, ParallelThingsBlock, DiffParallelScalingBlock):
        host = vit(block_fn=kind)
        with pytest.raises(TypeError, match="does not come apart"):
            adaptkit.attach(host, "adavit")
        adaptkit.attach(host, "sfp").detach()


def test_hybrids_are_proven():
    import timm

    host = timm.create_model("vit_tiny_r_s16_p8_224", depth=1, embed_dim=DIM, num_heads=HEADS, num_classes=0)
    prove(view(host))


def test_a_method_put_around_another_is_no_reason_to_refuse_what_is_in_it():
    """``old = attn.forward; attn.forward = lambda x: old(x)``: a copy of the tree still runs the original's method."""
    host, x = vit(), torch.randn(1, 3, 32, 32)
    for block in host.blocks:
        old = block.attn.forward
        block.attn.forward = lambda h, old=old, **given: old(h, **given)
        outer = block.mlp.forward

        def again(h, outer=outer):
            return outer(h) if again else h

        block.mlp.forward = again
    model = adaptkit.attach(host, ("lora", {"target_modules": ["qkv", "fc1"], "init_lora_weights": False}))
    with model.disable_adapter():
        plain = model(x).tokens
    assert not torch.equal(model(x).tokens, plain)


def test_blocks_that_mix_the_images_of_a_batch_are_refused():
    host = vit()
    old = host.blocks[1].forward
    host.blocks[1].forward = lambda x, **given: old(x, **given) + x.mean(0, keepdim=True) * (len(x) > 1)
    with pytest.raises(TypeError, match="block 1 .* of its parts differ"):
        prove(view(host))


def test_a_part_of_another_kind_than_the_class_has_is_a_type_error_with_a_remedy():
    host = vit()
    host.patch_embed.proj = nn.Sequential(host.patch_embed.proj)
    with pytest.raises(TypeError, match="is not built as .*VisionTransformer: .*'weight'. Hand over one"):
        view(host)
