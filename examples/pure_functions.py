"""Text to image from the pure functions alone: every array in plain sight, ready for your own jit, vmap or grad.

    python examples/pure_functions.py [--model sd15] [--output picture.png]

Without a model: an untrained tiny one, some 15 seconds on two CPU cores, a noisy square of 64 x 64.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import sdjax
from sdjax import pipeline
from sdjax.diffusion.sample import image_keys, initial_noise
from sdjax.diffusion.schedule import noise_schedule


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
    context = pipeline.encode_text(params["text"], ids, config=config)
    kv = pipeline.text_kv(params["unet"], context, config=config)
    # 3. The sampler's table for these noise levels, and what the UNet computes from the timesteps alone
    schedule, sampler = noise_schedule(config.schedule), sdjax.SAMPLERS["dpmpp_2m"]
    sigma = schedule.levels(options.steps, "karras")
    rows = pipeline.time_tables(params["unet"], sampler.rows(schedule, sigma), config=config)
    # 4. One key per picture; the start is noise with the spread of the first level
    keys = image_keys([0])
    side = config.image_size // config.vae.downscale
    x = initial_noise(keys, (side, side, config.vae.latent_channels)) * np.float32(np.sqrt(sigma[0] ** 2 + 1))
    # 5. The whole loop, one program
    inputs = pipeline.Inputs(
        unet=params["unet"],
        context_kv=kv,
        guidance=jnp.float32(7.5),
        rescale=jnp.float32(0),
        interval=(jnp.float32(-1), jnp.float32(jnp.inf)),
        known=None,
        mask=None,
        concat=None,
    )
    latents = pipeline.generate_latents(inputs, rows, x, keys, config=config, method=sampler.method, is_guided=True)
    # 6. to 8. Decoder, to bytes on the device, one transfer
    pixels = pipeline.decode_latents(params["vae"], latents, config=config)
    Image.fromarray(np.asarray(jax.device_get(pixels))[0]).save(options.output)
    print(options.output)


if __name__ == "__main__":
    main()
