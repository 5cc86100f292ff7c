"""Every method that the installed peft has: in a frozen backbone, or refused by name with the reason.

peft itself is asked for its list, so that a method of a newer version fails here until it stands in one of the tables.
"""

import copy
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS

import adaptkit
from adaptkit.adapters.lora.methods import PARAMETER, REFUSED_TYPES, SHARED, TYPES, UNMERGED
from adaptkit.core.registry import view
from adaptkit.interop import to_peft

#: Options for a width of 32, where peft's defaults are for thousands.
SMALL = {
    "OFT": {"oft_block_size": 4}, "BOFT": {"boft_block_size": 4}, "MISS": {"r": 4}, "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4}, "C3A": {"block_size": 8}, "VBLORA": {"vector_length": 8, "num_vectors": 16, "topk": 2},
    "VERA": {"r": 8}, "PVERA": {"r": 8}, "FOURIERFT": {"n_frequency": 50}, "WAVEFT": {"n_frequency": 50},
}  # fmt: skip
#: How far the output is from the frozen one just attached: 0, the rounding of a matrix made anew, or a random bank.
STARTS = {"HRA": 1e-5, "DEFT": 1e-5, "FROD": 1e-5, "OSF": 1e-5, "PSOFT": 1e-5, "UNILORA": 1e-2, "VBLORA": 1e-2}
#: Dynamo does not follow peft's own code of these: a sparse matrix, a lookup of a wavelet.
UNTRACED = ("FROD", "SHIRA", "WAVEFT")

pytestmark = pytest.mark.filterwarnings(
    "ignore:Failed to load the CUDA extension", "ignore:Setting boft_n_butterfly_factor"
)
every = pytest.mark.parametrize("kind", TYPES)
x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def host(name="timm-vit", blocks=2):
    """A backbone of two blocks: what layers share is shared by two."""
    backbone = HOSTS[name].build()
    del (backbone.blocks if name.startswith("timm") else backbone.encoder.layer)[blocks:]
    return backbone


def attached(kind, name="timm-vit", **options):
    torch.manual_seed(1)
    return adaptkit.attach(host(name), "lora", peft_type=kind, **SMALL.get(kind, {}), **options)


def stirred(model):
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=g))
    return model.eval()


def test_pefts_own_list_is_in_the_tables_each_method_once():
    assert {kind.value for kind in peft.PeftType} == TYPES.keys() | REFUSED_TYPES.keys()
    assert not TYPES.keys() & REFUSED_TYPES.keys()


@pytest.mark.parametrize("kind", REFUSED_TYPES)
def test_what_is_no_change_of_a_layer_is_refused_by_name_with_the_reason(kind):
    with pytest.raises(ValueError, match=f"peft_type='{kind}' is no method that works layer by layer") as caught:
        adaptkit.attach(host(), "lora", peft_type=kind)
    assert REFUSED_TYPES[kind] in str(caught.value)


def test_a_name_that_is_misspelt_is_answered_with_the_one_that_is_meant():
    with pytest.raises(ValueError, match="did you mean 'RANDLORA'"):
        adaptkit.attach(host(), "lora", peft_type="randlra")


@every
def test_it_starts_at_the_frozen_model_and_every_parameter_is_trained(kind):
    model, plain = attached(kind), view(host()).features(x).tokens
    assert (model.eval()(x).tokens - plain).abs().max() <= STARTS.get(kind, 0)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.SGD(trained.values(), lr=1e-2)
    before = copy.deepcopy(model.backbone.state_dict())
    for _ in range(3):
        optimiser.zero_grad()
        model.train()(x).tokens.square().sum().backward()
        optimiser.step()
        assert not [n for n, p in trained.items() if p.grad is None]
    stuck = [n for n, p in trained.items() if not p.grad.any()]
    assert not stuck
    assert all(torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items())
    assert all(PARAMETER.search(n) for n in trained), "a parameter whose name is not known is lost on its way to peft"


@every
@torch.no_grad()
def test_what_is_saved_and_attached_elsewhere_says_the_same_and_a_copy_does(kind, tmp_path):
    model = stirred(attached(kind))
    expected = model(x).tokens
    model.save(tmp_path)
    torch.manual_seed(99)  # nothing of the file is drawn again
    assert torch.equal(adaptkit.attach(host(), tmp_path)(x).tokens, expected)
    other = copy.deepcopy(model)
    assert torch.equal(other(x).tokens, expected)
    for p in other.adapters.parameters():
        p.add_(1)
    assert torch.equal(model(x).tokens, expected)
    untouched = host().state_dict()
    assert (expected - view(host()).features(x).tokens).abs().max() > 1e-4
    detached = model.detach().state_dict()
    assert list(detached) == list(untouched)
    assert all(torch.equal(v, untouched[k]) for k, v in detached.items())


@every
@torch.no_grad()
def test_it_merges_where_peft_merges_it_and_back_exactly(kind):
    model = stirred(attached(kind))
    expected = model(x).tokens
    if kind in UNMERGED:
        with pytest.raises(TypeError, match="LILY cannot be merged"):
            model.merge_adapter()
    else:
        model.merge_adapter()
        torch.testing.assert_close(model(x).tokens, expected, atol=1e-4, rtol=1e-4)
        model.unmerge_adapter()
    assert torch.equal(model(x).tokens, expected)


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind not in SHARED])
@torch.no_grad()
def test_peft_loads_what_is_exported(kind, tmp_path):
    model = stirred(attached(kind))
    expected = model(x).tokens
    to_peft(model, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(host(), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs.forward_features(x)[:, 1:], expected, atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(adaptkit.attach(host(), tmp_path / "theirs")(x).tokens, expected)


@pytest.mark.parametrize("kind", SHARED)
def test_what_layers_share_is_not_in_pefts_layout_and_the_error_says_so(kind, tmp_path):
    with pytest.raises(ValueError, match=f"{kind} has tensors that all layers share"):
        to_peft(attached(kind), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["VERA", "RANDLORA", "VBLORA"])
def test_what_layers_share_is_in_the_file_once_and_moves_with_the_model(kind):
    model = attached(kind)
    shared = [k for k in model.adapter_state_dict() if k.startswith("lora.shared.")]
    assert shared
    names = {k.split(".")[2] for k in shared}
    assert not [k for k in model.adapter_state_dict() if ".layers." in k and any(n in k for n in names)]
    assert model.double()(x.double()).tokens.dtype == torch.float64


@every
@pytest.mark.full
def test_it_is_one_graph_under_compile_unless_the_table_says_why_not(kind):
    torch._dynamo.reset()
    model = stirred(attached(kind))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    if kind in UNTRACED:
        with pytest.raises(Exception, match=r"Dynamo|Unsupported|data-dependent"):
            compiled(x)
    else:
        torch.testing.assert_close(compiled(x).tokens, model(x).tokens, atol=1e-5, rtol=1e-5)


@every
def test_it_acts_in_the_layers_of_transformers_too(kind):
    side = HOSTS["hf-dinov2"].size
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    model = attached(kind, "hf-dinov2")
    with torch.no_grad():
        plain = view(host("hf-dinov2")).features(image).tokens
        assert (stirred(model)(image).tokens - plain).abs().max() > 1e-4


def test_ln_tuning_is_in_the_norms_of_the_blocks_by_default_and_in_those_that_are_named():
    paths = list(attached("LN_TUNING").adapters["lora"].proxies)
    assert paths == ["blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2"]
    assert list(attached("LN_TUNING", target_modules=["norm"]).adapters["lora"].proxies) == ["norm"]
    with pytest.raises(ValueError, match="no norm named 'fc1'; its norms with a weight are norm, norm1, norm2"):
        attached("LN_TUNING", target_modules=["fc1"])


def test_bias_training_is_a_part_of_the_backbone_that_is_trained(tmp_path):
    model = adaptkit.attach(host(), train_backbone=("*.bias",))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(n.endswith("bias") for n in trained)
    model.train()(x).tokens.square().sum().backward()
    expected = stirred(model)(x).tokens
    model.save(tmp_path)
    assert torch.equal(adaptkit.attach(host(), tmp_path)(x).tokens, expected)
