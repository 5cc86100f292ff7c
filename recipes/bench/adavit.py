"""How much of the MACs that AdaViT skips is time saved? A DeiT-S at 224 pixels beside its dense self, in one run.

    python -m recipes.bench.adavit
    python -m recipes.bench.adavit --reference         # and the same inside adaptkit.reference()

Decisions are drawn at random with fixed rates, for every image and block anew, so the figures need no training. The
ideal is the ratio of MACs, dense to adaptive (gates included, counted by ``adaptkit.analysis.accounting``); "of ideal"
is the ratio of times over it. Each way sees the same images; they take turns, and the medians over the rounds are
compared. "prepacked" is "packed" with the backbone's weights laid out beforehand (``AdaViT.prepacked``).
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import adaptkit
from adaptkit.adapters.adavit import Given, Random
from adaptkit.analysis import accounting

POLICIES = {  # kept shares of patches, heads, sub-layers
    "0.5 / 0.65 / 0.8": (0.5, 0.65, 0.8),
    "0.7 / 0.8 / 0.9": (0.7, 0.8, 0.9),
    "1 / 1 / 1": (1.0, 1.0, 1.0),
}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="deit_small_patch16_224", help="a timm name; weights are random")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 1])
    parser.add_argument("--images", type=int, default=64, help="per round and way; half of them one by one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--head-mode", default="full", choices=["full", "partial"])
    parser.add_argument("--last-block", default="all", choices=["all", "class"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--reference", action="store_true", help="columns more: each way with no fast path taken")
    return parser.parse_args(argv)


def timed(run: Callable[[Tensor], object], batches: list[Tensor]) -> float:
    """Seconds for all batches."""
    if batches[0].is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for batch in batches:
        run(batch)
    if batches[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


class Recorded:
    """Decisions drawn beforehand, batch after batch, so that drawing them is not what is timed."""

    def __init__(self, model: adaptkit.AdaptedModel, batches: list[Tensor], rates: tuple[float, ...]) -> None:
        gates = model.adapters["adavit"]
        self.given: list[Given] = []
        spent = []
        costs = accounting.costs(model, tuple(batches[0].shape[-2:]))
        with gates.deciding(Random(*rates, seed=0)), gates.executing("packed"):
            for batch in batches:
                aux = model(batch).aux
                self.given.append(gates.given(aux))
                spent.append(accounting.macs(costs, aux))
        self.share = float(torch.cat(spent).mean()) / costs.dense


def main(argv: list[str] | None = None) -> None:
    """Print one table."""
    args = arguments(argv)
    import timm

    torch.manual_seed(0)
    host = timm.create_model(args.backbone, img_size=args.size).eval().to(args.device)
    options = {"first_block": 0, "head_mode": args.head_mode, "last_block": args.last_block}
    images = torch.randn(args.images, 3, args.size, args.size, device=args.device)
    dense_host = timm.create_model(args.backbone, img_size=args.size).eval().to(args.device)
    model = adaptkit.attach(host, ("adavit", options)).eval().to(args.device)
    gates = model.adapters["adavit"]
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    print(f"{args.backbone}, {args.size} pixels, {args.rounds} rounds of {args.images} images; {device}, ", end="")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    ways = ("packed", "auto", "masked")
    head = ["patches / heads / sub-layers", "batch", "MACs", "ideal", "packed", "of ideal", "prepacked", "of ideal"]
    head += ["auto", "masked", "dense ms/image", *(f"{way} with reference()" for way in ways if args.reference)]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    with torch.inference_mode():
        for policy, rates in POLICIES.items():
            for size in args.batches:
                batches = list((images if size > 1 else images[: -(-args.images // 2)]).split(size))
                recorded = Recorded(model, batches, rates)

                def run(way: str, given: list[Given] = recorded.given) -> Callable[[Tensor], object]:
                    turn = iter(given)

                    def forward(batch: Tensor) -> object:
                        with gates.executing(way), gates.deciding(next(turn)):
                            return model(batch)

                    return forward

                texts = {way: f"{way}, text" for way in ways if args.reference}
                names = ("dense", "prepacked", *ways, *texts.values())
                seconds: dict[str, list[float]] = {name: [] for name in names}
                with gates.prepacked() as layouts:
                    timed(run("packed"), batches)  # lays the weights out
                for _ in range(args.rounds):
                    seconds["dense"].append(timed(dense_host, batches))
                    for way in ways:
                        seconds[way].append(timed(run(way), batches))
                    for way, name in texts.items():
                        with adaptkit.reference():
                            seconds[name].append(timed(run(way), batches))
                    with gates.prepacked(layouts):
                        seconds["prepacked"].append(timed(run("packed"), batches))
                median = {way: statistics.median(s) for way, s in seconds.items()}
                gain = {way: median["dense"] / median[way] for way in median}
                ideal = 1 / recorded.share
                cells = [policy, str(size), f"{recorded.share:.1%}", f"{ideal:.2f}x"]
                for way in ("packed", "prepacked"):
                    cells += [f"{gain[way]:.2f}x", f"{gain[way] / ideal:.0%}"]
                cells += [f"{gain['auto']:.2f}x", f"{gain['masked']:.2f}x"]
                cells += [f"{1000 * median['dense'] / sum(map(len, batches)):.1f}"]
                cells += [f"{gain[name]:.2f}x" for name in texts.values()]
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
