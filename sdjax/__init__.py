"""Stable Diffusion in JAX: text to image, image to image and inpainting as pure functions.

pipe = sdjax.load("v1-5-pruned-emaonly.ckpt")
pipe.text_to_image("red heart", seed=1)[0].save("heart.png")
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sdjax.checkpoint import cast as cast
    from sdjax.checkpoint import restore as restore
    from sdjax.checkpoint import save as save
    from sdjax.config import PRESETS as PRESETS
    from sdjax.config import SD15 as SD15
    from sdjax.config import SD15_INPAINT as SD15_INPAINT
    from sdjax.config import SD21 as SD21
    from sdjax.config import SD21_BASE as SD21_BASE
    from sdjax.config import TINY as TINY
    from sdjax.config import ModelConfig as ModelConfig
    from sdjax.diffusion.samplers import SAMPLERS as SAMPLERS
    from sdjax.diffusion.schedule import SPACINGS as SPACINGS
    from sdjax.load import load as load
    from sdjax.models.params import random_params as random_params
    from sdjax.pipeline import Pipeline as Pipeline
    from sdjax.request import Request as Request
    from sdjax.tokenizer import Tokenizer as Tokenizer

HOMES = {
    "PRESETS": "config",
    "SAMPLERS": "diffusion.samplers",
    "SD15": "config",
    "SD15_INPAINT": "config",
    "SD21": "config",
    "SD21_BASE": "config",
    "SPACINGS": "diffusion.schedule",
    "TINY": "config",
    "ModelConfig": "config",
    "Pipeline": "pipeline",
    "Request": "request",
    "Tokenizer": "tokenizer",
    "cast": "checkpoint",
    "load": "load",
    "random_params": "models.params",
    "restore": "checkpoint",
    "save": "checkpoint",
}
"""The public names, each with the module it is imported from when it is first asked for."""

__all__ = ["__version__", *HOMES]


class _Package(ModuleType):
    """`sdjax.load` is the function, also when the module of that name has been imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        is_load = name == "load" and isinstance(value, ModuleType)
        super().__setattr__(name, value.load if is_load else value)


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'sdjax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sdjax.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *HOMES])


sys.modules[__name__].__class__ = _Package
