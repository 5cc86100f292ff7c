"""Parts of the backbone that are trained: ``attach(model, "sfp", train_backbone=("blocks.11", "norm"))``.

They are trained as copies. While the set that they belong to is active, the copies stand in the backbone in place of
its own parameters; otherwise, and after ``detach``, the backbone's own are there, the very objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from adaptkit.adapters.base import WeightAdapter
from adaptkit.core.proxy import edges, in_place, missing, own_layer, parameter_store
from adaptkit.core.tree import locate, named_modules, nested, plain_name, skeleton

__all__ = ["TrainedBackbone", "named", "parameters"]


class TrainedBackbone(WeightAdapter):
    """Trained copies of some parameters of a backbone.

    Args:
        spec: of the backbone.
        backbone: the backbone.
        parts: names of modules or parameters, or patterns of them: ``"blocks.11"``, ``"norm"``, ``"*.bias"``,
            ``"blocks.*.norm?"``.

    Raises ``ValueError`` where a part names nothing, or parameters that hold no floating-point numbers.
    """

    merges = False  # they are weights already

    def __init__(self, spec: Any, backbone: nn.Module, parts: Sequence[str]) -> None:
        parts = (parts,) if isinstance(parts, str) else tuple(parts)
        super().__init__(spec, parts)
        chosen = _chosen(backbone, parts)
        self.copies = nn.Module()  # by their names in the backbone: copies.blocks.11.norm1.weight
        #: every name of each copy: a tied parameter has several
        self.names: dict[str, list[str]] = {}
        first: dict[int, str] = {}
        for name, parameter in chosen.items():
            if id(parameter) in first:
                self.names[first[id(parameter)]].append(name)
                continue
            if not parameter.is_floating_point():
                raise ValueError(f"{name} is a quantised {type(parameter).__name__} of {parameter.dtype}: train others")
            first[id(parameter)] = name
            self.names[name] = [name]
            path, _, last = name.rpartition(".")
            nested(self.copies, path).register_parameter(last, nn.Parameter(parameter.detach().clone()))
        self.__dict__["_own"] = {}  # the backbone's parameters, while the copies are in their places
        self.__dict__["_edges"] = []

    def install(self, backbone: nn.Module) -> None:
        """Put the copies into the backbone."""
        own, holders = self.__dict__["_own"], {}
        for name, places in self.names.items():
            for place in places:
                store, key = parameter_store(backbone, place)
                own.setdefault(place, store[key])
                store[key] = self.copies.get_parameter(name)
                holders[place] = store
        paths = {place.rpartition(".")[0] for place in holders}
        modules = {path: own_layer_at(backbone, path) for path in paths if path}
        self.__dict__["_edges"] = edges(backbone, modules.values())
        self.__dict__["_modules_at"], self.__dict__["_stores"] = modules, holders

    def remove(self, backbone: nn.Module) -> None:
        """Put the backbone's own parameters back, where the copies were moved to another device, there."""
        own: dict[str, nn.Parameter] = self.__dict__["_own"]
        for name, places in self.names.items():
            copy = self.copies.get_parameter(name)
            for place in (p for p in places if p in own):
                store, key = parameter_store(backbone, place)
                parameter = own[place]
                if (parameter.device, parameter.dtype) != (copy.device, copy.dtype):
                    parameter.data = parameter.data.to(copy.device, copy.dtype)
                store[key] = parameter
                del own[place]  # last: what was begun can be done again

    def check(self, backbone: nn.Module) -> None:
        """Raise ``RuntimeError`` where a module was replaced; a parameter made anew by a conversion is put right."""
        if not in_place(self.__dict__["_edges"]):
            gone = missing(backbone, self.__dict__["_modules_at"])
            if gone:
                raise RuntimeError(
                    f"{', '.join(gone[:3])}: somebody has replaced these trained parts of the backbone: detach(), "
                    "replace, and attach again"
                )
            self.__dict__["_edges"] = edges(backbone, self.__dict__["_modules_at"].values())
        for name, places in self.names.items():
            copy = self.copies.get_parameter(name)
            for place in places:
                self.__dict__["_stores"][place][place.rpartition(".")[2]] = copy

    def weights(self) -> dict[str, Tensor]:
        """Return a copy of what was trained, by its names in the backbone."""
        return {p: self.copies.get_parameter(n).detach().clone() for n, places in self.names.items() for p in places}

    def originals(self) -> dict[str, Tensor]:
        """While installed, the backbone's own parameters."""
        return dict(self.__dict__["_own"])

    def train_backbone_modes(self, backbone: nn.Module, mode: bool) -> None:
        """Set the mode of the modules that are trained as a whole: their dropout acts.

        Modules with statistics (BatchNorm) stay in eval mode: these are no parameters, and are not in the file.
        """
        trained = {place for places in self.names.values() for place in places}
        for path, module in named_modules(backbone):
            inside = {f"{path}.{plain_name(name)}" for name, _ in module.named_parameters()}
            named = any(_matches(path, part) for part in self.config)
            if named and inside and inside <= trained and not list(module.buffers()):
                module.train(mode)

    def merge(self) -> None:
        """Nothing to do."""

    def unmerge(self) -> None:
        """Nothing to do."""

    @property
    def merged(self) -> bool:
        """Never."""
        return False


def _chosen(backbone: nn.Module, parts: Sequence[str]) -> dict[str, nn.Parameter]:
    every = dict(parameters(backbone))
    for part in parts:
        if not any(_matches(name, part) for name in every):
            tops = dict.fromkeys(".".join(name.split(".")[:2]).removesuffix(".weight").removesuffix(".bias")
                                 for name in every)  # fmt: skip
            raise ValueError(
                f"train_backbone={part!r} names nothing in {type(backbone).__name__}; its parts are {', '.join(tops)}"
            )
    return {name: p for name, p in every.items() if named(name, parts)}


def parameters(backbone: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The backbone's own parameters by plain name, tied ones under each name, without what is in its layers."""
    return skeleton(backbone, own_layer).named_parameters(remove_duplicate=False)


def named(name: str, parts: Sequence[str]) -> bool:
    """Whether one of these parts of a backbone holds the parameter of this name."""
    return any(_matches(name, part) for part in parts)


def _matches(name: str, part: str) -> bool:
    """Whether a pattern matches a name, or one of the modules that it is in."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:i]), part) for i in range(1, len(parts) + 1))


def own_layer_at(backbone: nn.Module, path: str) -> nn.Module:
    """Return the backbone's own module at a plain path."""
    parent, name = locate(backbone, path)
    return own_layer(parent._modules[name])  # type: ignore[arg-type]
