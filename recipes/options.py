"""The options that the recipes share, on the command line or in a YAML file."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from adaptkit.core import packed
from adaptkit.core.near import hint
from adaptkit.pictures import CHANNELS

from . import normalisation
from .help import RecipeParser
from .layouts import has_splits

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")  # of torch.compile
CONFIGS = Path(__file__).parent / "configs"
OPTIONS_HELP = """e.g. '{"injector": false}'; with several adapters '{"lora": {...}, "vit-adapter": {...}}'"""

VIEWS_HELP = """make K random views (crop, mirror, colour) of each image and come back to them:
epoch e trains on view e modulo K; 0: a new view in every epoch"""
CACHE_HELP = """run the frozen backbone once for each of the K views, keep its features in this folder and
train on them, now and in later runs. For adapters that only read: none, linear, sfp, vit-split and
vit-adapter with '{"injector": false}'. A run that is killed goes on where it was, and a folder that
holds more blocks than a run reads serves it too; features of another backbone, data, transform,
size or seed are an error"""
CACHE_DTYPE_HELP = """of the features that are kept. float32 keeps every bit, in twice the room of float16; int8
takes 53 %% of float16's, with a scale for each 32 channels of a token: no value is off by more than
1/253 of the largest of the 32, in quadratic mean by 0.5 to 1 %% of the features (float16: 0.02 %%),
as adaptkit/features/int8.py says"""
OFFLOAD_HELP = """with --cache-features, for a backbone that does not fit the device: its blocks stay in CPU memory
and each is on the device while it runs, for up to 64 images at once where the cache is filled and
for a batch in validation. The features are the same, bit for bit. On the device are the largest
block, adapter, head and activations"""
DTYPE_HELP = """of the frozen weights: bfloat16, or the linear layers of its blocks in eight bits (torchao, else
bitsandbytes) or four (nf4, bitsandbytes). What is trained stays float32, and its file fits the
backbone in any of these. Default: as it is loaded"""
CROP_HELP = """train on a window of H x W pixels of what the backbone saw of the whole image, a new one,
drawn at random, each time an image comes: variety for which the backbone need not run again,
and less work for adapter and head. Tokens, image and target are cut alike. Multiples of the
patch; with multiples of 32 no adapter has to pad. For the adapters of --cache-features, with
or without it"""
FLIP_HELP = """mirror what the backbone saw, left and right exchanged, every other time at random"""

TRAIN_HELP = """parts of the backbone to train as well, by names of its modules or parameters or patterns of them:
blocks.11 norm, or '*.bias'. They are saved in the file"""
DECAY_HELP = "of the learning rate of --train-backbone, from each block to the one before it, e.g. 0.8"
COMPILE_HELP = """run backbone, adapters and a head of adaptkit's through torch.compile, in training and
evaluation; a network around it (detectors, upernet, mask2former) is left as it is. default,
reduce-overhead (CUDA graphs), max-autotune, max-autotune-no-cudagraphs"""
PRECISION_HELP = """of the forward pass; auto: bf16 where the GPU or the processor computes in it, else no. On a
processor that does not, bf16 takes two to three times as long as float32"""


INIT_HELP = """a saved adapter to start from, of the same --adapter: a folder or a Hub id. Its head is taken too where
it is the same; a warning says why not"""
OPTIMIZER_HELP = """adamw; muon: orthogonal updates for matrices and convolutions, AdamW for the rest, at the rates of
AdamW; sgd: momentum 0.9"""
CHANGE_HELP = """options that may differ from those of the run that --resume goes on with: steps lr schedule warmup
weight-decay clip patience keep-best. Data, model and loss may not"""
KEEP_HELP = """keep the adapter with the best METRIC of all evaluations in OUT/best; none: do not. Default: the
score of the task where --eval-every is given"""
DETAILS_HELP = """at the end write evaluation.json and some pictures for `adaptkit report`: scores class by class and
image by image, boundaries, calibration, cost. The last validation finds most of it in passing"""
PATIENCE_HELP = "end after N evaluations in a row without a better --keep-best; 0: never"
BATCH_HELP = """images per process; auto: as many as memory allows, tried out on a GPU, estimated on a CPU from steps
of 4 and 8 (half of the machine's memory). What was chosen is said, and recorded in config.yaml"""
TRACKER_HELP = "tensorboard, wandb, mlflow, ...; metrics.jsonl is always written"
OVERWRITE_HELP = "delete what an earlier run left in --out"


def batch_of(text: str) -> int | str:
    """Read ``--batch-size``, as argparse asks for it."""
    if text == "auto":
        return text
    with contextlib.suppress(ValueError):
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r}: give a number of images, or auto")


def seed_of(text: str) -> int:
    """Read a seed, as argparse asks for it."""
    with contextlib.suppress(ValueError):
        if 0 <= int(text) < 2**63:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text!r}: a seed is a whole number from 0 to 2^63 - 1")


#: What ``--change`` may name: how long and how fast it is trained, and how it is scored; not what, on what, or by which
#: loss. It must be
#: named, for an option that differs by mistake (given the first time, then forgotten) looks like one that is meant.
CHANGEABLE = (
    "steps", "lr", "schedule", "warmup", "weight_decay", "clip", "patience", "keep_best",
    "slide", "stride", "resize", "scales", "flip", "details",
)  # fmt: skip


def changeable(text: str) -> str:
    """Read an option of ``--change``, as argparse asks for it."""
    name = text.removeprefix("--").replace("-", "_")
    if name in CHANGEABLE:
        return name
    known = " ".join(k.replace("_", "-") for k in CHANGEABLE)
    raise argparse.ArgumentTypeError(f"{text!r} cannot change within a run; {known} can")


class Options(argparse.Namespace):
    """Options, and under ``names`` which of its attributes are options: recipes put more there."""

    __slots__ = ("names",)  # not among vars(), which a checkpoint compares


def precision(asked: str) -> str:
    """``no``, ``bf16`` or ``fp16``; of ``auto``, what this machine computes fast in."""
    if asked != "auto":
        return asked
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16")
    return "bf16" if fast else "no"


def parser(name: str, doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Return a parser with the options that every task has; ``defaults`` overrides theirs."""
    p = RecipeParser(prog=name, description=doc, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument(
        "--config", help="YAML file of options, or the name of one in recipes/configs; the command line wins"
    )
    p.add_argument(
        "--train", required="train" not in defaults, help="Parquet file, folder, or Hub id (org/set, or org/set@split)"
    )
    p.add_argument("--val", help="the same for validation; default: the split 'validation' of a Hub id")
    p.add_argument("--streaming", action=argparse.BooleanOptionalAction, default=False, help="read data as they come")
    p.add_argument("--shuffle-buffer", type=int, default=1000, help="rows to draw from when streaming; 0: as they come")
    p.add_argument("--backbone", default="demo", help="demo, a timm name, hf-hub:..., org/repo, or a local folder")
    p.add_argument("--random-backbone", action=argparse.BooleanOptionalAction, default=False, help="random weights")
    p.add_argument("--backbone-dtype", choices=packed.DTYPES, help=DTYPE_HELP)
    normalisation.options(p)
    p.add_argument("--adapter", nargs="+", default=["none"], metavar="NAME", help="one or several, see `adaptkit list`")
    p.add_argument("--adapter-options", type=json.loads, default={}, metavar="JSON", help=OPTIONS_HELP)
    p.add_argument("--init", metavar="FILE", help=INIT_HELP)
    p.add_argument("--train-backbone", nargs="+", default=[], metavar="PART", help=TRAIN_HELP)
    p.add_argument("--layer-decay", type=float, default=1.0, metavar="FACTOR", help=DECAY_HELP)
    p.add_argument("--steps", type=int, default=400, help="optimiser steps")
    p.add_argument("--batch-size", type=batch_of, default=8, metavar="N", help=BATCH_HELP)
    p.add_argument("--accumulate", type=int, default=1, help="batches per optimiser step")
    p.add_argument("--optimizer", default="adamw", choices=["adamw", "muon", "sgd"], help=OPTIMIZER_HELP)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--schedule", default="cosine", choices=["cosine", "linear"], help="of the learning rate, to zero")
    p.add_argument("--weight-decay", type=float, default=0.01)
    p.add_argument("--warmup", type=float, default=0.05, help="share of the steps")
    p.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    p.add_argument("--ema", type=float, default=0.0, metavar="DECAY", help="score and save the average of the weights")
    p.add_argument("--mixed-precision", default="no", choices=["no", "bf16", "fp16", "auto"], help=PRECISION_HELP)
    p.add_argument("--compile", nargs="?", const="default", choices=MODES, metavar="MODE", help=COMPILE_HELP)
    p.add_argument("--views", type=int, default=0, metavar="K", help=VIEWS_HELP)
    p.add_argument("--cache-features", metavar="DIR", help=CACHE_HELP)
    p.add_argument(
        "--cache-dtype", default="float16", choices=["float16", "bfloat16", "float32", "int8"], help=CACHE_DTYPE_HELP
    )
    p.add_argument("--offload", action=argparse.BooleanOptionalAction, default=False, help=OFFLOAD_HELP)
    p.add_argument("--crop-features", type=int, nargs=2, metavar=("H", "W"), help=CROP_HELP)
    p.add_argument("--flip-features", action=argparse.BooleanOptionalAction, default=False, help=FLIP_HELP)
    p.add_argument("--shard", action=argparse.BooleanOptionalAction, default=False, help="backbone in parts (FSDP2)")
    p.add_argument("--workers", type=int, default=0)
    p.add_argument("--eval-every", type=int, default=0, help="steps; 0: at the end only")
    p.add_argument("--save-every", type=int, default=100, help="steps between checkpoints; 0: none")
    p.add_argument("--details", action=argparse.BooleanOptionalAction, default=True, help=DETAILS_HELP)
    p.add_argument("--keep-best", default=None, metavar="METRIC", help=KEEP_HELP)
    p.add_argument("--patience", type=int, default=0, metavar="N", help=PATIENCE_HELP)
    p.add_argument("--tracker", default=None, help=TRACKER_HELP)
    p.add_argument("--seed", type=seed_of, default=0)
    p.add_argument("--out", default=f"runs/{name}")
    p.add_argument("--resume", action=argparse.BooleanOptionalAction, default=False, help="from the newest checkpoint")
    p.add_argument("--change", nargs="+", default=[], metavar="OPTION", type=changeable, help=CHANGE_HELP)
    p.add_argument("--overwrite", action=argparse.BooleanOptionalAction, default=False, help=OVERWRITE_HELP)
    p.set_defaults(**defaults)
    return p


def read(p: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, behind it ``--config``; an unknown key or a bad value ends with a line that says so."""
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--config")
    config = before.parse_known_args(argv)[0].config
    tokens = [] if config is None else config_arguments(p, config)
    args = p.parse_args([*tokens, *(argv if argv is not None else sys.argv[1:])], Options())
    args.names = tuple(action.dest for action in p._actions if action.dest != "help")
    counts = (getattr(args, k, 1) for k in ("steps", "batch_size", "accumulate"))
    if min(1 if n == "auto" else n for n in counts) < 1:
        p.error("--steps, --batch-size and --accumulate must be at least 1")
    if not 0 < getattr(args, "layer_decay", 1.0) <= 1:
        p.error(f"--layer-decay {args.layer_decay}: a factor in 0..1, e.g. 0.8; 1 is the same rate for all blocks")
    if not (getattr(args, "train_backbone", None) or getattr(args, "channels", None)):
        check_unused(p, args, ("layer_decay",), "nothing of the backbone is trained: --train-backbone")
    if not getattr(args, "cache_features", None):
        check_unused(p, args, ("cache_dtype",), "no features are kept: --cache-features")
    if getattr(args, "channels", None) is None:
        check_unused(p, args, ("expand", "wavelengths"), "the backbone is taken as it is: --channels")
    if getattr(args, "train_backbone", None) and getattr(args, "cache_features", None):
        p.error("--cache-features keeps what a frozen backbone says, and --train-backbone changes it: give one of them")
    if getattr(args, "train_backbone", None) and getattr(args, "backbone_dtype", None) not in (None, "float32"):
        p.error(f"--backbone-dtype {args.backbone_dtype} is for frozen weights, and small steps of --train-backbone "
                "would be lost in it: give one of them")  # fmt: skip
    if getattr(args, "clip", 1.0) <= 0:
        p.error(f"--clip {args.clip}: the largest norm of a gradient is above 0, e.g. 1; inf clips nothing")
    if not 0 <= getattr(args, "warmup", 0.0) < 1:
        p.error(f"--warmup {args.warmup}: a share of the steps, in 0..1, e.g. 0.05")
    if min(getattr(args, k, 0) for k in ("eval_every", "save_every")) < 0:
        p.error("--eval-every and --save-every are numbers of steps, or 0")
    if getattr(args, "patience", 0) < 0:
        p.error(f"--patience {args.patience}: give a number of evaluations, or 0")
    if getattr(args, "change", None) and not args.resume:
        p.error("--change says what may differ from the run that --resume goes on with: give --resume, or leave it out")
    if not 0 <= getattr(args, "ema", 0) < 1:
        p.error(f"--ema {args.ema}: the decay is in 0..1, e.g. 0.999; 0 keeps no average")
    if getattr(args, "cache_features", None) and args.views < 1:
        p.error("--cache-features needs --views K: which views of each image are there to be kept, e.g. --views 4")
    if getattr(args, "offload", False):
        check_offload(p, args)
    if getattr(args, "views", 0) and args.streaming:
        p.error("--views comes back to the same images, and --streaming reads them as they come: give one of them")
    if (getattr(args, "crop_features", None) or getattr(args, "flip_features", False)) and args.streaming:
        p.error("--crop-features and --flip-features know an image by its number, and a stream has none: give "
                "--no-streaming, or leave them out")  # fmt: skip
    try:
        normalisation.given(args, None if hasattr(args, "channels") else CHANNELS)
    except ValueError as error:
        p.error(str(error))
    return args


def check_offload(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a line where ``--offload`` makes no sense beside the other options."""
    if not args.cache_features:
        p.error("--offload copies the backbone to the device for each pass, too slow to train through: give "
                "--cache-features DIR --views K, so that it runs once for each image, or --shard")  # fmt: skip
    if args.shard or args.compile:
        other, why = ("--shard", "has parts of the blocks on each device") if args.shard else (
            "--compile", "makes one program of all blocks and their weights")  # fmt: skip
        p.error(f"--offload has one block on the device at a time, and {other} {why}: give one of them")


def config_arguments(p: argparse.ArgumentParser, config: str) -> list[str]:
    """Return the command line that a YAML file stands for; its keys are the names of the options."""
    import yaml

    path = next((f for f in (Path(config), CONFIGS / config, CONFIGS / f"{config}.yaml") if f.is_file()), None)
    if path is None:
        known = ", ".join(sorted(f.stem for f in CONFIGS.glob("*.yaml")))
        near = hint(config, [f.stem for f in CONFIGS.glob("*.yaml")])
        p.error(f"--config {config}: there is no such file, nor one in recipes/configs{near} ({known})")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        p.error(f"--config {path} is no YAML: {error}")
    if not isinstance(values, dict):
        p.error(f"--config {path} holds no 'option: value' lines")
    if isinstance(values.get("options"), dict):  # what a run wrote of itself: see record.py
        values = values["options"]
    options = {flag: action for action in p._actions for flag in action.option_strings}
    tokens: list[str] = []
    for key, value in values.items():
        flag = "--" + str(key).replace("_", "-")
        if flag not in options or flag in ("--config", "--help"):
            p.error(f"--config {path}: unknown key {key!r}{hint(key, [one[2:] for one in options if one[:2] == '--'])}")
        if value is None or value == []:
            continue
        if isinstance(options[flag], argparse.BooleanOptionalAction):
            if not isinstance(value, bool):
                p.error(f"--config {path}: {key} is {value!r}; give true or false")
            tokens.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, dict):
            tokens.append(f"{flag}={json.dumps(value)}")
        elif isinstance(value, list):
            tokens += [flag, *map(str, value)]
        else:
            tokens.append(f"{flag}={value}")
    return tokens


def check_unused(p: argparse.ArgumentParser, args: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Refuse options that differ from their defaults and would change nothing."""
    for name in names:
        if hasattr(args, name) and getattr(args, name) != p.get_default(name):
            p.error(f"--{name.replace('_', '-')} has nothing to act on, for {why}")


def validation(args: argparse.Namespace) -> str:
    """Return ``--val``, or the set of ``--train`` where that has splits. Raises ``ValueError`` where it has none."""
    path = Path(args.train)
    splits = has_splits(path) or not (path.exists() or "*" in args.train or path.suffix == ".parquet")
    splits = splits and not args.train.startswith(("crops:", "placed:"))
    if args.val is None and not splits:
        raise ValueError(f"{args.train} has no splits, and a score on training data says little; give --val")
    if args.val is None and "@" in args.train and not path.exists():
        said = args.train.partition("@")[0]
        raise ValueError(
            f"{args.train} is one split, and a score on it would be one on training data; give --val {said}"
        )
    return args.val or args.train


def adapters(args: argparse.Namespace) -> list[Any]:
    """Return what ``attach`` takes of ``--adapter`` and ``--adapter-options``; [] for none, and for linear."""
    names, options = args.adapter, args.adapter_options
    if not isinstance(options, dict):
        raise ValueError(f"--adapter-options {options!r}: give a JSON object")
    if names in (["none"], ["linear"]):
        if options:
            raise ValueError(f"--adapter {names[0]} has no options, and --adapter-options gives {', '.join(options)}")
        return []
    if {"none", "linear"} & set(names):
        raise ValueError(f"--adapter {' '.join(names)}: 'none' and 'linear' stand alone")
    if len(names) == 1 and not options.keys() <= set(names):
        options = {names[0]: options}
    unknown = sorted(options.keys() - set(names))
    if unknown or not all(isinstance(v, dict) for v in options.values()):
        raise ValueError(
            f"--adapter-options has {', '.join(unknown or options)}; with --adapter {' '.join(names)} give "
            f'{{"{names[0]}": {{...}}}}'
        )
    return [(name, options[name]) if name in options else attachable(name, args) for name in names]


def attachable(name: str, args: argparse.Namespace) -> Any:
    """Return a name as it is, and a saved file without its head where the run trains a network of another library.

    That network is built around what is attached, and then gets the file's head if it is the same (``initial.py``).
    """
    from .initial import saved
    from .network import BUILDERS

    if getattr(args, "head", None) not in BUILDERS:
        return name
    file = saved(name)
    return name if file is None else dataclasses.replace(file, header={**file.header, "head": None})


def makes_pyramid(args: argparse.Namespace) -> list[str]:
    """Return the side adapters among ``--adapter``: what they learn is read from the pyramid alone."""
    from adaptkit.adapters.base import SideAdapter
    from adaptkit.core import registry

    known = registry.adapters()
    return [n for n in args.adapter if n in known and issubclass(known[n].module, SideAdapter)]


def command(name: str, main: Callable[[], Any]) -> None:
    """Run a recipe from the shell: an error of the user's is one line, which says how to mend it.

    One that was asked to stop says so, and ends with the status of the signal: 130 after Ctrl-C, 143 after SIGTERM.
    """
    try:
        main()
    except KeyboardInterrupt as stopped:
        print(f"{name}: {str(stopped) or 'stopped'}", file=sys.stderr)
        raise SystemExit(getattr(stopped, "status", 130)) from None
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise SystemExit(f"{name}: {error}") from error
