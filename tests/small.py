"""A model that compiles in a few seconds: two levels in the UNet, one width in the autoencoder."""

import dataclasses

from sdjax.config import TINY

SMALL = dataclasses.replace(
    TINY,
    name="small",
    image_size=32,
    vae=dataclasses.replace(TINY.vae, channels=(8, 8, 16, 16)),
    unet=dataclasses.replace(TINY.unet, channels=(32, 64), attention=(True, False), heads=(2, 2)),
)
