"""What the text of every method promises: hooks are called, and transforms, derivatives and compilers work on it.

The text is what runs where somebody looks: hooks, ``torch.func``, second derivatives, checkpoints, ``torch.compile``.
"""

import sys
from pathlib import Path

import pytest
import torch
import torch._inductor as inductor
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parent))
from errors import assert_rounds_to, one_rounding_off, transformer
from families import DIM, HEADS, randomise
from reference import image, stir

import adaptkit
from adaptkit.adapters.base import SideAdapter
from adaptkit.mixers import list_mixers
from adaptkit.model.trainable import tensors_in

SIDE, PATCH, DEPTH = 64, 8, 2
SMALL = {"conv_inplane": 8, "interaction_indexes": [[0, 0], [1, 1]], "extra_extractors": 1, "drop_path": 0.0}
LIGHT = {**SMALL, "add_vit_feature": None, "extra_extractors": 0, "with_cffn": False, "strides": (8, 16, 32)}
CLASS = {"patch_policy": "class", "head_mode": "partial", "bottleneck": 4, "last_block": "class"}
ADAPTERS = {
    "vit-adapter": ("vit-adapter", SMALL),
    "vit-adapter-extract-only": ("vit-adapter", {**SMALL, "injector": False, "norm": "group"}),
    **{f"vit-adapter-{m}": ("vit-adapter", {**LIGHT, "attention": m}) for m in list_mixers() if m != "msda"},
    "vit-split": ("vit-split", {}),
    "sfp": ("sfp", {}),
    "adavit": ("adavit", {"execution": "masked"}),
    "adavit-class": ("adavit", {"execution": "masked", **CLASS}),
    **{
        f"dat-{mode}-{bias}": ("dat", {"mode": mode, "bias": bias})
        for mode in ("add", "replace")
        for bias in ("table", "log-cpb")
    },
    **{f"metaformer-{m}": ("metaformer", {"width": 8, "mixer": m}) for m in list_mixers()},
    "metaformer-gate": ("metaformer", {"width": 0, "norm": "group1"}),
    "lora": ("lora", {"r": 2}),
}
FPN = ("fpn", {"num_classes": 3, "channels": 8, "dropout": 0.0})
HEADS_TRIED = {
    "linear": ("linear", {"num_classes": 3}),
    "classifier": ("classifier", {"num_classes": 3}),
    "depth": ("depth", {"max_depth": 80.0, "bins": 4, "channels": 8}),
}
PLAIN_MASK = ("plain-mask", {"num_classes": 3, "num_q": 4, "num_blocks": 2})
CASES = [
    *(pytest.param(name, FPN, id=name) for name in ADAPTERS),
    *(pytest.param("sfp", head, id=f"sfp-{name}") for name, head in HEADS_TRIED.items()),
    pytest.param("lora", PLAIN_MASK, id="lora-plain-mask"),
]
every_adapter = pytest.mark.parametrize("adapter", ADAPTERS)
every_case = pytest.mark.parametrize(("adapter", "head"), CASES)
# Of the backbone's blocks, and as many again of the adapter.
SUMS = transformer(2 * DEPTH, DIM, (SIDE // PATCH) ** 2 + 1)


def attach(adapter, head=None, depth=DEPTH, **options):
    sizes = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": DIM, "depth": depth, "num_heads": HEADS}
    torch.manual_seed(0)
    host = randomise(VisionTransformer(**sizes, num_classes=3))
    name, own = ADAPTERS[adapter]
    torch.manual_seed(0)
    return stir(adaptkit.attach(host, (name, {**own, **options}), head=head), 0)


def outputs(model, x) -> list[Tensor]:
    """What a model says, its draws from one seed."""
    torch.manual_seed(1)
    features = model(x)
    return list(tensors_in([features.tokens, *features.maps, features.logits]))


def scalar(tensors: list[Tensor]) -> Tensor:
    """One number that depends on all of them, and bends."""
    g = torch.Generator().manual_seed(2)
    return sum((t.sin() * torch.randn(t.shape, generator=g).to(t)).mean() for t in tensors)


def trained(model) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def quiet(model):
    """In training, but the norms of a batch as in eval mode: the statistics of a transform would be written in place."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


# ----------------------------------------------------------------------------------------------------------- hooks


def owners(model) -> dict[str, nn.Module]:
    """Modules of the adapter and the head that own a parameter."""
    own = {id(p) for p in trained(model).values()}
    return {
        n: m for n, m in model.named_modules() if any(p is not None and id(p) in own for p in m._parameters.values())
    }


@every_case
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.filterwarnings("ignore:the head")
def test_every_module_that_owns_parameters_is_called(adapter, head, training):
    model, x, called = attach(adapter, head), image(SIDE), []
    parts = owners(model)
    hooks = [m.register_forward_hook(lambda *_, n=n: called.append(n)) for n, m in parts.items()]
    with torch.set_grad_enabled(training):
        hooked = outputs(model.train(training), x)
        for hook in hooks:
            hook.remove()
        assert sorted(set(parts) - set(called)) == []
        moved = outputs(attach(adapter, head).train(training), one_rounding_off(x))
        assert_rounds_to(hooked, outputs(attach(adapter, head).train(training), x), *SUMS, moved=moved)


@every_case
@pytest.mark.filterwarnings("ignore:the head")
def test_backward_hooks_are_called(adapter, head):
    """Of what a side adapter returns, torch's hook sees the tensors of the tuple, and its maps lie deeper."""
    model, called = attach(adapter, head).train(), set()
    parts = {name: module for name, module in owners(model).items() if not isinstance(module, SideAdapter)}
    for name, module in parts.items():
        module.register_full_backward_hook(lambda *_, n=name: called.add(n))
    scalar(outputs(model, image(SIDE))).backward()
    assert sorted(set(parts) - called) == []


# ----------------------------------------------------------------------------------------------------- derivatives


@every_adapter
def test_torch_func_says_what_autograd_says(adapter):
    model, x = quiet(attach(adapter, FPN)), image(SIDE)

    def loss(parameters, x):
        return scalar(outputs(lambda x: torch.func.functional_call(model, parameters, (x,)), x))

    parameters = trained(model)
    found = torch.func.grad(loss)({n: p.detach() for n, p in parameters.items()}, x)
    with adaptkit.reference():
        expected, moved = (
            torch.autograd.grad(scalar(outputs(model, x)), list(parameters.values())) for x in (x, one_rounding_off(x))
        )
    assert_rounds_to(list(found.values()), expected, *SUMS, *SUMS, moved=moved)


def penalty(model, x) -> list[Tensor]:
    """The gradients of a norm of gradients. torch's flash attention has no second derivative, its formula has."""
    parameters = list(trained(model).values())
    with sdpa_kernel(SDPBackend.MATH):
        first = torch.autograd.grad(scalar(outputs(model, x)), parameters, create_graph=True)
    made = torch.autograd.grad(sum(g.square().sum() for g in first), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(made, parameters)]


@every_adapter
def test_second_derivatives_are_those_of_the_reference(adapter):
    model, x = quiet(attach(adapter, FPN)), image(SIDE)
    found = penalty(model, x)
    with adaptkit.reference():
        expected, moved = penalty(model, x), penalty(model, one_rounding_off(x))
    assert any(g.any() for g in found)
    assert_rounds_to(found, expected, *4 * SUMS, moved=moved)


# ------------------------------------------------------------------------------------------------------ checkpoints


def flat(features) -> list[Tensor]:
    return [features.tokens, *features.maps, features.logits]


def gradients(run, x, parameters) -> list[Tensor]:
    """Of the image and of what is trained; by ``backward``, for a reentrant checkpoint knows no other way."""
    leaves = [x.detach().requires_grad_(), *parameters]
    for leaf in leaves:
        leaf.grad = None
    torch.manual_seed(1)
    scalar(run(leaves[0])).backward()
    return [leaf.grad for leaf in leaves]


@every_adapter
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_a_checkpoint_around_the_model_gives_the_same_gradients(adapter, reentrant):
    model, x = quiet(attach(adapter, FPN)), image(SIDE)
    parameters = list(trained(model).values())

    def run(x):
        return flat(model(x))

    def again(x):
        return checkpoint(lambda x: tuple(run(x)), x, use_reentrant=reentrant)

    moved = gradients(run, one_rounding_off(x), parameters)
    assert_rounds_to(gradients(again, x, parameters), gradients(run, x, parameters), *SUMS, *SUMS, moved=moved)


# -------------------------------------------------------------------------------------------------------- compilers

# The C++ of a ViT-Adapter takes minutes to compile: its graphs, forward and backward, are run as they are.
ONE = "metaformer-identity"
COMPILED = [
    pytest.param("vit-adapter", "aot_eager", id="vit-adapter-aot_eager"),
    *(pytest.param(a, "inductor", id=a, marks=[] if a == ONE else pytest.mark.full) for a in ADAPTERS),
]


@pytest.mark.parametrize(("adapter", "backend"), COMPILED)
def test_compiled_training_says_what_eager_says(adapter, backend):
    torch._dynamo.reset()
    name, _ = ADAPTERS[adapter]
    short = {"vit-adapter": {"interaction_indexes": [[0, 0]]}, "adavit": {"first_block": 0}}.get(name, {})
    model, x = attach(adapter, depth=1, **short).train(), image(SIDE)

    def run(model, x):
        out = outputs(model, x)
        grads = torch.autograd.grad(scalar(out), list(trained(model).values()), allow_unused=True)
        return [*out, *(g for g in grads if g is not None)]

    with inductor.config.patch(fallback_random=True):  # what is drawn is drawn by torch's own generator
        found = run(torch.compile(model, fullgraph=True, backend=backend), x)
    assert_rounds_to(found, run(model, x), *SUMS, *SUMS, moved=run(model, one_rounding_off(x)))
