"""adaptkit: small trainable modules for frozen vision transformers.

``adaptkit.attach(model, "vit-adapter")`` is the call that everybody uses. Every public name, and every module of the
package (``adaptkit.interop``, ``adaptkit.export``, ``adaptkit.analysis``), is an attribute, imported when it is first
asked for: ``import adaptkit`` alone imports no torch.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from adaptkit import _moved, _namesake  # noqa: F401  the second refuses to share its name
from adaptkit.version import __version__

if TYPE_CHECKING:
    from adaptkit.adapters.adapter_plus import AdapterPlusConfig
    from adaptkit.adapters.adavit import AdaViTConfig
    from adaptkit.adapters.dat import DATConfig
    from adaptkit.adapters.metaformer import MetaFormerConfig
    from adaptkit.adapters.rein import ReinConfig
    from adaptkit.adapters.sfp import SimpleFeaturePyramidConfig
    from adaptkit.adapters.tome import ToMeConfig
    from adaptkit.adapters.vit_adapter import ViTAdapterConfig
    from adaptkit.adapters.vit_split import ViTSplitConfig
    from adaptkit.adapters.vpt import VPTConfig
    from adaptkit.core.hierarchical import HierarchicalSpec
    from adaptkit.core.registry import register_adapter, register_family, register_head, view
    from adaptkit.core.view import Features, Spec
    from adaptkit.demo import demo_backbone
    from adaptkit.heads.classifier import ClassifierHeadConfig
    from adaptkit.heads.depth import DepthHeadConfig
    from adaptkit.heads.fpn import FPNHeadConfig
    from adaptkit.heads.linear import LinearHeadConfig
    from adaptkit.heads.plain_mask import PlainMaskHeadConfig
    from adaptkit.hub.file import AdapterFile
    from adaptkit.hub.repository import load
    from adaptkit.mixers import list_mixers, register_mixer
    from adaptkit.model.adapted import AdaptedModel, attach, list_adapters, list_heads
    from adaptkit.model.expand import expand_channels
    from adaptkit.model.interpolate import interpolate
    from adaptkit.model.many import ManyTasks, attach_many
    from adaptkit.model.pyramid import as_pyramid
    from adaptkit.model.sharding import shard
    from adaptkit.pretrained import from_pretrained
    from adaptkit.seam import reference

__all__ = [
    "AdaViTConfig",
    "AdaptedModel",
    "AdapterFile",
    "AdapterPlusConfig",
    "ClassifierHeadConfig",
    "DATConfig",
    "DepthHeadConfig",
    "FPNHeadConfig",
    "Features",
    "HierarchicalSpec",
    "LinearHeadConfig",
    "ManyTasks",
    "MetaFormerConfig",
    "PlainMaskHeadConfig",
    "ReinConfig",
    "SimpleFeaturePyramidConfig",
    "Spec",
    "ToMeConfig",
    "VPTConfig",
    "ViTAdapterConfig",
    "ViTSplitConfig",
    "__version__",
    "as_pyramid",
    "attach",
    "attach_many",
    "demo_backbone",
    "expand_channels",
    "from_pretrained",
    "interpolate",
    "list_adapters",
    "list_heads",
    "list_mixers",
    "load",
    "reference",
    "register_adapter",
    "register_family",
    "register_head",
    "register_mixer",
    "shard",
    "view",
]

#: public name -> the module that it is in; editors read the same from the imports above
_NAMES = {
    "AdaViTConfig": "adapters.adavit",
    "AdaptedModel": "model.adapted",
    "AdapterFile": "hub.file",
    "AdapterPlusConfig": "adapters.adapter_plus",
    "ClassifierHeadConfig": "heads.classifier",
    "DATConfig": "adapters.dat",
    "DepthHeadConfig": "heads.depth",
    "FPNHeadConfig": "heads.fpn",
    "Features": "core.view",
    "HierarchicalSpec": "core.hierarchical",
    "LinearHeadConfig": "heads.linear",
    "ManyTasks": "model.many",
    "MetaFormerConfig": "adapters.metaformer",
    "PlainMaskHeadConfig": "heads.plain_mask",
    "ReinConfig": "adapters.rein",
    "SimpleFeaturePyramidConfig": "adapters.sfp",
    "Spec": "core.view",
    "ToMeConfig": "adapters.tome",
    "VPTConfig": "adapters.vpt",
    "ViTAdapterConfig": "adapters.vit_adapter",
    "ViTSplitConfig": "adapters.vit_split",
    "as_pyramid": "model.pyramid",
    "attach": "model.adapted",
    "attach_many": "model.many",
    "demo_backbone": "demo",
    "expand_channels": "model.expand",
    "from_pretrained": "pretrained",
    "interpolate": "model.interpolate",
    "list_adapters": "model.adapted",
    "list_heads": "model.adapted",
    "list_mixers": "mixers",
    "load": "hub.repository",
    "reference": "seam",
    "register_adapter": "core.registry",
    "register_family": "core.registry",
    "register_head": "core.registry",
    "register_mixer": "mixers",
    "shard": "model.sharding",
    "view": "core.registry",
}


_moved.install()


def _modules() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
        globals()[name] = value  # the next time it is found without this function
        return value
    if name == "StagedSpec":
        return importlib.import_module("adaptkit.core.hierarchical").StagedSpec
    if name in _modules() or f"{__name__}.{name}" in _moved.MOVED:
        return _opened(importlib.import_module(f"{__name__}.{name}"))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _opened(module: Any) -> Any:
    """Let a package import its own modules when they are asked for: ``adaptkit.ops.pool``."""
    if "__path__" in vars(module) and "__getattr__" not in vars(module):  # a path makes a module a package

        def inside(name: str) -> Any:
            if name in [found.name for found in pkgutil.iter_modules(module.__path__)]:
                return _opened(importlib.import_module(f"{module.__name__}.{name}"))
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = inside
    return module


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_modules()})
