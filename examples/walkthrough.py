"""Stable Diffusion from first principles, on the model in the box: each idea with its equation, its code and a picture.

    python examples/walkthrough.py --output walkthrough

writes the pictures into a folder and prints the numbers; a minute on two CPU cores. `examples/walkthrough.ipynb` is the
same as a notebook (`python examples/make_notebook.py examples/walkthrough.py` makes it). Every claim stands beside an
`assert`, so that a run that ends has checked them all.
"""

# ruff: noqa: E402

# %% [markdown]
# # Stable Diffusion, from a coin to a picture
#
# This page builds up Stable Diffusion in eleven steps. Each has an idea, its equation, the code, and a picture. It uses
# a small model that comes with sdjax: it draws 64 x 64 pictograms for the names of emoji, and runs on any computer. The
# ideas are those of the large models, which only have more numbers in them.
#
# You need Python, school mathematics, and two facts about probability:
#
# - An average over random draws of something is written $\mathbb{E}[\dots]$, "the expected value of".
# - $N(m, s^2)$ is the normal distribution (the bell curve) with mean $m$ and standard deviation $s$. Its square $s^2$
#   is called the variance. If $\varepsilon$ is drawn from $N(0, 1)$, then $m + s\,\varepsilon$ is drawn from
#   $N(m, s^2)$.
#
# For arrays of numbers, the same happens to each number by itself. Brackets such as (Ho et al., eq. 2) say where an
# equation comes from; the list of papers is at the end.

# %% command line
import argparse
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", type=Path, default=Path("walkthrough"), help="folder for the pictures (walkthrough)")
folder = parser.parse_args().output
folder.mkdir(parents=True, exist_ok=True)

# %%
import math
from functools import partial
from itertools import pairwise

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image, ImageColor

import sdjax
from sdjax.config import BOX_VISION
from sdjax.diffusion.denoiser import guided, to_denoiser
from sdjax.diffusion.rows import first_carry, step
from sdjax.diffusion.samplers import SAMPLERS
from sdjax.diffusion.schedule import noise_schedule, per_image, q_sample, q_step, start_step
from sdjax.image import to_array, to_images, to_uint8
from sdjax.load import BOX_FOLDER
from sdjax.models.clip import ImageEncoder, TextEncoder
from sdjax.models.layers import GroupNorm, LayerNorm
from sdjax.models.unet import Attention, UNet
from sdjax.models.vae import VAE
from sdjax.pipeline import functions
from sdjax.request import Request
from sdjax.storage.checkpoint import read_tensors
from sdjax.train.losses import contrastive_loss, diffusion_loss, drop_prompts, unit, variational_bound
from sdjax.train.plots import COLOURS, curves, matrix, scatter, sheet
from sdjax.types import Guidance


def show(name, picture):
    """Hands back a picture, which a notebook then shows; keeps it as a file if there is a folder."""
    if folder is not None:
        picture.save(folder / f"{name}.png", optimize=True)
    return picture


def normal(seed, *shape):
    """Draws of N(0, 1); the same seed gives the same draws."""
    return jax.random.normal(jax.random.key(seed), shape)


# %% [markdown]
# ## 0. The model, and what it draws
#
# Three networks work together:
#
# - The **text encoder** turns a prompt into numbers. The prompt is cut into tokens (words, or pieces of words) and
#   filled up to 32 of them with padding; each becomes a row of 192 numbers.
# - The **UNet** removes noise. This is where pictures come from; sections 2 to 4 and 8 to 11 are about it.
# - The **autoencoder** translates between pictures and *latents*. A latent is a smaller array that stands for the
#   picture: here 8 x 8 positions with 16 numbers each, 1,024 in place of 12,288. The UNet sees only latents. Section 6
#   looks at them.
#
# We let it draw sixteen pictures. They will be our data from here on.

# %%
PROMPTS = ["red heart", "cat face", "grinning face", "rocket", "rose", "pizza", "owl", "red apple"]
PROMPTS += ["woman: red hair", "face with medical mask", "rainbow", "police car"]
PROMPTS += ["sun behind cloud", "butterfly", "hamburger", "sunflower"]
STEPS = 10  # calls of the UNet for a picture, times two for guidance

pipe = sdjax.load()
config, params = pipe.config, pipe.params


def draw(requests):
    """A picture for each request, eight of them at a time."""
    made = {id(request): picture for request, picture in pipe.batch(requests, batch_size=8)}
    return [made[id(request)] for request in requests]


def enlarged(pictures, size=124):
    return [picture.resize((size, size), Image.Resampling.NEAREST) for picture in pictures]


def distance(a, b):
    """How far two pictures are apart: root of the mean squared difference, 1 from all black to all white."""
    return float(np.sqrt(np.square((np.asarray(a, float) - np.asarray(b, float)) / 255).mean()))


pictures = draw([Request(prompt, steps=STEPS) for prompt in PROMPTS])
show("00_drawn", sheet(enlarged(pictures), 8, PROMPTS))

# %% [markdown]
# Two translators, used all the time below: `decode` makes pictures of latents, `encode` makes latents of pictures.

# %%
pixels = np.stack([to_array(picture) for picture in pictures])  # [16, 64, 64, 3], each number between -1 and 1
latents = functions.encode(params, pixels, config=config)  # [16, 8, 8, 16]
SHAPE = latents.shape[1:]


def decode(some):
    """Pictures of latents [8, 8, 8, 16]."""
    return to_images(to_uint8(functions.decode(params, some, config=config)))


print("pictures", pixels.shape, "latents", latents.shape)

# %% [markdown]
# ## 1. The joint distribution and the marginal
#
# A model of pictures is a probability distribution $p(x)$: how likely is the picture $x$? (Where $x$ can be any number,
# $p(x)$ is a density: the area under its curve is the probability.) Nobody can write down such a distribution. The way
# out is to invent something that we do not see, call it $z$, and to tell how $x$ comes about: first $z$ is drawn, then
# $x$ given $z$. Models of this kind are called *latent variable models*; latent means hidden.
#
# The smallest one: $z$ is a bent coin that shows 0 with probability 0.7 and 1 with probability 0.3. Then $x$ is a
# single number, drawn from $N(-1, 0.5^2)$ if the coin shows 0, and from $N(+1, 0.5^2)$ if it shows 1.
#
# The **joint distribution** says how likely a pair is, the hidden and the visible part together:
#
# $$p(x, z) = p(z)\,p(x \mid z)$$
#
# The bar is read "given". The **marginal distribution** forgets what we do not see, by adding up all its possibilities:
#
# $$p(x) = \sum_z p(x, z)$$

# %%
P_Z, MEANS, SPREAD = np.array([0.7, 0.3]), np.array([-1.0, 1.0]), 0.5


def bell(x, mean, spread):
    """The density of N(mean, spread^2) at x."""
    return np.exp(-0.5 * ((x - mean) / spread) ** 2) / (spread * math.sqrt(2 * math.pi))


def joint(x):
    """p(x, z) for both z: f[..., 2]."""
    return P_Z * bell(x[..., None], MEANS, SPREAD)


def marginal(x):
    return joint(x).sum(-1)


rng = np.random.default_rng(0)
coins = (rng.random(4000) < 0.3).astype(int)  # first z ...
draws = MEANS[coins] + SPREAD * rng.normal(size=4000)  # ... then x given z

grid = np.linspace(-3, 3, 121)
height, edges = np.histogram(draws, 40, (-3, 3), density=True)
middle = (edges[1:] + edges[:-1]) / 2

assert abs(np.trapezoid(marginal(grid), grid) - 1) < 1e-3  # it is a distribution: all of it together is 1
assert np.abs(height - marginal(middle)).max() < 0.1  # and forgetting z is the same as adding it up
lines = {f"joint p(x, z = {z})": (grid, joint(grid)[:, z]) for z in (0, 1)}
lines |= {"marginal p(x)": (grid, marginal(grid)), "4000 draws of x, z forgotten": (middle, height)}
show("01_joint", curves(lines, title="a coin z decides where x is drawn", x_label="x"))

# %% [markdown]
# Going back from $x$ to $z$ is called inference. Having seen $x$, which side did the coin show? That is the
# **posterior**
#
# $$p(z \mid x) = \frac{p(x, z)}{p(x)}$$
#
# In Stable Diffusion the visible $x$ is a latent picture, from now on $x_0$, and what is hidden is a whole chain of
# noisier and noisier versions of it, $x_1, x_2, \dots, x_T$ with $T = 1000$. The joint distribution is then over the
# chain $x_{0:T}$ (short for $x_0, \dots, x_T$), and $p(x_0)$ is an integral over everything but $x_0$. Nobody can
# compute that integral. Section 3 shows what can be computed in its place.

# %% [markdown]
# ## 2. Forward: adding noise, in a chain or in one leap
#
# One step of the chain shrinks the latent a little and adds a little noise $\varepsilon$, fresh from $N(0, 1)$ (Ho et
# al., eq. 2):
#
# $$q(x_t \mid x_{t-1}) = N\!\left(\sqrt{1 - \beta_t}\; x_{t-1},\; \beta_t\right)
# \qquad\text{or}\qquad x_t = \sqrt{1 - \beta_t}\; x_{t-1} + \sqrt{\beta_t}\;\varepsilon$$
#
# The letter $q$ is for what we do to pictures, $p$ for what the model believes. The $\beta_t$ are a fixed list of 1000
# small numbers, the *noise schedule*. Why shrink? The variance of $x_t$ is $(1 - \beta_t)\cdot$(variance
# before)$ + \beta_t$: if it was 1, it stays 1.
#
# Many steps at once have a **closed form** (Ho et al., eq. 4). With
# $\bar\alpha_t = (1-\beta_1)(1-\beta_2)\cdots(1-\beta_t)$,
#
# $$q(x_t \mid x_0) = N\!\left(\sqrt{\bar\alpha_t}\; x_0,\; 1 - \bar\alpha_t\right)
# \qquad\text{or}\qquad x_t = \sqrt{\bar\alpha_t}\; x_0 + \sqrt{1 - \bar\alpha_t}\;\varepsilon$$
#
# because sums of independent normal numbers are normal, and their variances add up. So $\bar\alpha_t$ is the share of
# the picture in the variance, and $1 - \bar\alpha_t$ the share of the noise.
#
# **One thing about counting**: papers count the noised versions from 1 to 1000. The code counts from 0 to 999. From
# here on we count as the code does: $t = 0$ has one dose of noise, $t = 999$ a thousand, and the first of the $\beta$s
# is $\beta_0$. The clean latent keeps its name $x_0$.

# %%
schedule = noise_schedule(config.schedule)
T = len(schedule.betas)
alpha_bar = schedule.alpha_bars
for t in (0, 99, 299, 499, 699, 999):
    print(f"t = {t:3}  beta {schedule.betas[t]:.5f}  share of the picture {alpha_bar[t]:.4f}")

variance = 0.0  # of the noise, step by step: shrunk, then added to
for t in range(T):
    variance = (1 - schedule.betas[t]) * variance + schedule.betas[t]
    assert abs(variance - (1 - alpha_bar[t])) < 1e-12  # the closed form

# %% [markdown]
# The same as an experiment, with the numbers of section 1 in place of pictures: 4,000 of them go through the chain,
# step by step, and 4,000 leap by the closed form. At every $t$ both must be draws of the same distribution. The two
# humps of the coin melt into one bell.

# %%


@jax.jit
def chain(x):
    """q_step a thousand times: every x_t on the way, f[1000, ...]."""

    def one(x, moment):
        t, key = moment
        x = q_step(schedule, x, jnp.full(len(x), t), jax.random.normal(key, x.shape))
        return x, x

    return jax.lax.scan(one, x, (jnp.arange(T), jax.random.split(jax.random.key(1), T)))[1]


def leap(x, t, seed):
    """q_sample: straight to x_t."""
    return q_sample(schedule, x, jnp.full(len(x), t), normal(seed, *x.shape))


start = jnp.asarray(draws, jnp.float32)[:, None]
walked, panels = chain(start), []
for t in (49, 199, 399, 999):
    a = alpha_bar[t]
    spread = math.sqrt(a * SPREAD**2 + 1 - a)
    exact = (P_Z * bell(grid[:, None], math.sqrt(a) * MEANS, spread)).sum(-1)
    leapt = leap(start, t, seed=t)
    lines = {"exact": (grid, exact)}
    for name, x in (("chain", walked[t]), ("closed form", leapt)):
        lines[name] = (middle, np.histogram(np.asarray(x), 40, (-3, 3), density=True)[0])
    panels.append(curves(lines, title=f"t = {t}", x_label="x_t", size=(320, 240)))
    print(f"t = {t:3}  chain: mean {walked[t].mean():+.3f}, spread {walked[t].std():.3f}", end="   ")
    print(f"closed form: mean {leapt.mean():+.3f}, spread {leapt.std():.3f}")
    error = 5 * math.sqrt(2 / len(draws))  # five standard errors of a difference of two means
    assert abs(walked[t].mean() - leapt.mean()) < error
    assert abs(walked[t].std() - leapt.std()) < error
show("02_chain_and_leap", sheet(panels, 2))

# %% [markdown]
# And with a latent of the cat: above through the chain, below by leaps, both decoded. The noise differs, because it was
# drawn anew, but at every $t$ there is equally much of it. At the end nothing of the cat is left: the last $x_t$ is as
# good as pure noise. This is what makes it possible to start from noise later.

# %%
SHOWN = [0, 49, 99, 199, 299, 499, 699, 999]
cat = latents[1:2]
by_chain = chain(cat)[np.array(SHOWN), 0]
by_leaps = q_sample(schedule, jnp.tile(cat, (8, 1, 1, 1)), jnp.array(SHOWN), normal(2, 8, *SHAPE))
labels = [f"t = {t}" for t in SHOWN]
noised = sheet(enlarged(decode(by_chain) + decode(by_leaps)), 8, 2 * labels)
for t, a, b in zip(SHOWN, by_chain, by_leaps, strict=True):
    left = [float(np.vdot(x, cat[0]) / np.vdot(cat, cat)) for x in (a, b)]  # the factor before the cat, measured
    factor = math.sqrt(alpha_bar[t])
    print(f"t = {t:3}  factor of the cat: chain {left[0]:.2f}, closed form {left[1]:.2f}, formula {factor:.2f}")
    assert max(abs(part - factor) for part in left) < 5 / np.linalg.norm(cat)
show("02_noised", noised)

# %% [markdown]
# ## 3. Backward: removing noise, and the bound
#
# If we knew $x_0$, a step back would be easy. Given both $x_t$ and $x_0$, the version before $x_t$ is normal, too, with
# a mean between the two (Ho et al., eq. 6 and 7; it follows from the formulas of section 2 by Bayes' rule). For a step
# from $t$ down to some earlier $s$, with $\alpha = \bar\alpha_t / \bar\alpha_s$ and $\beta = 1 - \alpha$:
#
# $$q(x_s \mid x_t, x_0) = N\!\left(
# \frac{\sqrt{\bar\alpha_s}\,\beta}{1 - \bar\alpha_t}\; x_0
# + \frac{\sqrt{\alpha}\,(1 - \bar\alpha_s)}{1 - \bar\alpha_t}\; x_t,\;\;
# \frac{1 - \bar\alpha_s}{1 - \bar\alpha_t}\,\beta\right)$$
#
# We do not know $x_0$. So a network looks at $x_t$ and guesses: the guess is $\hat x_0$, "x-hat". The model's step back
# is the same formula with the guess in place of the truth:
#
# $$p(x_s \mid x_t) = q(x_s \mid x_t, \hat x_0(x_t))$$
#
# That is all that is learnt. The UNet gives its guess in a roundabout way: this one predicts the mixture
# $v = \sqrt{\bar\alpha_t}\,\varepsilon - \sqrt{1 - \bar\alpha_t}\,x_0$ (others predict $\varepsilon$), and one solves
# for $\hat x_0 = \sqrt{\bar\alpha_t}\,x_t - \sqrt{1 - \bar\alpha_t}\;v$. Squared errors of $v$, of $\varepsilon$ and of
# $\hat x_0$ are the same up to a factor, so it makes no difference to the idea.

# %%


@jax.jit
def unet(x, t, context):
    """The network as papers write it: x_t [8, 8, 8, 16], t [8], encoded prompts [8, 32, 192] -> v."""
    return UNet(config.unet).apply({"params": params["unet"]}, x, t, context)


def context_of(prompts):
    """Prompts as the UNet reads them, f[b, 32, 192]."""
    ids = pipe.tokenizer(prompts, config.clip.length, config.clip.pad_token)
    return functions.encode_text(params["text"], ids, config=config)


def x0_hat(x, t, v):
    a = per_image(jnp.asarray(alpha_bar, jnp.float32)[t], x)
    return jnp.sqrt(a) * x - jnp.sqrt(1 - a) * v


noise, ts = normal(3, 8, *SHAPE), jnp.array(SHOWN)
x_t = q_sample(schedule, jnp.tile(cat, (8, 1, 1, 1)), ts, noise)
a = per_image(jnp.asarray(alpha_bar, jnp.float32)[ts], x_t)
right_v = jnp.sqrt(a) * noise - jnp.sqrt(1 - a) * cat
assert np.allclose(x0_hat(x_t, ts, right_v), cat, atol=1e-4)  # the right v gives the right x_0

guesses = x0_hat(x_t, ts, unet(x_t, ts, context_of(["cat face"] * 8)))
errors = jnp.square(guesses - cat).mean((1, 2, 3))
print("squared error of the guess:", *(f"t = {t}: {e:.3f}" for t, e in zip(SHOWN, errors, strict=True)))
assert errors[0] < errors[3] < errors[-1]
names = [f"x_t, t = {t}" for t in SHOWN] + [f"guess, t = {t}" for t in SHOWN]
show("03_guesses", sheet(enlarged(decode(x_t) + decode(guesses)), 8, names))

# %% [markdown]
# The less noise, the better the guess. With nothing but noise the network does what is best for the squared error: it
# guesses the average of all that the prompt leaves possible. A large model has seen thousands of cats, and its average
# is a blur. Ours knows a single cat face, and so it guesses that one from the start.
#
# Now the reverse process itself. It starts with pure noise. Each step asks for a guess and draws the next $x_s$ around
# it, a little less noisy, so that the next guess is a little better. (We make 25 large steps in place of 1000 small
# ones. Section 9 says why that is allowed.)

# %%


def reverse_step(x, t, s, guess, noise):
    """A draw of q(x_s | x_t, x_0) with the guess as x_0; s = -1 is the end, where nothing is left to add."""
    at, before = alpha_bar[t], alpha_bar[s] if s >= 0 else 1.0
    alpha = at / before
    mean = math.sqrt(before) * (1 - alpha) / (1 - at) * guess + math.sqrt(alpha) * (1 - before) / (1 - at) * x
    return mean + math.sqrt((1 - before) / (1 - at) * (1 - alpha)) * noise


def sampled(x, visited, context, each=reverse_step):
    """From noise to latents over falling timesteps; also every guess on the way."""
    kept = []
    for t, s in zip(visited, [*visited[1:], -1], strict=True):
        guess = x0_hat(x, jnp.full(8, t), unet(x, jnp.full(8, t), context))
        x = each(x, t, s, guess, normal(1000 + t, *x.shape))
        kept.append((x, guess))
    return x, kept


eight = context_of(PROMPTS[:8])
visited = list(range(T - 1, -1, -40))
_, kept = sampled(normal(4, 8, *SHAPE), visited, eight)
places = [0, 4, 8, 12, 16, 19, 22, 24]
way = [jnp.stack([kept[i][k][3] for i in places]) for k in (0, 1)]  # of the fourth prompt, the rocket
names = [f"x after t = {visited[i]}" for i in places] + [f"guess at t = {visited[i]}" for i in places]
show("03_reverse", sheet(enlarged(decode(way[0]) + decode(way[1])), 8, names))

# %% [markdown]
# In sdjax a sampler is a table of coefficients, worked out beforehand. It works on $x_t / \sqrt{\bar\alpha_t}$, which
# is the latent at its full size plus noise of spread $\sigma_t = \sqrt{(1 - \bar\alpha_t) / \bar\alpha_t}$. The table
# of "ddpm" holds the formula above. One step of both, to see that they agree:

# %%
t, s = 519, 479
sigma = schedule.sigmas[[t, s]]
row = jax.tree.map(lambda leaf: jnp.float32(leaf[0]), SAMPLERS["ddpm"].rows(schedule, sigma))
x, guess, fresh = normal(5, 8, *SHAPE), normal(6, 8, *SHAPE), normal(7, 8, *SHAPE)
theirs = step(lambda x, level: guess, first_carry(x / math.sqrt(alpha_bar[t])), row, fresh).x * math.sqrt(alpha_bar[s])
difference = float(np.abs(theirs - reverse_step(x, t, s, guess, fresh)).max())
print(f"sdjax.diffusion.samplers and the formula differ by {difference:.1e}")
assert difference < 1e-5

# %% [markdown]
# ### The bound
#
# How good is such a model? We would like to know $\log p(x_0)$, the log of the probability that the model gives to real
# pictures. But $p(x_0)$ was the integral that nobody can compute. The way out fits on one line. For *any* distribution
# $q(z)$ of the hidden part,
#
# $$\log p(x) = \log \sum_z q(z)\,\frac{p(x, z)}{q(z)} \;\ge\; \sum_z q(z) \log \frac{p(x, z)}{q(z)}$$
#
# since the log of an average is at least the average of the logs (Jensen's inequality: the log curve bends downwards).
# The right side is the **evidence lower bound**, ELBO. How much is lost is known, too: it is the *Kullback-Leibler
# divergence* between $q(z)$ and the true posterior,
# $\mathrm{KL}(q \,\|\, p) = \sum_z q(z) \log \frac{q(z)}{p(z \mid x)}$, which is never negative, and 0 only where the
# two are the same.
#
# Here it is for the coin of section 1, for a number seen at $x = 0.3$. Since $z$ has two values, $q$ is one number: the
# probability that we give to $z = 1$. The bound touches the truth at the posterior, and nowhere else. (With natural
# logs the unit is the *nat*. A nat is 1.44 bits.)

# %%
seen = np.array(0.3)
truth, posterior = math.log(marginal(seen)), joint(seen)[1] / marginal(seen)
ones = np.linspace(0.01, 0.99, 99)
q = np.stack([1 - ones, ones], -1)
bound = (q * np.log(joint(seen) / q)).sum(-1)
kl = (q * np.log(q / (joint(seen) / marginal(seen)))).sum(-1)
print(f"log p(x) = {truth:.3f} nats; posterior of z = 1: {posterior:.3f}; best bound {bound.max():.3f}")
assert (bound <= truth).all()
assert abs(ones[bound.argmax()] - posterior) < 0.01
assert np.allclose(truth - bound, kl)  # what is lost
lines = {
    "ELBO": (ones, bound),
    "log p(x)": (ones, np.full(99, truth)),
    "the posterior": ([posterior], [truth]),
}
show("03_elbo", curves(lines, title="nats; the bound for every q", x_label="q(z = 1)", size=(480, 320)))

# %% [markdown]
# For the chain the hidden part is $x_{1:T}$, the distribution $q$ of it is the forward process, and the bound falls
# apart into one term for each step (Ho et al., eq. 5). Turned around, so that small is good:
#
# $$-\log p(x_0) \;\le\;
# \underbrace{\mathrm{KL}\big(q(x_T \mid x_0) \,\|\, N(0,1)\big)}_{\text{prior}}
# + \sum_t \underbrace{\mathbb{E}\,\mathrm{KL}\big(q(x_{t-1} \mid x_t, x_0) \,\|\,
# p(x_{t-1} \mid x_t)\big)}_{\text{one step}}
# \; \underbrace{-\; \mathbb{E}\log p(x_0 \mid x_1)}_{\text{reconstruction}}$$
#
# Each step compares two normal distributions of the same variance, so its KL is a squared difference of means. Written
# with the signal-to-noise ratio $\mathrm{SNR}_t = \bar\alpha_t / (1 - \bar\alpha_t)$ it is
# $\tfrac12(\mathrm{SNR}_{t-1} - \mathrm{SNR}_t)\,(x_0 - \hat x_0)^2$. **That is why training a diffusion model is
# nothing but guessing $x_0$ with a small squared error.**
#
# With the coin we can check it. There the best possible guess can be worked out on paper (it is the average of $x_0$
# given $x_t$), and so can $p(x_0)$. The bound must lie above $-\log p(x_0)$, and come nearer with more steps.

# %%


def ideal(x, t, context):
    """The best v for the coin: E[x_0 | x_t], weighed by the posterior of the coin."""
    a = per_image(jnp.asarray(alpha_bar, jnp.float32)[t], x)[..., None]
    apart, spread2 = x[..., None] - jnp.sqrt(a) * MEANS, a * SPREAD**2 + 1 - a
    sides = jax.nn.softmax(jnp.log(P_Z) - 0.5 * apart**2 / spread2, axis=-1)
    guess = (sides * (MEANS + jnp.sqrt(a) * SPREAD**2 / spread2 * apart)).sum(-1)
    a = a[..., 0]
    return (jnp.sqrt(a) * x - guess) / jnp.sqrt(1 - a)


truth = -np.log(marginal(draws)).mean()
losses = []
for count in (50, 200, 1000):
    chosen = np.linspace(0, T - 1, count).round().astype(int)
    x = jnp.asarray(draws, jnp.float32).reshape(-1, 1, 1, 1)
    terms = variational_bound(ideal, schedule, x, None, jax.random.key(0), prediction="v", timesteps=chosen)
    losses.append(float(terms["total"].mean()))
    print(f"{count:4} steps: bound {losses[-1]:.3f} nats, -log p(x_0) = {truth:.3f}")
assert losses[0] > losses[1] > losses[2] > truth
assert losses[2] - truth < 0.5

# %% [markdown]
# Now the UNet, on eight latents, with 40 steps. All values are nats for each of the 1,024 numbers of a latent. The
# network is asked twice, with the right prompts and with those of other pictures. For comparison, a third one knows
# nothing and answers $v = 0$ to everything, which would be ideal if latents were pure noise from $N(0, 1)$.

# %%
chosen = np.linspace(0, T - 1, 40).round().astype(int)


def bounded(predict, context):
    """The terms of the bound for the first eight latents and a prompt for each."""
    key = jax.random.key(8)
    return variational_bound(predict, schedule, latents[:8], context, key, prediction="v", timesteps=chosen)


bounded_unet = jax.jit(lambda context: bounded(unet, context))
found = {
    "v = 0": bounded(lambda x, t, context: jnp.zeros_like(x), eight),
    "wrong prompts": bounded_unet(jnp.roll(eight, 1, axis=0)),
    "right prompts": bounded_unet(eight),
}
for name, terms in found.items():
    parts = [float(terms[part].mean()) for part in ("prior", "reconstruction", "total")]
    print(f"{name:13}  prior {parts[0]:.4f}, reconstruction {parts[1]:.2f}, in all {parts[2]:.2f} nats")
total = {name: np.asarray(terms["total"]) for name, terms in found.items()}
assert (total["right prompts"] < total["v = 0"]).all()
assert total["right prompts"].mean() < total["wrong prompts"].mean()
step_by_step = {name: np.asarray(terms["diffusion"]).mean(0) for name, terms in found.items()}
lines = {name: (chosen[1:], values) for name, values in step_by_step.items()}
title = "nats of one step: KL(q(x_s | x_t, x_0) || p(x_s | x_t))"
show("03_bound", curves(lines, title=title, x_label="t", log_y=True))

# %% [markdown]
# Read the curves from the right, as the sampler goes. At large $t$ the prompt is nearly everything: a network with the
# wrong prompt does no better there than one that knows nothing. Here it is decided what the picture shows. At small $t$
# the noise is so weak that the picture itself says what it is, and the prompt matters little. Yet most nats are spent
# there, on fine details. (The reconstruction term is negative because $p(x_0)$ is a density, and a density may be
# larger than 1. With all 1000 steps the totals would be much smaller, as for the coin.)

# %%
gain = step_by_step["wrong prompts"] / step_by_step["right prompts"]
late, early = gain[np.searchsorted(chosen[1:], 900)], gain[0]
print(f"wrong prompts cost {late:.0f} times as much at t = 900, {early:.2f} times as much at t = {chosen[1]}")
assert late > 3 > early

# %% [markdown]
# ## 4. Classifier-free guidance
#
# The UNet takes the prompt $c$ and believes in pictures from $p(x \mid c)$. People want more: pictures that show the
# prompt *clearly*. By Bayes' rule, how clearly $x$ shows $c$ is $p(c \mid x) \propto p(x \mid c) / p(x)$ (the sign
# means: equal up to a factor that does not depend on $x$). From the network's answer one can read, by a known formula,
# in which direction $\log p$ grows. The log of a quotient is a difference; so the direction in which the prompt is
# shown more clearly is the *difference* of two answers, one with the prompt and one with an empty prompt. Go further in
# that direction (Ho & Salimans, eq. 6):
#
# $$\hat v = v(\text{empty}) + w\,\big(v(c) - v(\text{empty})\big)$$
#
# With $w = 0$ the prompt is ignored, $w = 1$ is the plain model, and more exaggerates. In sdjax this is
# `sdjax.diffusion.denoiser.guided`, and $w$ is the setting `guidance`.

# %%
WEIGHTS = [0, 1, 2, 3, 4, 6, 10, 20]
requests = [Request(prompt, steps=STEPS, guidance=w, seed=3) for prompt in ("owl", "police car") for w in WEIGHTS]
guided_pictures = draw(requests)
show("04_guidance", sheet(enlarged(guided_pictures), 8, [f"{r.prompt}, w = {r.guidance:g}" for r in requests]))

# %% [markdown]
# At $w = 0$ both prompts give the same picture, because nobody reads them. A moderate $w$ draws what was asked for. A
# large one exaggerates colours and contrast, and at last breaks the picture: it is far from everything that the model
# has seen.

# %%
apart = [distance(a, b) for a, b in zip(guided_pictures[:8], guided_pictures[8:], strict=True)]
contrast = [float(np.asarray(picture, float).std()) for picture in guided_pictures[:8]]
print("difference between the prompts:", *(f"w = {w}: {d:.2f}" for w, d in zip(WEIGHTS, apart, strict=True)))
print("contrast of the owl:", *(f"w = {w}: {c:.0f}" for w, c in zip(WEIGHTS, contrast, strict=True)))
assert apart[0] < 0.01 < apart[4]
assert contrast[1] < contrast[4] < contrast[7]

# %% [markdown]
# ### What guidance needs: the dropped prompt
#
# Why should the network have a sensible answer to an empty prompt? Only because it was taught one: in training, each
# prompt is replaced by the empty one with a probability of about 0.1 (`sdjax.train.losses.drop_prompts`). What if one
# forgets? We train two tiny networks, for some seconds each. Their "pictures" are points in the plane in three heaps,
# and the "prompt" is the number of the heap. One sees prompts dropped in 15 of 100 cases, the other never.

# %%
HEAPS = np.array([[0, 1.2], [-1.04, -0.6], [1.04, -0.6]], np.float32)
WAVES = np.pi / T * np.array([1.0, 2.0, 4.0, 8.0])
PROMPT_OF = jnp.eye(4)[:, None]  # three heaps, and the empty prompt as the fourth


def small_network(weights, x, t, context):
    """A point, t as waves, and a prompt -> v, through four layers."""
    angles = t[:, None] * WAVES
    h = jnp.concatenate([x[:, 0, 0], jnp.sin(angles), jnp.cos(angles), context[:, 0]], axis=-1)
    for kernel, shift in weights[:-1]:
        h = nn.silu(h @ kernel + shift)
    return (h @ weights[-1][0] + weights[-1][1])[:, None, None]


@jax.jit
def trained(dropped):
    """The weights after 1000 updates, each with 256 points."""
    sizes, key = [2 + 8 + 4, 64, 64, 64, 2], jax.random.key(9)
    pairs = pairwise(sizes)
    weights = [(jax.random.normal(jax.random.fold_in(key, i), (i, o)) * i**-0.5, jnp.zeros(o)) for i, o in pairs]
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, 1000))

    def update(carry, key):
        weights, state = carry
        which, where, drop, rest = jax.random.split(key, 4)
        heap = jax.random.randint(which, (256,), 0, 3)
        x = (jnp.asarray(HEAPS)[heap] + 0.15 * jax.random.normal(where, (256, 2)))[:, None, None]
        context = drop_prompts(PROMPT_OF[heap], PROMPT_OF[3], drop, dropped)

        def loss(weights):
            return diffusion_loss(partial(small_network, weights), schedule, x, context, rest, prediction="v")[0]

        change, state = optimizer.update(jax.grad(loss)(weights), state)
        return (optax.apply_updates(weights, change), state), None

    return jax.lax.scan(update, (weights, optimizer.init(weights)), jax.random.split(key, 1000))[0][0]


@jax.jit
def guided_points(weights, w):
    """600 points, 200 for each prompt, by 50 steps of DDIM with guidance w."""
    given = PROMPT_OF[jnp.arange(600) % 3]
    empty = jnp.broadcast_to(PROMPT_OF[3], given.shape)
    rows = SAMPLERS["ddim"].rows(schedule, schedule.levels(50))
    rows = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), rows)
    every = Guidance(scale=jnp.full(50, w), rescale=jnp.zeros(50), used=jnp.ones(50, bool))
    rows = rows._replace(levels=rows.levels._replace(guidance=every))

    def one(which, x, level):
        return small_network(weights, x, jnp.full(600, level.t), jnp.where(which == 1, given, empty))

    def pair(x, level):
        return jnp.concatenate([one(0, x, level), one(1, x, level)])

    denoise = to_denoiser(guided(pair, one), "v")
    x = normal(10, 600, 1, 1, 2) * math.sqrt(schedule.sigmas[-1] ** 2 + 1)
    still = jnp.zeros_like(x)  # DDIM adds no noise on the way
    return jax.lax.scan(lambda carry, row: (step(denoise, carry, row, still), None), first_carry(x), rows)[0].x[:, 0, 0]


panels, hits = [], {}
for name, dropped in (("dropped in 15 of 100", 0.15), ("never dropped", 0.0)):
    weights = trained(dropped)
    for w in (1.0, 3.0):
        points = np.asarray(guided_points(weights, w))
        hits[name, w] = (np.linalg.norm(points - HEAPS[np.arange(600) % 3], axis=1) < 0.45).mean()
        groups = {f"asked for heap {i}": points[i::3] for i in range(3)}
        panels.append(scatter(groups, title=f"{name}, w = {w:g}: {hits[name, w]:.0%} in their heap", limit=4.5))
assert min(hits["dropped in 15 of 100", 1.0], hits["never dropped", 1.0]) > 0.95
assert hits["dropped in 15 of 100", 3.0] > 0.8
assert hits["never dropped", 3.0] < 0.2
show("04_dropped", sheet(panels, 2))

# %% [markdown]
# Without guidance both are right. With it, the first draws its heaps together: guidance pays for clearness with
# variety. The second sends its points away from the heaps: its answer to a prompt that it has never seen is arbitrary,
# and guidance multiplies the difference to it.
#
# The model in the box was taught the empty prompt. We can break it in the same way, and give it for the second answer
# something that it was never taught: random numbers in place of the encoded empty prompt. It bears that better than the
# tiny network: the owl stays an owl. But it darkens, and breaks at a $w$ that does no harm with the empty prompt.

# %%
nonsense = np.asarray(normal(11, config.clip.length, config.clip.width)) * float(eight.std())
requests = [Request("owl", "", steps=STEPS, guidance=w, seed=3) for w in (1, 2, 4, 6)]
requests += [Request("owl", nonsense, steps=STEPS, guidance=w, seed=3) for w in (1, 2, 4, 6)]
right_and_wrong = draw(requests)
names = [f"{kind}, w = {w}" for kind in ("empty", "nonsense") for w in (1, 2, 4, 6)]
assert right_and_wrong[0].tobytes() == right_and_wrong[4].tobytes()  # at w = 1 the second answer has no weight
show("04_wrong_unconditional", sheet(enlarged(right_and_wrong), 8, names))

# %% [markdown]
# ## 5. CLIP: one space for pictures and words
#
# How did the text encoder learn what words look like? It was trained together with an image encoder, on pictures with
# captions. Each of the two ends in a vector of 192 numbers. Scaled to length 1, the product of a text vector $a_i$ and
# a picture vector $b_j$ is the cosine of the angle between them: 1 if they point the same way. The training makes the
# matrix of all products large on its diagonal, where caption and picture belong together, and small elsewhere. With
# logits $\ell_{ij} = \lambda\,a_i \cdot b_j$ and a learnt factor $\lambda$, the loss for $n$ pairs is (Radford et al.,
# figure 3)
#
# $$-\frac{1}{2n} \sum_i \left(
# \log \frac{e^{\ell_{ii}}}{\sum_j e^{\ell_{ij}}} + \log \frac{e^{\ell_{ii}}}{\sum_j e^{\ell_{ji}}} \right)$$
#
# In words: find the right picture for each caption, and the right caption for each picture. The image encoder is not
# needed for drawing, but the box carries it. (An honest remark: our pictures were drawn by a UNet that reads this very
# text encoder. But the image encoder knows nothing of the UNet; it has only ever seen real emoji.)

# %%
stored = read_tensors(BOX_FOLDER / "image_encoder.safetensors")["image"]
tower = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), stored)


@jax.jit
def embedded(pixels, ids):
    """Pictures and their captions as vectors f[n, 192] of one space."""
    return (
        ImageEncoder(BOX_VISION).apply({"params": tower}, pixels),
        TextEncoder(config.clip).apply({"params": params["text"]}, ids).pooled,
    )


ids = pipe.tokenizer(PROMPTS, config.clip.length, config.clip.pad_token)
of_pictures, of_texts = embedded(pixels, ids)
cosines = np.asarray(unit(of_texts) @ unit(of_pictures).T)
loss, metrics = contrastive_loss(of_pictures, of_texts, params["text"]["logit_scale"])
chance = math.log(len(PROMPTS))
print(f"loss {loss:.3f} nats, by chance {chance:.3f}; right caption found for {metrics['accuracy']:.0%}")
assert (cosines.argmax(axis=1) == np.arange(16)).mean() > 0.9  # the diagonal is the largest of its row ...
assert (cosines.argmax(axis=0) == np.arange(16)).mean() > 0.9  # ... and of its column
assert loss < 0.5
title = "cosine of every caption with every picture"
show("05_clip", matrix(cosines, title=title, rows=PROMPTS, columns=pictures, cell=38))

# %% [markdown]
# ## 6. Latents, and walks among them
#
# The autoencoder is a latent variable model, as in section 1: the hidden part is the latent $z$, and the encoder gives
# the distribution $q(z \mid x) = N(m(x), s(x)^2)$ of latents for a picture $x$. It was trained with the same bound
# (Kingma & Welling, eq. 10). The decoder goes back. Three questions:
#
# *Is anything lost?* A little: we compare each picture with what comes back. PSNR is the squared error on a logarithmic
# scale, in decibels: 20 dB is a typical error of one tenth of the range, 30 dB of one thirtieth. (Our pictures came out
# of this decoder before, which makes them easy. Emoji that it has never seen come back with 28 or 29 dB.)

# %%
back = decode(latents[:8])
mse = [np.square(to_array(a) - to_array(b)).mean() for a, b in zip(pictures[:8], back, strict=True)]
psnr = -10 * np.log10(np.array(mse) / 4)  # pixels go from -1 to 1
posterior = jax.jit(lambda x: VAE(config.vae).apply({"params": params["vae"]}, x, method="encode"))(pixels[:8])
print("there and back:", *(f"{value:.1f} dB" for value in psnr))
doubt = float(jnp.exp(posterior.logvar / 2).mean())
print(f"latents: spread {latents.std():.2f}; the encoder's own uncertainty s(x): {doubt:.3f}")
assert psnr.min() > 20
show("06_there_and_back", sheet(enlarged(pictures[:8] + back), 8, [*PROMPTS[:8], *["and back"] * 8]))

# %% [markdown]
# *What do the numbers mean?* Here are the 16 numbers at each of the 8 x 8 positions of the cat, as 16 little maps, dark
# for small and bright for large. They are not colours, but they lie where the cat lies: a latent is still a picture of
# some kind.

# %%


def grey(values, low, high):
    """f[h, w] as a grey picture."""
    level = np.clip((np.asarray(values, float) - low) / (high - low), 0, 1)
    return Image.fromarray(np.uint8(255 * level)).convert("RGB")


channels = [grey(latents[1, :, :, c], -2.5, 2.5) for c in range(16)]
show("06_channels", sheet(enlarged(channels), 8, [f"number {c}" for c in range(16)]))

# %% [markdown]
# *What lies between two latents?* We walk in a straight line from one to another and decode on the way. Halfway there
# is something like two pictures laid over each other. The autoencoder knows how to keep details small, not what
# pictures mean.
#
# The UNet knows. So let us walk between two *noises* and draw a picture from each, first with an empty prompt and
# without guidance, where the noise alone decides. A straight line is not good here: halfway between two independent
# noises the spread is $\sqrt{0.5^2 + 0.5^2} = 0.71$ in place of 1, and the UNet takes the missing noise for missing
# details. The pictures in the middle of the line are flat. The way around is along the sphere (**slerp**): with the
# angle $\theta$ between $a$ and $b$,
#
# $$\mathrm{slerp}(a, b; f) = \frac{\sin((1 - f)\,\theta)}{\sin\theta}\,a + \frac{\sin(f\,\theta)}{\sin\theta}\,b$$

# %%


def slerp(a, b, f):
    angle = math.acos(float(np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)))
    return (math.sin((1 - f) * angle) * a + math.sin(f * angle) * b) / math.sin(angle)


FRACTIONS = np.linspace(0, 1, 8)
straight = jnp.stack([(1 - f) * latents[1] + f * latents[6] for f in FRACTIONS])
first, last = np.asarray(normal(12, *SHAPE)), np.asarray(normal(13, *SHAPE))
lines = np.stack([(1 - f) * first + f * last for f in FRACTIONS])
arcs = np.stack([slerp(first, last, f) for f in FRACTIONS])
print(f"spread halfway: straight {lines[3:5].std():.2f}, slerp {arcs[3:5].std():.2f}")
assert lines[3:5].std() < 0.75
assert abs(arcs[3:5].std() - 1) < 0.05
walks = decode(straight)
for noise in (lines, arcs):
    walks += draw([Request("", guidance=1, steps=STEPS, noise=one) for one in noise])
walks += draw([Request("fruit", guidance=2, steps=STEPS, noise=one) for one in arcs])
kinds = ("latents", "noises, line", "noises, slerp", "fruit, slerp")


def detail(picture):
    """The mean difference of neighbouring pixels."""
    return float(np.abs(np.diff(np.asarray(picture, float), axis=1)).mean())


in_line, in_arc = (np.mean([detail(walks[8 * row + i]) for i in (2, 3, 4, 5)]) for row in (1, 2))
print(f"differences of neighbouring pixels in the middle: line {in_line:.2f}, slerp {in_arc:.2f}")
assert in_line < in_arc
show("06_walks", sheet(enlarged(walks), 8, [f"{kind} {f:.2f}" for kind in kinds for f in FRACTIONS]))

# %% [markdown]
# ## 7. Looking inside: group and layer normalisation
#
# Deep networks learn badly when the numbers in them grow or shrink from layer to layer. A **normalisation** sets them
# right: subtract a mean $\mu$, divide by a standard deviation, then multiply by a learnt $\gamma$ and add a learnt
# $\beta$:
#
# $$y = \gamma\,\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta$$
#
# The kinds differ only in what $\mu$ and $\sigma$ are averaged *over*. Take an array of pictures x positions x
# channels. (This $\beta$ and $\sigma$ have nothing to do with those of the noise.)
#
# - **Group normalisation** (the residual blocks of UNet and autoencoder): the channels are divided into groups. One
#   mean for each picture and group, over all positions and the group's channels.
# - **Layer normalisation** (all transformers): one mean for each picture and position, over all channels.
# - Batch normalisation averages over the pictures as well. No network here has it: a picture would depend on what else
#   is in the batch.
#
# In the drawing, entries of the same colour share a mean. Down go four positions, to the right eight channels.

# %%
x = 5 + 3 * np.asarray(normal(14, 2, 2, 2, 8))  # 2 pictures, 2 x 2 positions, 8 channels; mean 5 and spread 3
fresh = {"scale": jnp.ones(8), "bias": jnp.zeros(8)}  # gamma and beta before training
by_group = np.asarray(GroupNorm(groups=2, epsilon=1e-6).apply({"params": fresh}, x))
by_layer = np.asarray(LayerNorm(epsilon=1e-6).apply({"params": fresh}, x))

for g in (slice(0, 4), slice(4, 8)):
    assert np.allclose(by_group[..., g].mean((1, 2, 3)), 0, atol=1e-5)  # over positions and the group's channels
    assert np.allclose(by_group[..., g].std((1, 2, 3)), 1, atol=1e-4)
assert np.allclose(by_layer.mean(-1), 0, atol=1e-5)  # over channels alone
assert np.allclose(by_layer.std(-1), 1, atol=1e-4)
other = x.copy()
other[1] *= 10  # another second picture changes nothing in the first
assert np.array_equal(np.asarray(GroupNorm(groups=2, epsilon=1e-6).apply({"params": fresh}, other))[0], by_group[0])
print(f"group means after group norm {np.abs(by_group.reshape(2, 4, 2, 4).mean((1, 3))).max():.3f}", end="; ")
print(f"after layer norm {np.abs(by_layer.reshape(2, 4, 2, 4).mean((1, 3))).max():.3f}")


def shared(owner):
    """Pictures x positions x channels as squares, coloured by the number of the mean that each belongs to."""
    tones = np.array([ImageColor.getrgb(colour) for colour in COLOURS[:8]], np.uint8)
    cells = np.kron(tones[owner], np.ones((1, 28, 28, 1), np.uint8))
    cells[:, ::28], cells[:, :, ::28] = 255, 255  # white lines between them
    return [Image.fromarray(one) for one in cells]


picture, position, channel = np.indices((2, 4, 8))
drawn = shared(2 * picture + channel // 4) + shared(4 * picture + position)
names = [f"{kind}, picture {i}" for kind in ("group norm, 2 groups", "layer norm") for i in (1, 2)]
show("07_norms", sheet(drawn, 2, names))

# %% [markdown]
# The same in the real UNet. `nn.intercept_methods` hands us every call of every layer. We keep what goes into each
# group normalisation and what comes out, and, for the next section, who attends to what.

# %%


def looked_at(layer, x, kv):
    """The attention weights of a layer, f[b, heads, queries, keys], and what it makes of them. Section 8 explains."""
    q, k, v = layer.split(layer.q(x)), *kv
    weights = jax.nn.softmax(jnp.einsum("blnd,bmnd->bnlm", q, k) / math.sqrt(q.shape[-1]), axis=-1)
    return weights, layer.out(jnp.einsum("bnlm,bmnd->blnd", weights, v).reshape(x.shape))


@jax.jit
def looked_inside(x, t, context):
    """The UNet's norms as {path: (in, out)}, its attention as {path: weights}, and how far ours is from its own."""
    norms, attention, off = {}, {}, []

    def look(call, arguments, options, where):
        layer, path = where.module, "/".join(where.module.path)
        result = call(*arguments, **options)
        if where.method_name == "__call__" and isinstance(layer, GroupNorm):
            norms[path] = (arguments[0], result)
        if where.method_name == "__call__" and isinstance(layer, Attention):
            attention[path], ours = looked_at(layer, *arguments)
            off.append(jnp.abs(ours - result).max())
        return result

    with nn.intercept_methods(look):
        UNet(config.unet).apply({"params": params["unet"]}, x, t, context)
    return norms, attention, jnp.stack(off)


LEVELS = jnp.array([100, 250, 400, 550, 700, 850, 250, 400])  # the woman at six noise levels, and two other pictures
which = jnp.array([8, 8, 8, 8, 8, 8, 9, 10])
x = q_sample(schedule, latents[which], LEVELS, normal(15, 8, *SHAPE))
norms, attention, off = looked_inside(x, LEVELS, context_of([PROMPTS[i] for i in which]))

path = "mid/res_0/norm1"
before, after = (np.asarray(value) for value in norms[path])
learnt = params["unet"]["mid"]["res_0"]["norm1"]
groups = before.reshape(8, -1, config.unet.groups, before.shape[-1] // config.unet.groups)
mean, variance = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
by_hand = (groups - mean) / np.sqrt(variance + config.unet.epsilon)
assert np.allclose(by_hand.reshape(before.shape) * learnt["scale"] + learnt["bias"], after, atol=1e-3)  # gamma, beta
spreads = groups.std((1, 3))
print(f"{path}: before, the groups' spreads go from {spreads.min():.2f} to {spreads.max():.2f}; after, all are 1")

# %% [markdown]
# ## 8. Attention: which word is seen where
#
# Convolutions see only neighbours. **Attention** lets every place look at every other. A place asks with a vector $q$
# (the query); all places, or all words, offer a vector $k$ (the key) and a content $v$ (the value). The better the key
# fits the query, the more of the value is taken (Vaswani et al., eq. 1):
#
# $$\mathrm{attention}(q, k, v) = \mathrm{softmax}\!\left(\frac{q\,k^\top}{\sqrt d}\right) v$$
#
# Here $d$ is the length of the vectors (this $q$ and $v$ are not those of the sections before), and softmax,
# $e^{a_i} / \sum_j e^{a_j}$, makes a list of numbers into probabilities that add up to 1. In **cross-attention** the
# queries are places in the picture and the keys are words: this is how the prompt gets into the picture. In
# **self-attention** both are places in the picture.
#
# We caught these probabilities in the last section. For a word, its column is a map over the 8 x 8 places; we average
# it over the layers of that size, their heads (parallel copies), and the noise levels. Each map is scaled on its own,
# from its smallest value (black) to its largest (white); the number is its mean.

# %%
assert all(np.allclose(weights.sum(-1), 1, atol=1e-5) for weights in attention.values())  # probabilities
assert off.max() < 1e-3  # weights times values are what the network itself goes on with


def averaged(kind, rows):
    """The attention of some pictures on 8 x 8 places, averaged over layers, heads and pictures: f[64, keys]."""
    found = [w for path, w in attention.items() if path.endswith(kind) and w.shape[2] == 64]
    return np.mean([np.asarray(w)[rows].mean((0, 1)) for w in found], axis=0)


def mapped(values):
    """f[64] as a picture."""
    return grey(values.reshape(8, 8), values.min(), values.max()).resize((124, 124), Image.Resampling.BICUBIC)


maps, names = [], []
for number, rows, words in (
    (8, slice(0, 6), ["start", "woman", ":", "red", "hair", "end"]),
    (9, [6], ["start", "face", "with", "medical", "mask", "end"]),
    (10, [7], ["start", "rainbow", "end", "padding", "padding", "padding"]),
):
    weights = averaged("cross_attention", rows)
    maps += [*enlarged(pictures[number : number + 1]), *(mapped(weights[:, i]) for i in range(6))]
    names += [PROMPTS[number], *(f"{word}  {weights[:, i].mean():.3f}" for i, word in enumerate(words))]

weights = averaged("cross_attention", slice(0, 6))
small = np.asarray(pictures[8].resize((8, 8), Image.Resampling.BOX), float).reshape(64, 3)
red = (small[:, 0] > 180) & (small[:, 1] < 130) & (small[:, 2] < 120)  # where the hair is
hair = weights[:, 4]
ratio = hair[red].mean() / hair[~red].mean()
print(f'"hair" is looked at {ratio:.1f} times as much from where the picture is red as from elsewhere')
assert ratio > 1.3
assert weights[:, 0].mean() > 0.5  # the start token
show("08_cross_attention", sheet(maps, 7, names))

# %% [markdown]
# "hair" lights up along the hair, "woman" along her outline and shoulders. Do not read too much into such maps. "red"
# looks at the face, and "mask" all around the mask. The start token, which stands before every prompt and says nothing,
# takes most of the attention: softmax has to spend its 1 somewhere, and a network learns to spend it where it does no
# harm. The padding behind the end is not empty either: the text encoder has written the sense of the whole prompt into
# it.
#
# Self-attention: where does one place look? The place is marked in the picture; white is where it looks most.

# %%
weights = averaged("self_attention", slice(0, 6))
maps, names = enlarged(pictures[8:9]), [PROMPTS[8]]
for name, (row, column) in {"hair": (1, 3), "face": (4, 3), "dress": (7, 2), "background": (3, 0)}.items():
    marked = enlarged(pictures[8:9])[0]
    marked.paste((0, 0, 255), (31 * column // 2 + 4, 31 * row // 2 + 4, 31 * column // 2 + 12, 31 * row // 2 + 12))
    maps += [marked, mapped(weights[8 * row + column])]
    names += [f"from the {name}", "it looks here"]
show("08_self_attention", sheet(maps, 9, names))

# %% [markdown]
# ## 9. 980, 960, ...: skipping timesteps
#
# The network was trained on 1000 noise levels. Must we visit them all? Look at how it was trained: each time with one
# $x_t$, made in one leap from $x_0$. It has never seen the chain. The loss knows only $q(x_t \mid x_0)$, and so **any
# other process that goes through the same $q(x_t \mid x_0)$ can use the same network** (Song et al.). DDIM is such a
# process, and adds no noise at all: from $x_t$ take the guess $\hat x_0$, find the noise that belongs to it, and leap
# with both to any earlier $s$:
#
# $$\hat\varepsilon = \frac{x_t - \sqrt{\bar\alpha_t}\,\hat x_0}{\sqrt{1 - \bar\alpha_t}} \qquad\qquad
# x_s = \sqrt{\bar\alpha_s}\,\hat x_0 + \sqrt{1 - \bar\alpha_s}\;\hat\varepsilon$$
#
# For 50 steps one takes every 20th timestep: 980, 960, ..., 20, 0. (Stable Diffusion adds 1 to each; that is the
# spacing "leading".)

# %%


def ddim_step(x, t, s, guess, noise):
    """The leap from t to s; the noise is not used."""
    at, before = alpha_bar[t], alpha_bar[s] if s >= 0 else 1.0
    implied = (x - math.sqrt(at) * guess) / math.sqrt(1 - at)
    return math.sqrt(before) * guess + math.sqrt(1 - before) * implied


levels = schedule.levels(50, "leading")
every_20th = schedule.timesteps(levels[:-1]).round().astype(int).tolist()
print(*every_20th[:5], "...", *every_20th[-3:])
assert every_20th == [t + 1 for t in range(980, -1, -20)]

visited = schedule.timesteps(schedule.levels(20, "leading")[:-1]).round().astype(int).tolist()
noise = normal(16, 8, *SHAPE)
ours = decode(sampled(noise, visited, eight, ddim_step)[0])
settings = dict(steps=20, sampler="ddim", spacing="leading", guidance=1)
same = [Request(prompt, noise=np.asarray(one), **settings) for prompt, one in zip(PROMPTS[:8], noise, strict=True)]
theirs = draw(same)
difference = max(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() for a, b in zip(ours, theirs, strict=True))
print(f"this loop and sdjax make the same pictures, but for {difference} of 255")
assert difference <= 2

# %% [markdown]
# How few are enough? The same noise and prompt with fewer and fewer steps. The distance is that to the picture of 24
# steps.

# %%


COUNTS = [1, 2, 3, 4, 6, 8, 12, 24]
fewer = draw([Request("rocket", steps=n, sampler="ddim", spacing="trailing", seed=5) for n in COUNTS])
apart = [distance(picture, fewer[-1]) for picture in fewer]
names = [f"steps {n}, off by {d:.3f}" for n, d in zip(COUNTS, apart, strict=True)]
assert apart[0] > apart[3] > apart[5] > apart[7] == 0
show("09_skipping", sheet(enlarged(fewer), 8, names))

# %% [markdown]
# The path from noise to picture is smooth, so large steps miss it by little. Better samplers follow it more closely
# with the same number of calls: a step of "dpmpp_2m" uses the guess before as well, to see how the path bends. Our ten
# steps are of that kind.

# %% [markdown]
# ## 10. Image to image: strength is freedom
#
# Sampling need not start from pure noise. Encode a picture, leap forward to some $t$ with `q_sample`, and go back from
# there with another prompt. What the noise has covered is free to become something else; what still shows through
# stays. The setting `strength` is the part of the $n$ steps that is run:
#
# $$\text{start at } x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1 - \bar\alpha_t}\,\varepsilon
# \quad\text{with } t \text{ of step number}\quad n - \lfloor n \cdot \text{strength} \rfloor$$
#
# At 0 nothing happens but encoding and decoding, at 1 nothing is left of the picture.

# %%
STRENGTHS = [0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0]
assert [start_step(10, strength) for strength in STRENGTHS] == [10, 8, 6, 5, 4, 3, 2, 0]
freed = draw([Request("sunflower", image=pictures[1], strength=s, steps=STEPS, seed=1) for s in STRENGTHS])
apart = [distance(picture, pictures[1]) for picture in freed]
names = [f"strength {s:g}, {d:.2f}" for s, d in zip(STRENGTHS, apart, strict=True)]
assert apart[0] < apart[2] < apart[4] < apart[7]  # more freedom, further away
show("10_strength", sheet(enlarged(freed), 8, names))

# %% [markdown]
# ## 11. Inpainting: keeping the known
#
# One part of a picture is to be drawn anew, the rest kept. Of the rest we know $x_0$, so there we need no guess. With a
# mask $m$, 1 where we draw and 0 where we keep, the network's guess is corrected before every step:
#
# $$\hat x_0 \;\leftarrow\; m\,\hat x_0 + (1 - m)\,x_0$$
#
# That is `sdjax.diffusion.denoiser.keep_known`, one line around the denoiser. The network sees the known part in every
# $x_t$, and draws what fits to it, as far as the prompt lets it: sunglasses fit to the lower half of a smile, an owl
# does not fit to the lower half of a cat, and leaves a seam. At the end the kept pixels are copied from the picture
# itself, since encoding and decoding would change them a little.

# %%
mask = Image.new("L", (64, 64), 0)
mask.paste(255, (0, 0, 64, 32))  # white: draw the upper half anew
keep = (0, 32, 64, 64)
TASKS = [("grinning face", 2), ("smiling face with sunglasses", 2), ("cat face", 2), ("woman: red hair", 2)]
TASKS += [("owl", 1), ("fox", 1), ("tiger face", 1), ("red heart", 1)]
filled = draw([Request(prompt, image=pictures[of], mask=mask, steps=20, seed=1) for prompt, of in TASKS])
for picture, (_, of) in zip(filled, TASKS, strict=True):
    assert picture.crop(keep).tobytes() == pictures[of].crop(keep).tobytes()  # to the byte
    assert distance(picture, pictures[of]) > 0.01 or of == 2
rows = [pictures[2], mask.convert("RGB"), *filled[:4], pictures[1], mask.convert("RGB"), *filled[4:]]
names = ["given", "mask", *(prompt for prompt, _ in TASKS[:4]), "given", "mask", *(prompt for prompt, _ in TASKS[4:])]
print("the known half is kept to the byte in all", len(filled))
show("11_inpainting", sheet(enlarged(rows), 6, names))

# %% [markdown]
# ## Where to go from here
#
# `examples/pure_functions.py` draws a picture with the functions of sdjax alone. `sdjax/diffusion/` holds sections 2 to
# 4 and 9 to 11, `sdjax/models/` the networks, `sdjax/train/losses.py` all losses. The papers:
#
# - Kingma & Welling 2014, *Auto-Encoding Variational Bayes*: the bound, the autoencoder.
# - Ho, Jain & Abbeel 2020, *Denoising Diffusion Probabilistic Models*: sections 2 and 3.
# - Song, Meng & Ermon 2021, *Denoising Diffusion Implicit Models*: section 9.
# - Ho & Salimans 2022, *Classifier-Free Diffusion Guidance*: section 4.
# - Radford et al. 2021, *Learning Transferable Visual Models From Natural Language Supervision*: CLIP, section 5.
# - Wu & He 2018, *Group Normalization*; Ba et al. 2016, *Layer Normalization*: section 7.
# - Vaswani et al. 2017, *Attention Is All You Need*: section 8.
# - Rombach et al. 2022, *High-Resolution Image Synthesis with Latent Diffusion Models*: all of it together, and Stable
#   Diffusion.
# - Meng et al. 2022, *SDEdit*: section 10. Lugmayr et al. 2022, *RePaint*: section 11.
