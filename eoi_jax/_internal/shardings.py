"""Shardings: give a new array that of its parameter, and compute without explicit axes.

A mesh axis is *explicit* if the types of arrays name it, and *auto* if the compiler alone decides
what is distributed along it. Along an explicit axis JAX refuses whatever would need a choice: some
reshapes and matrix products, and every factorization.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eoi_jax._internal import checks
from eoi_jax._internal.keys import words, wrapped
from eoi_jax.typing import Array

_shard_alike: Any = None  # JAX 0.12 has it no longer
with contextlib.suppress(ImportError):
    from jax.experimental.shard_alike import shard_alike as _shard_alike

__all__ = [
    "asked",
    "auto",
    "axes_of_columns",
    "draw_into",
    "drawn",
    "entered",
    "explicit_mesh",
    "like",
    "mesh_of_context",
    "named",
    "on_every_device",
    "replicated",
    "unsharded",
]

_Result = TypeVar("_Result")
# What the arrays are asked for that draw_into has drawn.
_OUT: contextvars.ContextVar[NamedSharding | None] = contextvars.ContextVar("_OUT", default=None)


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
        axes = _explicit_axes(mesh)
        out = jax.tree.map(lambda leaf: NamedSharding(mesh, _spec(leaf)), out_like)
        result: _Result = jax.sharding.auto_axes(function, axes=axes, out_sharding=out)(*args)
        return result

    return call


def mesh_of_context(array: Any) -> Any:
    """Return the mesh in which a program is traced, if nothing divides its arrays by their types.

    ``array`` tells whether one is traced. Inside :func:`jax.shard_map`, and along explicit axes,
    there is none; the functions given to :func:`auto` and :func:`draw_into` have one.
    """
    mesh = jax.sharding.get_abstract_mesh()
    is_auto = all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)
    return (
        mesh if checks.is_traced(array) and not mesh.empty and mesh.size > 1 and is_auto else None
    )


def axes_of_columns(array: Any, *, is_transposed: bool) -> tuple[str, ...]:
    """Choose the axes of the context's mesh that divide the columns of a matrix while it is drawn.

    ``array`` tells whether a program is traced in a mesh, as in :func:`mesh_of_context`.

    A kernel's last two axes are the matrix's, or its columns and rows if ``is_transposed``. Of what
    :func:`draw_into` is asked for, the axes that divide columns come first: a device then exchanges
    with those that get the same columns alone, and with none along axes that divide nothing. Where
    nothing is known, inputs are expected along the first axes and outputs along the last.
    """
    mesh = mesh_of_context(array)
    if mesh is None:
        return ()
    out, names = _OUT.get(), tuple(mesh.axis_names)
    if out is None:
        return names if is_transposed else names[::-1]
    sides = [_names(entry) for entry in out.spec[-2:]]
    rows, columns = reversed(sides) if is_transposed else sides
    return tuple(name for name in (*columns, *rows) if name in names)


def on_every_device(function: Callable[..., Array], mesh: Any) -> Callable[..., Array]:
    """Let each device of a mesh compute the whole result, without a word to the others.

    Under :func:`jax.vmap` the compiler divides the work instead, as the arrays are.
    """

    @jax.custom_batching.custom_vmap
    def call(*arrays: Array) -> Array:
        spec = PartitionSpec()
        on_mesh = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        return on_mesh(*arrays)

    @call.def_vmap
    def rule(axis_size: int, in_batched: list[bool], *arrays: Array) -> tuple[Array, bool]:
        del axis_size
        axes = [0 if is_batched else None for is_batched in in_batched]
        return jax.vmap(function, in_axes=axes)(*arrays), True

    return call


def asked(leaf: Any) -> NamedSharding | None:
    """Return the sharding over several devices that a leaf asks for, as far as it is known.

    A leaf is an array, which asks for the sharding that it has if it is committed to its devices,
    or a shape. Of an array that is traced only the explicit axes are known.
    """
    rank = len(getattr(leaf, "shape", ()))
    if checks.is_traced(leaf):
        sharding = jax.typeof(leaf).sharding
        return of_rank(sharding, rank) if _is_explicit(sharding) else None
    is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
    sharding = leaf.sharding if is_shape or (_is_jax(leaf) and leaf.committed) else None
    is_known = isinstance(sharding, NamedSharding) and sharding.mesh.size > 1
    return of_rank(sharding, rank) if is_known else None


def named(out_sharding: Any, rank: int) -> NamedSharding:
    """Accept a sharding of a mesh, or a spec of the mesh that is entered, for so many axes."""
    remedy = "Give a jax.sharding.NamedSharding, or enter the mesh with jax.set_mesh(mesh)."
    if isinstance(out_sharding, PartitionSpec):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            raise checks.value_error("out_sharding", out_sharding, "names no mesh", remedy)
        out_sharding = NamedSharding(mesh, out_sharding)
    if not isinstance(out_sharding, NamedSharding):
        problem = "is no sharding of a mesh"
        raise checks.value_error("out_sharding", out_sharding, problem, remedy)
    if len(out_sharding.spec) > rank:
        problem = f"has more entries than the {rank} axes of the kernel"
        raise checks.value_error("out_sharding", out_sharding.spec, problem, "Give one an axis.")
    found = of_rank(out_sharding, rank)
    assert found is not None
    return found


def of_rank(sharding: NamedSharding | None, rank: int) -> NamedSharding | None:
    """Return a sharding whose spec has an entry for each axis of an array."""
    if sharding is None or len(sharding.spec) == rank:
        return sharding
    entries = (*sharding.spec, *[None] * (rank - len(sharding.spec)))
    return NamedSharding(sharding.mesh, PartitionSpec(*entries))


def draw_into(
    function: Callable[..., list[Array]], out: Sequence[NamedSharding | None]
) -> Callable[..., list[Array]]:
    """Let a function that is being traced draw arrays into shards.

    Each of its results has one sharding in ``out``, all of one mesh, or None where none is asked
    for. The function is traced in that mesh, and sees no axis of it as explicit.
    """
    mesh = _mesh(out)
    if mesh is None:
        return function
    mesh = getattr(mesh, "abstract_mesh", mesh)
    explicit = _explicit_axes(mesh)

    def constrained(*arrays: Any) -> list[Array]:
        pairs = zip(function(*arrays), out, strict=True)
        return [
            # A mesh without its devices is the one that is entered.
            array
            if to is None
            else jax.lax.with_sharding_constraint(
                array, to if isinstance(to.mesh, Mesh) else to.spec
            )
            for array, to in pairs
        ]

    def typed(*arrays: Any) -> list[Array]:
        specs = [PartitionSpec() if to is None else to.spec for to in out]
        to = [NamedSharding(mesh, _of_axes(spec, explicit)) for spec in specs]
        draw = jax.sharding.auto_axes(function, axes=explicit, out_sharding=to)
        results: list[Array] = draw(*arrays)
        return results

    def call(*arrays: Any) -> list[Array]:
        token = _OUT.set(next(to for to in out if to is not None))
        try:
            with jax.sharding.use_abstract_mesh(mesh):
                return (typed if explicit else constrained)(*arrays)
        finally:
            _OUT.reset(token)

    return call


def drawn(
    function: Callable[[Array], list[Array]], key: Array, out: Sequence[NamedSharding | None]
) -> list[Array]:
    """Call a function of a key of Threefry, each result of which has one sharding in ``out``.

    Where one is asked for, one program draws the arrays into shards.
    """
    if _mesh(out) is None:
        return function(key)
    into = draw_into(lambda words: function(wrapped(words)), out)
    key_words = words(key)
    if checks.is_traced(key_words):
        return into(key_words)
    with entered(out):
        # Of NumPy, since a key may be bound to a device.
        found: list[Array] = jax.jit(into)(np.asarray(key_words))
        return found


@contextlib.contextmanager
def entered(out: Sequence[NamedSharding | None]) -> Iterator[None]:
    """Enter the mesh of some shardings, where no program is being traced."""
    mesh = _mesh(out)
    with contextlib.ExitStack() as stack:
        if isinstance(mesh, Mesh):  # a shape may name a mesh without its devices
            stack.enter_context(jax.set_mesh(mesh))
        yield


def _mesh(out: Sequence[NamedSharding | None]) -> Any:
    return next((sharding.mesh for sharding in out if sharding is not None), None)


def _explicit_axes(mesh: Any) -> tuple[str, ...]:
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in types if kind == jax.sharding.AxisType.Explicit)


def _of_axes(spec: PartitionSpec, axes: tuple[str, ...]) -> PartitionSpec:
    """Return a spec with some of its axes."""
    kept = [tuple(name for name in _names(entry) if name in axes) for entry in spec]
    return PartitionSpec(*(names[0] if len(names) == 1 else names or None for names in kept))


def _names(entry: Any) -> tuple[str, ...]:
    """Return the axes of a mesh that an entry of a spec names."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


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
    if mesh is None or jax.sharding.get_abstract_mesh().empty:
        return array
    if _is_explicit(sharding):
        return jax.sharding.reshard(array, sharding)
    return jax.lax.with_sharding_constraint(array, sharding)


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
