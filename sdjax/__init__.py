"""Stable Diffusion in JAX: text to image, image to image and inpainting as pure functions.

pipe = sdjax.load("v1-5-pruned-emaonly.ckpt")
pipe.text_to_image("red heart", seed=1)[0].save("heart.png")
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdjax.config import PRESETS as PRESETS
    from sdjax.config import SD15 as SD15
    from sdjax.config import SD15_INPAINT as SD15_INPAINT
    from sdjax.config import SD21 as SD21
    from sdjax.config import SD21_BASE as SD21_BASE
    from sdjax.config import TINY as TINY
    from sdjax.config import ModelConfig as ModelConfig
    from sdjax.diffusion.samplers import SAMPLERS as SAMPLERS
    from sdjax.diffusion.spacings import SPACINGS as SPACINGS
    from sdjax.load import load as load
    from sdjax.models.params import cast as cast
    from sdjax.models.params import random_params as random_params
    from sdjax.pipeline.pipeline import Pipeline as Pipeline
    from sdjax.request import Request as Request
    from sdjax.storage.checkpoint import restore as restore
    from sdjax.storage.checkpoint import save as save
    from sdjax.text.tokenizer import Tokenizer as Tokenizer

HOMES = {
    "PRESETS": "config",
    "SAMPLERS": "diffusion.samplers",
    "SD15": "config",
    "SD15_INPAINT": "config",
    "SD21": "config",
    "SD21_BASE": "config",
    "SPACINGS": "diffusion.spacings",
    "TINY": "config",
    "ModelConfig": "config",
    "Pipeline": "pipeline.pipeline",
    "Request": "request",
    "Tokenizer": "text.tokenizer",
    "cast": "models.params",
    "load": "load",
    "random_params": "models.params",
    "restore": "storage.checkpoint",
    "save": "storage.checkpoint",
}
"""The public names, each with the module it is imported from when it is first asked for."""

__all__ = ["__version__", *HOMES]

MOVED = {
    "sdjax.batch": ("jobs.run",),
    "sdjax.checkpoint": ("storage.checkpoint", "models.params"),
    "sdjax.compilation": ("devices.compilation", "pipeline.warmup"),
    "sdjax.functions": ("pipeline.functions", "pipeline.programs"),
    "sdjax.hosts": ("jobs.processes",),
    "sdjax.job_file": ("jobs.job_file",),
    "sdjax.outputs": ("jobs.outputs",),
    "sdjax.recipe": ("pipeline.recipe",),
    "sdjax.sharding": ("devices.placement",),
    "sdjax.target": ("devices.platform",),
    "sdjax.tokenizer": ("text.tokenizer",),
    "sdjax.train.command": ("cli.train",),
    "sdjax.train.data": ("train.dataset", "train.stream", "train.cache"),
}
"""Modules that people may still import under their earlier names, each with the modules that its names are in now."""


class _Package(ModuleType):
    """`sdjax.load` is the function, also when the module of that name has been imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        is_load = name == "load" and isinstance(value, ModuleType)
        super().__setattr__(name, value.load if is_load else value)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("sdjax")
    if name not in HOMES:
        raise AttributeError(f"module 'sdjax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sdjax.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *HOMES])


class _EarlierNames:
    """Imports a module of `MOVED` as one that passes every name on from its new home (a finder and loader, PEP 451)."""

    def find_spec(self, name: str, *_: Any) -> Any:
        if name not in MOVED:
            return None
        from importlib.machinery import ModuleSpec

        return ModuleSpec(name, self)  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> None:
        """As usual."""

    def exec_module(self, module: ModuleType) -> None:
        import warnings

        earlier, homes = module.__name__, [f"sdjax.{home}" for home in MOVED[module.__name__]]
        warnings.warn(f"{earlier} has moved to {' and '.join(homes)}", DeprecationWarning, stacklevel=2)

        def passed_on(name: str) -> Any:
            for home in map(importlib.import_module, homes):
                if hasattr(home, name):
                    return getattr(home, name)
            raise AttributeError(f"module {earlier!r} has no attribute {name!r}; it has moved to {', '.join(homes)}")

        module.__getattr__ = passed_on  # type: ignore[method-assign]


sys.modules[__name__].__class__ = _Package
sys.meta_path.append(_EarlierNames())  # type: ignore[arg-type]
