"""Programs around a function of the user that keep nothing alive which the function does not.

A jit with the function among its static arguments holds it, and all that it closes over, for as
long as the process runs. And the arrays that it closes over, a batch of images perhaps, become
constants of the compiled program, with which the compiler computes for minutes.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

__all__ = ["Traced", "of_function"]

# From a function of the user to the programs around it, by what they do with it.
_PROGRAMS: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


class Traced(NamedTuple):
    """A function of which the arrays that it closes over are arguments.

    Attributes:
        jaxpr: What it computes.
        constants: The arrays that it closes over.
        shapes: The structure, shapes and dtypes of its result.
    """

    jaxpr: Any
    constants: list[Any]
    shapes: Any

    @classmethod
    def of(cls, function: Callable[..., Any], *args: Any) -> Traced:
        """Trace a function of arguments of the types of ``args``."""
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        return cls(closed.jaxpr, closed.consts, shapes)

    def __call__(self, constants: list[Any], *args: Any) -> Any:
        """Compute the function, with other arrays in place of those that it closes over."""
        flat = jaxpr_as_fun(ClosedJaxpr(self.jaxpr, constants))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(self.shapes), flat)


def of_function(
    body: Callable[..., Any], function: Any, static_argnums: tuple[int, ...] = ()
) -> Callable[..., Any]:
    """Return ``jax.jit`` of ``body(function, ...)``: the same one for as long as both live.

    ``static_argnums`` counts the arguments behind ``function``.
    """
    try:
        return _PROGRAMS[function][body]
    except (KeyError, TypeError):
        pass
    try:
        reference: Callable[[], Any] = weakref.ref(function)
    except TypeError:  # an object that no weak reference can point to
        return jax.jit(lambda *args: body(function, *args), static_argnums=static_argnums)
    program = jax.jit(lambda *args: body(reference(), *args), static_argnums=static_argnums)
    with contextlib.suppress(TypeError):  # an object without a hash
        _PROGRAMS.setdefault(function, {})[body] = program
    return program
