"""Decoding latents to a picture of 512x512 with Stable Diffusion 1.5's autoencoder, beside diffusers in the same run.

    python examples/benchmarks/vae_decode.py [--rounds 7] [--size 512]

Both sides hold the same random float32 weights and see the same latents; their results are compared before the clock
starts, then they take turns, and the medians of the seconds are printed, with the memory that our compiled program
needs. Needs the test extra and 4 GiB of memory.

Bounds: at most 0.8 of diffusers' time, and 1.3 times the memory of commit c87bdd3 (189 + 896 MiB).

2026-11-27, two cores of an AMD EPYC (Zen 5, AVX-512), jax 0.10.2, torch 2.13.0:

    --rounds 7, another process running   diffusers 13.06 s   ours 7.60 s, 0.58 times it (rounds 0.41 to 0.85)
    three rounds, nothing else running    diffusers  7.16 s   ours 5.09 s, 0.71 times it
    memory                                189 MiB of parameters, 648 MiB more while it runs

c87bdd3 took 7.5 s beside 6.5 and 8.4 s.
"""

import argparse
import os
import statistics

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from unet_step import diffusers_part, seconds

from sdjax.config import SD15
from sdjax.devices.placement import HERE
from sdjax.models.params import random_params
from sdjax.pipeline.programs import programs

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", type=int, default=512, help="of the picture, a multiple of 8")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    print(f"CPU, {torch.get_num_threads()} threads; jax {jax.__version__}, torch {torch.__version__}", end=", ")
    print(f"diffusers {diffusers.__version__}; load {os.getloadavg()[0]:.1f}", flush=True)

    weights = random_params(SD15)["vae"]
    theirs, params = (
        diffusers_part(diffusers.AutoencoderKL, "vae", weights),
        {"vae": jax.tree.map(jnp.asarray, weights)},
    )
    side = options.size // SD15.vae.downscale
    latents = np.random.default_rng(0).standard_normal((1, side, side, SD15.vae.latent_channels), np.float32)
    decode = programs(SD15, HERE).decode
    memory = decode.lower(params, latents).compile().memory_analysis()
    given = torch.from_numpy(latents.transpose(0, 3, 1, 2).copy()) / SD15.vae.scaling_factor

    def ours() -> jax.Array:
        return decode(params, latents)

    @torch.inference_mode()
    def diffusers_picture() -> torch.Tensor:
        return theirs.decode(given).sample

    found, expected = np.asarray(ours()), diffusers_picture().numpy().transpose(0, 2, 3, 1)
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    times = [(seconds(diffusers_picture, 1), seconds(ours, 1)) for _ in range(options.rounds)]
    their_time, our_time = (statistics.median(column) for column in zip(*times, strict=True))
    ratios = sorted(mine / yours for yours, mine in times)
    print(f"diffusers {their_time:.2f} s, ours {our_time:.2f} s, {our_time / their_time:.2f} times it", end=" ")
    print(f"(rounds {ratios[0]:.2f} to {ratios[-1]:.2f}), relative difference {error:.1e}")
    arguments, temporaries = memory.argument_size_in_bytes / MIB, memory.temp_size_in_bytes / MIB
    print(f"memory of ours: parameters {arguments:.0f} MiB, while it runs {temporaries:.0f} MiB more")


if __name__ == "__main__":
    main()
