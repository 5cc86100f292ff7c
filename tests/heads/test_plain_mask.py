"""PMT's plain mask decoder: what it computes, against another writing of it; annealing, and what it promises a user."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS

import adaptkit
from adaptkit.heads.base import QueryLogits
from adaptkit.heads.plain_mask import annealed, even_layers, set_loss
from adaptkit.model.trainable import tensors_in
from adaptkit.ops.queries import instances, merge

SMALL = {"num_classes": 3, "num_q": 4, "num_blocks": 2}


def stirred(module, seed=0):
    """Nothing at its initial value, running statistics neither."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.2 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))
    return module


def model_on(name="timm-vit", backbone=None, **options):
    backbone = HOSTS[name].build() if backbone is None else backbone
    torch.manual_seed(1)
    model = adaptkit.attach(backbone, head=("plain-mask", {**SMALL, **options}))
    stirred(model.head)
    return model.eval()


def image_for(model, cells=(5, 3), extra=(1, 2), batch=2):
    side = model.spec.patch_size
    size = cells[0] * side + extra[0], cells[1] * side + extra[1]
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(3))


def all_of(features):
    return list(tensors_in([features.tokens, features.prefix, *features.maps, features.logits]))


# ----------------------------------------------------------------------------------------- another writing of it


def rotate(x, grid):
    """Of x (S, heads, E) the last tokens, each pair of channels (j, j + E/2) as one complex number."""
    n, e = grid[0] * grid[1], x.shape[-1]
    rate = [100 ** (-4 * j / e) for j in range(e // 4)]
    turned = []
    for i in range(n):
        y, x_ = ((i // grid[1] + 0.5) / grid[0] * 2 - 1, (i % grid[1] + 0.5) / grid[1] * 2 - 1)
        angle = torch.tensor([2 * math.pi * p * r for p in (y, x_) for r in rate], dtype=x.dtype)
        a, b = x[len(x) - n + i].chunk(2, -1)
        turned.append(torch.view_as_real(torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)).unbind(-1))
    return torch.cat([x[: len(x) - n], torch.stack([torch.cat(t, -1) for t in turned])])


def written_out(s, levels, grid, queries, heads, up, residual=True, mask=None):
    """One image: the keys' tensors s, levels (S, D) -> classes (Q, K + 1), mask logits (Q, H, W), before and after
    each block; ``mask``: whether a query reads its own patches alone."""

    def linear(name, x):
        return F.linear(x, s[name + ".weight"], s.get(name + ".bias"))

    def norm(name, x, eps=1e-5):
        return F.layer_norm(x, x.shape[-1:], s[name + ".weight"], s[name + ".bias"], eps)

    total = 0
    for i, x in enumerate(levels):
        if f"bn.{i}.weight" in s:
            x = (x - s[f"bn.{i}.running_mean"]) / (s[f"bn.{i}.running_var"] + 1e-5).sqrt()
            x = x * s[f"bn.{i}.weight"] + s[f"bn.{i}.bias"]
        key = f"lateral_projections.{i}"
        if f"{key}.2.weight" in s:
            made = linear(f"{key}.2", F.gelu(linear(f"{key}.0", x)))
        else:
            made = linear(key, x) if f"{key}.weight" in s else x
        total = total + (made + x if residual else made) * s[f"scalers.{i}"]
    x, n = torch.cat([s["q.weight"], total]), grid[0] * grid[1]
    said = []

    def predict():
        z = norm("decoder_norm", x)
        fine = z[len(z) - n :].T.reshape(1, -1, *grid)
        for u in range(up):
            fine = F.gelu(F.conv_transpose2d(fine, s[f"upscale.{u}.conv1.weight"], s[f"upscale.{u}.conv1.bias"], 2))
            fine = F.conv2d(fine, s[f"upscale.{u}.conv2.weight"], padding=1, groups=fine.shape[1])
            fine = norm(f"upscale.{u}.norm", fine.permute(0, 2, 3, 1), 1e-6).permute(0, 3, 1, 2)
        q = z[:queries]
        m = linear("mask_head.4", F.gelu(linear("mask_head.2", F.gelu(linear("mask_head.0", q)))))
        said.append((linear("class_head", q), (m @ fine[0].flatten(1)).unflatten(1, fine.shape[-2:])))

    for i in range(sum(k.endswith("norm1.weight") for k in s)):
        predict()
        b = f"blocks.{i}"
        z = norm(f"{b}.norm1", x)
        q, k, v = (linear(f"{b}.attention.{c}_proj", z).unflatten(1, (heads, -1)) for c in "qkv")
        scores = torch.einsum("she,the->hst", rotate(q, grid), rotate(k, grid)) / math.sqrt(q.shape[-1])
        if mask:
            inside = F.interpolate(said[-1][1][None], grid, mode="bilinear", align_corners=False)[0].flatten(1) > 0
            scores[:, :queries, len(x) - n :].masked_fill_(~inside, -math.inf)
        read = torch.einsum("hst,the->she", scores.softmax(-1), v).flatten(1)
        x = x + s[f"{b}.layer_scale1.lambda1"] * linear(f"{b}.attention.o_proj", read)
        z = F.gelu(linear(f"{b}.mlp.up_proj", norm(f"{b}.norm2", x)))
        x = x + s[f"{b}.layer_scale2.lambda1"] * linear(f"{b}.mlp.down_proj", z)
    predict()
    return said


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("name", "grid", "options"),
    [
        ("timm-vit", (4, 3), {"num_blocks": 3, "interaction_indices": (0, 2)}),
        ("timm-dinov2-reg", (2, 5), {"num_heads": 4, "hidden_dim": 20, "num_q": 7}),
        ("timm-vit-patch14", (3, 3), {"lateral_projection": "linear", "upscale": 3, "num_q": 1}),
        ("hf-dinov3", (1, 6), {"lateral_projection": "identity", "lateral_bn": False, "interaction_indices": (3,)}),
        ("timm-vit", (2, 2), {"residual_projection": False, "upscale": 0, "num_blocks": 1, "num_classes": 1}),
    ],
)
def test_it_computes_the_equations(name, grid, options, masked):
    model = model_on(name, **options).double()
    head, config = model.head, model.head.config
    tokens = model.spec.num_prefix_tokens + grid[0] * grid[1]
    generator = torch.Generator().manual_seed(5)
    shape = 2, tokens, model.spec.embed_dim
    levels = [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in config.interaction_indices]
    with torch.no_grad():
        found = head.predictions(levels, grid, masked)
        assert len(found) == (config.num_blocks + 1 if masked else 1)
        for b in range(2):
            wanted = written_out(head.state_dict(), [x[b] for x in levels], grid, config.num_q, config.num_heads,
                                 config.upscale, config.residual_projection, masked)  # fmt: skip
            for one, (classes, masks) in zip(found, wanted if masked else wanted[-1:]):
                torch.testing.assert_close(one.class_queries_logits[b], classes, rtol=1e-9, atol=1e-9)
                torch.testing.assert_close(one.masks_queries_logits[b], masks, rtol=1e-9, atol=1e-9)


def test_in_training_batchnorm_counts_over_all_tokens_of_the_batch_the_prefix_too():
    model = model_on("timm-dinov2-reg", interaction_indices=(1,), lateral_projection="identity").double().train()
    head = model.head
    x = torch.randn(2, model.spec.num_prefix_tokens + 6, model.spec.embed_dim, dtype=torch.float64)
    y = x.flatten(0, 1)
    y = (y - y.mean(0)) / (y.var(0, unbiased=False) + 1e-5).sqrt() * head.bn[0].weight + head.bn[0].bias
    torch.testing.assert_close(head.fuse([x]), (2 * y * head.scalers.get_parameter("0")).view_as(x))


# ------------------------------------------------------------------------------------------------------- annealing


def test_annealing_is_the_published_schedule():
    total = 88692  # COCO
    starts = [0, 23651, 32520, 41389, 50258, 59128]
    ends = [3000, 38433, 47302, 56171, 65040, 73910]
    for step in range(0, total, 500):
        for found, start, end in zip(annealed(6, step / total), starts, ends):
            share = (step - start) / (end - start)
            wanted = 1.0 if step < start else 0.0 if step >= end else (1 - share) ** 0.9
            assert found == pytest.approx(wanted, abs=0.02)  # block 0 ends at 3000 steps there, at 1/30 here
    for blocks in (1, 2, 3, 9):
        assert annealed(blocks, 0.0) == [1.0] * blocks
        assert annealed(blocks, 1.0) == [0.0] * blocks
        assert annealed(blocks, 0.5) == sorted(annealed(blocks, 0.5))


def test_a_query_is_held_to_its_mask_by_that_probability_and_then_reads_only_that():
    head = model_on().head
    masks = torch.full((50, 4, 6, 6), -1.0)
    masks[..., :2, :2] = 1.0  # the first of 3 x 3 patches
    for probability in (0.0, 0.3, 1.0):
        torch.manual_seed(0)
        seen = head.visible(masks, (3, 3), torch.tensor(probability))
        held = ~seen.all(-1)
        assert held.float().mean() == pytest.approx(probability, abs=0.1)  # of 200 draws: 3 deviations
        assert seen[..., 0].all()
        assert not seen[held][:, 1:].any()


def test_once_annealed_training_computes_what_evaluation_does():
    model = model_on(lateral_bn=False)
    x = image_for(model)
    model.head.anneal(1.0)
    with torch.no_grad():
        found, wanted = model.train()(x).logits, model.eval()(x).logits
    assert len(found.auxiliary_logits) == 2
    torch.testing.assert_close(found.masks_queries_logits, wanted.masks_queries_logits)
    assert wanted.auxiliary_logits == ()


# ------------------------------------------------------------------------------------------------- what a user does


@pytest.mark.parametrize("name", sorted(HOSTS))
def test_cached_shared_and_saved_it_says_the_same_bit_for_bit(name, tmp_path):
    model = model_on(name)
    x = image_for(model)
    model.save(tmp_path, task="segmentation")
    with torch.no_grad():
        wanted = all_of(model(x))
        assert len(wanted) >= 3
        many = adaptkit.attach_many(HOSTS[name].build(), {"a": tmp_path, "b": "sfp"}).eval()
        again = adaptkit.attach(HOSTS[name].build(), tmp_path)
        for found in (model(model.extract(x)), many(x)["a"], again(x)):
            assert all(torch.equal(a, b) for a, b in zip(all_of(found), wanted, strict=True))
    assert many.passes() == 1
    assert model.reads()[0] == tuple(sorted({*even_layers(4), 3}))


def test_lora_trains_with_it_and_what_reads_no_block_is_refused():
    model = adaptkit.attach(HOSTS["timm-vit"].build(), "lora", head=("plain-mask", SMALL))
    target = [(torch.ones(1, 41, 26), torch.tensor([1]))] * 2
    features = model(image_for(model))
    model.head.loss(features, target, points=32).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="attach it without sfp"):
        adaptkit.attach(HOSTS["timm-vit"].build(), "sfp", head=("plain-mask", SMALL))


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(precision):
    model = model_on("timm-dinov3")
    x = image_for(model)
    with torch.no_grad():
        wanted = model(x).logits.masks_queries_logits
        with torch.autocast("cpu", precision):
            under = model(x).logits.masks_queries_logits
        half = model.to(precision)(x.to(precision)).logits.masks_queries_logits
    for found in (under, half):
        assert float((found.float() - wanted).abs().max()) <= 0.1 * float(wanted.abs().max())


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_from_a_file_to_an_answer_at_the_pictures_own_size(task, tmp_path):
    backbone = HOSTS["timm-vit"].build()
    model = model_on(backbone=backbone, task=task, things=(1,) if task == "panoptic" else ())
    model.save(tmp_path, mean=[0.5] * 3, std=[0.5] * 3, size=32, thresholds=[0.0, 0.0])
    again = adaptkit.attach(HOSTS["timm-vit"].build(), tmp_path)
    picture = torch.rand(3, 45, 61, generator=torch.Generator().manual_seed(0))
    found = again.predict(picture, **({"threshold": 0.0} if task == "instance" else {}))
    if task == "semantic":
        assert found.mask.shape == (45, 61)
        shares = again.predict(picture, probabilities=True).probabilities
        np.testing.assert_allclose(shares.sum(0), 1, atol=1e-5)
        assert (shares.argmax(0) == found.mask).all()
    elif task == "instance":
        assert found.masks.shape[1:] == (45, 61)
        assert len(found.scores) == len(found.masks) > 0
        for mask, (x1, y1, x2, y2) in zip(found.masks, found.boxes):
            rows, columns = np.nonzero(mask)
            assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x1, y1, x2, y2)
    else:
        assert found.segments.shape == (45, 61)
        assert all(segment["isthing"] == (segment["label"] == 1) for segment in found.found)
        assert sum(segment["area"] for segment in found.found) == (found.segments > 0).sum()


@pytest.mark.parametrize("open_size", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_graph_says_what_the_model_says(open_size, tmp_path):
    pytest.importorskip("onnxruntime")
    import onnxruntime

    model = model_on()
    side = 2 * math.lcm(32, model.spec.patch_size)
    adaptkit.export.to_onnx(model, tmp_path / "m.onnx", (side, side), dynamic_size=open_size)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    x = torch.randn(2, 3, side + 32 * open_size, side)
    found = dict(zip([o.name for o in session.get_outputs()], session.run(None, {"image": x.numpy()})))
    with torch.no_grad():
        wanted = model(x).logits
    for name in ("class_queries_logits", "masks_queries_logits"):
        torch.testing.assert_close(torch.from_numpy(found[name]), getattr(wanted, name), rtol=1e-3, atol=1e-3)


# ----------------------------------------------------------------------------------------------- reading of queries


def test_a_segment_is_dropped_by_the_pixels_that_it_wins_not_by_those_inside_of_its_mask():
    """Mask2Former's rule: pixels won, over pixels with p(mask) >= 1/2; what is drawn is what is both."""
    classes = torch.tensor([[9.0, 0, 0], [0, 9.0, 0]])
    masks = torch.full((2, 1, 10), -9.0)
    masks[0, 0, :4], masks[1, 0, 4:] = 9.0, -0.1  # the second wins the rest, and no pixel of it is inside
    masks[1, 0, 4] = 0.1
    found = merge(classes, masks, (1, 10), {0, 1}, (0.5, 0.8))
    assert found[0, :, 0].tolist() == [0] * 4 + [1] + [-1] * 5
    masks[1, 0, :4] = 5.0  # its mask has 5 pixels now, and it wins 6 again
    assert merge(classes, masks, (1, 10), {0, 1}, (0.5, 0.8))[0, 4].tolist() == [1, 2]
    assert merge(classes, masks, (1, 10), {0, 1}, (0.5, 1.3))[0, 4].tolist() == [-1, -1]


def test_objects_are_the_surest_pairs_of_query_and_class():
    classes = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 0.0], [5.0, 0.0, 0.0]])
    masks = torch.full((3, 2, 3), -1.0)
    masks[0, 0, 1:], masks[1] = 2.0, 0.5  # the third is empty
    found = instances(classes, masks, (2, 3), most=4)
    p, s = classes.softmax(-1), torch.tensor([2.0, 0.5]).sigmoid()
    wanted = sorted([(float(p[0, 0] * s[0]), 1), (float(p[1, 1] * s[1]), 2), (float(p[0, 1] * s[0]), 2)], reverse=True)
    assert found["labels"].tolist() == [label for _, label in wanted]
    torch.testing.assert_close(found["scores"], torch.tensor([score for score, _ in wanted]))
    assert found["boxes"][found["labels"] == 1].tolist() == [[1, 0, 3, 1]]


# ---------------------------------------------------------------------------------------------------------- the loss


GIVEN = (torch.ones(3, 16, 16), torch.tensor([0, 2, 1]))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([GIVEN], "2 images, and targets of 1"),
        ([GIVEN, (GIVEN[0], torch.tensor([0, 3, 1]))], "image 1 has the label 3, and there are classes 0 to 2"),
        ([GIVEN, (GIVEN[0], torch.tensor([0, -1, 1]))], "image 1 has the label -1"),
        ([GIVEN, (GIVEN[0], torch.tensor([0.0, 1.0, 2.0]))], "labels of torch.float32"),
        ([GIVEN, (GIVEN[0][0], GIVEN[1])], r"image 1 has masks of \(16, 16\) and labels of \(3,\)"),
        ([GIVEN, (torch.ones(3, 0, 0), GIVEN[1])], r"image 1 has masks of \(3, 0, 0\)"),
        ([(GIVEN[0] * 255, GIVEN[1]), GIVEN], "image 0 has masks with values from 255 to 255: give masks in 0..1"),
        ([(GIVEN[0] * float("nan"), GIVEN[1]), GIVEN], "image 0 has masks with values from nan"),
        ([(torch.ones(7, 4, 4), torch.zeros(7, dtype=torch.int64)), GIVEN], "7 masks, and there are 6 queries"),
    ],
)
def test_targets_that_cannot_be_are_refused_by_name(targets, message):
    found = [QueryLogits(torch.randn(2, 6, 4), torch.randn(2, 6, 8, 8))]  # three classes, and "nothing"
    with pytest.raises(ValueError, match=message):
        set_loss(found, targets, points=64)


def test_an_image_without_targets_and_bool_masks_are_fine():
    found = [QueryLogits(torch.randn(2, 6, 4), torch.randn(2, 6, 8, 8))]
    empty = (torch.zeros(0, 16, 16), torch.zeros(0, dtype=torch.int64))
    torch.manual_seed(1)
    once = set_loss(found, [(GIVEN[0], GIVEN[1]), empty], points=64)
    torch.manual_seed(1)
    assert torch.equal(once, set_loss(found, [(GIVEN[0].bool(), GIVEN[1].to(torch.uint8)), empty], points=64))
    assert set_loss(found, [empty, empty], points=64).isfinite()
