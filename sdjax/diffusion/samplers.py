"""Samplers: a table worked out on the host, and one short step that runs over its rows.

Every coefficient of a sampler depends on the sigmas alone. `table(sigma)` computes them in float64 (no infinities, no
NaN, no special first step left for later), one row for each call of the network, and every sampler is a linear rule
over the last few calls. So the jitted step is plain arithmetic, all samplers share one compiled program, and a batch
may have another sampler in every picture. lambda = -log(sigma) and h = lambda' - lambda as in Lu et al. 2022
("DPM-Solver++"); sigma' is the next level.

    name          order  UNet calls per step  noise  source
    ddim          1      1                    eta    Song et al. 2021, eq. 12
    ddpm          1      1                    yes    Ho et al. 2020, algorithm 2 (variance beta tilde)
    euler         1      1                    no     Karras et al. 2022, algorithm 1 without churn
    euler_a       1      1                    yes    ancestral Euler, eta 1 (Song et al. 2021, eq. 16)
    lms           4      1                    no     Adams-Bashforth on the sigma grid
    plms          4      1, one more in all   no     Liu et al. 2022, algorithm 2 ("PNDM")
    dpmpp_2m      2      1                    no     Lu et al. 2022, algorithm 2
    dpmpp_2m_sde  2      1                    yes    Lu et al. 2022, section 5 (midpoint form)
    unipc         3      1                    no     Zhao et al. 2023, B(h) = e^h - 1, predictor and corrector
    lcm           1      1                    yes    Luo et al. 2023, algorithm 3 (for distilled models)
    heun          2      2                    no     Karras et al. 2022, algorithm 1
    dpm2          2      2                    no     Karras et al. 2022, eq. 3 with the geometric midpoint
    dpm2_a        1      2                    yes    the same, ancestral
    dpmpp_sde     1      2                    yes    Lu et al. 2022, algorithm 1 on the SDE, r = 1/2

In sigma space Euler is variance-preserving DDIM with eta 0, and ancestral Euler is DDIM with eta 1, which is DDPM:
three names, one table. The last level is sigma = 0 for all of them: the final picture is x0_hat. (DDIM with
`set_alpha_to_one=False` stops at the first training level instead and leaves 3 % noise in the latent.) The last step
of a sampler with two calls is an Euler step with one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sdjax.diffusion.schedule import NoiseSchedule, per_image
from sdjax.types import Array, Denoiser, Latent, NoiseLevel

HISTORY = 5  # directions that a rule may combine, the newest first


class Rows(NamedTuple):
    """A sampler's table, one row for each call of the network.

    For one picture each field has the leading axis s, for a batch the axes [b, s]; a step sees one row, [b].
    """

    levels: NoiseLevel  # [s]
    direction: Any  # [s, 2]
    correct: Any  # [s, 2]
    correct_history: Any  # [s, HISTORY]
    scale: Any  # [s]
    history: Any  # [s, HISTORY]
    noise: Any  # [s]


class Carry(NamedTuple):
    """What one call hands to the next. x: where it will be evaluated; previous: where the call before was (corrected);
    history: the directions H_0, H_1, ... of the calls before.
    """

    x: Latent
    x0_hat: Latent
    previous: Latent
    history: tuple[Latent, ...]


def first_carry(x: Latent) -> Carry:
    """The carry before the first row."""
    zero = jnp.zeros_like(x)
    return Carry(x, zero, zero, (zero,) * HISTORY)


def step(denoise: Denoiser, carry: Carry, row: Rows, noise: Array) -> Carry:
    """One row of any sampler: a linear multistep rule with a linear corrector. noise: unit normal, like x.

    D = denoise(x, level)
    H_0 = direction . (x, D),  then H_1, H_2, ... of the calls before
    x = correct . (x, previous x) + sum_k correct_history_k H_k
    x' = scale x + sum_k history_k H_k + noise eps
    """
    x = carry.x
    x0_hat = denoise(x, row.levels)
    times = partial(_times, x)
    new = times(row.direction[..., 0], x) + times(row.direction[..., 1], x0_hat)
    history = (new, *carry.history[:-1])
    x = times(row.correct[..., 0], x) + times(row.correct[..., 1], carry.previous)
    x += sum(times(row.correct_history[..., k], history[k]) for k in range(HISTORY))
    after = times(row.scale, x) + times(row.noise, noise)
    after += sum(times(row.history[..., k], history[k]) for k in range(HISTORY))
    return Carry(after, x0_hat, x, history)


@dataclass(frozen=True)
class Sampler:
    """What `SAMPLERS` lists.

    table: sigma float64[s + 1], falling, the last may be 0 -> rows of float64 without timesteps; samplers with two
        calls per step have more rows than there are steps.
    stochastic: whether it adds noise on the way.
    """

    table: Callable[[np.ndarray], Rows]
    stochastic: bool

    def rows(self, schedule: NoiseSchedule, sigma: np.ndarray, length: int | None = None) -> Rows:
        """The table for the levels `sigma`, with the timestep of every network call filled in.

        length: rows in all; those behind the sampler's own leave x as it is.
        """
        rows = self.table(sigma)
        if length is not None:
            rest = _rows(np.full(1 + length - len(rows.scale), schedule.sigmas[0]))
            rows = Rows(*(_joined(*fields) for fields in zip(rows, rest, strict=True)))
        visited = rows.levels.sigma
        return rows._replace(levels=NoiseLevel(visited, schedule.timesteps(visited)))


def _joined(first: Any, second: Any) -> Any:
    if isinstance(first, NoiseLevel):
        return NoiseLevel(np.concatenate([first.sigma, second.sigma]), None)
    return np.concatenate([first, second])


def _times(x: Latent, value: Any, y: Array) -> Array:
    return per_image(value.astype(x.dtype), x) * y


def _rows(sigma: np.ndarray) -> Rows:
    """A table that evaluates at every sigma but the last and keeps x; the plans fill it in."""
    count = len(sigma) - 1
    return Rows(
        NoiseLevel(sigma[:-1], None),
        direction=np.tile([0.0, 1.0], (count, 1)),
        correct=np.tile([1.0, 0.0], (count, 1)),
        correct_history=np.zeros((count, HISTORY)),
        scale=np.ones(count),
        history=np.zeros((count, HISTORY)),
        noise=np.zeros(count),
    )


def _ancestral(sigma: np.ndarray, after: np.ndarray, eta: float) -> tuple[np.ndarray, np.ndarray]:
    """The level to step down to and the noise to add, so that down^2 + up^2 = after^2.

    up = eta sigma' sqrt(sigma^2 - sigma'^2) / sigma (Song et al. 2021, eq. 16, in sigma space).
    """
    up = eta * after * np.sqrt(np.maximum(sigma**2 - after**2, 0.0)) / sigma
    return after * np.sqrt(1 - eta**2 + (eta * after / sigma) ** 2), up


def euler_table(sigma: np.ndarray, eta: float = 0.0) -> Rows:
    """x' = (down / sigma) x + (1 - down / sigma) D + up eps; eta 0 is DDIM, eta 1 DDPM."""
    rows = _rows(sigma)
    down, up = _ancestral(sigma[:-1], sigma[1:], eta)
    rows.scale[:] = down / sigma[:-1]
    rows.history[:, 0] = 1 - rows.scale
    rows.noise[:] = up
    return rows


def dpmpp_2m_table(sigma: np.ndarray) -> Rows:
    """x' = (sigma' / sigma) x + (1 - sigma' / sigma) (D_0 + (D_0 - D_1) h / (2 h_before)).

    The first step, and a last one to sigma = 0 (where h is infinite), are Euler steps.
    """
    rows = _rows(sigma)
    for i in range(len(sigma) - 1):
        ratio = sigma[i + 1] / sigma[i]
        extra = 0.0
        if i > 0 and sigma[i + 1] > 0:
            extra = 0.5 * np.log(ratio) / np.log(sigma[i] / sigma[i - 1])
        rows.scale[i] = ratio
        rows.history[i, :2] = (1 - ratio) * np.array([1 + extra, -extra])
    return rows


def dpmpp_2m_sde_table(sigma: np.ndarray) -> Rows:
    """As dpmpp_2m with h twice as long and noise that makes up for it:

    x' = (sigma'^2 / sigma^2) x + (1 - sigma'^2 / sigma^2) (D_0 + (D_0 - D_1) h / (2 h_before))
         + sigma' sqrt(1 - sigma'^2 / sigma^2) eps.
    """
    rows = dpmpp_2m_table(sigma)
    ratio = rows.scale.copy()
    rows.history[:] *= ((1 - ratio**2) / (1 - ratio))[:, None]
    rows.scale[:] = ratio**2
    rows.noise[:] = sigma[1:] * np.sqrt(1 - ratio**2)
    return rows


def _slopes(rows: Rows) -> None:
    """Makes the directions dx/dsigma = (x - D) / sigma (Karras et al. 2022, eq. 1)."""
    sigma = rows.levels.sigma
    rows.direction[:] = np.stack([1 / sigma, -1 / sigma], axis=-1)


def lms_table(sigma: np.ndarray) -> Rows:
    """x' = x + sum_k d_k integral of the k-th Lagrange polynomial over [sigma, sigma'], k < 4."""
    rows = _rows(sigma)
    _slopes(rows)
    for i in range(len(sigma) - 1):
        nodes = sigma[i::-1][:4]
        for k, node in enumerate(nodes):
            others = np.delete(nodes, k)
            integral = np.polyint(np.atleast_1d(np.poly(others)) / np.prod(node - others))
            rows.history[i, k] = np.polyval(integral, sigma[i + 1]) - np.polyval(integral, sigma[i])
    return rows


ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def plms_table(sigma: np.ndarray) -> Rows:
    """x' = x + (sigma' - sigma) times Adams-Bashforth's mean of the last four slopes.

    The first step is Heun's, so there is one row more: an Euler step to y, then the slope at y,
    from where x_0 + (sigma' - sigma) (d_0 + d_y) / 2 = y + (sigma' - sigma) (d_y - d_0) / 2. The
    slope d_y is not used again: later rows skip its place in the history.
    """
    steps = len(sigma) - 1
    if steps < 2:
        return euler_table(sigma)
    rows = _rows(np.insert(sigma, 2, sigma[1]))  # visits 0, 1, 1, 2, 3, ...
    _slopes(rows)
    rows.history[0, 0] = sigma[1] - sigma[0]
    rows.history[1, :2] = np.array([0.5, -0.5]) * (sigma[1] - sigma[0])
    for i in range(1, steps):
        weights = ADAMS_BASHFORTH[min(i, 3)]
        row = i + 1
        places = [k if k < row - 1 else k + 1 for k in range(len(weights))]  # row 1's slope is d_y
        rows.history[row, places] = np.array(weights) * (sigma[i + 1] - sigma[i])
    return rows


def unipc_table(sigma: np.ndarray) -> Rows:
    """UniP-2 and UniC-2, B(h) = e^h - 1, data prediction (Zhao et al. 2023, eq. 7-9 and appendix).

    With phi = e^-h - 1: x' = (sigma' / sigma) x - phi (D_0 + (D_1 - D_0) / (2 r)), r = h_before / h
    with its sign. The corrector redoes the step before once D at its end is known. First and last
    steps are Euler.
    """
    rows = _rows(sigma)
    steps = len(sigma) - 1
    lambdas = -np.log(np.maximum(sigma, np.finfo(float).tiny))
    orders = [1 if i == 0 or sigma[i + 1] == 0 else 2 for i in range(steps)]
    for i in range(steps):
        phi = sigma[i + 1] / sigma[i] - 1
        rows.scale[i] = sigma[i + 1] / sigma[i]
        rows.history[i, 0] = -phi
        if orders[i] == 2:
            r = (lambdas[i - 1] - lambdas[i]) / (lambdas[i + 1] - lambdas[i])
            rows.history[i, :2] += -phi * 0.5 / r * np.array([-1.0, 1.0])
        if i == 0:
            continue
        # The corrected x_i from x_{i-1}: H_0 = D_i, H_1 = D_{i-1}, H_2 = D_{i-2}.
        h = lambdas[i] - lambdas[i - 1]
        phi = np.expm1(-h)
        rows.correct[i] = [0.0, sigma[i] / sigma[i - 1]]
        if orders[i - 1] == 1:
            rows.correct_history[i, :2] = [-phi * 0.5, -phi * 0.5]
        else:
            r = (lambdas[i - 2] - lambdas[i - 1]) / h
            phi_2 = phi / -h - 1
            phi_3 = phi_2 / -h - 0.5
            older, newer = np.linalg.solve([[1.0, 1.0], [r, 1.0]], [phi_2 / phi, 2 * phi_3 / phi])
            rows.correct_history[i, :3] = -phi * np.array([newer, 1 - older / r - newer, older / r])
    return rows


def lcm_table(sigma: np.ndarray) -> Rows:
    """x' = D + sigma' eps. (The paper's c_skip is under 1e-4 for every t >= 5, and left out.)"""
    rows = _rows(sigma)
    rows.scale[:] = 0.0
    rows.history[:, 0] = 1.0
    rows.noise[:] = sigma[1:]
    return rows


def _two_calls(sigma: np.ndarray, second: np.ndarray, middle: np.ndarray, final: np.ndarray) -> Rows:
    """Two rows for each step that calls the network twice, one Euler row x' = D for a last step to sigma = 0.

    D = denoise(x, sigma);      y = middle . (x, D, eps_1)
    E = denoise(y, second);     x' = final . (x, D, E, eps_0, eps_1)

    with middle float64[s, 3] and final float64[s, 5]. The second row no longer has eps_1, but x, D and y, in which it
    is: eps_1 = (y - middle_0 x - middle_1 D) / middle_2.
    """
    two = sigma[1:] > 0
    first = np.cumsum(np.append(0, 1 + two))[:-1]  # each step's first row
    visited = np.empty(len(two) + two.sum() + 1)
    visited[first], visited[first[two] + 1], visited[-1] = sigma[:-1], second[two], sigma[-1]
    rows = _rows(visited)
    rows.scale[first] = np.where(two, middle[:, 0], 0.0)
    rows.history[first, 0] = np.where(two, middle[:, 1], 1.0)
    rows.noise[first] = np.where(two, middle[:, 2], 0.0)
    then, middle, final = first[two] + 1, middle[two], final[two]
    again = np.divide(final[:, 4], middle[:, 2], out=np.zeros(len(then)), where=middle[:, 2] > 0)
    rows.correct[then] = np.stack([again, final[:, 0] - again * middle[:, 0]], -1)
    rows.history[then, :2] = np.stack([final[:, 2], final[:, 1] - again * middle[:, 1]], -1)
    rows.noise[then] = final[:, 3]
    return rows


def _runge_kutta(
    sigma: np.ndarray, middle: np.ndarray, end: np.ndarray, weight: float, up: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients of y = x + (middle - sigma) d, x' = x + (end - sigma) ((1 - weight) d + weight
    d_y) + up eps,

    with the slopes d = (x - D) / sigma and d_y = (y - E) / middle written out in x, D and E.
    """
    lean = (middle - sigma) / sigma
    first = (1 - weight) * (end - sigma) / sigma
    second = weight * (end - sigma) / middle
    zero = np.zeros_like(sigma)
    stage = np.stack([1 + lean, -lean, zero], -1)
    final = [1 + first + second * (1 + lean), -first - second * lean, -second, up, zero]
    return stage, np.stack(final, -1)


def _finite(sigma: np.ndarray) -> np.ndarray:
    """sigma with its 0 replaced: that row is overwritten, and its arithmetic stays finite."""
    return np.where(sigma > 0, sigma, np.finfo(np.float32).tiny)


def heun_table(sigma: np.ndarray) -> Rows:
    """x' = x + (sigma' - sigma) (d + d') / 2, d' the slope where Euler's step lands."""
    before, after = sigma[:-1], _finite(sigma[1:])
    middle, final = _runge_kutta(before, after, after, 0.5, np.zeros_like(before))
    return _two_calls(sigma, after, middle, final)


def dpm2_table(sigma: np.ndarray, eta: float = 0.0) -> Rows:
    """x' = x + (down - sigma) d at the geometric middle of sigma and down, + up eps."""
    before, after = sigma[:-1], _finite(sigma[1:])
    down, up = _ancestral(before, after, eta)
    second = np.sqrt(before * down)
    middle, final = _runge_kutta(before, second, down, 1.0, up)
    return _two_calls(sigma, second, middle, final)


def dpmpp_sde_table(sigma: np.ndarray, eta: float = 1.0) -> Rows:
    """Two ancestral steps in lambda, to the middle s and from sigma to sigma' with D at s.

    y = (down_s / sigma) x + (1 - down_s / sigma) D + up_s eps_1 and
    x' = (down / sigma) x + (1 - down / sigma) E + up (rho eps_1 + sqrt(1 - rho^2) eps_0). Both
    noises are increments of one Brownian motion in sigma: rho^2 = (sigma - s) / (sigma - sigma').
    """
    before, after = sigma[:-1], _finite(sigma[1:])
    second = np.sqrt(before * after)
    down_s, up_s = _ancestral(before, second, eta)
    down, up = _ancestral(before, after, eta)
    rho = np.sqrt(before / (before + second))  # (before - second) / (before - after), simplified
    zero = np.zeros_like(before)
    middle = [down_s / before, 1 - down_s / before, up_s]
    final = [down / before, zero, 1 - down / before, up * np.sqrt(1 - rho**2), up * rho]
    return _two_calls(sigma, second, np.stack(middle, -1), np.stack(final, -1))


def ddim(eta: float = 0.0) -> Sampler:
    """DDIM with the given eta in [0, 1]: 0 deterministic, 1 DDPM (Song et al. 2021, eq. 16).

    Raises:
        ValueError: eta is not in [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], found {eta!r}")
    return Sampler(partial(euler_table, eta=eta), stochastic=eta > 0)


SAMPLERS = {
    "ddpm": Sampler(partial(euler_table, eta=1.0), stochastic=True),
    "ddim": ddim(),
    "plms": Sampler(plms_table, stochastic=False),
    "euler": Sampler(euler_table, stochastic=False),
    "euler_a": Sampler(partial(euler_table, eta=1.0), stochastic=True),
    "heun": Sampler(heun_table, stochastic=False),
    "dpm2": Sampler(dpm2_table, stochastic=False),
    "dpm2_a": Sampler(partial(dpm2_table, eta=1.0), stochastic=True),
    "lms": Sampler(lms_table, stochastic=False),
    "dpmpp_2m": Sampler(dpmpp_2m_table, stochastic=False),
    "dpmpp_2m_sde": Sampler(dpmpp_2m_sde_table, stochastic=True),
    "dpmpp_sde": Sampler(dpmpp_sde_table, stochastic=True),
    "unipc": Sampler(unipc_table, stochastic=False),
    "lcm": Sampler(lcm_table, stochastic=True),
}
