"""Many tasks on one pass of the backbone."""

import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS

import adaptkit
from adaptkit.core.registry import view

SMALL = {"conv_inplane": 8, "injector": False}
TASKS = {
    "seg": (("vit-adapter", SMALL), ("fpn", {"num_classes": 3, "channels": 8})),
    "depth": ("sfp", ("linear", {"num_classes": 1})),
    "parts": (("vit-adapter", {**SMALL, "tap_norm": True, "norm": "group"}), ("linear", {"num_classes": 4})),
    "class": (None, ("linear", {"num_classes": 5})),
    "split": ("vit-split", ("upsample", {"num_classes": 2})),
}
HEAD = ("linear", {"num_classes": 2})
ALONE = {
    "lora": (["lora", "sfp"], ("fpn", {"num_classes": 2, "channels": 8})),
    "inject": (("vit-adapter", {**SMALL, "injector": True}), ("linear", {"num_classes": 2})),
    "drop": (("vit-adapter", {**SMALL, "prefix": "drop"}), ("linear", {"num_classes": 2})),
    "gates": ("metaformer", ("linear", {"num_classes": 2})),
}


def host(name="timm-vit"):
    return HOSTS[name].build()


def image(batch=3, seed=0):
    return torch.randn(batch, 3, 40, 32, generator=torch.Generator().manual_seed(seed))


def saved(folder, tasks, name="timm-vit"):
    """One file for each task, and what each says alone."""
    said = {}
    for seed, (task, (adapters, head)) in enumerate(tasks.items()):
        given = [] if adapters is None else adapters if isinstance(adapters, list) else [adapters]
        model = adaptkit.attach(host(name), *given, head=head)
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn(p.shape, generator=g))
        model.eval().save(folder / task)
        said[task] = model(image())
    return said


def same(a, b):
    pairs = [(a.tokens, b.tokens), (a.logits, b.logits), *zip(a.maps, b.maps, strict=True)]
    return all(torch.equal(x, y) for x, y in pairs)


def counted(model):
    """How often each block of the backbone runs from here on."""
    runs = []
    model.model.vit.backbone.blocks[0].register_forward_pre_hook(lambda *_: runs.append(0))
    return runs


def test_each_task_says_what_it_says_alone_and_the_backbone_runs_once(tmp_path):
    said = saved(tmp_path, TASKS)
    many = adaptkit.attach_many(host(), {task: tmp_path / task for task in TASKS}).eval()
    runs = counted(many)
    out = many(image())
    assert list(out) == list(TASKS)
    assert all(same(out[task], said[task]) for task in TASKS)
    assert len(runs) == many.passes() == 1


def test_what_several_tasks_read_is_normed_once(monkeypatch):
    options = ("vit-adapter", {**SMALL, "tap_norm": True})
    many = adaptkit.attach_many(host(), {"a": options, "b": options, "c": options}).eval()
    normed, norm = [], many.model.vit.norm
    monkeypatch.setattr(many.model.vit, "norm", lambda x: normed.append(0) or norm(x))
    many(image())
    depth = many.model.spec.depth
    assert len(normed) == min(4, depth)


def test_what_changes_the_blocks_has_a_pass_of_its_own_and_it_is_said(tmp_path):
    tasks = {"seg": TASKS["seg"], **ALONE, "depth": TASKS["depth"]}
    said = saved(tmp_path, tasks)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        many = adaptkit.attach_many(host(), {task: tmp_path / task for task in tasks}).eval()
    told = [str(w.message) for w in caught if "a pass of its own" in str(w.message)]
    assert len(told) == len(ALONE)
    assert "task 'inject' has a pass of its own: its injectors write into the tokens; injector=False" in told[1]
    runs = counted(many)
    out = many(image())
    assert all(same(out[task], said[task]) for task in tasks)
    assert len(runs) == many.passes() == len(ALONE) + 1
    plain = host()
    backbone = many.detach()
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in backbone.state_dict().items())
    assert [n for n, _ in backbone.named_modules()] == [n for n, _ in plain.named_modules()]


@pytest.mark.parametrize("name", ["timm-siglip", "timm-dinov3", "timm-beit", "timm-sam", "hf-dinov2"])
def test_other_hosts_replay_as_well(name, tmp_path):
    said = saved(tmp_path, TASKS, name)
    many = adaptkit.attach_many(host(name), {task: tmp_path / task for task in TASKS}).eval()
    out = many(image())
    assert all(same(out[task], said[task]) for task in TASKS)


def test_a_hierarchical_host_replays_its_stages():
    from timm.models.swin_transformer import SwinTransformer

    torch.manual_seed(0)
    swin = SwinTransformer(64, window_size=4, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), num_classes=5)
    x = torch.randn(3, 3, 64, 64)
    heads = {"a": ("fpn", {"num_classes": 2, "channels": 8}), "b": ("fpn", {"num_classes": 3, "channels": 8})}
    many = adaptkit.attach_many(swin.eval(), {"a": [], "b": []}, heads).eval()
    out = many(x)
    for task in heads:
        expected = many.model.set_of(task).head(view(swin).features(x))
        assert torch.equal(out[task].logits, expected)
    split = many(x, tasks=["a", "b", "a"])
    torch.testing.assert_close(split["b"].logits[0], out["b"].logits[1])
    torch.testing.assert_close(split["a"].logits, out["a"].logits[[0, 2]])


def test_tasks_come_and_go_at_run_time(tmp_path):
    said = saved(tmp_path, {**TASKS, **{"lora": ALONE["lora"]}})
    many = adaptkit.attach_many(host(), {"seg": tmp_path / "seg"}).eval()
    many.add("depth", tmp_path / "depth")
    with pytest.warns(UserWarning, match="lora changes what the blocks compute"):
        many.add("lora", tmp_path / "lora")
    assert list(many(image())) == ["seg", "depth", "lora"]
    many.set_active("lora", "seg")
    out = many(image())
    assert list(out) == ["lora", "seg"]
    assert all(same(out[task], said[task]) for task in out)
    many.remove("lora")
    assert many.active == ("seg",)
    assert many.tasks == ["seg", "depth"]
    many.save("depth", tmp_path / "again", task="depth")
    assert same(adaptkit.attach(host(), tmp_path / "again")(image()), said["depth"])
    with pytest.raises(ValueError, match="no adapters are named 'lora'; there are 'seg', 'depth'"):
        many.set_active("lora")


def test_a_name_for_each_image_splits_the_batch(tmp_path):
    tasks = {"seg": TASKS["seg"], "depth": TASKS["depth"], "lora": ALONE["lora"]}
    said = saved(tmp_path, tasks)
    with pytest.warns(UserWarning, match="a pass of its own"):
        many = adaptkit.attach_many(host(), {task: tmp_path / task for task in tasks}).eval()
    out = many(image(), tasks=["lora", "seg", "lora"])
    assert list(out) == ["lora", "seg"]
    torch.testing.assert_close(out["lora"].logits, said["lora"].logits[[0, 2]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out["seg"].logits, said["seg"].logits[1:2], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="3 images and 2 tasks"):
        many(image(), tasks=["seg", "seg"])


def test_all_tasks_train_at_once_and_the_backbone_does_not():
    adapters = {task: adapter if adapter is not None else [] for task, (adapter, _) in TASKS.items()}
    many = adaptkit.attach_many(host(), adapters, {task: head for task, (_, head) in TASKS.items()}).train()
    many.set_active("seg", "depth", "class", "split")
    sum(x.square().mean() for f in many(image()).values() for x in (f.logits, *f.maps)).backward()
    for task in many.tasks:
        own = [p for p in many.model.set_of(task).parameters() if p.requires_grad]
        assert own
        assert all((p.grad is not None) == (task != "parts") for p in own)
    assert not any(p.requires_grad for p in many.model.backbone.parameters())


def test_mistakes_name_the_task_and_leave_the_backbone():
    backbone = host().train()
    with pytest.raises(ValueError, match="task 'b': .*has no option 'nonsense'"):
        adaptkit.attach_many(backbone, {"a": "sfp", "b": ("vit-adapter", {"nonsense": 1})})
    assert backbone.training
    assert all(p.requires_grad for p in backbone.parameters())
    with pytest.raises(ValueError, match="heads are given for c, the tasks are a"):
        adaptkit.attach_many(backbone, {"a": "sfp"}, {"c": ("linear", {"num_classes": 2})})
    with pytest.raises(ValueError, match="no tasks are given"):
        adaptkit.attach_many(backbone, {})


@torch.no_grad()
def test_rows_of_readers_pass_a_layer_whose_weight_is_read_and_that_lora_has_wrapped():
    """timm's Eva reads the weight of a fused qkv with biases of its own, which no wrapper sees."""
    from timm.models.eva import Eva

    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    head = ("linear", {"num_classes": 3})
    many = adaptkit.attach_many(
        Eva(**sizes, use_rot_pos_emb=True, qkv_bias=True), {"a": [], "b": [], "lora": ["lora"]},
        heads=dict.fromkeys(("a", "b", "lora"), head),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 32, 32)
    for _ in range(2):
        rows = many(x, tasks=["a", "b"])
        for i, name in enumerate(("a", "b")):
            torch.testing.assert_close(rows[name].logits, many(x)[name].logits[i : i + 1], atol=1e-5, rtol=1e-5)
        if "lora" in many.active:
            many.remove("lora")


def gradients(checkpointed, tasks):
    """Of LoRA beside a reader, in a pass of its own or in one for both."""
    model = adaptkit.attach_many(host(), {"lora": ["lora"], "seg": ["sfp"]}, heads=dict.fromkeys(("lora", "seg"), HEAD))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=g))
    if checkpointed:
        model.model.gradient_checkpointing_enable()
    out = model.train()(image(), tasks=tasks)
    sum(one.logits.square().mean() for one in out.values()).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("tasks", [None, ["lora", "seg", "lora"]])
def test_a_layer_that_runs_again_in_the_backward_pass_runs_its_own_task(tasks):
    plain, again = gradients(False, tasks), gradients(True, tasks)
    assert plain.keys() == again.keys()
    assert any("lora_B" in name and grad.abs().max() > 0 for name, grad in plain.items())
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, msg=name)
