"""Compiled programs around a function of the user, which do not keep the function alive.

A jit with the function among its static arguments keeps the function, and everything that it closes
over, for as long as the process runs. And the arrays that it closes over, such as a batch of
images, become constants of the compiled program, with which the compiler computes for minutes.
"""

from __future__ import annotations

import contextlib
import functools
import sys
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


class Weak:
    """A function that is not kept alive: what a program may hold of the function it is kept for.

    Else the program, which some rules of JAX make hold its functions, would keep its own key.
    """

    def __init__(self, function: Callable[..., Any]):
        self._reference = weakref.ref(function)

    @property
    def function(self) -> Callable[..., Any]:
        """The function, as long as it lives."""
        function = self._reference()
        assert function is not None, "a program outlived its function"
        return function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.function, name)

    def __repr__(self) -> str:
        return repr(self.function)


def of_function(
    body: Callable[..., Any], function: Any, static_argnums: tuple[int, ...] = ()
) -> Callable[..., Any]:
    """Return ``jax.jit`` of ``body(function, ...)``: the same one for as long as both live.

    A number in place of the function has a program too. ``static_argnums`` counts the arguments
    behind ``function``.
    """
    if isinstance(function, Weak):
        function = function.function
    if not callable(function) or _is_of_module(function):
        return _lasting(body, function, static_argnums)
    try:
        return _PROGRAMS[function][body]
    except (KeyError, TypeError):
        pass
    try:
        held: Callable[..., Any] = Weak(function)
    except TypeError:  # an object that no weak reference can point to
        return jax.jit(functools.partial(body, function), static_argnums=static_argnums)
    program = jax.jit(functools.partial(body, held), static_argnums=static_argnums)
    with contextlib.suppress(TypeError):  # an object without a hash
        _PROGRAMS.setdefault(function, {})[body] = program
    return program


@functools.lru_cache(maxsize=4096)
def _lasting(
    body: Callable[..., Any], function: Any, static_argnums: tuple[int, ...]
) -> Callable[..., Any]:
    return jax.jit(functools.partial(body, function), static_argnums=static_argnums)


def _is_of_module(function: Any) -> bool:
    """Whether a function is an attribute of its module, which lives as long as the process."""
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    return getattr(module, getattr(function, "__name__", None) or "", None) is function
