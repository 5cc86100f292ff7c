"""AdaViT on a frozen classifier: train the gates to a budget of MACs, and compare with the dense model.

    python -m recipes.adavit --data digits --size 64 --budget 0.5
    python -m recipes.adavit --data crops:train.parquet --val crops:val.parquet --size 64 --budget 0.5
    accelerate launch -m recipes.adavit --data imagenet-1k --backbone deit_small_patch16_224 --size 224

1. The classifier: the backbone's own where it has the right classes, else a linear head on its frozen features.
2. The gates and their bottlenecks, everything else frozen: cross-entropy, KL to the same model with all gates open, and
   the distance from the budget in MACs, which comes down from 1 in the first quarter of the run.
3. From the middle of the run on the gates decide without noise, as in evaluation, and are trained no further: the
   bottlenecks learn what goes with these decisions, as a pruned network is tuned. One shift of the patch gates' biases
   (of all, where not every gated block has a patch gate) holds the budget.
4. Such a shift, found on training images, brings the decisions to the budget in the end.
5. The table: dense, adaptive, and random decisions of the same cost.

Several budgets or seeds are a comparison (recipes/adavit_baselines.py): at each budget the gates, each kind of them
alone, the same training under random decisions, and with the last sub-layers left out; a table, and a chart of accuracy
against MACs. Each is a run as above, in a folder of its own; those that have ended are not made again.

    python -m recipes.adavit --data digits --size 64 --budget 0.4 0.5 0.7 --seeds 0 1 2 --out runs/adavit-baselines
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from adaptkit.adapters.adavit import AdaViT, Random
from adaptkit.analysis import accounting, kept_patches, usage_by_depth
from adaptkit.analysis.difficulty import EasyAndHard, ends
from adaptkit.analysis.style import pictured
from adaptkit.hub.write import write_atomic
from adaptkit.losses import check_budget

from . import normalisation, record
from .adavit_model import build
from .adavit_policies import POLICIES, WAYS, prepared, warn_out_of_reach
from .adavit_scores import Score, calibrate, evaluate, images_per_second, random_at
from .adavit_training import train
from .devices import together
from .folder import begin, occupied
from .help import RecipeParser
from .labelled import Labelled, check_same_classes, open_labelled
from .normalisation import source_of
from .options import MODES, OVERWRITE_HELP, PRECISION_HELP, command, precision, seed_of, validation
from .order import folded

#: What a run leaves.
MADE = ("metrics.jsonl", "result.json", "config.yaml", "adapter", "kept_patches.png", "usage.png", "easy_and_hard.png")

SHOWN = 6  #: of the easiest images, and of the hardest

DATA_HELP = """digits; crops:FILE, of a segmentation set, or placed:FILE, each somewhere in an empty image; a Parquet
file, a folder, or a Hub id"""
POLICY_HELP = """what decides in training and after it: the gates; at random, at one rate that fits the budget; or
static, the last sub-layers left out. The bottlenecks are trained in the same way"""
BUDGET_LOSS_HELP = """what is pulled to the budget: the MACs, whichever kind of gates saves them; or usage, as in the
paper (eq. 8), the share that each kind keeps: the one share at which the budget is spent"""

# ---------------------------------------------------------------------------------------------------- arguments


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = RecipeParser(prog="adavit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default="digits", help=DATA_HELP)
    p.add_argument("--val", help="the same for validation; default: the split 'validation' of --data")
    p.add_argument("--backbone", default="demo", help="demo, a timm name, hf-hub:..., org/repo, or a local folder")
    normalisation.options(p)
    p.add_argument("--size", type=int, default=64, help="side of the images in pixels")
    p.add_argument("--budget", type=float, nargs="+", default=[0.5], metavar="SHARE",
                   help="MACs to spend, as a share of the dense model's; several: a comparison")  # fmt: skip
    p.add_argument("--policy", default="learned", choices=list(POLICIES), help=POLICY_HELP)
    p.add_argument("--options", type=json.loads, default={"bottleneck": 4}, help="of the adapter, JSON")
    p.add_argument("--head-steps", type=int, default=1000, help="for the classifier; 0: the backbone's own")
    p.add_argument("--steps", type=int, default=800)
    p.add_argument("--batch-size", type=int, default=64, help="per process")
    p.add_argument("--lr", type=float, default=5e-3)
    p.add_argument("--weight", type=float, default=4.0, help="of the budget's loss")
    p.add_argument("--budget-loss", default="macs", choices=["macs", "usage"], help=BUDGET_LOSS_HELP)
    p.add_argument("--mixed-precision", default="no", choices=["no", "bf16", "fp16", "auto"], help=PRECISION_HELP)
    p.add_argument("--compile", nargs="?", const="default", choices=MODES, metavar="MODE",
                   help="train through torch.compile; evaluation packs what is kept, and runs as it is")  # fmt: skip
    p.add_argument("--seed", type=seed_of, default=0)
    p.add_argument("--seeds", type=seed_of, nargs="+", default=[], metavar="N", help="a comparison, each run with each")
    p.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, metavar="WAY",
                   help="of a comparison, of adaptive random random+ static patches heads layers")  # fmt: skip
    p.add_argument("--out", default="runs/adavit")
    p.add_argument("--overwrite", action=argparse.BooleanOptionalAction, default=False, help=OVERWRITE_HELP)
    args = p.parse_args(argv)
    for budget in args.budget:
        check_budget(budget, "--budget")
    args.budgets, args.budget = args.budget, args.budget[0]
    if min(args.size, args.steps, args.batch_size) < 1:
        p.error("--size, --steps and --batch-size must be at least 1")
    return args


# ------------------------------------------------------------------------------------------------------------ main


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if len(args.budgets) > 1 or args.seeds:
        from . import adavit_baselines  # it makes runs of this recipe

        adavit_baselines.run(sys.argv[1:] if argv is None else argv)
        return
    accelerator = together(Accelerator, mixed_precision=precision(args.mixed_precision))
    with occupied(args.out, accelerator, overwrite=args.overwrite, made=MADE, can_resume=False) as out:
        run_in(out, args, accelerator)


def run_in(out: Path, args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Train and compare, in a folder that is this run's."""
    set_seed(folded(args.seed, 31))
    device = accelerator.device
    scored = validation(argparse.Namespace(train=args.data, val=args.val))
    data, held = open_labelled(args.data, "train", args.size), open_labelled(scored, "validation", args.size)
    check_same_classes(data.classes, held.classes, "--data")
    model = build(data, args, device)
    if accelerator.num_processes > 1:
        set_seed(folded(args.seed, 31), device_specific=True)  # each draws noise of its own
    seed = folded(args.seed * 1000 + accelerator.process_index)
    policy = prepared(model, args.policy, args.budget, (args.size, args.size), seed)
    if accelerator.is_main_process:
        warn_out_of_reach(accounting.costs(model, (args.size, args.size)), args.budget)
        begin(out, MADE)
        record.write(out, "adavit", args, accelerator, model, (data, held))
    started = time.perf_counter()
    train(model, data, accelerator, args, policy)
    seconds = time.perf_counter() - started
    main_process = accelerator.is_main_process
    accelerator.end_training()  # what follows is one process's work
    if not main_process:
        return
    finish(out, args, model, policy, (data, held), device, seconds)


def finish(
    out: Path, args: argparse.Namespace, model: Any, policy: Random | None, sets: tuple[Labelled, Labelled],
    device: torch.device, seconds: float,
) -> None:  # fmt: skip
    """Bring the gates to their budget, score on the validation set, save and say it."""
    data, held = sets
    gates, learned = AdaViT.of(model), args.policy == "learned"
    shift = calibrate(model, data, args, device) if learned else 0.0
    everything, costs = torch.arange(len(held.labels)), accounting.costs(model, (args.size, args.size))

    def score(order: Tensor) -> Score:
        return evaluate(model, held, order, args, device, costs)

    if policy is not None:
        policy = Random(*policy.rates, seed=0)  # of every run the same draws
    with gates.opened():
        dense = score(everything)
    with gates.deciding(policy):
        own = score(everything)
        # saved before the proof, which may fail
        kept = f"; saved {save(out, args, model, own, held, device)}" if policy is None else ""
        off = model.verify(next(held.batches(everything, args.batch_size, source_of(model.vit, args), device))[0])
        rates = list(images_per_second(model, held, args, device))
    scores = {"dense": dense, POLICIES[args.policy]: own}
    if learned:
        scores["random"] = random_at(model, own.macs.mean, own.usage, score, len(everything))
    result = {
        "data": args.data, "images": [len(data.labels), len(held.labels)], "classes": len(data.classes),
        "gmacs": costs.dense / 1e9, "budget": args.budget, "shift": shift, "trained": POLICIES[args.policy],
        "accuracy": {name: one.accuracy for name, one in scores.items()},
        "readings": {name: {"accuracy": one.accuracy, "macs": one.macs.mean} for name, one in scores.items()},
        "macs": own.macs._asdict(), "usage": own.usage, "images_per_s": rates, "packed_minus_masked": off,
        "seconds": seconds, "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }  # fmt: skip
    if learned:
        result["random_macs"] = scores["random"].macs.mean
    write_atomic(out / "result.json", (json.dumps(result, indent=2) + "\n").encode())
    say(args, result, scores)
    print(f"\npacked equals masked to {off:.1e}{kept}")


def save(out: Path, args: argparse.Namespace, model: Any, own: Score, held: Labelled, device: torch.device) -> str:
    """Write the file, and what was kept as pictures; random decisions are in no file. Returns what was written."""
    scores = {"budget": args.budget, "accuracy": own.accuracy}
    folder = model.save(out / "adapter", task="image-classification", **normalisation.to_record(args), **scores)
    source = source_of(model.vit, args)

    def images(which: Sequence[int]) -> Tensor:
        return next(held.batches(torch.tensor(which), len(which), source, device))[0]

    try:  # the training is not lost by a picture
        kept_patches(model, images([0]), out / "kept_patches.png")
        usage_by_depth(own.aux, AdaViT.of(model).first).save(out / "usage.png")
        if len(own.shares) > 1:
            easy, hard = ends(own.shares, SHOWN)
            pictures = pictured(images((*easy, *hard)), source)
            EasyAndHard(own.shares, easy, hard, pictures).save(out / "easy_and_hard.png")
    except ImportError as error:
        return f"{folder}; no pictures: {error}"
    return f"{folder}; drew {', '.join(path.name for path in sorted(out.glob('*.png')))} beside it"


def say(args: argparse.Namespace, result: dict[str, Any], scores: dict[str, Score]) -> None:
    """Print the table."""
    kept = " / ".join(f"{share:.2f}" for share in result["usage"].values())
    print(f"\n{args.data}: {result['images'][0]} training and {result['images'][1]} validation images, ", end="")
    print(f"{result['gmacs']:.3f} GMACs dense, kept {' / '.join(result['usage'])} {kept}\n")
    print("| | accuracy | MACs mean | p50 | p95 | images/s |")
    print("|---|---|---|---|---|---|")
    speed = dict(zip(("dense", result["trained"]), result["images_per_s"]))
    called = {
        "random": "random decisions",
        "random+": "trained under random decisions",
        "static": "last layers left out",
    }
    for name, one in scores.items():
        rate = f"{speed[name]:.0f}" if name in speed else ""
        macs = " | ".join(f"{m:.0%}" for m in one.macs)
        print(f"| {called.get(name, name)} | {one.accuracy:.1%} | {macs} | {rate} |")


if __name__ == "__main__":
    command("adavit", main)
