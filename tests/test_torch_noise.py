"""Our torch.randn against the real one on a CPU, against what GPUs have printed, and the order in which it is drawn."""

from itertools import pairwise

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sdjax.config import ScheduleConfig
from sdjax.devices.placement import HERE
from sdjax.diffusion.noise import picture_noise
from sdjax.diffusion.philox import TorchCuda, philox
from sdjax.diffusion.sample import first_state, image_keys, sample, stream
from sdjax.diffusion.samplers import SAMPLERS, ddim
from sdjax.diffusion.schedule import noise_schedule, per_image
from sdjax.diffusion.torch_noise import TorchCpu, torch_noise
from sdjax.models.unet import UNet
from sdjax.pipeline.programs import programs
from sdjax.pipeline.warmup import programs_for
from sdjax.request import Request
from tests.small import MINI, mini

# A CPU's numbers


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (1, 4, 5, 7), (3, 3), (1, 4, 2, 2), (3, 1, 5), (4,), (1,)], ids=str)
def test_noise_is_pytorchs(shape, seed):
    expected = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).numpy()
    found = torch_noise(seed, shape)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("shapes", [[(4, 8, 8)] * 4, [(3, 3), (5,), (4, 5, 7), (1,), (2, 2), (4, 4), (3,)]], ids=len)
def test_a_generator_goes_on_where_it_was(shapes):
    theirs, ours = torch.Generator().manual_seed(5), TorchCpu(5)
    for shape in shapes:
        np.testing.assert_allclose(ours.randn(shape), torch.randn(shape, generator=theirs).numpy(), atol=1e-6)


# A GPU's numbers

KNOWN = {  # Random123, tests/kat_vectors: counter, key -> words
    ((0,) * 4, (0,) * 2): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)): (
        *(0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


def plain_philox(counter, key):
    """Salmon et al. 2011, section 4, for one counter, in whole numbers of Python."""
    (left0, right0, left1, right1), (key0, key1) = counter, key
    for _ in range(10):
        product0, product1 = left0 * 0xD2511F53, left1 * 0xCD9E8D57
        left0, right0 = (product1 >> 32) ^ key0 ^ right0, product1 % 2**32
        left1, right1 = (product0 >> 32) ^ key1 ^ right1, product0 % 2**32
        key0, key1 = (key0 + 0x9E3779B9) % 2**32, (key1 + 0xBB67AE85) % 2**32
    return left0, right0, left1, right1


@pytest.mark.parametrize(("given", "expected"), KNOWN.items(), ids=["zeros", "ones", "pi"])
def test_philox_gives_the_published_words(given, expected):
    assert tuple(int(word) for word in philox(*given)) == expected == plain_philox(*given)


def test_many_counters_at_once_are_each_enciphered_alone():
    counters = np.random.default_rng(0).integers(2**32, size=(4, 50))
    found = np.stack(philox(tuple(counters), (123, 456)), axis=1)
    assert found.tolist() == [list(plain_philox(map(int, counter), (123, 456))) for counter in counters.T]


def test_noise_is_what_gpus_have_printed():
    """Seed 0: the example in A1111's documentation of its source "NV"; seed 42: pytorch/pytorch issue 158398."""
    printed = [
        *(-0.92466259, -0.42534415, -2.6438457, 0.14518388, -0.12086647, -0.57972564, -0.62285122, -0.32838709),
        *(-1.07454231, -0.36314407, -1.67105067, 2.26550497),
    ]
    np.testing.assert_allclose(TorchCuda(0).randn((3, 4)), np.reshape(printed, (3, 4)), atol=1e-6)
    found = TorchCuda(42).randn((1, 8, 2048))[0]
    np.testing.assert_allclose(found[0, :3], [0.1940, 2.1614, -0.1721], atol=6e-5)
    np.testing.assert_allclose(found[0, -3:], [1.4540, -2.7733, -0.8932], atol=6e-5)
    np.testing.assert_allclose(found[1, :3], [-0.4574, 0.8063, 0.1580], atol=6e-5)


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 2**40 + 5])
def test_every_call_counts_the_counter_up(seed):
    ours = TorchCuda(seed)
    for call in range(3):
        x, y, _, _ = zip(*(plain_philox((call, 0, i, 0), (seed % 2**32, seed >> 32)) for i in range(24)), strict=True)
        u, v = (np.array(x) + 0.5) / 2**32, 2 * np.pi * (np.array(y) + 0.5) / 2**32
        np.testing.assert_allclose(ours.randn((2, 3, 4)).ravel(), np.sqrt(-2 * np.log(u)) * np.sin(v), atol=1e-6)


def test_a_gpus_noise_is_unit_normal():
    found = TorchCuda(3).randn((4, 128, 128))
    assert found.dtype == np.float32
    assert abs(found.mean()) < 0.01
    assert abs(found.std() - 1) < 0.01
    assert abs(np.corrcoef(found.ravel(), TorchCuda(4).randn(found.shape).ravel())[0, 1]) < 0.01


# The sampler's noise

SHAPE = (4, 6, 4)  # h, w, c
SCHEDULE = noise_schedule(ScheduleConfig())
SIGMA = SCHEDULE.levels(6, "karras")


def toy(x, sigma):
    return np.tanh(x) / (1 + sigma)


def make_toy(params, given, index):
    return lambda x, level: jnp.tanh(x) / (1 + per_image(level.sigma, x))


def ours(sampler, source, driver=None):
    """Latents f32[h, w, c] of the toy denoiser, all noise from a source."""
    rows = sampler.rows(SCHEDULE, SIGMA, 16)
    noise, added = picture_noise(source, 7, SHAPE, adds=rows.noise != 0)
    x = jnp.asarray(noise[None] * SIGMA[0], jnp.float32)
    rows, count = jax.tree.map(lambda leaf: np.float32(leaf)[None], rows), len(sampler.table(SIGMA).scale)
    state = first_state(rows, np.array([count]), x, image_keys([7]), (), noises=added[None])
    if driver is stream:
        *_, last = stream(make_toy, None, state)
        return np.asarray(last.carry.x[0])
    return np.asarray(sample(make_toy, None, state).carry.x[0])


def draws(source):
    """Draws f64[h, w, c] one after the other: PyTorch's own, or of a GPU's counters."""
    theirs, cuda = torch.Generator().manual_seed(7), TorchCuda(7)
    whole = (SHAPE[2], *SHAPE[:2])
    while True:
        drawn = torch.randn(whole, generator=theirs).numpy() if source == "torch" else cuda.randn(whole)
        yield drawn.transpose(1, 2, 0).astype(np.float64)


def ancestral(sigma, after):
    up = min(after, np.sqrt(after**2 * (sigma**2 - after**2) / sigma**2))
    return np.sqrt(after**2 - up**2), up


def euler_a_loop(noise):
    """As k-diffusion's sample_euler_ancestral."""
    x = next(noise) * SIGMA[0]
    for sigma, after in pairwise(SIGMA):
        down, up = ancestral(sigma, after)
        x = x + (x - toy(x, sigma)) / sigma * (down - sigma)
        if after > 0:
            x = x + next(noise) * up
    return x


def dpm2_a_loop(noise):
    """As k-diffusion's sample_dpm_2_ancestral."""
    x = next(noise) * SIGMA[0]
    for sigma, after in pairwise(SIGMA):
        down, up = ancestral(sigma, after)
        d = (x - toy(x, sigma)) / sigma
        if down == 0:
            x = x + d * (down - sigma)
        else:
            middle = np.exp((np.log(sigma) + np.log(down)) / 2)
            y = x + d * (middle - sigma)
            x = x + (y - toy(y, middle)) / middle * (down - sigma) + next(noise) * up
    return x


def lcm_loop(noise):
    """As ComfyUI's and A1111's sample_lcm."""
    x = next(noise) * SIGMA[0]
    for sigma, after in pairwise(SIGMA):
        x = toy(x, sigma)
        if after > 0:
            x = x + after * next(noise)
    return x


def ddim_loop(noise):
    """DDIM with eta 1 in its own variables (Song et al. 2021, eq. 12 and 16)."""
    a = 1 / (1 + SIGMA**2)
    x = next(noise) * SIGMA[0] * np.sqrt(a[0])
    for now, after, sigma in zip(a[:-1], a[1:], SIGMA[:-1], strict=True):
        x0 = toy(x / np.sqrt(now), sigma)
        eps = (x - np.sqrt(now) * x0) / np.sqrt(1 - now)
        deviation = np.sqrt((1 - after) / (1 - now)) * np.sqrt(1 - now / after)
        x = np.sqrt(after) * x0 + np.sqrt(max(1 - after - deviation**2, 0)) * eps + deviation * next(noise)
    return x


LOOPS = {
    "euler_a": (SAMPLERS["euler_a"], euler_a_loop),
    "dpm2_a": (SAMPLERS["dpm2_a"], dpm2_a_loop),
    "lcm": (SAMPLERS["lcm"], lcm_loop),
    "ddim with eta 1": (ddim(1.0), ddim_loop),
}


@pytest.mark.parametrize("source", ["torch", "torch-cuda"])
@pytest.mark.parametrize("name", LOOPS)
def test_a_sampler_takes_the_draws_of_one_generator_in_their_order(name, source):
    sampler, loop = LOOPS[name]
    expected = loop(draws(source))
    found = ours(sampler, source)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    other = ours(sampler, "torch-cuda" if source == "torch" else "torch")
    assert np.abs(other - expected).max() > 0.01 * np.abs(expected).max(), "it is the noise that decides"


def test_a_stream_takes_the_same_draws():
    np.testing.assert_allclose(ours(SAMPLERS["dpm2_a"], "torch", stream), ours(SAMPLERS["dpm2_a"], "torch"), atol=1e-5)


def test_diffusers_with_a_generator_makes_the_same():
    scheduler = diffusers.EulerAncestralDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="linspace"
    )
    scheduler.set_timesteps(6)
    sigma, generator = scheduler.sigmas.numpy().astype(np.float64), torch.Generator().manual_seed(7)
    x = torch.randn((1, SHAPE[2], *SHAPE[:2]), generator=generator) * sigma[0]
    for now, t in zip(sigma[:-1], scheduler.timesteps, strict=True):
        scheduler.scale_model_input(x, t)
        eps = (x - torch.tanh(x) / (1 + now)) / now
        x = scheduler.step(eps.to(torch.float32), t, x.to(torch.float32), generator=generator).prev_sample
    rows = SAMPLERS["euler_a"].rows(SCHEDULE, sigma)
    noise, added = picture_noise("torch", 7, SHAPE, adds=rows.noise != 0)
    rows = jax.tree.map(lambda leaf: np.float32(leaf)[None], rows)
    start = jnp.asarray(noise[None] * sigma[0], jnp.float32)
    state = first_state(rows, np.array([6]), start, image_keys([7]), (), noises=added[None])
    found = sample(make_toy, None, state).carry.x
    np.testing.assert_allclose(found[0], x[0].numpy().transpose(1, 2, 0), atol=1e-4 * x.abs().max())


# Pictures

SIZE = dict(width=8, height=8, steps=4)


def latents(**settings):
    """What `mini` makes of "red disc", f32[h, w, c]: of the last row x0_hat is the result."""
    seen = []
    mini().text_to_image("red disc", progress=lambda done, total, x0_hat: seen.append(x0_hat), **SIZE, **settings)
    return np.asarray(seen[-1][0])


@pytest.mark.parametrize("source", ["torch", "torch-cuda"])
def test_a_picture_by_an_ancestral_sampler_is_that_of_a_plain_loop(source):
    """Euler ancestral on the network's own epsilon, with one generator's draws."""
    pipe, sigma, cuda = mini(), SCHEDULE.levels(4, "leading"), TorchCuda(7)
    theirs = torch.Generator().manual_seed(7)

    def drawn():
        found = torch.randn((4, 8, 8), generator=theirs).numpy() if source == "torch" else cuda.randn((4, 8, 8))
        return found.transpose(1, 2, 0)[None]

    context = jnp.asarray(pipe.encode("red disc"))[None]
    unet = jax.jit(lambda x, t: UNet(MINI.unet).apply({"params": pipe.params["unet"]}, x, t, context))
    x = drawn() * np.float32(np.sqrt(sigma[0] ** 2 + 1))
    for now, after in pairwise(sigma):
        down, up = ancestral(now, after)
        t = jnp.full((1,), SCHEDULE.timesteps(now), jnp.float32)
        x = x + np.float32(down - now) * unet(x * np.float32(1 / np.sqrt(now**2 + 1)), t)
        if after > 0:
            x = x + np.float32(up) * drawn()
    found = latents(seed=7, noise=source, sampler="euler_a", spacing="leading", guidance=1)
    np.testing.assert_allclose(found, x[0], atol=1e-4 * np.abs(x).max())


MIXED = [
    Request("red disc", seed=i, noise=noise, sampler=sampler, width=8, height=8, steps=2 + i % 3)
    for i, (noise, sampler) in enumerate(
        [("torch", "euler_a"), ("torch-cuda", "dpm2_a"), ("jax", "euler_a"), ("torch", "euler"), ("torch-cuda", "lcm")]
        * 2
    )
]


def pictures(pipe, requests, **settings):
    made = {request.seed: np.asarray(image).astype(int) for request, image in pipe.batch(requests, **settings)}
    return [made[request.seed] for request in requests]


def test_pictures_of_all_sources_in_one_job_are_those_made_alone():
    """Places are taken anew while others are under way, with the noise of the picture that takes it."""
    alone = [picture for request in MIXED for picture in pictures(mini(), [request], batch_size=1)]
    for one, other in zip(alone, pictures(mini(), MIXED, batch_size=2), strict=True):
        assert np.abs(one - other).max() <= 1
    assert len({picture.tobytes() for picture in alone}) == len(alone)


def test_one_program_serves_both_sources_and_every_sampler_that_adds_noise():
    sampling = programs(MINI, HERE).sample.program
    pictures(mini(), MIXED, batch_size=2)
    before = sampling._cache_size()
    others = [
        Request("blue", seed=i, noise=("torch", "torch-cuda")[i % 2], sampler=name, width=8, height=8, steps=5)
        for i, name in enumerate(["dpmpp_sde", "lcm", "dpm2_a", "ddpm", "dpmpp_2m_sde", "euler", "heun"])
    ]
    pictures(mini(), others, batch_size=2)
    assert sampling._cache_size() == before


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        (dict(noise="jax", sampler="euler_a"), 0),
        (dict(noise="torch", sampler="euler"), 0),
        (dict(noise="torch-cuda", sampler="ddim", eta=0.0), 0),
        (dict(noise="torch-cuda", sampler="ddim", eta=0.5), 64),
        (dict(noise="torch", sampler="euler_a"), 64),
    ],
)
def test_the_program_has_a_table_of_noise_only_where_it_is_needed(settings, rows):
    lowered = programs_for(Request("a", **SIZE, **settings), MINI, 2)["sample"]()
    state = lowered.args_info[0][1]
    shapes = [leaf.shape for leaf in jax.tree.leaves(state.noises)]
    assert shapes == ([(2, rows, 8, 8, 4)] if rows else [])
