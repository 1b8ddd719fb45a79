"""Shardings: a new array gets that of its parameter, and the array work sees none in its way.

A mesh axis is *explicit* if the types of arrays name it, and *auto* if the compiler alone decides
what is distributed along it. Along an explicit axis JAX refuses whatever would need a choice: some
reshapes and matrix products, and every factorization.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eoi_jax._internal import checks
from eoi_jax.typing import Array

_shard_alike: Any = None  # JAX 0.12 has it no longer
with contextlib.suppress(ImportError):
    from jax.experimental.shard_alike import shard_alike as _shard_alike

__all__ = ["auto", "explicit_mesh", "like", "replicated", "unsharded"]

_Result = TypeVar("_Result")


def like(array: Array, leaf: Any) -> Array:
    """Return an array with the sharding of the leaf that it stands for, of the same shape.

    A leaf of NumPy, an array that is not committed to its devices and a
    :class:`jax.ShapeDtypeStruct` without a sharding ask for none. While a program is traced only
    explicit axes are known: along the others the compiler is told to treat the two arrays alike.
    """
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return _as_shape(array, leaf.sharding)
    if not _is_jax(leaf):
        return array
    if checks.is_traced(array) or checks.is_traced(leaf):
        sharding = jax.typeof(leaf).sharding if checks.is_traced(leaf) else leaf.sharding
        if _is_explicit(sharding):
            array = jax.sharding.reshard(array, sharding)
        # Also along explicit axes, or a leaf of which nothing else is used would be dropped, and
        # its devices with it.
        return _tied(array, leaf)
    return jax.device_put(array, leaf.sharding) if leaf.committed else array


def _tied(array: Array, leaf: Array) -> Array:
    """Tell the compiler to shard an array as it shards the leaf.

    Without JAX's own function a choice that is never made ties the two. It is a wish and no demand:
    where products shape an array, the compiler may prefer to divide it as they are divided.
    """
    if _shard_alike is not None:
        tied: Array = _shard_alike(array, leaf)[0]
        return tied
    return jnp.where(False, leaf.astype(array.dtype), array)


def unsharded(array: Any) -> Any:
    """Return an array that no explicit axis divides, and anything else as it is."""
    if all(axes is None for axes in _spec(array)):
        return array
    mesh = jax.typeof(array).sharding.mesh
    return jax.sharding.reshard(array, NamedSharding(mesh, PartitionSpec()))


def auto(function: Callable[..., _Result], out_like: Any) -> Callable[..., _Result]:
    """Let a function compute as if no axis of its arguments were explicit.

    The compiler then decides what is distributed, so reshapes, scatters and loops need no type of
    a sharding, and nothing is gathered for them. ``out_like`` is a tree of the structure of the
    results, of arrays whose shardings they take. Arrays have to be arguments, not closed over.
    """

    def call(*args: Any) -> _Result:
        mesh = _explicit_mesh(args)
        if mesh is None:
            return function(*args)
        types = zip(mesh.axis_names, mesh.axis_types, strict=True)
        axes = tuple(name for name, kind in types if kind == jax.sharding.AxisType.Explicit)
        out = jax.tree.map(lambda leaf: NamedSharding(mesh, _spec(leaf)), out_like)
        result: _Result = jax.sharding.auto_axes(function, axes=axes, out_sharding=out)(*args)
        return result

    return call


def replicated(array: Array, tree: Any) -> Array:
    """Return an array of no mesh as one of the explicit mesh of a tree, undivided.

    JAX does not differentiate every function of arrays of a mesh and of none together.
    """
    mesh = _explicit_mesh(tree)
    if mesh is None or _explicit_mesh(array) is not None:
        return array
    return jax.sharding.reshard(array, NamedSharding(mesh, PartitionSpec()))


@contextlib.contextmanager
def explicit_mesh(tree: Any) -> Iterator[None]:
    """Enter the mesh of a tree's arrays if it has explicit axes and no mesh is entered.

    Outside of it JAX differentiates functions of such arrays only while it compiles them.
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree) if _explicit_mesh(leaf) is not None]
    with contextlib.ExitStack() as stack:
        is_known = leaves and not checks.is_traced(leaves[0])
        if is_known and jax.sharding.get_abstract_mesh().empty:
            # While a program is traced no mesh can be entered; it has one, or JAX asks for it.
            with contextlib.suppress(ValueError):
                stack.enter_context(jax.set_mesh(leaves[0].sharding.mesh))
        yield


def _as_shape(array: Array, sharding: Any) -> Array:
    """Return an array with the sharding of a shape, where that can be had."""
    if sharding is None:
        return array
    mesh = getattr(sharding, "mesh", None)
    # The shapes that jax.eval_shape returns name a mesh without its devices.
    if not checks.is_traced(array) and (mesh is None or isinstance(mesh, Mesh)):
        return jax.device_put(array, sharding)
    is_known = _is_explicit(sharding) and not jax.sharding.get_abstract_mesh().empty
    return jax.sharding.reshard(array, sharding) if is_known else array


def _spec(leaf: Any) -> PartitionSpec:
    """Return which explicit axes divide an array; of anything else none does."""
    return jax.typeof(leaf).sharding.spec if _is_jax(leaf) else PartitionSpec()


def _explicit_mesh(tree: Any) -> Any:
    """Return the mesh with explicit axes in the types of a tree's arrays, or None."""
    shardings = (jax.typeof(leaf).sharding for leaf in jax.tree.leaves(tree) if _is_jax(leaf))
    return next((sharding.mesh for sharding in shardings if _is_explicit(sharding)), None)


def _is_jax(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array)


def _is_explicit(sharding: Any) -> bool:
    """Whether a sharding is of a mesh with an explicit axis."""
    types = getattr(getattr(sharding, "mesh", None), "axis_types", ())
    return jax.sharding.AxisType.Explicit in types
