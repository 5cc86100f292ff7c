"""``as_pyramid``: an adapted model as the backbone of somebody else's decoder or detector.

Every dense-prediction library wants the same thing, maps at strides s_0 < s_1 < ..., and says it in its own words::

    timm            a list of maps, ``feature_info``
    torchvision     an ``OrderedDict`` of maps, ``out_channels``, the one width of all of them
    transformers    ``BackboneOutput(feature_maps=...)``, ``channels``
    smp             the image, an empty map at stride 2, then the maps; ``out_channels``, a list

``Pyramid`` speaks all four. It adds no parameter: what is trained is the adapter, and the backbone stays frozen.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from adaptkit.adapters.base import SideAdapter
from adaptkit.core.hierarchical import HierarchicalSpec
from adaptkit.hub.card import card_beside
from adaptkit.hub.file import load_into, metadata_of, write_folder
from adaptkit.hub.fits import check_fits
from adaptkit.hub.repository import load
from adaptkit.model.adapted import AdaptedModel
from adaptkit.model.facts import ConfigProxy
from adaptkit.model.parts import AdapterSet, differences
from adaptkit.model.saved import check_tensors
from adaptkit.ops.grid import cells

__all__ = ["Pyramid", "as_pyramid"]


def as_pyramid(
    model: AdaptedModel, *, strides: Sequence[int] | None = None, names: Sequence[str] | None = None, out: str = "list"
) -> Pyramid:
    """Turn an adapted model into a module that returns its maps, for the decoders of other libraries.

    Args:
        model: what ``attach`` returned, with an adapter that makes maps (``"vit-adapter"``, ``"sfp"``) or on a
            hierarchical backbone, and without a head. It is held, not copied.
        strides: which maps, finest first, in pixels; default: all of them.
        names: of the maps; default ``"0", "1", ...``, as torchvision's ``MaskRCNN`` expects them.
        out: what a forward returns: ``"list"``, ``"dict"`` (an ``OrderedDict``, torchvision), ``"hf"``
            (``transformers``' ``BackboneOutput``) or ``"smp"`` (segmentation_models_pytorch).

    Returns the :class:`Pyramid`, in the training mode of ``model``.

    Raises ``TypeError`` for a model that ``attach`` did not make, and ``ValueError`` for one without maps or with a
    head, for strides that it does not make, and for names or an ``out`` that do not fit.
    """
    if not isinstance(model, AdaptedModel):
        raise TypeError(
            f"as_pyramid takes what attach returns, not {type(model).__name__}: "
            'as_pyramid(adaptkit.attach(model, "vit-adapter"))'
        )
    made = _made(model)
    if not made:
        attached = ", ".join(model.adapters) or "no adapter"
        raise ValueError(
            f"{type(model.backbone).__name__} with {attached} makes no maps: attach 'vit-adapter' or 'sfp' as well, or "
            "use a hierarchical backbone (Swin, PoolFormer, ...)"
        )
    if model.head is not None:
        raise ValueError(
            f"the model has a head ({type(model.head).__name__}), which a pyramid would run and never train: attach "
            "without head="
        )
    wanted = tuple(strides) if strides is not None else tuple(made)
    if not wanted or list(wanted) != sorted(set(wanted) & made.keys()):
        raise ValueError(
            f"strides={list(wanted)}: this model makes maps at strides {', '.join(map(str, made))}; name some of "
            "these, finest first"
        )
    return Pyramid(model, wanted, names, out)


def _made(model: AdaptedModel) -> dict[int, int]:
    """Return stride -> width of the maps that the model makes."""
    spec = model.spec
    if isinstance(spec, HierarchicalSpec):
        return dict(zip(spec.strides, spec.embed_dims))
    return {s: spec.embed_dim for a in model.adapters.values() if isinstance(a, SideAdapter) for s in a.strides}


class Pyramid(ConfigProxy):
    """An adapted model that returns its maps; :func:`as_pyramid` makes it.

    Attributes, in the words of the libraries that read them:
        strides, channels: of the maps, finest first.
        feature_info: timm's ``FeatureInfo`` (``.channels()``, ``.reduction()``, ``.module_name()``).
        out_features, stage_names: the names of the maps.
        out_channels: the one width of all maps, as torchvision's detectors want it; absent where they differ, so put
            ``torchvision.ops.FeaturePyramidNetwork(pyramid.channels, width)`` behind it. With ``out="smp"`` a list.
        output_stride: the coarsest stride.
    """

    holds = "model"

    def __init__(self, model: AdaptedModel, strides: tuple[int, ...], names: Sequence[str] | None, out: str) -> None:
        super().__init__()
        from timm.models import FeatureInfo

        made = _made(model)
        labels = [str(i) for i in range(len(strides))] if names is None else list(names)
        if len(set(labels)) != len(strides) or len(labels) != len(strides):
            raise ValueError(f"names={labels}: {len(strides)} maps need {len(strides)} different names")
        if out not in _FORMS:
            raise ValueError(f"out={out!r}: choose one of {', '.join(_FORMS)}")
        if out == "smp" and strides != tuple(4 * 2**i for i in range(len(strides))):
            raise ValueError(
                f'out="smp" needs strides that double from 4 on, for its decoders count stages; got {list(strides)}'
            )
        if out == "hf":
            _backbone_output([])  # transformers must be there before anything is trained
        self.model = model
        self.strides, self.channels = list(strides), [made[s] for s in strides]
        self.stage_names, self.out_features = labels, list(labels)
        self.output_stride = strides[-1]
        self.out = out
        self._levels = [list(made).index(s) for s in strides]
        info = [{"num_chs": c, "reduction": s, "module": n} for c, s, n in zip(self.channels, strides, labels)]
        self.feature_info = FeatureInfo(info, tuple(range(len(info))))
        if out == "smp":
            self.out_channels: Any = [model.spec.channels, 0, *self.channels]
        elif len(set(self.channels)) == 1:
            self.out_channels = self.channels[0]
        self.train(model.training)

    def maps(self, image: Tensor) -> list[Tensor]:
        """Image (B, C, H, W) of any size -> the maps (B, channels[i], H / strides[i], W / strides[i]), rounded up."""
        made = self.model(image).maps
        if len(made) <= self._levels[-1]:
            raise RuntimeError(
                f"the active adapters ({', '.join(self.model.adapters) or 'none'}) make {len(made)} maps, this pyramid "
                f"was made of {len(self._levels)}: set_adapter() those that it was made with"
            )
        taken = [made[i] for i in self._levels]
        if self.training and len(taken) < len(made):
            # DDP wants a gradient of every parameter, also of those that only feed the maps left out: one of zero.
            nothing = sum(m[..., :0].sum() for i, m in enumerate(made) if i not in self._levels)
            taken[0] = taken[0] + nothing
        return taken

    def forward(self, image: Tensor) -> Any:
        """Image (B, C, H, W), normalised as the backbone wants it -> its maps, in the form that ``out`` named."""
        return _FORMS[self.out](self, image)

    def forward_with_filtered_kwargs(self, pixel_values: Tensor, **_: Any) -> Any:
        """Do what transformers' task models ask of a backbone: ``BackboneOutput``, whatever ``out`` is."""
        return _backbone_output(self.maps(pixel_values))

    def extra_repr(self) -> str:
        """Show strides, widths and form."""
        return f"strides={self.strides}, channels={self.channels}, out={self.out!r}"

    # ---------------------------------------------------------------------------------------------------- the file

    def save(self, folder: str | os.PathLike[str], network: nn.Module | None = None, **metadata: Any) -> Path:
        """Write one adapter file: the adapter and, as its head, what ``network`` has beside this pyramid.

        Args:
            folder: where to write. Its backbone is not in it.
            network: the detector or segmenter that this pyramid is in; without it ``pyramid.model.save`` is the same.
            metadata: kept in the header, as ``AdaptedModel.save`` does; say here how to build ``network`` again.

        Raises ``TypeError`` where several sets act as their mean, ``ValueError`` where this pyramid is not in
        ``network`` or JSON cannot say the metadata, ``OSError`` where the folder cannot be written; the folder is as it
        was then.
        """
        self.model.check_one_acts()
        self.model.check_untrained()
        header = self.model.header(**metadata)
        tensors = self.model.adapter_state_dict()
        if network is not None:
            cls = f"{type(network).__module__}.{type(network).__qualname__}"
            header["head"] = {"name": None, "class": cls, "around": True}
            tensors.update({f"head.{k}": v for k, v in self.beside(network).items()})
        return write_folder(folder, header, tensors, card_beside(folder, header))

    def load(self, folder: str | os.PathLike[str], network: nn.Module | None = None, strict: bool = False) -> None:
        """Put back what :meth:`save` wrote, into this adapter and ``network``, built as they were.

        ``folder`` is also an id on the Hub. ``strict`` makes other backbone weights than the file's an error instead
        of a warning. Raises ``ValueError`` where backbone, adapters or network are not those of the file; nothing is
        changed then.
        """
        file = load(folder)
        with self.model.disable_adapter():
            check_fits(file, self.model.vit, strict)
        difference = next(differences({**file.header, "head": None}, {**self._acting().header(), "head": None}), None)
        if difference is not None:
            theirs, mine = difference
            raise ValueError(f"{file.path} holds {theirs}, this model has {mine}; attach what the file holds")
        head = file.tensors_of("head")
        own = {} if network is None else self.beside(network)
        check_tensors(own, head, f"{file.path}, beside the pyramid")
        self.model.load_adapter_state_dict({k: v for k, v in file.tensors.items() if not k.startswith("head.")})
        if network is not None:  # the pyramid's own keys are the ones left out
            load_into(network, head, strict=False)
        self._acting().metadata = metadata_of([file])

    def _acting(self) -> AdapterSet:
        if self.model.active_adapter is None:
            raise RuntimeError("every adapter of this pyramid's model was deleted; add_adapter() one")
        return self.model.set_of(self.model.active_adapter)

    def beside(self, network: nn.Module) -> dict[str, Tensor]:
        """Return the tensors of ``network`` that are not in this pyramid, by the network's own keys."""
        prefix = next((name for name, module in network.named_modules() if module is self), None)
        if prefix is None:
            raise ValueError(
                f"this pyramid is not inside the {type(network).__name__} given: pass the network it is in"
            )
        return {k: v for k, v in network.state_dict().items() if prefix and not k.startswith(prefix + ".")}


def _backbone_output(maps: Sequence[Tensor]) -> Any:
    try:
        from transformers.modeling_outputs import BackboneOutput
    except ImportError as error:
        raise ImportError('out="hf" returns a class of transformers: pip install transformers') from error
    return BackboneOutput(feature_maps=tuple(maps))


def _as_dict(pyramid: Pyramid, image: Tensor) -> OrderedDict[str, Tensor]:
    return OrderedDict(zip(pyramid.stage_names, pyramid.maps(image)))


def _as_smp(pyramid: Pyramid, image: Tensor) -> list[Tensor]:
    """As smp's own transformer encoders do it: a map without channels stands where stride 2 would be."""
    height, width = image.shape[-2:]
    empty = image.new_zeros(image.shape[0], 0, cells(height, 2), cells(width, 2))
    return [image, empty, *pyramid.maps(image)]


_FORMS: dict[str, Callable[[Pyramid, Tensor], Any]] = {
    "list": Pyramid.maps,
    "dict": _as_dict,
    "hf": lambda pyramid, image: _backbone_output(pyramid.maps(image)),
    "smp": _as_smp,
}
