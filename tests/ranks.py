"""What each process of ``test_distributed.py`` does: ``torchrun --nproc_per_node 2 ranks.py METHOD OUT``.

Trains one method for a few steps on its share of each batch, under DDP and under FSDP2, and writes what it saw. With
one process (``reference``) the same on the whole batch.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from families import HOSTS

import adaptkit
from adaptkit.adapters.adavit import AdaViT

STEPS, BATCH, CLASSES = 8, 4, 3
SIDE = {"conv_inplane": 8, "norm": "sync", "drop_path": 0.0}
METHODS = {
    "vit-adapter": [("vit-adapter", SIDE)],
    "adavit": [("adavit", {"keep_bias": 0.1})],
    "metaformer": [("metaformer", {"width": 8})],
    "dat": ["dat"],
    "lora": ["lora"],
    "lora+vit-adapter": ["lora", ("vit-adapter", {**SIDE, "norm": "group"})],
}


class Head(torch.nn.Module):
    """Classes from the mean token and the finest map: every output has a part in the loss."""

    def __init__(self):
        super().__init__()
        self.tokens, self.map = torch.nn.Linear(32, CLASSES), torch.nn.Linear(32, CLASSES)

    def forward(self, features):
        logits = self.tokens(features.tokens.mean(1))
        return logits + sum(self.map(m.mean((2, 3))) for m in features.maps)


def build(method):
    host = HOSTS["timm-vit"].build()
    torch.manual_seed(0)
    model = adaptkit.attach(host, *METHODS[method], head=Head()).train()
    if METHODS[method][-1][0] != "vit-adapter":
        model.head.map.requires_grad_(False)  # no maps: DDP must not wait for it
    return model


def batches():
    g = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        yield torch.randn(BATCH, 3, 64, 64, generator=g), torch.randint(CLASSES, (BATCH,), generator=g)


def quiet(model):
    """Decide without noise: what is drawn belongs to a process, and the processes differ."""
    for module in model.modules():
        if isinstance(module, AdaViT):
            module.gates.eval()


def loss_of(model, image, label):
    features = model(image)
    loss = torch.nn.functional.cross_entropy(features.logits, label)
    if "patch_keep" in features.aux:
        # Linear in the decisions, so that the mean over the ranks is the loss of the whole batch.
        loss = loss + sum(features.aux[f"{kind}_keep"].mean() for kind in ("patch", "head", "layer"))
    return loss


def train(model, inner):
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    # Not Adam: a gradient that is zero but for rounding (a bias before a norm) would be made as large as any other.
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.001, momentum=0.9)
    losses = []
    quiet(inner)
    for image, label in batches():
        loss = loss_of(model, image[share], label[share])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        total = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(total)
        losses.append(float(total) / world)
    return losses


def reference(method):
    model = build(method)
    return train(model, model), model.adapter_state_dict()


def main(methods, out):
    dist.init_process_group("gloo")
    for method in methods.split(","):
        seen = {}
        model = build(method)
        seen["ddp"] = train(torch.nn.parallel.DistributedDataParallel(model), model)
        model.save(Path(out) / f"{method}-ddp-{dist.get_rank()}")

        model = build(method)
        frozen = sum(p.numel() for p in model.vit.backbone.parameters())
        model = adaptkit.shard(model)
        held = sum(p.to_local().numel() for p in model.vit.backbone.parameters())
        seen["fsdp"], seen["share"] = train(torch.nn.parallel.DistributedDataParallel(model), model), held / frozen
        if dist.get_rank() == 0:
            model.save(Path(out) / f"{method}-fsdp")
            (Path(out) / f"{method}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
