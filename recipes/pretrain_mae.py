"""Pretrain the demonstration backbone: masked autoencoding plus dense labels, on pictures drawn by formula.

    python -m recipes.pretrain_mae --steps 20 --batch-size 8 --canvases 8 --image-size 64 --out /tmp/mae
    python -m recipes.pretrain_mae       # on two cores, 93 minutes: what made the checkpoint that ships

A part of each batch is masked: three quarters of the patches are hidden and a small decoder draws them again (He et al.
2022; the target is the pixels of a patch with its own mean and deviation taken out). All of the batch goes through the
same encoder unmasked, and its tokens say for each 4 x 4 square which formula drew it, whether it holds a boundary, and
how near it is. The labels come from the drawing (adaptkit/demo/formula.py); no image data is read. All randomness is a
function of (seed, rank, step): a run that is resumed is the run that was never stopped.

Three things make it affordable without a GPU: the patch embedding starts as a discrete cosine transform, the network
grows from 4 to 12 blocks, and the matrices are trained by Muon. It grows by splitting: each of the four blocks becomes
three that add a third of what it adds, as a solver of differential equations takes shorter steps (Chang et al., ICLR
2018), and all twelve have their share from then on. With --growth identity new blocks start as the identity, and in so
short a run most stay near it.
"""

import argparse
import json
import math
import shutil
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs
from safetensors import SafetensorError
from safetensors.torch import save as to_bytes
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from adaptkit.demo.canvas import Canvas
from adaptkit.demo.formula import FAMILIES, boundaries, crops, draw
from adaptkit.hub.write import write_atomic

from .devices import BACKEND, together
from .folder import adopt, begin, check_run, occupied, run_of
from .muon import Muon
from .options import MODES, OVERWRITE_HELP, command, seed_of
from .order import folded
from .stopping import Stop, Stopped

ARCHITECTURE = "vit_tiny_patch16_224"
MEAN = STD = (0.5, 0.5, 0.5)
PROGRESS = "run.json"  # in a checkpoint
WEIGHTS = "demo_backbone.safetensors"
MADE = ("checkpoint", "checkpoint.old", WEIGHTS, "README.md")  # what a run leaves in its folder
SQUARE = 4  # pixels: side of the squares for which the dense heads answer
SHALLOW = 4  # blocks at first
GROWTH = {  # --growth -> from this share of the steps on, so many blocks
    "identity": ((0.0, SHALLOW), (0.45, 8), (0.7, 12)),
    "split": ((0.0, SHALLOW), (0.4, 12)),
}
RARE = ("pole", "sign", "fence", "person", "cyclist", "vehicle", "pavement")  # few pixels, so they weigh three times


# Arguments


def arguments() -> argparse.Namespace:
    """Read the command line; the defaults are those of the checkpoint that ships."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/mae"), help="folder for checkpoint, weights and card")
    parser.add_argument("--steps", type=int, default=4800, help="length of the schedule in optimiser steps")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this time, save, be resumed later")
    parser.add_argument("--batch-size", type=int, default=64, help="crops per step and process")
    parser.add_argument("--image-size", type=int, default=128, help="side of a crop in pixels, a multiple of 16")
    parser.add_argument("--canvases", type=int, default=96, help="canvases drawn at once")
    parser.add_argument("--reuse", type=int, default=36, help="crops taken from each canvas")
    parser.add_argument("--streets", type=float, default=0.7, help="share of street canvases, the others are abstract")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--warmup", type=float, default=0.05, help="share of the steps")
    parser.add_argument("--mask-ratio", type=float, default=0.75)
    parser.add_argument("--masked-share", type=float, default=0.25, help="share of the batch that is also masked")
    parser.add_argument("--dense-weight", type=float, default=1.0, help="weight of the dense labels beside the pixels")
    parser.add_argument("--growth", choices=tuple(GROWTH), default="split", help="how blocks are added")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints; 0: the last alone")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    parser.add_argument("--precision", choices=("bf16", "no"), default="bf16", help="of the matrix products")
    parser.add_argument("--compile", nargs="?", const="default", choices=MODES, metavar="MODE",
                        help="run model and losses through torch.compile, anew where the network grows")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE_HELP)
    parser.add_argument("--seed", type=seed_of, default=0)
    return parser.parse_args()


# Data: a pool of canvases, redrawn when each has been cropped `reuse` times


class Pictures:
    """Batches of crops with labels; the batch of a step is a function of (seed, rank, step)."""

    def __init__(self, args: argparse.Namespace, rank: int, device: torch.device):
        self.args, self.rank, self.generator = args, rank, torch.Generator(device)
        self.period = max(1, args.canvases * args.reuse // args.batch_size)  # steps that share a pool
        self.pool: Canvas | None = None
        self.drawn = -1  # which pool is in hand

    def seed(self, kind: int, number: int) -> torch.Generator:
        """Set the generator to the one state that belongs to this pool (kind 0) or step (kind 1)."""
        return self.generator.manual_seed(folded(((self.args.seed * 1000 + self.rank) * 2 + kind) * 10**9 + number))

    def batch(self, step: int) -> tuple[Canvas, Tensor]:
        """Return the crops of a step and the noise (B, N) that chooses the hidden patches."""
        args, index = self.args, step // self.period
        if index != self.drawn:
            side = args.image_size * 3 // 2  # a crop takes 0.45 to 1 of it
            self.pool = draw(args.canvases, side, self.seed(0, index), streets=args.streets)
            self.drawn = index
        g = self.seed(1, step)
        view = crops(self.pool, args.batch_size, args.image_size, g, scale=(0.45, 1.0))
        patches = (args.image_size // 16) ** 2
        return view, torch.rand(args.batch_size, patches, generator=g, device=g.device)


# Model


class MaskedAutoencoder(nn.Module):
    """A plain ViT encoder, a small decoder for hidden patches, and one linear layer for the dense labels."""

    def __init__(self, encoder: nn.Module, args: argparse.Namespace, dim: int = 128, depth: int = 2):
        super().__init__()
        self.encoder, self.mask_ratio, self.masked_share = encoder, args.mask_ratio, args.masked_share
        patches = (args.image_size // 16) ** 2
        self.embed = nn.Linear(encoder.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 1 + patches, dim) * 0.02)
        self.decoder = nn.Sequential(*(Block(dim, 4, qkv_bias=True) for _ in range(depth)), nn.LayerNorm(dim))
        self.pixels = nn.Linear(dim, 16 * 16 * 3)
        self.answers = len(FAMILIES) + 2  # families, boundary, nearness
        self.dense = nn.Linear(encoder.embed_dim, (16 // SQUARE) ** 2 * self.answers)
        weight = torch.tensor([3.0 if name in RARE else 1.0 for name in FAMILIES])
        self.register_buffer("family_weight", weight, persistent=False)

    def forward(self, view: Canvas, noise: Tensor, depth: int) -> dict[str, Tensor]:
        """Crops with labels, masking noise (B, N) and the number of blocks to use -> the losses by name."""
        image = (view.image - MEAN[0]) / STD[0]
        masked = max(1, round(len(image) * self.masked_share))
        losses = {"pixels": self.reconstruction(image[:masked], noise[:masked], depth)}
        return losses | self.labelling(image, view, depth)

    def encode(self, image: Tensor, depth: int, seen: Tensor | None = None) -> Tensor:
        """Image, and indices (B, V) of the patches to see -> class token and patch tokens (B, 1+V, D)."""
        x = self.encoder._pos_embed(self.encoder.patch_embed(image))  # (B, 1+N, D)
        if seen is not None:
            x = torch.cat((x[:, :1], take(x[:, 1:], seen)), 1)
        for block in self.encoder.blocks[:depth]:
            x = block(x)
        return self.encoder.norm(x)

    def reconstruction(self, image: Tensor, noise: Tensor, depth: int) -> Tensor:
        """Mean squared error on the hidden patches, each normalised by its own mean and deviation."""
        seen = noise.argsort(1)[:, : round(noise.shape[1] * (1 - self.mask_ratio))]  # (B, V)
        y = self.embed(self.encode(image, depth, seen))
        full = self.mask_token.to(y.dtype).repeat(len(y), noise.shape[1], 1)
        full = full.scatter(1, seen[..., None].expand(-1, -1, y.shape[-1]), y[:, 1:])
        y = self.pixels(self.decoder(torch.cat((y[:, :1], full), 1) + self.positions)[:, 1:])  # (B, N, 768)

        target = patchify(image, 16)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-4).sqrt()
        error = (y.float() - target).square().mean(-1)  # (B, N)
        hidden = torch.ones_like(error).scatter(1, seen, 0.0)
        return (error * hidden).sum() / hidden.sum()

    def labelling(self, image: Tensor, view: Canvas, depth: int) -> dict[str, Tensor]:
        """Losses of the dense answers; a linear layer reads them off the tokens, so the tokens must hold them."""
        tokens = self.encode(image, depth)[:, 1:]
        answer = self.dense(tokens).float().unflatten(-1, (-1, self.answers))  # (B, N, 16, answers)
        family = patchify(view.family[:, None, 1::SQUARE, 1::SQUARE], 16 // SQUARE)  # (B, N, 16)
        nearness = patchify(view.depth[:, None, 1::SQUARE, 1::SQUARE], 16 // SQUARE)
        border = F.max_pool2d(boundaries(view.instance, view.family)[:, None], SQUARE)
        border = patchify(border, 16 // SQUARE)
        return {
            "family": F.cross_entropy(answer[..., :-2].flatten(0, 2), family.flatten(), self.family_weight),
            "border": F.binary_cross_entropy_with_logits(answer[..., -2], border),
            "depth": F.l1_loss(answer[..., -1], nearness),
        }


def patchify(image: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, N, patch * patch * C), patches row by row."""
    b, c, h, w = image.shape
    image = image.reshape(b, c, h // patch, patch, w // patch, patch)
    return image.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // patch) * (w // patch), -1)


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """(B, N, D) and (B, V) -> (B, V, D)."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def build(args: argparse.Namespace) -> MaskedAutoencoder:
    """Make the model; the weights it starts from depend on the seed only."""
    torch.manual_seed(args.seed)
    encoder = timm.create_model(ARCHITECTURE, num_classes=0, dynamic_img_size=True)
    initialise(encoder)
    return MaskedAutoencoder(encoder, args)


@torch.no_grad()
def initialise(encoder: nn.Module) -> None:
    """Start from what needs no learning: cosine filters, sine positions, and blocks that are the identity."""
    encoder.patch_embed.proj.weight.copy_(cosine_filters(encoder.embed_dim))
    rows, columns = encoder.patch_embed.grid_size
    encoder.pos_embed[:, 1:].copy_(0.3 * sine_positions(rows, columns, encoder.embed_dim))
    for block in encoder.blocks:
        block.attn.proj.weight.zero_()
        block.mlp.fc2.weight.zero_()


def cosine_filters(dim: int) -> Tensor:
    """The lowest filters (dim, 3, 16, 16) of the 2-D DCT, two thirds on luma and one third on colour differences."""
    steps, order = torch.arange(16) + 0.5, torch.arange(16)
    basis = torch.cos(math.pi / 16 * order[:, None] * steps) / 8**0.5  # (16, 16), row k is frequency k
    frequency = torch.hypot(order[:, None].float(), order[None].float()).flatten()
    lowest = frequency.argsort(stable=True)
    planes = torch.einsum("ky,lx->klyx", basis, basis).flatten(0, 1)
    planes = planes * (0.3 + frequency)[:, None, None] / 3  # natural spectra fall as 1/f: make all outputs alike
    colours = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [-0.5, 1.0, -0.5]])
    counts = (dim - 2 * (dim // 6), dim // 6, dim // 6)
    filters = [planes[lowest[:n], None] * c[None, :, None, None] for n, c in zip(counts, colours)]
    return torch.cat(filters) / 3


def sine_positions(rows: int, columns: int, dim: int) -> Tensor:
    """Sines and cosines of row and column (rows * columns, dim), periods from 6 to 400 patches."""
    rate = 2 * math.pi / (6 * 66 ** torch.linspace(0, 1, dim // 4))
    y, x = (torch.arange(n)[:, None] * rate for n in (rows, columns))  # (n, dim / 4)
    y, x = y[:, None].expand(-1, columns, -1), x[None].expand(rows, -1, -1)
    return torch.cat((y.sin(), y.cos(), x.sin(), x.cos()), -1).flatten(0, 1)


# Optimiser


def optimiser(args: argparse.Namespace, model: MaskedAutoencoder) -> Muon:
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    inner = [*model.encoder.blocks.parameters(), *model.decoder.parameters()]
    matrices = [p for p in inner if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    inside = {"params": matrices, "orthogonal": True, "weight_decay": args.weight_decay}
    return Muon([inside, {"params": others}], lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)


# Loop


def depth_at(args: argparse.Namespace, step: int) -> int:
    """How many blocks are in use at a step."""
    return max(depth for start, depth in GROWTH[args.growth] if step >= start * args.steps)


@torch.no_grad()
def split(blocks: nn.ModuleList, optimizer: torch.optim.Optimizer) -> None:
    """Make each of the first blocks several in a row, in place: x + f(x) becomes n steps of f / n.

    What the optimiser remembers of them is forgotten.
    """
    times = len(blocks) // SHALLOW
    for index in reversed(range(len(blocks))):  # each reads one that is not written yet
        blocks[index].load_state_dict(blocks[index // times].state_dict())
    for block in blocks:
        for layer in (block.attn.proj, block.mlp.fc2):  # the last of what a sub-layer adds
            layer.weight.div_(times)
            layer.bias.div_(times)
    for parameter in blocks.parameters():
        optimizer.state.pop(parameter, None)


def learning_rate(args: argparse.Namespace, step: int) -> float:
    """Linear warm-up, then a cosine down to a thousandth of the peak."""
    warm = max(1, round(args.steps * args.warmup))
    if step < warm:
        return args.lr * (step + 1) / warm
    progress = (step - warm) / max(1, args.steps - warm)
    return args.lr * (0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * progress)))


def out_of_time(args: argparse.Namespace, accelerator: Accelerator, seconds: float) -> bool:
    """Tell whether the time limit is reached; all processes give the same answer, so that all stop together."""
    if args.minutes == math.inf or accelerator.num_processes == 1:
        return seconds > 60 * args.minutes
    average = accelerator.reduce(torch.tensor(seconds, device=accelerator.device), "mean")
    return average.item() > 60 * args.minutes


def train(args: argparse.Namespace, accelerator: Accelerator, model: nn.Module) -> dict:
    """Train to the last step or to the time limit; return what the card says about the run."""
    pictures = Pictures(args, accelerator.process_index, accelerator.device)
    if args.compile:
        model.compile(backend=BACKEND, mode=args.compile)  # in place: names stay as they are
    encoder: Any = model.encoder
    model, optimizer = accelerator.prepare(model, optimiser(args, model))
    run = restore(args, accelerator) if args.resume else None
    if run is None:
        run = {"step": 0, "seconds": 0.0, "losses": {}}
        if accelerator.is_main_process:
            begin(args.out, MADE)

    start, before, first = time.monotonic(), run["seconds"], run["step"]
    images = args.batch_size * accelerator.num_processes
    bar = tqdm(
        total=args.steps * images, initial=first * images, unit="img", unit_scale=True, mininterval=2,
        disable=not accelerator.is_main_process,
    )  # fmt: skip
    on_cpu = accelerator.device.type == "cpu"  # whose fused kernel is slow in its backward pass
    attention = partial(sdpa_kernel, SDPBackend.MATH) if on_cpu else nullcontext
    model.train()
    with Stop() as stop:
        for step in range(first, args.steps):
            if args.growth == "split" and step and depth_at(args, step) > depth_at(args, step - 1):
                split(encoder.blocks, optimizer)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, step)
            view, noise = pictures.batch(step)
            with attention(), accelerator.autocast():
                losses = model(view, noise, depth_at(args, step))
                loss = losses["pixels"] + args.dense_weight * (losses["family"] + losses["border"] + losses["depth"])
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

            bar.update(images)
            if step % 50 == 0 or step == args.steps - 1:
                run["losses"] = {name: round(value.item(), 4) for name, value in losses.items()}
                bar.set_postfix(run["losses"])
            run |= {"step": step + 1, "seconds": before + time.monotonic() - start}
            # Several processes agree by a question to their devices, which waits: not in every step.
            asks = accelerator.num_processes == 1 or (step + 1) % 10 == 0
            late = asks and out_of_time(args, accelerator, run["seconds"] - before)
            stopped = stop.agreed(accelerator, step + 1)
            if late or stopped or (args.save_every and (step + 1) % args.save_every == 0) or step + 1 == args.steps:
                store(args, accelerator, run)
            if stopped:
                bar.close()
                raise Stopped(step + 1, args.out / "checkpoint", stopped)
            if late:
                break
    bar.close()
    run["images"] = run["step"] * images
    run["drawn"] = -(-run["step"] // pictures.period) * args.canvases * accelerator.num_processes
    return run


# Save


def store(args: argparse.Namespace, accelerator: Accelerator, run: dict) -> None:
    """Write the checkpoint next to the old one, then put it in its place; at no moment is there none."""
    fresh, final, old = (args.out / f"checkpoint{suffix}" for suffix in (".new", "", ".old"))
    try:
        accelerator.save_state(str(fresh))
        accelerator.wait_for_everyone()  # each process has written its part
        if accelerator.is_main_process:
            write_atomic(fresh / PROGRESS, json.dumps({**run, "run": run_of(args.out)}).encode())
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own
        shutil.rmtree(fresh, ignore_errors=True)
        raise OSError(
            f"the checkpoint {final} cannot be written: {error}. Make room, then go on with --resume"
        ) from error
    if accelerator.is_main_process:
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        fresh.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def restore(args: argparse.Namespace, accelerator: Accelerator) -> dict | None:
    """Load weights and optimisers, and say at which step the run goes on; None where there is no checkpoint."""
    for folder in (args.out / "checkpoint", args.out / "checkpoint.old"):
        if (folder / PROGRESS).exists():
            run = json.loads((folder / PROGRESS).read_text())
            check_run(folder, run.get("run"), args.out)
            accelerator.load_state(str(folder))
            if accelerator.is_main_process:
                adopt(args.out, run.get("run"))
            return run
    return None


def publish(args: argparse.Namespace, encoder: nn.Module, run: dict, accelerator: Accelerator) -> Path:
    """Write the encoder as fp16 safetensors, and its card beside it; return the path of the weights."""
    path = args.out / WEIGHTS
    weights = {name: tensor.detach().half().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    header = {"format": "pt", "architecture": ARCHITECTURE, "steps": str(run["step"]), "images": str(run["images"])}
    write_atomic(path, to_bytes(weights, header))
    processes = accelerator.num_processes
    launch = f"torchrun --nproc-per-node {processes}" if processes > 1 else "python"
    options = "".join(
        f" --{name.replace('_', '-')} {getattr(args, name)}"
        for name in ("steps", "batch_size", "image_size", "canvases", "reuse", "streets", "lr", "growth", "seed")
    )
    facts = run | vars(args) | {"command": f"{launch} -m recipes.pretrain_mae{options}", "torch": torch.__version__}
    facts["grew"] = ", ".join(str(depth) for _, depth in GROWTH[args.growth])
    facts["losses"] = ", ".join(f"{name} {value:.2f}" for name, value in run["losses"].items())
    facts |= {"device": accelerator.device.type.upper(), "processes": processes, "minutes": run["seconds"] / 60}
    card = (Path(__file__).parent / "pretrain_mae_card.md").read_text().format(**facts)
    write_atomic(args.out / "README.md", card.encode())
    return path


def main() -> None:
    """Pretrain and publish."""
    args = arguments()
    if args.image_size % 16:
        raise ValueError(f"--image-size is {args.image_size}, patches are 16 pixels wide; give a multiple of 16")
    waiting = DistributedDataParallelKwargs(find_unused_parameters=True)  # blocks that are not in use yet
    accelerator = together(Accelerator, mixed_precision=args.precision, kwargs_handlers=[waiting])
    model = build(args)
    with occupied(args.out, accelerator, args.resume, args.overwrite, MADE):
        run = train(args, accelerator, model)
        if accelerator.is_main_process:
            path = publish(args, model.encoder, run, accelerator)
            print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {run['images']} crops, losses {run['losses']}")


if __name__ == "__main__":
    command("pretrain_mae", main)
