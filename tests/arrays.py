"""Arrays for tests, and what a traced function works out."""

import jax
import numpy as np


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def equations(jaxpr):
    """Every equation of a jaxpr and of all those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: isinstance(v, jax.extend.core.ClosedJaxpr)):
            if isinstance(value, jax.extend.core.ClosedJaxpr):
                yield from equations(value.jaxpr)


def largest(function, *inputs):
    """The number of elements of the largest array that a function works out; nothing is computed to know it."""
    traced = jax.make_jaxpr(function)(*inputs)
    return max(variable.aval.size for equation in equations(traced.jaxpr) for variable in equation.outvars)
