"""Every method of peft is one graph under torch.compile, and says there what it says without."""

import copy
import sys
from pathlib import Path

import peft
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from dealt import dealt
from families import HOSTS

import adaptkit
from adaptkit.adapters.lora.traceable import make_traceable

METHODS = {
    "lora": {"r": 4},
    "lora-bias": {"r": 4, "lora_bias": True},
    "rslora": {"use_rslora": True, "lora_dropout": 0.3},
    "dora": {"use_dora": True},
    "dora-dropout": {"use_dora": True, "lora_dropout": 0.3},
    "loha": {"peft_type": "LOHA", "r": 2},
    "loha-dropout": {"peft_type": "LOHA", "r": 2, "module_dropout": 0.3, "rank_dropout": 0.3},
    "lokr": {"peft_type": "LOKR", "r": 2},
    "oft": {"peft_type": "OFT", "oft_block_size": 4},
    "boft": {"peft_type": "BOFT", "boft_block_size": 4},
    "hra": {"peft_type": "HRA", "r": 2},
    "ia3": {"peft_type": "IA3"},
    "patterns": {"rank_pattern": {".*(qkv|q_proj)": 2}, "alpha_pattern": {".*fc2": 1}},
}
LAYERS = {
    "timm-linear": ("timm-vit", ["qkv", "fc2"]),
    "hf-linear": ("hf-dinov2", ["qkv", "fc2"]),
    "timm-convolution": ("timm-vit", r"patch_embed\.proj"),
}
# peft's code for training is a superset of that for inference, so one kind of layer is traced in both modes.
TRACED = [("timm-linear", False), *((layers, True) for layers in LAYERS)]


def adapted(layers, method):
    """On a backbone of one block: a graph says no more by saying it four times."""
    name, targets = LAYERS[layers]
    options = {**METHODS[method], "target_modules": targets}
    if layers == "timm-convolution":
        options |= {"feedforward_modules": []} if method == "ia3" else {}
        options = {k: v for k, v in options.items() if not k.endswith("pattern")}
    host = HOSTS[name].build()
    blocks = host.blocks if name == "timm-vit" else host.encoder.layer
    del blocks[1:]
    torch.manual_seed(1)
    model = adaptkit.attach(host, "lora", **options)
    with torch.no_grad():
        for p in model.adapters.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model, torch.randn(2, 3, HOSTS[name].size, HOSTS[name].size)


@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension", "ignore:Setting boft_n_butterfly_factor")
@pytest.mark.parametrize(("method", "layers_and_mode"), dealt(METHODS, TRACED, share=3))
def test_every_method_is_one_graph_in_training_and_in_eval_mode(method, layers_and_mode):
    layers, training = layers_and_mode
    torch._dynamo.reset()
    model, x = adapted(layers, method)
    model.train(training)
    torch.manual_seed(5)
    expected = model(x).tokens
    torch.manual_seed(5)
    compiled = torch.compile(model, fullgraph=True, backend="eager")(x).tokens
    assert torch.equal(compiled, expected)


def peft_layers(bias=True, **options):
    """A linear layer with peft's own wrapper, and the same made traceable."""
    torch.manual_seed(0)
    kind = {"LOHA": peft.LoHaConfig, "LOKR": peft.LoKrConfig, "LORA": peft.LoraConfig}[options.pop("peft_type", "LORA")]
    net = torch.nn.Sequential(torch.nn.Linear(12, 8, bias=bias)).double()
    theirs = peft.inject_adapter_in_model(kind(target_modules=["0"], **options), net).train()
    for p in theirs.parameters():
        p.data = p.data.double() + 0.1 * torch.randn(p.shape)
    ours = copy.deepcopy(theirs)
    make_traceable(ours)
    assert type(ours[0]) is not type(theirs[0]) or type(ours[0].lora_magnitude_vector["default"]).__name__ == "DoRA"
    return theirs, ours


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("method", ["dora", "dora-dropout", "loha", "lokr"])
def test_a_layer_made_traceable_has_the_values_and_gradients_of_pefts(method, bias):
    theirs, ours = peft_layers(bias, **METHODS[method])
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    outputs = []
    for net in (theirs, ours):
        torch.manual_seed(2)  # of the dropout
        outputs.append(net(x))
        (outputs[-1] * torch.arange(8.0)).sum().backward()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-12, atol=1e-12)
    trained = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert (p.grad is None) == (trained[name].grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, trained[name].grad, rtol=1e-12, atol=1e-12)


def test_a_dropped_change_leaves_the_layer_and_gives_its_parameters_a_gradient_of_zero():
    _, net = peft_layers(peft_type="LOHA", r=2, module_dropout=0.5)
    x = torch.randn(5, 12, dtype=torch.float64)
    plain, whole = net[0].base_layer(x), net.eval()(x)
    net.train()
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        out = net(x)
        net.zero_grad()
        out.sum().backward()
        dropped = torch.equal(out, plain)
        assert dropped or torch.equal(out, whole)
        assert all((p.grad.abs().max() == 0) == dropped for n, p in net.named_parameters() if "hada" in n)
        seen.add(dropped)
    assert seen == {True, False}
