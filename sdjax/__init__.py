"""Stable Diffusion in JAX: text to image, image to image and inpainting as pure functions.

pipe = sdjax.load("v1-5-pruned-emaonly.ckpt")
pipe.text_to_image("red heart", seed=1)[0].save("heart.png")
"""

__version__ = "0.1.0"

from sdjax.checkpoint import cast, restore, save
from sdjax.config import PRESETS, SD15, SD15_INPAINT, SD21, SD21_BASE, TINY, ModelConfig
from sdjax.diffusion.samplers import SAMPLERS
from sdjax.diffusion.schedule import SPACINGS
from sdjax.load import load
from sdjax.models.params import random_params
from sdjax.pipeline import Pipeline
from sdjax.request import Request
from sdjax.tokenizer import Tokenizer

__all__ = [
    "PRESETS",
    "SAMPLERS",
    "SD15",
    "SD15_INPAINT",
    "SD21",
    "SD21_BASE",
    "SPACINGS",
    "TINY",
    "ModelConfig",
    "Pipeline",
    "Request",
    "Tokenizer",
    "__version__",
    "cast",
    "load",
    "random_params",
    "restore",
    "save",
]
