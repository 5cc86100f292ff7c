"""The module that takes the place of a frozen layer while adapters act in it.

peft puts its layers into the backbone, and so changes the names of the backbone's parameters (``qkv.weight`` becomes
``qkv.base_layer.weight``). A :class:`LayerProxy` takes the place instead, as a registered submodule that
``torch.compile`` guards like any other. It shares the layer's own dictionaries of parameters, buffers and children, so
that every name in the backbone stays what it was.

Which layers are replaced is read from the tree itself (every proxy knows its layer), so undoing needs no record, and
leaves alone what somebody else has put there since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adaptkit.core.tree import locate, unwrapped

__all__ = [
    "LayerProxy",
    "Route",
    "Routed",
    "WeightProxy",
    "edges",
    "in_place",
    "missing",
    "own_layer",
    "parameter_store",
    "put",
    "rerouted",
    "restore",
    "routing",
    "write",
]

#: What a proxy and its layer share. Its state goes through hooks too: a quantised layer adds its scales there.
_SHARED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_state_dict_hooks",
           "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")  # fmt: skip


class LayerProxy(nn.Module):
    """Runs ``wrapper`` in place of ``layer``, and owns nothing: the layer is the backbone's, the wrapper a set's."""

    def __init__(self, wrapper: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["wrapper"] = wrapper
        self.bind(layer)

    @property
    def layer(self) -> nn.Module:
        """The layer of the backbone."""
        return self.__dict__["base"]

    def bind(self, layer: nn.Module) -> None:
        """Stand in for this layer."""
        own = self.__dict__
        own["base"] = layer
        own.update({name: layer.__dict__[name] for name in _SHARED})
        own["training"] = layer.training
        own["wrapper"].__dict__["base_layer"] = layer  # where a wrapper of peft looks for it; no child of it

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the wrapper."""
        return vars(self)["wrapper"](x, *args, **kwargs)

    def train(self, mode: bool = True) -> LayerProxy:
        """Set the mode of the layer too, which is no child of this module."""
        super().train(mode)
        self.layer.training = mode
        return self

    def _save_to_state_dict(self, *args: Any) -> None:
        self.layer._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.layer._load_from_state_dict(*args)

    def __getattr__(self, name: str) -> Any:
        """``in_features`` and the like are the layer's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self)["base"], name)


class WeightProxy(LayerProxy):
    """For a backbone that reads ``layer.weight`` and never calls the layer: the weight has the change added to it.

    timm's EVA and BEiT compute ``F.linear(x, qkv.weight, bias)`` where q and v have a bias and k has none.
    """

    @property
    def weight(self) -> Tensor:
        """(out, in) of the backbone plus the change; the backbone's own while merged."""
        wrapper: Any = vars(self)["wrapper"]
        weight: Any = self._parameters["weight"]
        if isinstance(wrapper, Routed):
            wrapper = wrapper.alone()
        return weight if wrapper is None or wrapper.merged else weight + _change(wrapper).to(weight.dtype)


def _change(wrapper: Any) -> Tensor:
    """What a wrapper of peft adds to the weight."""
    (name,) = wrapper.active_adapters
    return wrapper.get_delta_weight(name)


# --------------------------------------------------------------------------------------------- in the tree, and out


def own_layer(module: nn.Module) -> nn.Module:
    """Return the backbone's own layer under wrappers, a proxy or a layer of peft."""
    while True:
        module = unwrapped(module)
        if isinstance(module, LayerProxy):
            module = module.layer
        elif type(module).__module__.startswith("peft.") and "base_layer" in module._modules:
            module = module._modules["base_layer"]  # type: ignore[assignment]
        else:
            return module


def put(backbone: nn.Module, proxies: Mapping[str, LayerProxy]) -> None:
    """Put proxies at these plain paths, each bound to the layer that is there, all of them or none.

    A layer that is held in several places is replaced in all of them. Raises ``RuntimeError`` where a path is
    gone, or its layer has another shape than the one that the wrapper was built for.
    """
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in backbone.modules():
        for name, child in module._modules.items():
            holders.setdefault(id(child), []).append((module, name))
    try:
        for path, proxy in proxies.items():
            parent, name = _find(backbone, path)
            found: nn.Module = parent._modules[name]  # type: ignore[assignment]
            if found is proxy:
                continue
            _check_shape(path, proxy.layer, own_layer(found))
            proxy.bind(own_layer(found))
            proxy.__dict__["replaced"] = found
            for module, key in holders[id(found)]:
                module._modules[key] = proxy
    except BaseException:
        restore(backbone, proxies)
        raise


def restore(backbone: nn.Module, proxies: Mapping[str, LayerProxy] | None = None) -> None:
    """Put back what these proxies, or all that there are, have replaced; leave what somebody else has put there."""
    ours = None if proxies is None else {id(p) for p in proxies.values()}
    for module in list(backbone.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, LayerProxy) and (ours is None or id(child) in ours):
                child.layer.training = child.training
                module._modules[name] = child.__dict__["replaced"]


def in_place(edges: Sequence[tuple[nn.Module, str, nn.Module]]) -> bool:
    """Whether the tree is still what it was on the way to the proxies."""
    return all(parent._modules.get(name) is child for parent, name, child in edges)


def missing(backbone: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the paths whose modules are nowhere in the tree any more: somebody has replaced them."""
    there = {i for module in backbone.modules() for i in (id(module), id(own_layer(module)))}
    return [path for path, module in modules.items() if id(module) not in there]


def edges(backbone: nn.Module, modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
    """Return the edges of the tree, (parent, name, child), on the way to these modules, wherever they are."""
    wanted = {id(module) for module in modules}
    leads: dict[int, bool] = {}

    def visit(module: nn.Module) -> bool:
        if id(module) not in leads:
            leads[id(module)] = False
            below = [visit(child) for child in module._modules.values() if child is not None]
            leads[id(module)] = bool({id(module), id(own_layer(module))} & wanted) or any(below)
        return leads[id(module)]

    visit(backbone)
    return [(m, n, c) for m in backbone.modules() for n, c in m._modules.items() if c is not None and leads[id(c)]]


def parameter_store(backbone: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Return the dictionary that holds a parameter of this plain name, and its key there."""
    path, _, key = name.rpartition(".")
    if not path:
        return own_layer(backbone)._parameters, key
    parent, child = _find(backbone, path)
    return own_layer(parent._modules[child])._parameters, key  # type: ignore[arg-type]


@torch.no_grad()
def write(backbone: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy these into the backbone's own parameters and buffers of these plain names."""
    for name, tensor in tensors.items():
        path, _, key = name.rpartition(".")
        module = backbone
        if path:
            parent, child = _find(backbone, path)
            module = own_layer(parent._modules[child])  # type: ignore[arg-type]
        there: dict[str, Any] = {**module._parameters, **module._buffers}
        there[key].copy_(tensor)


def _find(backbone: nn.Module, path: str) -> tuple[nn.Module, str]:
    try:
        return locate(backbone, path)
    except AttributeError as error:
        raise RuntimeError(f"{error}: somebody has replaced a part of the backbone; detach() before that") from error


def _check_shape(path: str, before: nn.Module, now: nn.Module) -> None:
    then, new = (getattr(m._parameters.get("weight"), "shape", None) for m in (before, now))
    if then != new:
        raise RuntimeError(
            f"{path} is a {type(now).__name__} of weight {new} now, the adapter was built for a "
            f"{type(before).__name__} of weight {then}: detach() before you replace layers, and attach again"
        )


# --------------------------------------------------------------------------------------- several adapters in one layer


class Route(NamedTuple):
    """Whose rows these are: ``rows`` of a batch of ``batch`` images belong to ``task``."""

    task: str
    start: int
    stop: int
    batch: int


_ROUTES: ContextVar[tuple[Route, ...]] = ContextVar("adaptkit_routes", default=())


@contextmanager
def routing(*routes: Route) -> Iterator[None]:
    """Inside, and in this thread alone, routed layers run the adapters of these tasks on their rows."""
    token = _ROUTES.set(routes)
    try:
        yield
    finally:
        _ROUTES.reset(token)


def rerouted(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``run`` as it goes here and now, for a time when nobody routes: the backward pass, which runs it again."""
    routes = _ROUTES.get()
    if not routes:
        return run

    def again(*args: Any) -> Any:
        with routing(*routes):
            return run(*args)

    return again


class Routed(nn.Module):
    """The wrappers of several tasks around one layer: each row of a batch goes through its own task's.

    A task without a wrapper here, and a batch that nobody has routed, get the layer as it is. Nothing is changed by a
    forward, so that threads can run different tasks at once.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["base_layer"] = layer
        self.__dict__["wrappers"] = {}

    @property
    def wrappers(self) -> dict[str, nn.Module]:
        """By task."""
        return self.__dict__["wrappers"]

    def alone(self) -> Any:
        """Return the wrapper of the one task that has the whole batch; None where every row is the plain layer's."""
        routes = _ROUTES.get()
        if len(routes) > 1 and any(route.task in self.wrappers for route in routes):
            raise RuntimeError(
                "the backbone reads the weight of this layer, which all rows of a batch share: run one task at a time"
            )
        return self.wrappers.get(routes[0].task) if len(routes) == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """(B * n, ...) -> (B * n, ...): rows come image by image, n for each (windows of an image, for instance)."""
        routes = _ROUTES.get()
        if not routes:
            return self.__dict__["base_layer"](x)
        if len(routes) == 1:
            return self._of(routes[0])(x)
        each, rest = divmod(len(x), routes[0].batch)
        if rest:
            raise RuntimeError(f"{len(x)} rows do not come from {routes[0].batch} images: run one task at a time")
        return torch.cat([self._of(r)(x[r.start * each : r.stop * each]) for r in routes])

    def _of(self, route: Route) -> Any:
        wrapper = self.wrappers.get(route.task)
        return self.__dict__["base_layer"] if wrapper is None else wrapper
