"""What README promises of several threads on one model, and what it does not."""

import sys
import threading
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS
from reference import equal, image, outputs, said, stir

import adaptkit

ADAPTERS = {
    "vit-adapter": ("vit-adapter", {"conv_inplane": 8}),
    "vit-split": "vit-split",
    "sfp": "sfp",
    "adavit": "adavit",
    "dat": "dat",
    "metaformer": ("metaformer", {"width": 8}),
    "lora": "lora",
}
SIZE = HOSTS["timm-vit"].size
X = image(SIZE)


def build(*adapters):
    return stir(adaptkit.attach(HOSTS["timm-vit"].build(), *adapters), 1).eval()


def together(*works):
    """Run these functions in threads that start at once and take turns often; raise what one of them raises."""
    errors, start = [], threading.Barrier(len(works))

    def run(work):
        start.wait()
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # seconds
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]


# ---------------------------------------------------------------------------------------------------------------- safe


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_threads_that_infer_get_the_bits_that_one_gets_alone_while_another_saves(adapter, without, tmp_path):
    model = build(ADAPTERS[adapter])
    images = [image(SIZE, seed=seed) for seed in range(3)]
    expected = [said(model, x) for x in images]

    def infer():
        with without():
            for _ in range(4):
                for x, wanted in zip(images, expected):
                    assert equal(outputs(model(x)), wanted)

    together(infer, infer, infer, lambda: [model.save(tmp_path / "a") for _ in range(3)])
    again = adaptkit.attach(HOSTS["timm-vit"].build(), tmp_path / "a").eval()
    assert equal(said(again, X), expected[0])


def test_threads_attach_save_and_detach_models_of_their_own(tmp_path):
    first = build("lora")
    tensors, expected = first.adapter_state_dict(), said(first, X)
    hosts = [HOSTS["timm-vit"].build() for _ in range(3)]  # their weights are drawn from one generator

    def work(i):
        for _ in range(2):
            model = adaptkit.attach(hosts[i], "lora")
            model.load_adapter_state_dict(tensors)
            model.eval().save(tmp_path / str(i))
            with torch.no_grad():
                assert equal(outputs(model(X)), expected)
            assert model.detach() is hosts[i]

    together(*(lambda i=i: work(i) for i in range(3)))


def test_reference_is_for_the_thread_that_enters_it():
    entered, left, seen = threading.Event(), threading.Event(), []

    def enter():
        with adaptkit.reference():
            entered.set()
            assert left.wait(60)

    def look():
        assert entered.wait(60)
        seen.append(adaptkit.seam.is_reference())
        left.set()

    together(enter, look)
    assert seen == [False]


# ------------------------------------------------------------------------------------------------------------ not safe


def test_gradients_of_two_threads_add_up_in_one_model():
    model = build("sfp").train()
    parameter = next(p for p in model.parameters() if p.requires_grad)

    def loss(x):
        return sum(m.square().mean() for m in model(x).maps)

    alone = []
    for x in (X, X + 1):
        model.zero_grad()
        loss(x).backward()
        alone.append(parameter.grad.clone())
    model.zero_grad()
    together(lambda: loss(X).backward(), lambda: loss(X + 1).backward())
    torch.testing.assert_close(parameter.grad, alone[0] + alone[1])


def test_a_verb_during_a_forward_leaves_it_with_half_of_each():
    model = build("lora")
    model.add_adapter("lora", name="other")
    model.load_adapter_state_dict({k: v + 0.1 for k, v in model.adapter_state_dict().items()})
    one = said(model, X)
    model.set_adapter("other")
    stir(model, 7)
    other = said(model, X)
    assert not equal(one, other)
    hook = model.backbone.blocks[1].register_forward_hook(lambda *_: together(lambda: model.set_adapter("default")))
    mixed = said(model, X)
    hook.remove()
    assert not equal(mixed, other)
    assert not equal(mixed, one)
    assert equal(said(model, X), one)
