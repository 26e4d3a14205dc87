"""What programs are written and compiled for: the platform, JAX's numerics, and the compiler's options."""

from __future__ import annotations

import ctypes
import os
import platform as system
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import numpy as np

use_platform = jax.make_user_context(None)
"""`with use_platform(name):` inside, programs are written for "cpu", "gpu" or "tpu" instead of JAX's default backend.

jit knows of it: another platform is another program.
"""

use_kernels = jax.make_user_context(False)
"""`with use_kernels(True):` allows hand-written GPU and TPU kernels inside, such as flash attention.

They have no gradient, and XLA cannot split them over devices by itself. `sdjax.devices.placement.parallelize` allows
them where neither is needed.
"""

use_gradients = jax.make_user_context(False)
"""`with use_gradients(True):` writes programs for their gradients inside: the same numbers but for rounding, in forms
that a CPU differentiates faster, though they may be no faster without. jit knows of it.
"""

CPU_OPTIONS = {"xla_backend_optimization_level": 1}
"""Compiles in two thirds of the time; the programs are as fast."""

GPU_OPTIONS = {"xla_gpu_dot_merger_threshold_mb": 0}
"""Products of one array with several matrices (queries, keys, values) stay apart: XLA would multiply with the matrices
side by side, and then copy each part of the result to where cuDNN's attention takes it."""

OPTIONS: dict[str, dict[str, Any]] = {"cpu": CPU_OPTIONS, "gpu": GPU_OPTIONS}

GENERATOR = "threefry2x32"
"""The random generator of every key, whatever JAX's default is."""

BFLOAT16_FLAGS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}
"""Instructions of x86 processors for products in bfloat16, by their names in /proc/cpuinfo."""

HARMLESS_FLAGS = ("--xla_force_host_platform_device_count", "--xla_dump", "--xla_hlo_profile")
"""How flags of XLA begin that change no numbers."""

Function = TypeVar("Function", bound=Callable[..., Any])


@contextmanager
def numerics() -> Iterator[None]:
    """Inside, JAX computes and draws as this project was proven to, whatever its configuration and environment say."""
    with ExitStack() as stack:
        stack.enter_context(jax.threefry_partitionable(True))
        stack.enter_context(jax.default_prng_impl(GENERATOR))
        stack.enter_context(jax.enable_x64(False))
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        stack.enter_context(jax.transfer_guard("allow"))
        yield


def pinned(function: Function) -> Function:
    """The same function, run inside `numerics`."""

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        with numerics():
            return function(*arguments, **options)

    return cast(Function, call)


def seeded_keys(seeds: Any) -> jax.Array:
    """seeds, whole numbers in [0, 2^32) of any shape -> keys of that shape, those of `jax.random.key` as JAX comes.

    Made from their bits, so that neither another default generator nor JAX's offset of seeds changes them.
    """
    low = np.asarray(seeds, np.uint32)
    data = jax.device_put(np.stack([np.zeros_like(low), low], axis=-1))  # unlike `jnp.asarray` it compiles nothing
    return jax.random.wrap_key_data(data, impl=GENERATOR)


MALLOC = (("M_ARENA_MAX", -8, 1), ("M_MMAP_MAX", -4, 0), ("M_TRIM_THRESHOLD", -1, 2**31 - 1))
"""Options of glibc's mallopt: one arena for all threads, nothing mapped apart, nothing handed back."""


def keep_memory() -> bool:
    """From now on this process keeps the memory that it frees, for itself; call it before JAX computes anything.

    XLA asks for a CPU program's intermediate results anew at every call. glibc maps so large a piece and hands it back
    each time, and the system clears every page of it anew: of a training step of the box's text encoder (758 MB) that
    is a third. What it costs: the process stays as large as it ever was. Returns whether it had an effect; it has none
    without glibc.
    """
    if system.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return all(library.mallopt(option, value) for _, option, value in MALLOC)


def environment() -> dict[str, str]:
    """What is set around a process that changes its numbers and cannot be pinned; a picture's recipe names it."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(HARMLESS_FLAGS)]
    found = {name: os.environ.get(name, "") for name in ("LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")}
    found["XLA_FLAGS"] = " ".join(flags)
    for name, usual in (
        ("jax_default_matmul_precision", None),
        ("jax_disable_most_optimizations", False),
        ("jax_disable_jit", False),
    ):
        value = jax.config.values[name]
        found[name.upper()] = "" if value == usual else str(value)
    return {name: value for name, value in sorted(found.items()) if value}


def platform() -> str:
    """The platform that programs are written for, here and now."""
    return use_platform.value or jax.default_backend()


@cache
def bfloat16_instructions(cpuinfo: str = "/proc/cpuinfo") -> tuple[str, ...]:
    """Which of "AMX" and "AVX512-BF16" this machine's processor has; none where the file is not there (not Linux).

    Without them bfloat16 saves memory on a CPU, but no time.
    """
    try:
        flags = next(line for line in Path(cpuinfo).read_text().splitlines() if line.startswith("flags")).split()
    except (OSError, StopIteration):
        return ()
    return tuple(name for flag, name in BFLOAT16_FLAGS.items() if flag in flags)


def bfloat16_products(dtype: Any) -> bool:
    """Whether programs written for here and now multiply faster in this dtype because it is bfloat16, on a CPU."""
    return dtype == jax.numpy.bfloat16 and platform() == "cpu" and bool(bfloat16_instructions())


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
    return None if jax.config.read("jax_disable_most_optimizations") else OPTIONS.get(name)
