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
from sdjax.diffusion.plan import stack_plans
from sdjax.diffusion.sample import first_state, image_keys, initial_noise
from sdjax.image import to_uint8
from sdjax.models.adapters import NO_GATES
from sdjax.pipeline import functions
from sdjax.request import Request, plan
from sdjax.text.prompt import lay_out, read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="anything that sdjax.load takes")
    parser.add_argument("--prompt", default="a lighthouse at dusk, oil painting")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="picture.png")
    options = parser.parse_args()
    pipe = sdjax.load(options.model)
    config, params = pipe.config, pipe.params

    # 1. The sampler's table for these settings: [1, 64, ...], of which the first `calls` rows run
    request = Request(options.prompt, steps=options.steps, sampler="dpmpp_2m", spacing="karras", guidance=7.5)
    planned = plan(request, config)
    rows, calls = stack_plans([planned])
    # 2. The negative prompt and the prompt: token ids, weights, which text each row sees; pictures as the first axis
    negative, positive = read(""), read(options.prompt, steps=options.steps)
    places = dict(rows=rows.scale.shape[1], pad_token=config.clip.pad_token, width=config.clip.width)
    prompts = jax.tree.map(lambda leaf: leaf[None], lay_out(negative, positive, pipe.words, **places))
    # 3. All that the UNet sees besides x: the text's keys and values, the timesteps' shifts, a region to keep (none)
    side = config.image_size // config.vae.downscale
    known = jnp.zeros((1, side, side, config.vae.latent_channels))
    adapters, mask, concat = NO_GATES[None], jnp.ones_like(known[..., :1]), known[..., :0]
    given, kv = functions.condition(params, prompts, rows, adapters, known, mask, concat, config=config)
    # 4. One key per picture; the initial latents are noise with the spread of the first level
    key = image_keys([0])
    x = initial_noise(key, known.shape[1:]) * np.float32(np.sqrt(planned.sigma**2 + 1))
    # 5. The whole loop, one program for all settings
    latents = functions.sample(params, first_state(rows, calls, x, key, given, kv), config=config).carry.x
    # 6. Decoder, to bytes on the device, one transfer
    pixels = to_uint8(functions.decode(params, latents, config=config))
    Image.fromarray(np.asarray(jax.device_get(pixels))[0]).save(options.output)
    print(options.output)


if __name__ == "__main__":
    main()
