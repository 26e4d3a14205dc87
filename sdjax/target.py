"""What programs are written and compiled for: the platform, and the options of its compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

use_platform = jax.make_user_context(None)
"""`with use_platform(name):` inside, programs are written for "cpu", "gpu" or "tpu" instead of JAX's default backend.

jit knows of it: another platform is another program.
"""

use_kernels = jax.make_user_context(False)
"""`with use_kernels(True):` inside, programs may hold kernels that have no gradient and that XLA cannot split over
devices by itself. `sdjax.sharding.spread` says so where neither is asked of them.
"""

CPU_OPTIONS = {"xla_backend_optimization_level": 1}
"""Compiles in two thirds of the time; the programs are as fast."""


def platform() -> str:
    """The platform that programs are written for, here and now."""
    return use_platform.value or jax.default_backend()


def written_for(name: str, function: Callable[..., Any], *, kernels: bool) -> Callable[..., Any]:
    """The same function, or `functools.partial` of one, which always sees the platform of that name, and whether
    kernels are allowed.
    """

    def inside(*arguments: Any) -> Any:
        with use_platform(name), use_kernels(kernels):
            return function(*arguments)

    inside.__name__ = getattr(function, "func", function).__name__  # programs are shown and kept under it
    return inside


def compiler_options(name: str) -> dict[str, Any] | None:
    """For `jax.jit`, on a platform; None where the defaults are best, or where JAX was told to optimise less still."""
    return CPU_OPTIONS if name == "cpu" and not jax.config.read("jax_disable_most_optimizations") else None
