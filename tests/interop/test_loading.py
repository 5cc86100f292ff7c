"""An import that is refused names the tensor, and leaves the backbone as it was."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parent))
import test_adavit
import test_pmt
import test_vit_adapter
import test_vit_split

import adaptkit
from adaptkit.interop import from_official


def split():
    """A ViT-Split by its authors' names, with the DINOv2 in it and a head."""
    case = test_vit_split.CASES["padded"]
    vit, state = test_vit_split.made(case)
    state |= {f"backbone.backbone.{k}": v + 0.1 for k, v in vit.state_dict().items()}
    head = ("upsample", {"num_classes": 3, "dropout": 0.0, "resize": False})
    like = adaptkit.attach(copy.deepcopy(vit), "vit-split", head=head).head
    state |= {f"decode_head.{k}": torch.rand(v.shape) for k, v in like.state_dict().items() if v.is_floating_point()}
    return "vit-split", state, vit, {"out_indices": case["out_indices"], "load_backbone": True}


def masks():
    """A PMT."""
    model = test_pmt.made(test_pmt.host())
    told = {"interaction_indices": model.head.config.interaction_indices}
    return "pmt", test_pmt.written(model), test_pmt.host(), told


def adapter():
    """The reference ViT-Adapter, with its ViT."""
    if not test_vit_adapter.GOLDEN.is_file():
        pytest.skip("no reference vectors")
    with safe_open(test_vit_adapter.GOLDEN, "pt") as f:
        config = json.loads(f.metadata()["config"])
        state = test_vit_adapter.official({k: f.get_tensor(k) for k in f.keys()})  # noqa: SIM118
    return "vit-adapter", state, test_vit_adapter.host(config), {"add_vit_feature": "last", "load_backbone": True}


def gates():
    """The reference AdaViT, with its DeiT."""
    if not test_adavit.FILES["full"].is_file():
        pytest.skip("no reference vectors")
    config, tensors = test_adavit.read("full")
    options = {"head_mode": "full", "load_backbone": True}
    return "adavit", test_adavit.official(tensors), test_adavit.host(config), options


BUILDS = {"vit-split": split, "pmt": masks, "vit-adapter": adapter, "adavit": gates}
QUERIES = "network.decoder.q.weight"  # of any number: nothing else in a PMT says how many


def tried(made, state):
    """Import into a fresh copy of the backbone that is trained in part; returns the error, and says what it left."""
    method, _, vit, options = made
    vit = copy.deepcopy(vit).train()
    free = [i % 3 > 0 for i, _ in enumerate(vit.parameters())]
    for parameter, grad in zip(vit.parameters(), free):
        parameter.requires_grad_(grad)
    before = copy.deepcopy(vit.state_dict())
    try:
        from_official(method, state, vit, **options)
    except ValueError as error:
        assert vit.training
        assert [p.requires_grad for p in vit.parameters()] == free
        assert all(torch.equal(before[k], v) for k, v in vit.state_dict().items()), "weights were written"
        return str(error)
    return None


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.full)])
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS.keys())
def test_any_tensor_that_is_missing_is_named_and_the_backbone_is_as_it_was(build, every):
    made = build()
    state = made[1]
    assert tried(made, state) is None
    needed = [k for k in state if not k.endswith("num_batches_tracked")]  # a counter that inference does not need
    for key in needed[::every]:
        error = tried(made, {k: v for k, v in state.items() if k != key})
        assert error is not None, key
        kind = key.rpartition(".")[2].rstrip("12")  # blocks.0.gamma1 is blocks.0.ls1.gamma here
        others = ("is no ", "tensors say", "gates start at")  # without these tensors it is another checkpoint
        assert kind in error or any(said in error for said in others), (key, error)


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS.keys())
def test_a_tensor_of_another_shape_is_named_too(build):
    made = build()
    state = made[1]
    for key in [k for k, v in state.items() if v.ndim and k != QUERIES][::9]:
        error = tried(made, {**state, key: torch.cat([state[key], state[key]])})
        assert error is not None, key


def test_what_is_no_state_dict_is_refused():
    with pytest.raises(TypeError, match="the checkpoint is a list"):
        from_official("pmt", [torch.ones(1)], test_pmt.host())
    for strange in (3, None):
        with pytest.raises(TypeError, match=rf"the checkpoint has 'q.weight': {type(strange).__name__}"):
            from_official("pmt", {"q.weight": strange}, test_pmt.host())
