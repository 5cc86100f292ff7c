r"""DAT, the vision transformer with deformable attention (Xia et al., CVPR 2022), as a backbone of timm.

    x = x + attn(norm(x))      attn by stage: local and shifted windows, windows and deformable attention
    x = x + mlp(norm(x))

in four stages at strides 4, 8, 16 and 32 (section 3.3, table 1). The modules carry the authors' names, so that their
checkpoints load as they are::

    import adaptkit.models  # registers dat_tiny, dat_small, dat_base and their _384 forms
    model = timm.create_model("dat_tiny")
    model.load_state_dict(torch.load("dat_tiny_in1k_224.pth", weights_only=True)["model"])

For ``attach``, and for ``--backbone`` of a command, they are put into a folder once, whose name is then the backbone's;
``--backbone dat_tiny --random-backbone`` has random weights::

    model = timm.create_model("dat_tiny", pretrained=True, pretrained_cfg_overlay={"file": "dat_tiny_in1k_224.pth"})
    timm.models.save_for_hf(model, "./dat_tiny")
    backbone = adaptkit.create.create_backbone("./dat_tiny")

Any image size runs: maps are padded to whole windows and even sides, bias tables are resized for another map. A
checkpoint of another size resizes them once, with a warning.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from adaptkit.core.layers import DropPath
from adaptkit.mixers.dat import ChannelNorm, DeformableAttention
from adaptkit.mixers.window import ShiftedWindowAttention
from adaptkit.ops.grid import cells, pad_to_multiple

__all__ = ["DAT"]

KERNELS = (9, 7, 5, 3)  # of the offset network, by stage
# Switches of the authors' constructor for variants that no released checkpoint uses, and their "off".
OFF = {
    "attn_drop_rate": 0.0,
    "dwc_pes": False,
    "sr_ratios": -1,
    "fixed_pes": False,
    "no_offs": False,
    "ns_per_pts": -1,
    "use_dwc_mlps": False,
    "use_conv_patches": False,
}


class MLP(nn.Module):
    """linear, GELU, linear over the channels of a map."""

    def __init__(self, dim: int, expansion: float) -> None:
        super().__init__()
        hidden = int(dim * expansion)
        layers = (("linear1", nn.Linear(dim, hidden)), ("act", nn.GELU()), ("linear2", nn.Linear(hidden, dim)))
        self.chunk = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.chunk(x.movedim(1, -1)).movedim(-1, 1)


def attention(
    letter: str, dim: int, heads: int, window: int, groups: int, grid: tuple[int, int], kernel: int, stride: int,
    factor: float, use_pe: bool,
) -> nn.Module:  # fmt: skip
    """Return the attention of a block by its letter; ``ValueError`` for one that DAT does not have."""
    if letter in ("L", "S"):
        return ShiftedWindowAttention(dim, heads, window, math.ceil(window / 2) if letter == "S" else 0, grid)
    if letter == "D":
        bias: Literal["table"] | None = "table" if use_pe else None
        return DeformableAttention(dim, heads, groups, grid, kernel, stride, factor, bias)
    raise ValueError(f"block {letter!r} is none of DAT's L, S and D; N, P, Q, X and E belong to DAT++")


class Stage(nn.Module):
    """The blocks of one resolution. ``layer_norms`` holds two per block: before ``attns`` and before ``mlps``."""

    def __init__(
        self, dim_in: int, dim: int, attns: Sequence[nn.Module], expansion: float, drop_path: Sequence[float]
    ) -> None:
        super().__init__()
        self.proj: nn.Module = nn.Identity() if dim_in == dim else nn.Conv2d(dim_in, dim, 1)
        self.layer_norms = nn.ModuleList(ChannelNorm(dim) for _ in range(2 * len(attns)))
        self.attns = nn.ModuleList(attns)
        self.mlps = nn.ModuleList(MLP(dim, expansion) for _ in attns)
        self.drop_path = nn.ModuleList(DropPath(p) for p in drop_path)

    def forward(self, x: Tensor, points: dict[int, Tensor] | None = None) -> Tensor:
        """(B, C, H, W) -> the same; ``points`` gathers where the deformable blocks read, by block."""
        x = self.proj(x)
        for index in range(len(self.attns)):
            x = self.block(index, x, points)
        return x

    def block(self, index: int, x: Tensor, points: dict[int, Tensor] | None = None) -> Tensor:
        """Run one block: (B, C, H, W) -> the same."""
        attn, drop_path = self.attns[index], self.drop_path[index]
        h = self.layer_norms[2 * index](x)
        if points is not None and isinstance(attn, DeformableAttention):
            points[index] = attn.keys(h).points
        x = x + drop_path(attn(h))
        return x + drop_path(self.mlps[index](self.layer_norms[2 * index + 1](x)))


class DAT(nn.Module):
    """DAT for classification and as a pyramid of features.

    The arguments are the authors', so that ``DAT(**their_config)`` builds their model; sequences go by stage.

    Args:
        img_size: (H, W) or one number: the size that masks and bias tables are made for. Other images run too.
        stage_spec: one letter per block: L windows, S shifted windows, D deformable.
        depths: blocks of a stage; must agree with ``stage_spec``.
        groups, strides, offset_range_factor, use_pes: of the deformable blocks; where a stage has none they are idle.
        drop_rate: before the classifier.
        drop_path_rate: of the last block; earlier ones less, linearly.
        others: the authors' further switches, accepted where they are off.

    Raises ``ValueError`` for a switch that is on, or a letter of DAT++.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        num_classes: int = 1000,
        expansion: float = 4,
        dim_stem: int = 96,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        window_sizes: Sequence[int] = (7, 7, 7, 7),
        strides: Sequence[int] = (-1, -1, 1, 1),
        offset_range_factor: Sequence[float] = (-1, -1, 2, 2),
        stage_spec: Sequence[Sequence[str]] | None = None,
        groups: Sequence[int] = (-1, -1, 3, 6),
        use_pes: Sequence[bool] = (False, False, True, True),
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        **others: Any,
    ) -> None:
        super().__init__()
        check_off(others)
        stage_spec = stage_spec or paper_spec(depths)
        if [len(s) for s in stage_spec] != list(depths):
            raise ValueError(
                f"stage_spec has {[len(s) for s in stage_spec]} blocks, depths={list(depths)}; make them agree"
            )
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.patch_size, self.num_classes, self.global_pool = patch_size, num_classes, global_pool
        self.num_features = self.head_hidden_size = dims[-1]
        self.patch_proj = nn.Sequential(nn.Conv2d(in_chans, dim_stem, patch_size, patch_size), ChannelNorm(dim_stem))
        rates = iter([drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))])
        stages, self.feature_info = [], []
        for i, spec in enumerate(stage_spec):
            stride = patch_size * 2**i
            grid = (cells(size[0], stride), cells(size[1], stride))
            attns = [
                attention(letter, dims[i], heads[i], window_sizes[i], groups[i], grid, KERNELS[i], strides[i],
                          offset_range_factor[i], use_pes[i])
                for letter in spec
            ]  # fmt: skip
            stages.append(
                Stage(dim_stem if i == 0 else dims[i], dims[i], attns, expansion, [next(rates) for _ in spec])
            )
            self.feature_info.append({"num_chs": dims[i], "reduction": stride, "module": f"stages.{i}"})
        self.stages = nn.ModuleList(stages)
        self.down_projs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 2, 2, bias=False), ChannelNorm(b)) for a, b in itertools.pairwise(dims)
        )
        self.cls_norm: nn.Module = ChannelNorm(dims[-1])
        self.head_drop = nn.Dropout(drop_rate)
        self.cls_head = self._classifier()

    def _classifier(self) -> nn.Module:
        return nn.Linear(self.num_features, self.num_classes) if self.num_classes > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, 3, H, W) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor, points: dict[str, Tensor] | None = None) -> Tensor:
        """Image (B, 3, H, W) -> the last map after its norm (B, C, H/32, W/32).

        ``points`` gathers where each deformable block read: ``"<stage>.<block>"`` -> (B, groups, Hk, Wk, 2), as
        (y, x) in -1..1.
        """
        return self.cls_norm(self._pyramid(x, len(self.stages), points)[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C, H, W) -> logits, or the pooled features (B, C) before them."""
        if self.global_pool == "avg":
            x = x.mean((2, 3))
        x = self.head_drop(x)
        return x if pre_logits else self.cls_head(x)

    def points(self, x: Tensor) -> dict[str, Tensor]:
        """Image -> where each deformable block reads its keys, by ``"<stage>.<block>"``."""
        points: dict[str, Tensor] = {}
        self.forward_features(x, points)
        return points

    def _pyramid(self, x: Tensor, stop: int, points: dict[str, Tensor] | None = None) -> list[Tensor]:
        """Return the maps of the first ``stop`` stages, strides 4, 8, 16, 32, rounded up."""
        x = self.patch_proj(pad_to_multiple(x, self.patch_size))
        maps: list[Tensor] = []
        for i, stage in enumerate(self.stages[:stop]):  # type: ignore[arg-type]
            if i > 0:
                x = self.down_projs[i - 1](pad_to_multiple(x, 2))
            own: dict[int, Tensor] | None = None if points is None else {}
            x = stage(x, own)
            if points is not None:
                points.update({f"{i}.{block}": p for block, p in (own or {}).items()})
            maps.append(x)
        return maps

    # ---- timm's interface

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the last map after its norm, and those of the stages in ``indices``.

        As timm has it: None takes all stages, n the last n; ``norm`` norms the last one; ``stop_early`` leaves out
        stages that are not asked for, and the first of the two is then the last map made, without a norm.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: DAT's maps are NCHW")
        take, last = feature_take_indices(len(self.stages), indices)
        maps = self._pyramid(x, last + 1 if stop_early else len(self.stages))
        final = self.cls_norm(maps[-1]) if len(maps) == len(self.stages) else maps[-1]
        taken = [final if norm and i == len(self.stages) - 1 else maps[i] for i in take]
        return taken if intermediates_only else (final, taken)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last of ``indices``, on request the norm and the classifier."""
        take, last = feature_take_indices(len(self.stages), indices)
        self.stages, self.down_projs = self.stages[: last + 1], self.down_projs[:last]  # type: ignore[assignment]
        if prune_norm:
            self.cls_norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.cls_head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; 0 removes it. ``global_pool`` is ``"avg"`` or ``""``."""
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        old = next(self.parameters())
        self.cls_head = self._classifier().to(old.device, old.dtype)

    def no_weight_decay(self) -> set[str]:
        """Bias tables are not decayed."""
        return {n for n, _ in self.named_parameters() if n.endswith(("rpe_table", "relative_position_bias_table"))}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the order of layers, for layer-wise learning rates."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(?:attns|mlps)\.(\d+)"
        return {
            "stem": r"^patch_proj",
            "blocks": [(blocks, None), (r"^down_projs\.(\d+)", (0,)), (r"^cls_norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Refuse: activations are not recomputed here."""
        if enable:
            raise ValueError("DAT keeps its activations; wrap its stages in torch.utils.checkpoint yourself")


def check_off(switches: dict[str, Any]) -> None:
    """Raise ``ValueError`` where one of the authors' further switches is on, or is none of theirs."""
    for name, value in switches.items():
        if name not in OFF:
            raise ValueError(f"DAT has no option {name!r}; see DAT.__doc__")
        values = value if isinstance(value, Sequence) else [value]
        if any(v != OFF[name] for v in values):
            raise ValueError(f"{name}={value!r} is of a variant that is not supported; leave it at {OFF[name]!r}")


def paper_spec(depths: Sequence[int]) -> list[list[str]]:
    """Return table 1: windows and shifted windows in stages 1 and 2, windows and deformable in 3 and 4."""
    return [[("L", "S" if i < 2 else "D")[b % 2] for b in range(depth)] for i, depth in enumerate(depths)]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Open the authors' checkpoint, which keeps the tensors under ``model``."""
    return state_dict.get("model", state_dict)


def _cfg(size: int = 224, **more: Any) -> dict[str, Any]:
    return {
        "url": "",  # the authors' files are behind a form: give yours with pretrained_cfg_overlay={"file": ...}
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "crop_pct": 0.875 if size == 224 else 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_proj.0",
        "classifier": "cls_head",
        "license": "apache-2.0",
        "paper_name": "Vision Transformer with Deformable Attention",
        "paper_ids": "arXiv:2201.00520",
        **more,
    }


default_cfgs = generate_default_cfgs(
    {f"dat_{size}.untrained": _cfg() for size in ("tiny", "small", "base")}
    | {f"dat_{size}_384.untrained": _cfg(384) for size in ("tiny", "small", "base")}
)

SMALL = {"depths": (2, 2, 18, 2)}
BASE = {"dim_stem": 128, "dims": (128, 256, 512, 1024), "heads": (4, 8, 16, 32), "groups": (-1, -1, 4, 8), **SMALL}
AT_384 = {"img_size": 384, "window_sizes": (12, 12, 12, 12)}


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> DAT:
    return build_model_with_cfg(
        DAT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **{**defaults, **kwargs},
    )


@register_model
def dat_tiny(pretrained: bool = False, **kwargs: Any) -> DAT:
    """DAT-T: 28.32 M parameters; 82.0 % in the paper."""
    return _create("dat_tiny", pretrained, {"drop_path_rate": 0.2}, kwargs)


@register_model
def dat_small(pretrained: bool = False, **kwargs: Any) -> DAT:
    """DAT-S: 49.70 M parameters; 83.7 % in the paper."""
    return _create("dat_small", pretrained, {"drop_path_rate": 0.3, **SMALL}, kwargs)


@register_model
def dat_base(pretrained: bool = False, **kwargs: Any) -> DAT:
    """DAT-B: 87.88 M parameters; 84.0 % in the paper."""
    return _create("dat_base", pretrained, {"drop_path_rate": 0.5, **BASE}, kwargs)


@register_model
def dat_tiny_384(pretrained: bool = False, **kwargs: Any) -> DAT:
    """DAT-T at 384 pixels, windows of 12: for a fine-tuned 224 checkpoint; the authors have none."""
    return _create("dat_tiny_384", pretrained, {"drop_path_rate": 0.2, **AT_384}, kwargs)


@register_model
def dat_small_384(pretrained: bool = False, **kwargs: Any) -> DAT:
    """DAT-S at 384 pixels, windows of 12: for a fine-tuned 224 checkpoint; the authors have none."""
    return _create("dat_small_384", pretrained, {"drop_path_rate": 0.3, **SMALL, **AT_384}, kwargs)


@register_model
def dat_base_384(pretrained: bool = False, **kwargs: Any) -> DAT:
    """DAT-B at 384 pixels, windows of 12: 88.18 M parameters; 84.8 % in the paper."""
    return _create("dat_base_384", pretrained, {"drop_path_rate": 0.5, **BASE, **AT_384}, kwargs)
