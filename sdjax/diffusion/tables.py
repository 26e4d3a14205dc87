"""The tables of all samplers: from the levels of a run to the coefficients of every call of the network.

Each function takes sigma, float64[s + 1], falling, whose last may be 0, and returns rows of float64 without timesteps
(`sdjax.diffusion.rows`). sigma' is the next level, D the network's x0_hat, d = (x - D) / sigma the slope of the flow
(Karras et al. 2022, eq. 1), lambda = -log sigma, h = lambda' - lambda (Lu et al. 2022, "DPM-Solver++"). down and up are
the parts of an ancestral step (`_ancestral`). Where sigma' is 0, x' = D.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

import numpy as np

from sdjax.diffusion.names import RHO
from sdjax.diffusion.rows import Rows, rows_at
from sdjax.diffusion.spacings import karras

# What several tables share


def _ancestral(sigma: np.ndarray, after: np.ndarray, eta: float) -> tuple[np.ndarray, np.ndarray]:
    """The level to step down to and the noise to add, so that down^2 + up^2 = after^2.

    up = eta sigma' sqrt(sigma^2 - sigma'^2) / sigma (Song et al. 2021, eq. 16, in sigma space).
    """
    up = eta * after * np.sqrt(np.maximum(sigma**2 - after**2, 0.0)) / sigma
    return after * np.sqrt(1 - eta**2 + (eta * after / sigma) ** 2), up


def _lambdas(sigma: np.ndarray) -> np.ndarray:
    """-log sigma, very large instead of infinite at sigma 0, whose steps need none."""
    return -np.log(np.maximum(sigma, np.finfo(float).tiny))


def _finite(sigma: np.ndarray) -> np.ndarray:
    """sigma with its 0 replaced: that row is overwritten, and its arithmetic stays finite."""
    return np.where(sigma > 0, sigma, np.finfo(np.float32).tiny)


def churned(
    sigma: np.ndarray, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = np.inf
) -> tuple[np.ndarray, np.ndarray]:
    """The levels that steps start from, float64[s], and the noise to add before each (Karras et al. 2022, algorithm 2).

    gamma = min(s_churn / s, sqrt(2) - 1) where s_tmin <= sigma <= s_tmax; a step starts from sigma (1 + gamma).
    """
    before = sigma[:-1]
    gamma = min(s_churn / max(len(before), 1), np.sqrt(2.0) - 1)
    higher = before * np.where((s_tmin <= before) & (before <= s_tmax), 1 + gamma, 1.0)
    return higher, np.sqrt(higher**2 - before**2)


def _with_noise_before(rows: Rows, first: np.ndarray, extra: np.ndarray) -> Rows:
    """The rows, with noise added before some steps: in the row that leads there. first: each step's first row.

    What comes before the first step of all is part of the initial noise (`Plan.sigma`).
    """
    leading_there = first[1:] - 1
    rows.noise[leading_there] = np.hypot(rows.noise[leading_there], extra[1:])
    return rows


def _slopes(rows: Rows) -> None:
    """Makes the directions dx/dsigma = (x - D) / sigma (Karras et al. 2022, eq. 1)."""
    sigma = rows.levels.sigma
    rows.direction[:] = np.stack([1 / sigma, -1 / sigma], axis=-1)


_gauss_legendre = lru_cache(np.polynomial.legendre.leggauss)


def _integral(weight: Callable[[np.ndarray], np.ndarray], low: float, high: float) -> float:
    """The integral of a smooth function, to about 1e-13 (Gauss-Legendre)."""
    nodes, weights = _gauss_legendre(40)
    at = (high - low) / 2 * nodes + (high + low) / 2
    return float((high - low) / 2 * (weights * weight(at)).sum())


def _lagrange(nodes: np.ndarray, k: int, at: np.ndarray) -> np.ndarray:
    """The polynomial that is 1 at node k and 0 at the others."""
    others = np.delete(nodes, k)
    return np.prod([(at - other) / (nodes[k] - other) for other in others], axis=0) if len(others) else np.ones_like(at)


# One call for each step, nothing remembered


def euler_table(
    sigma: np.ndarray, eta: float = 0.0, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = np.inf
) -> Rows:
    """x' = (down / sigma) x + (1 - down / sigma) D + up eps; eta 0 is DDIM, eta 1 DDPM."""
    before, extra = churned(sigma, s_churn, s_tmin, s_tmax)
    rows = rows_at(np.append(before, sigma[-1]))
    down, up = _ancestral(before, sigma[1:], eta)
    rows.scale[:] = down / before
    rows.history[:, 0] = 1 - rows.scale
    rows.noise[:] = up
    return _with_noise_before(rows, np.arange(len(before)), extra)


def lcm_table(sigma: np.ndarray) -> Rows:
    """x' = D + sigma' eps. (The paper's c_skip is under 1e-4 for every t >= 5, and left out.)"""
    rows = rows_at(sigma)
    rows.scale[:] = 0.0
    rows.history[:, 0] = 1.0
    rows.noise[:] = sigma[1:]
    return rows


def tcd_table(sigma: np.ndarray, sigmas: np.ndarray, eta: float = 0.3) -> Rows:
    """Down to the level of timestep (1 - eta) t', then noise up to sigma' (Zheng et al. 2024, algorithm 4).

    x' = D + sigma_s (x - D) / sigma + sqrt(sigma'^2 - sigma_s^2) eps. sigmas: the schedule's. eta 0 is DDIM.
    """
    rows = rows_at(sigma)
    after = sigma[1:]
    t = np.interp(np.log(_finite(after)), np.log(sigmas), np.arange(len(sigmas)))
    s = np.floor((1 - eta) * t + 1e-9).astype(int)  # whole timesteps, whatever the logarithms left of them
    sigma_s = np.where(after > 0, np.minimum(sigmas[s], after), 0.0)
    rows.scale[:] = sigma_s / sigma[:-1]
    rows.history[:, 0] = 1 - rows.scale
    rows.noise[:] = np.sqrt(after**2 - sigma_s**2)
    return rows


# One call for each step, multistep in lambda


def dpmpp_2m_table(sigma: np.ndarray) -> Rows:
    """x' = (sigma' / sigma) x + (1 - sigma' / sigma) (D_0 + (D_0 - D_1) h / (2 h_before)); first an Euler step."""
    return dpmpp_2m_sde_table(sigma, eta=0.0)


def dpmpp_2m_sde_table(sigma: np.ndarray, eta: float = 1.0, heun: bool = False) -> Rows:
    """x' = e^-H x + (1 - e^-H) D_0 + c (D_0 - D_1) h / h_before + sigma' sqrt(1 - e^(-2 eta h)) eps, H = h (1 + eta).

    c = (1 - e^-H) / 2 by the midpoint rule, or 1 - (1 - e^-H) / H by Heun's; the first step is
    Euler's.
    """
    rows = rows_at(sigma)
    lambdas = _lambdas(sigma)
    for i in range(len(sigma) - 1):
        h = lambdas[i + 1] - lambdas[i]
        ratio, rest = sigma[i + 1] / sigma[i], -np.expm1(-h * (1 + eta))
        extra = 0.0
        if sigma[i + 1] > 0 and i > 0:
            second = 1 - rest / (h * (1 + eta)) if heun else rest / 2
            extra = second * h / (lambdas[i] - lambdas[i - 1])
        if sigma[i + 1] == 0:
            rest = 1.0
        rows.scale[i] = ratio * ratio**eta
        rows.history[i, :2] = [rest + extra, -extra]
        rows.noise[i] = sigma[i + 1] * np.sqrt(1 - ratio ** (2 * eta))
    return rows


def dpmpp_3m_sde_table(sigma: np.ndarray, eta: float = 1.0) -> Rows:
    """x' = e^-H x + (1 - e^-H) D_0 + phi_2 D' - phi_3 D'' + sigma' sqrt(1 - e^(-2 eta h)) eps, H = h (1 + eta).

    phi_2 = (e^-H - 1) / H + 1, phi_3 = phi_2 / H - 1 / 2; D' and D'' are the derivatives in units of h by divided
    differences of the last three D (k-diffusion's `sample_dpmpp_3m_sde`). The second step has two, the first one.
    """
    rows = rows_at(sigma)
    lambdas = _lambdas(sigma)
    for i in range(len(sigma) - 1):
        if sigma[i + 1] == 0:
            rows.scale[i], rows.history[i, 0] = 0.0, 1.0
            continue
        h = lambdas[i + 1] - lambdas[i]
        whole = h * (1 + eta)
        phi_1 = -np.expm1(-whole)
        phi_2 = 1 - phi_1 / whole
        phi_3 = phi_2 / whole - 0.5
        weights = np.array([phi_1, 0.0, 0.0])
        if i > 0:
            r0 = (lambdas[i] - lambdas[i - 1]) / h
            newer = np.array([1.0, -1.0, 0.0]) / r0
            first, second = newer, np.zeros(3)
        if i > 1:
            r1 = (lambdas[i - 1] - lambdas[i - 2]) / h
            older = np.array([0.0, 1.0, -1.0]) / r1
            first = newer + (newer - older) * r0 / (r0 + r1)
            second = (newer - older) / (r0 + r1)
        if i > 0:
            weights += phi_2 * first - phi_3 * second
        rows.scale[i] = np.exp(-whole)
        rows.history[i, :3] = weights
        rows.noise[i] = sigma[i + 1] * np.sqrt(-np.expm1(-2 * eta * h))
    return rows


def res_multistep_table(sigma: np.ndarray, eta: float = 0.0) -> Rows:
    """x' = e^-h x + h ((p_1 - p_2 / c) D_0 + (p_2 / c) D_1), c = -h_before / h (Zhang et al. 2023, RES), to down.

    p_1 = (1 - e^-h) / h, p_2 = (1 - p_1) / h; the first step is Euler's. With eta, h leads to down, up is added, and
    h_before was measured to the down of the step before (as ComfyUI has it).
    """
    rows = rows_at(sigma)
    down, up = _ancestral(sigma[:-1], sigma[1:], eta)
    lambdas, of_down = _lambdas(sigma), _lambdas(down)
    for i in range(len(sigma) - 1):
        rows.scale[i] = down[i] / sigma[i]
        rows.history[i, 0] = 1 - rows.scale[i]
        if i > 0 and down[i] > 0:
            h = of_down[i] - lambdas[i]
            c = -(of_down[i - 1] - lambdas[i - 1]) / h
            p_1 = -np.expm1(-h) / h
            p_2 = (1 - p_1) / h
            rows.history[i, :2] = h * np.array([p_1 - p_2 / c, p_2 / c])
        rows.noise[i] = up[i]
    return rows


def unipc_table(sigma: np.ndarray) -> Rows:
    """UniP-2 and UniC-2, B(h) = e^h - 1, data prediction (Zhao et al. 2023, eq. 7-9 and appendix).

    With phi = e^-h - 1: x' = (sigma' / sigma) x - phi (D_0 + (D_1 - D_0) / (2 r)), r = h_before / h
    with its sign. The corrector redoes the step before once D at its end is known. First and last
    steps are Euler.
    """
    rows = rows_at(sigma)
    steps = len(sigma) - 1
    lambdas = _lambdas(sigma)
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


SA_TAU = (0.5710, 5.0919)
"""Levels between which SA-Solver adds noise: those of the fractions 0.2 and 0.8 of Stable Diffusion's timesteps."""


def sa_solver_table(sigma: np.ndarray, eta: float = 1.0, tau: tuple[float, float] = SA_TAU) -> Rows:
    """SA-Solver of order 3, with a corrector of order 4 (Xue et al. 2023, algorithm 1, data prediction).

    x' = (sigma' / sigma) e^(-tau^2 h) x + sum_j b_j D_j + sigma' sqrt(1 - e^(-2 tau^2 h)) eps, where
    b_j = integral over [lambda, lambda'] of m e^(m (l - lambda')) L_j(l) dl, m = 1 + tau^2. The corrector has the same
    noise, so that it is x + sum b_new D_new - sum b D. eta: tau in between `tau`, and 0 outside.
    """
    rows = rows_at(sigma)
    lambdas = _lambdas(sigma)
    steps = len(sigma) - 1

    def strength(i: int) -> float:
        return eta if tau[0] <= sigma[i] <= tau[1] else 0.0

    def weights(i: int, nodes: np.ndarray) -> np.ndarray:
        """Of D at the nodes, for the step that ends at level i."""
        m = 1 + strength(i) ** 2

        def weight(k: int) -> Callable[[np.ndarray], np.ndarray]:
            return lambda at: m * np.exp(m * (at - lambdas[i])) * _lagrange(nodes, k, at)

        return np.array([_integral(weight(k), lambdas[i - 1], lambdas[i]) for k in range(len(nodes))])

    used = np.zeros(0)
    for i in range(steps):
        if 0 < i < steps - 1:
            order = min(4, i + 1, steps - i)
            found = weights(i, lambdas[i::-1][:order])
            rows.correct_history[i, :order] += found
            rows.correct_history[i, 1 : 1 + len(used)] -= used
        if sigma[i + 1] == 0:
            rows.scale[i], rows.history[i, 0] = 0.0, 1.0
            continue
        h, noise = lambdas[i + 1] - lambdas[i], strength(i + 1) ** 2
        used = weights(i + 1, lambdas[i::-1][: min(3, i + 1, max(steps - 1 - i, 1))])
        rows.scale[i] = sigma[i + 1] / sigma[i] * np.exp(-noise * h)
        rows.history[i, : len(used)] = used
        rows.noise[i] = sigma[i + 1] * np.sqrt(-np.expm1(-2 * noise * h))
    return rows


ER_POINTS = 200
"""Points of the sums that stand for integrals in ER-SDE, as its authors take them."""


def er_sde_table(sigma: np.ndarray) -> Rows:
    """ER-SDE of order 3 (Cui et al. 2023, algorithm 3, with f(l) = l (e^(l^0.3) + 10) for ER-SDE 5).

    x' = q x + (1 - q) D + (d + S f') D' + (d^2 / 2 + S_u f') D'' + u eps with f' = f(sigma'), q = f' / f(sigma),
    d = sigma' - sigma, u^2 = sigma'^2 - q^2 sigma^2. S and S_u are sums for the integrals of 1 / f and (l - sigma) / f
    over [sigma', sigma].
    """

    def f(level: np.ndarray) -> np.ndarray:
        return level * (np.exp(level**0.3) + 10)

    rows = rows_at(sigma)
    for i in range(len(sigma) - 1):
        now, after = sigma[i], sigma[i + 1]
        if after == 0:
            rows.scale[i], rows.history[i, 0] = 0.0, 1.0
            continue
        q, distance = f(after) / f(now), after - now
        points = after - np.arange(ER_POINTS) * distance / ER_POINTS
        part = -distance / ER_POINTS
        weights = np.array([1 - q, 0.0, 0.0])
        if i > 0:
            first = np.array([1.0, -1.0, 0.0]) / (now - sigma[i - 1])
            weights += (distance + part * (1 / f(points)).sum() * f(after)) * first
        if i > 1:
            before = np.array([0.0, 1.0, -1.0]) / (sigma[i - 1] - sigma[i - 2])
            second = (first - before) / ((now - sigma[i - 2]) / 2)
            weights += (distance**2 / 2 + part * ((points - now) / f(points)).sum() * f(after)) * second
        rows.scale[i] = q
        rows.history[i, :3] = weights
        rows.noise[i] = np.sqrt(max(after**2 - (q * now) ** 2, 0.0))
    return rows


# One call for each step, multistep in sigma


def lms_table(sigma: np.ndarray) -> Rows:
    """x' = x + sum_k d_k integral of the k-th Lagrange polynomial over [sigma, sigma'], k < 4."""
    rows = rows_at(sigma)
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
    rows = rows_at(np.insert(sigma, 2, sigma[1]))  # visits 0, 1, 1, 2, 3, ...
    _slopes(rows)
    rows.history[0, 0] = sigma[1] - sigma[0]
    rows.history[1, :2] = np.array([0.5, -0.5]) * (sigma[1] - sigma[0])
    for i in range(1, steps):
        weights = ADAMS_BASHFORTH[min(i, 3)]
        row = i + 1
        places = [k if k < row - 1 else k + 1 for k in range(len(weights))]  # row 1's slope is d_y
        rows.history[row, places] = np.array(weights) * (sigma[i + 1] - sigma[i])
    return rows


def ipndm_table(sigma: np.ndarray) -> Rows:
    """x' = x + (sigma' - sigma) times Adams-Bashforth's mean of the last slopes, up to four (Zhang & Chen 2023)."""
    return _of_slopes(sigma, lambda i: np.array(ADAMS_BASHFORTH[min(i, 3)]) * (sigma[i + 1] - sigma[i]))


def ipndm_v_table(sigma: np.ndarray) -> Rows:
    """As ipndm with the steps' own lengths in the weights, as the diff-sampler toolbox has them (Zhou et al. 2024).

    The last weight there is off by a little (h_1 / h_2 in the place of h_2 / h_3, so that they sum to 1 only where the
    steps are even); it is kept, since pictures by this name were made with it.
    """

    def weights(i: int) -> np.ndarray:
        h = np.diff(sigma)[i::-1][:4]  # of this step and those before
        bend = h[0] / h[1] if i > 0 else 0.0
        found = np.array([1 + bend / 2, -bend / 2, 0.0, 0.0])
        if i > 1:
            two, three = h[0] + h[1], h[1] + h[2]
            third = (1 - h[0] / (3 * two) * h[0] * two / (h[1] * three)) / 2
            ratio = h[1] / h[2]
            found += third * np.array([1.0, -1 - ratio, ratio, 0.0])
        if i > 2:
            all_three, last = h[0] + h[1] + h[2], h[2] + h[3]
            fourth = ((1 - h[0] / (3 * two)) / 2 + (1 - h[0] / (2 * two)) * h[0] / (6 * all_three)) * (
                h[0] * two * all_three / (h[1] * three * (three + h[3]))
            )
            far = h[1] * three / (h[2] * last)
            found += fourth * np.array([1.0, -1 - ratio - far, ratio + far * (1 + h[2] / h[3]), -far * ratio])
        return found * h[0]

    return _of_slopes(sigma, weights)


DEIS_BETA = (17.537957, -0.004769)
"""beta_d and beta_min of the variance-preserving schedule (sigma from 0.002 to 80) in whose time DEIS integrates."""


def deis_table(sigma: np.ndarray) -> Rows:
    """x' = x + sum_j d_j integral over [sigma, sigma'] of L_j(t(s)) ds, j < 3 (Zhang & Chen 2023, "tab").

    t(s) = (sqrt(beta_min^2 + 2 beta_d log(1 + s^2)) - beta_min) / beta_d.
    """
    beta_d, beta_min = DEIS_BETA

    def time(s: np.ndarray) -> np.ndarray:
        return (np.sqrt(beta_min**2 + 2 * beta_d * np.log1p(s**2)) - beta_min) / beta_d

    def weights(i: int) -> np.ndarray:
        nodes = time(sigma[i::-1][:3])
        return np.array(
            [
                _integral(lambda s, k=k: _lagrange(nodes, k, time(s)), sigma[i], sigma[i + 1])  # type: ignore[misc]
                for k in range(len(nodes))
            ]
        )

    return _of_slopes(sigma, weights)


def gradient_estimation_table(sigma: np.ndarray, gamma: float = 2.0) -> Rows:
    """x' = x + (sigma' - sigma) (gamma d_0 + (1 - gamma) d_1) from the second step on (Permenter & Yuan 2024)."""
    return _of_slopes(sigma, lambda i: np.array([gamma, 1 - gamma] if i > 0 else [1.0]) * (sigma[i + 1] - sigma[i]))


def _of_slopes(sigma: np.ndarray, weights: Callable[[int], np.ndarray]) -> Rows:
    """x' = x + sum_k weights(i)_k d_k; a step to sigma 0 is x' = D."""
    rows = rows_at(sigma)
    _slopes(rows)
    for i in range(len(sigma) - 1):
        found = weights(i) if sigma[i + 1] > 0 else np.array([-sigma[i]])
        rows.history[i, : len(found)] = found
    return rows


# Two or three calls for each step


def _two_calls(
    before: np.ndarray, after: np.ndarray, second: np.ndarray, middle: np.ndarray, final: np.ndarray
) -> tuple[Rows, np.ndarray]:
    """Two rows for each step that calls the network twice, one Euler row x' = D for a step to sigma 0; and the first
    row of each step.

    D = denoise(x, before);     y = middle . (x, D, eps_1)
    E = denoise(y, second);     x' = final . (x, D, E, eps_0, eps_1)

    with middle float64[s, 3] and final float64[s, 5]. The second row no longer has eps_1, but x, D and y, in which it
    is: eps_1 = (y - middle_0 x - middle_1 D) / middle_2.
    """
    two = after > 0
    first = np.cumsum(np.append(0, 1 + two))[:-1]
    visited = np.empty(len(two) + two.sum() + 1)
    visited[first], visited[first[two] + 1], visited[-1] = before, second[two], after[-1]
    rows = rows_at(visited)
    rows.scale[first] = np.where(two, middle[:, 0], 0.0)
    rows.history[first, 0] = np.where(two, middle[:, 1], 1.0)
    rows.noise[first] = np.where(two, middle[:, 2], 0.0)
    then, middle, final = first[two] + 1, middle[two], final[two]
    again = np.divide(final[:, 4], middle[:, 2], out=np.zeros(len(then)), where=middle[:, 2] > 0)
    rows.correct[then] = np.stack([again, final[:, 0] - again * middle[:, 0]], -1)
    rows.history[then, :2] = np.stack([final[:, 2], final[:, 1] - again * middle[:, 1]], -1)
    rows.noise[then] = final[:, 3]
    return rows, first


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


def _heun(before: np.ndarray, after: np.ndarray, extra: np.ndarray) -> Rows:
    """Heun's steps from `before` to `after`, each after some noise."""
    end = _finite(after)
    middle, final = _runge_kutta(before, end, end, 0.5, np.zeros_like(before))
    return _with_noise_before(*_two_calls(before, after, end, middle, final), extra)


def heun_table(sigma: np.ndarray, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = np.inf) -> Rows:
    """x' = x + (sigma' - sigma) (d + d') / 2, d' the slope where Euler's step lands."""
    before, extra = churned(sigma, s_churn, s_tmin, s_tmax)
    return _heun(before, sigma[1:], extra)


RESTART = (0.1, 2.0)
"""The levels between which Restart goes again (Xu et al. 2023, in the form that A1111 has)."""


def restart_table(sigma: np.ndarray) -> Rows:
    """Heun's rule down a Karras spacing; at the level nearest 0.1 noise leads up to the one nearest 2, and down again.

    Of n steps, from 20 on, 9 are for going again, or from 36 on two times n // 4; below 20 it is plain Heun.
    """
    n = len(sigma) - 1
    again, times = (0, 0) if n < 20 else (9, 1) if n < 36 else (n // 4, 2)
    if not times:
        return heun_table(sigma)
    low, high = (sigma[-1] or sigma[-2]), sigma[0]
    levels = np.append(_karras(high, low, n - again * times), 0.0)
    places = [int(np.argmin(np.abs(levels - level))) for level in RESTART]
    turn, top = levels[places[0]], levels[places[1]]
    pairs = []
    for i in range(len(levels) - 1):
        pairs.append((levels[i], levels[i + 1]))
        if i + 1 == places[0] and top > turn:
            loop = _karras(top, turn, again + 1)
            pairs += list(pairwise(loop)) * times
    before, after = np.array(pairs).T
    arrived = np.append(before[0], after[:-1])
    return _heun(before, after, np.sqrt(np.maximum(before**2 - arrived**2, 0.0)))


def _karras(high: float, low: float, count: int) -> np.ndarray:
    """Levels of the spacing karras, both ends included."""
    return karras(np.array([low, high]), count, RHO["karras"])[:-1]


def dpm2_table(
    sigma: np.ndarray, eta: float = 0.0, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = np.inf
) -> Rows:
    """x' = x + (down - sigma) d at the geometric middle of sigma and down, + up eps."""
    before, extra = churned(sigma, s_churn, s_tmin, s_tmax)
    after = _finite(sigma[1:])
    down, up = _ancestral(before, after, eta)
    second = np.sqrt(before * down)
    middle, final = _runge_kutta(before, second, down, 1.0, up)
    return _with_noise_before(*_two_calls(before, sigma[1:], second, middle, final), extra)


def dpmpp_2s_table(sigma: np.ndarray, eta: float = 1.0) -> Rows:
    """Lu et al. 2022, algorithm 1, as an ancestral step: y = (s / sigma) x + (1 - s / sigma) D, s = sqrt(sigma down),
    x' = (down / sigma) x + (1 - down / sigma) E + up eps.
    """
    before, after = sigma[:-1], _finite(sigma[1:])
    down, up = _ancestral(before, after, eta)
    second, zero = np.sqrt(before * down), np.zeros_like(before)
    middle = np.stack([second / before, 1 - second / before, zero], -1)
    final = np.stack([down / before, zero, 1 - down / before, up, zero], -1)
    return _two_calls(before, sigma[1:], second, middle, final)[0]


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
    return _two_calls(before, sigma[1:], second, np.stack(middle, -1), np.stack(final, -1))[0]


def seeds_2_table(sigma: np.ndarray, eta: float = 1.0) -> Rows:
    """SEEDS-2 with its middle at half of h (Gonzalez et al. 2023, algorithm 2): both noises add up step by step.

    y = (s / sigma) e^(-eta h / 2) x + (1 - e^(-H / 2)) D + s sqrt(1 - e^(-eta h)) eps_1, H = h (1 + eta), and
    x' = (sigma' / sigma) e^(-eta h) x + (1 - e^-H) E + sigma' sqrt(1 - e^(-eta h)) (e^(-eta h / 2) eps_1 + eps_0).
    """
    before, after = sigma[:-1], _finite(sigma[1:])
    h = np.log(before / after)
    second, zero = np.sqrt(before * after), np.zeros_like(before)
    fresh, kept = np.sqrt(-np.expm1(-eta * h)), np.exp(-eta * h / 2)
    middle = [second / before * kept, -np.expm1(-h * (1 + eta) / 2), second * fresh]
    final = [after / before * kept**2, zero, -np.expm1(-h * (1 + eta)), after * fresh, after * fresh * kept]
    return _two_calls(before, sigma[1:], second, np.stack(middle, -1), np.stack(final, -1))[0]


def heunpp2_table(sigma: np.ndarray) -> Rows:
    """Heun's rule with the slopes of three levels, weighted by these (Karras et al. 2022 with the Heun++ of ComfyUI).

    x' = x + (sigma' - sigma) (w_1 d + w_2 d' + w_3 d''), w_2 = sigma' / W, w_3 = sigma'' / W, W = 3 sigma_0, w_1 the
    rest to 1; d' and d'' are the slopes where Euler's steps land. The last step but one has two slopes and
    W = 2 sigma_0, the last is x' = D.
    """
    steps = len(sigma) - 1
    calls = [min(3, sum(level > 0 for level in sigma[i : i + 3])) for i in range(steps)]
    visited = [sigma[i + k] for i in range(steps) for k in range(calls[i])]
    rows, row = rows_at(np.append(visited, sigma[-1])), 0
    _slopes(rows)
    for i in range(steps):
        moves = np.diff(sigma[i : i + calls[i] + 1]) if calls[i] > 1 else [sigma[i + 1] - sigma[i]]
        for k in range(calls[i] - 1):  # to where the next slope is
            rows.history[row + k, 0] = moves[k]
        row += calls[i] - 1
        whole = calls[i] * sigma[0]
        later = [sigma[i + k] / whole for k in range(1, calls[i])]
        slopes = (sigma[i + 1] - sigma[i]) * np.array([1 - sum(later), *later])
        slopes[: calls[i] - 1] -= moves[: calls[i] - 1]  # Euler's steps, taken back
        rows.history[row, : calls[i]] = slopes[::-1]
        row += 1
    return rows
