"""Products with Jacobians, also of functions that have only reverse mode.

A ``jax.custom_vjp`` (straight-through signs, fused attention and losses) has no Jacobian-vector
product. Its vector-Jacobian product is linear, and the transpose of this product is the missing
one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from eoi_jax.typing import Array

__all__ = ["Linearized", "has_forward_mode", "hessian_product", "linearized"]


class Linearized(NamedTuple):
    """A function of one array at a point: its value, and products with its Jacobian ``J``."""

    value: Array
    push: Callable[[Array], Array]  # t -> J t
    pull: Callable[[Array], Array]  # c -> Jᵀ c


def has_forward_mode(fn: Callable[..., Any], *primals: Any) -> bool:
    """Whether a Jacobian-vector product of ``fn`` can be computed, told by tracing alone."""
    if not any(name.startswith("custom_vjp") for name in _primitives(fn, *primals)):
        return True

    def push(*primals: Any) -> Any:
        return jax.jvp(fn, primals, primals)

    try:
        # JAX puts this where the product is missing, and complains when it comes to compute it.
        return "custom_lin" not in _primitives(push, *primals)
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        return False


def linearized(fn: Callable[[Array], Array], x: Array) -> Linearized:
    """Linearize a function from one array to another at ``x``, in whichever mode it has."""
    if has_forward_mode(fn, x):
        value, push = jax.linearize(fn, x)
        transposed = jax.linear_transpose(push, x)
        return Linearized(value, push, lambda cotangent: transposed(cotangent)[0])
    value, pull = jax.vjp(fn, x)

    def push_by_transpose(tangent: Array) -> Array:
        try:
            return jax.linear_transpose(pull, value)((tangent,))[0]
        except (NotImplementedError, TypeError, AssertionError) as error:
            raise ValueError(
                f"fn has a custom_vjp whose backward pass JAX cannot transpose: {error}. Write it "
                "linear in the cotangent and of differentiable operations, or take "
                "spectrum.singular_values(fn, x, mode='reverse')."
            ) from error

    return Linearized(value, push_by_transpose, lambda cotangent: pull(cotangent)[0])


def hessian_product(grad: Callable[[Any], Any], primals: Any, tangents: Any) -> Any:
    """Return the product of a gradient's Jacobian, which is symmetric, with ``tangents``."""
    if has_forward_mode(grad, primals):
        return jax.jvp(grad, (primals,), (tangents,))[1]
    return jax.vjp(grad, primals)[1](tangents)[0]


def _primitives(fn: Callable[..., Any], *primals: Any) -> set[str]:
    """Name the operations of a function, those of its loops and branches too."""
    return set(_names(jax.make_jaxpr(fn)(*primals).jaxpr))


def _names(jaxpr: Any) -> Iterator[str]:
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for parameter in equation.params.values():
            # Branches come as a tuple of programs.
            for part in parameter if isinstance(parameter, (tuple, list)) else [parameter]:
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from _names(inner)
