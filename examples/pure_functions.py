"""Text to image from the pure functions alone: every array in plain sight, ready for your own jit, vmap or grad.

    python examples/pure_functions.py [--model sd15] [--output picture.png]

Without a model: the one in the box, some 15 seconds on two CPU cores, a pictogram of 64 x 64.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import sdjax
from sdjax.diffusion.sample import image_keys, initial_noise
from sdjax.pipeline import functions
from sdjax.request import Request, plan, stacked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="anything that sdjax.load takes")
    parser.add_argument("--prompt", default="a lighthouse at dusk, oil painting")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="picture.png")
    options = parser.parse_args()
    pipe = sdjax.load(options.model)
    config, params = pipe.config, pipe.params

    # 1. The negative prompt and the prompt to token ids, i32[2, 77]
    ids = pipe.tokenizer(["", options.prompt], config.clip.length, config.clip.pad_token)
    # 2. Text encoder, then the keys and values of every cross-attention, once
    context = functions.encode_text(params["text"], ids, config=config)
    kv = functions.text_kv(params["unet"], context, config=config)
    # 3. The sampler's table for these settings, and what the UNet computes from the timesteps alone
    request = Request(options.prompt, steps=options.steps, sampler="dpmpp_2m", spacing="karras", guidance=7.5)
    worked_out = plan(request, config)
    rows, calls = stacked([worked_out])
    rows = functions.time_tables(params["unet"], rows, config=config)
    # 4. One key per picture; the start is noise with the spread of the first level
    keys = image_keys([0])
    side = config.image_size // config.vae.downscale
    shape = (1, side, side, config.vae.latent_channels)
    x = initial_noise(keys, shape[1:]) * np.float32(np.sqrt(worked_out.sigma**2 + 1))
    # 5. The whole loop, one program for all settings
    inputs = functions.Inputs(
        unet=params["unet"],
        context_kv=kv,
        known=jnp.zeros(shape),
        mask=jnp.ones((*shape[:3], 1)),
        concat=jnp.zeros((*shape[:3], 0)),
    )
    latents = functions.generate_latents(inputs, rows, calls, x, keys, config=config)
    # 6. to 8. Decoder, to bytes on the device, one transfer
    pixels = functions.decode_latents(params["vae"], latents, config=config)
    Image.fromarray(np.asarray(jax.device_get(pixels))[0]).save(options.output)
    print(options.output)


if __name__ == "__main__":
    main()
