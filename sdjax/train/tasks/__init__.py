"""The trainings by name of the part that learns; a `Task` is what the loop knows of each."""

from sdjax.train.tasks.clip import clip_task
from sdjax.train.tasks.task import Task
from sdjax.train.tasks.unet import unet_task
from sdjax.train.tasks.vae import vae_task

__all__ = ["Task", "clip_task", "unet_task", "vae_task"]
