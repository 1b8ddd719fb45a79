"""Kernels in Pallas of the products with a block-sparse matrix, for TPUs and for GPUs.

Two functions serve the three products. :func:`product` gives the forward product and, with
``transposed=True``, the gradient by the inputs; :func:`outer` gives the gradient by the blocks.
The blocks that a step reads are named by arrays of indices, and only those blocks are read:

* For TPUs (Mosaic) the indices are prefetched, so the blocks of the next step are copied while the
  present one is multiplied. A sum stays in the chip's memory until it is complete.
* For GPUs (Triton) each program reads the indices of its tile of outputs and loops over them.

Which one runs is decided where the program is compiled. On other platforms one of them is
interpreted, which is slow and for tests. The kernels have no derivatives: ``product.py`` gives
them. The module is imported when a kernel is first called, because importing Pallas takes time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as pltriton

from eoi_jax._internal import checks
from eoi_jax.typing import Array

__all__ = ["Options", "outer", "product"]

# A tile of floats of Mosaic takes 2**18 of them, 1 MiB in float32. The inputs, the blocks and the
# outputs have two each and the sum one: half of the 16 MiB that a kernel may use by default.
_TPU_TILES, _TPU_ELEMENTS = (512, 384, 256, 128), 2**18
# Triton keeps the sum in registers.
_GPU_TILE, _GPU_ROWS = 64, 64


class Options(NamedTuple):
    """What a kernel is compiled with.

    Attributes:
        precision: One ``jax.lax.Precision``, or ``None``.
        interpreted: ``"mosaic"`` or ``"triton"``: the kernel to interpret where there is neither a
            TPU nor a GPU.
    """

    precision: Any = None
    interpreted: str = "mosaic"


def product(
    x: Array, values: Array, sources: Array, places: Array, transposed: bool, options: Options
) -> Array:
    r"""Multiply by the blocks that are named: :math:`y_r = \sum_s x_{r, s} W_{r, s}`.

    Args:
        x: ``(batch, P * b)``, at least one row.
        values: ``(N, b, c)``, the stored blocks, of the dtype of ``x``; transposed ``(N, c, b)``.
        sources: ``(R, k)`` int32: the block of ``x`` of each product; ``P`` or more for none.
        places: ``(R, k)`` int32: the stored block of each product.
        transposed: Whether to transpose each stored block.
        options: Precision, and the kernel to interpret.

    Returns:
        ``(batch, R * c)``, of the dtype of ``x``.

    Example:
        >>> import jax.numpy as jnp
        >>> from eoi_jax.blocks import kernels
        >>> x, values = jnp.ones((3, 32)), jnp.ones((2, 16, 16))
        >>> sources, places = jnp.array([[0, 1], [1, 2]]), jnp.array([[0, 1], [0, 0]])
        >>> y = kernels.product(x, values, sources, places, False, kernels.Options())
        >>> y[:, ::16].tolist()  # the second block of outputs sees one block of inputs
        [[32.0, 16.0], [32.0, 16.0], [32.0, 16.0]]
    """
    indices = (sources.reshape(-1), places.reshape(-1))
    static = {"shape": sources.shape, "transposed": transposed}
    return _run("product", x, values, *indices, options=options, **static)


def outer(x: Array, dy: Array, rows: Array, blocks: int, options: Options) -> Array:
    r"""Multiply a transposed block of ``x`` by one of ``dy``: :math:`x_{r, s}^\top dy_r`.

    Args:
        x: ``(batch, P * b)``, at least one row.
        dy: ``(batch, R * c)``, of the dtype of ``x``.
        rows: ``(R, k)`` int32: the block of ``x`` of each product; ``P`` or more for none.
        blocks: ``P``, the number of blocks of ``x``.
        options: Precision, and the kernel to interpret.

    Returns:
        ``(R, k, b, c)``, of the dtype of ``x``; zeros where there is no block.

    Example:
        >>> import jax.numpy as jnp
        >>> from eoi_jax.blocks import kernels
        >>> x, dy = jnp.ones((3, 32)), jnp.ones((3, 16))
        >>> dw = kernels.outer(x, dy, jnp.array([[1, 2]]), 2, kernels.Options())
        >>> dw.shape, dw[0, :, 0, 0].tolist()  # the second is none of the two blocks
        ((1, 2, 16, 16), [3.0, 0.0])
    """
    static = {"shape": rows.shape, "present": blocks}
    return _run("outer", x, dy, rows.reshape(-1), options=options, **static)


def _run(name: str, *arrays: Array, options: Options, **static: Any) -> Array:
    """Run the kernel of the platform that the program is compiled for."""
    tpu, gpu = _KERNELS["mosaic"][name], _KERNELS["triton"][name]
    static["precision"] = options.precision
    fallback = functools.partial(_KERNELS[options.interpreted][name], interpret=True, **static)
    tpu = functools.partial(tpu, interpret=False, **static)
    gpu = functools.partial(gpu, interpret=False, **static)
    return lax.platform_dependent(*arrays, tpu=tpu, cuda=gpu, rocm=gpu, default=fallback)


def _dot(a: Array, b: Array, axes: tuple[int, int], precision: Any) -> Array:
    """Contract one axis of both, into float32 or wider."""
    numbers = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(
        a, b, numbers, precision, preferred_element_type=checks.compute_dtype(a.dtype)
    )


def _oriented(values: Array, transposed: bool) -> tuple[int, int, int]:
    """Return the number of stored blocks, and the inputs and outputs of one as it is used."""
    blocks, high, wide = values.shape
    return (blocks, wide, high) if transposed else (blocks, high, wide)


# ------------------------------------------------------------------------------ TPU, by Mosaic


def _tpu_tile(size: int) -> int:
    """Return the side of a tile for that of a block; the same where only an interpreter has it."""
    return next((tile for tile in _TPU_TILES if size % tile == 0), size)


def _tpu_precision(precision: Any) -> Any:
    """Return a precision that Mosaic has, the same or a higher one."""
    return lax.Precision.HIGHEST if precision == lax.Precision.HIGH else precision


def _tpu_rows(batch: int, tile: int) -> int:
    """Return the rows of a tile of the batch: all of it, or even parts of a multiple of 16."""
    most = _TPU_ELEMENTS // tile
    if batch <= most:
        return batch
    return 16 * pl.cdiv(pl.cdiv(batch, pl.cdiv(batch, most)), 16)


def _tpu_product(
    x: Array,
    values: Array,
    sources: Array,
    places: Array,
    *,
    shape: tuple[int, int],
    transposed: bool,
    precision: Any,
    interpret: bool,
) -> Array:
    (batch, width), (outputs, per) = x.shape, shape
    blocks, deep, wide = _oriented(values, transposed)
    precision, present = _tpu_precision(precision), width // deep
    depth, breadth = _tpu_tile(deep), _tpu_tile(wide)
    deeps, wides, rows = deep // depth, wide // breadth, _tpu_rows(batch, max(depth, breadth))

    # The grid: rows of the batch, block of outputs, part of it | product, part of its inputs.
    def x_at(i: Any, r: Any, c: Any, s: Any, a: Any, sources: Any, places: Any) -> Any:
        return i, jnp.minimum(sources[r * per + s], present - 1) * deeps + a

    def values_at(i: Any, r: Any, c: Any, s: Any, a: Any, sources: Any, places: Any) -> Any:
        place = jnp.minimum(places[r * per + s], blocks - 1)
        return (place, c, a) if transposed else (place, a, c)

    def kernel(
        sources_ref: Any, places_ref: Any, x_ref: Any, values_ref: Any, y_ref: Any, sum_ref: Any
    ) -> None:
        r, s, a = pl.program_id(1), pl.program_id(3), pl.program_id(4)

        @pl.when((s == 0) & (a == 0))
        def start() -> None:
            sum_ref[...] = jnp.zeros_like(sum_ref)

        @pl.when(sources_ref[r * per + s] < present)
        def add() -> None:
            axes = (1, 1) if transposed else (1, 0)
            sum_ref[...] += _dot(x_ref[...], values_ref[...], axes, precision)

        @pl.when((s == per - 1) & (a == deeps - 1))
        def finish() -> None:
            y_ref[...] = sum_ref[...].astype(y_ref.dtype)

    # Rows after the last of the batch hold anything. They give rows of the output that are dropped.
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((batch, outputs * wide), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(batch, rows), outputs, wides, per, deeps),
            in_specs=[
                pl.BlockSpec((rows, depth), x_at),
                pl.BlockSpec(
                    (None, breadth, depth) if transposed else (None, depth, breadth), values_at
                ),
            ],
            out_specs=pl.BlockSpec(
                (rows, breadth), lambda i, r, c, s, a, *indices: (i, r * wides + c)
            ),
            scratch_shapes=[pltpu.VMEM((rows, breadth), checks.compute_dtype(x.dtype))],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary", "arbitrary")
        ),
        interpret=interpret,
    )(sources, places, x, values)


def _tpu_outer(
    x: Array,
    dy: Array,
    indices: Array,
    *,
    shape: tuple[int, int],
    present: int,
    precision: Any,
    interpret: bool,
) -> Array:
    batch, (outputs, per) = x.shape[0], shape
    deep, wide = x.shape[1] // present, dy.shape[1] // outputs
    precision, depth, breadth = _tpu_precision(precision), _tpu_tile(deep), _tpu_tile(wide)
    deeps, wides, rows = deep // depth, wide // breadth, _tpu_rows(batch, max(depth, breadth))
    steps = pl.cdiv(batch, rows)

    # The grid: block of outputs, its product, parts of inputs and outputs | rows of the batch.
    def x_at(r: Any, s: Any, a: Any, c: Any, i: Any, indices: Any) -> Any:
        return i, jnp.minimum(indices[r * per + s], present - 1) * deeps + a

    def kernel(indices_ref: Any, x_ref: Any, dy_ref: Any, dw_ref: Any, sum_ref: Any) -> None:
        r, s, i = pl.program_id(0), pl.program_id(1), pl.program_id(4)

        def of_batch(ref: Any) -> Array:
            if batch % rows == 0:
                return ref[...]
            # Rows after the last of the batch hold anything, NaN as well.
            row = i * rows + lax.broadcasted_iota(jnp.int32, ref.shape, 0)
            return jnp.where(row < batch, ref[...], jnp.zeros_like(ref))

        @pl.when(i == 0)
        def start() -> None:
            sum_ref[...] = jnp.zeros_like(sum_ref)

        @pl.when(indices_ref[r * per + s] < present)
        def add() -> None:
            sum_ref[...] += _dot(of_batch(x_ref), of_batch(dy_ref), (0, 0), precision)

        @pl.when(i == steps - 1)
        def finish() -> None:
            dw_ref[...] = sum_ref[...].astype(dw_ref.dtype)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((outputs, per, deep, wide), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(outputs, per, deeps, wides, steps),
            in_specs=[
                pl.BlockSpec((rows, depth), x_at),
                pl.BlockSpec((rows, breadth), lambda r, s, a, c, i, indices: (i, r * wides + c)),
            ],
            out_specs=pl.BlockSpec(
                (None, None, depth, breadth), lambda r, s, a, c, i, indices: (r, s, a, c)
            ),
            scratch_shapes=[pltpu.VMEM((depth, breadth), checks.compute_dtype(x.dtype))],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
    )(indices, x, dy)


# ------------------------------------------------------------------------------ GPU, by Triton


def _gpu_tile(size: int) -> int:
    """Return the side of a tile of a block: the largest power of two that divides the block."""
    return min(size & -size, _GPU_TILE)


def _gpu_rows(batch: int) -> int:
    """Return the rows of a tile of the batch, a power of two."""
    return min(max(pl.next_power_of_2(batch), 16), _GPU_ROWS)


def _loaded(ref: Any, mask: Any, *starts: Any, sides: tuple[int, int]) -> Array:
    """Load a tile that begins at the last two of ``starts``, as zeros where the mask is false."""
    *first, row, column = starts
    at = ref.at[(*first, pl.ds(row, sides[0]), pl.ds(column, sides[1]))]
    return pltriton.load(at, mask=jnp.broadcast_to(mask, sides), other=0)


def _stored(ref: Any, tile: Array, mask: Any, *starts: Any) -> None:
    """Store a tile at the last two of ``starts``, but where the mask is false."""
    *first, row, column = starts
    at = ref.at[(*first, pl.ds(row, tile.shape[0]), pl.ds(column, tile.shape[1]))]
    pltriton.store(at, tile.astype(ref.dtype), mask=jnp.broadcast_to(mask, tile.shape))


def _gpu_product(
    x: Array,
    values: Array,
    sources: Array,
    places: Array,
    *,
    shape: tuple[int, int],
    transposed: bool,
    precision: Any,
    interpret: bool,
) -> Array:
    (batch, width), (outputs, per) = x.shape, shape
    blocks, deep, wide = _oriented(values, transposed)
    depth, breadth, rows = _gpu_tile(deep), _gpu_tile(wide), _gpu_rows(batch)
    present = width // deep

    # One program: rows of the batch, block of outputs, part of it.
    def kernel(x_ref: Any, values_ref: Any, sources_ref: Any, places_ref: Any, y_ref: Any) -> None:
        row, r, column = pl.program_id(0) * rows, pl.program_id(1), pl.program_id(2) * breadth
        inside = (row + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)) < batch

        def add(s: Any, total: Array) -> Array:
            at = r * per + s
            there = sources_ref[at] < present
            source = jnp.minimum(sources_ref[at], present - 1)
            place = jnp.minimum(places_ref[at], blocks - 1)
            for part in range(0, deep, depth):
                corner = (column, part) if transposed else (part, column)
                sides = (breadth, depth) if transposed else (depth, breadth)
                left = _loaded(
                    x_ref, inside & there, row, source * deep + part, sides=(rows, depth)
                )
                right = _loaded(values_ref, there, place, *corner, sides=sides)
                axes = (1, 1) if transposed else (1, 0)
                total += _dot(left, right, axes, precision)
            return total

        zeros = jnp.zeros((rows, breadth), checks.compute_dtype(x.dtype))
        total = lax.fori_loop(0, per, add, zeros)
        _stored(y_ref, total, inside, row, r * wide + column)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((batch, outputs * wide), x.dtype),
        grid=(pl.cdiv(batch, rows), outputs, wide // breadth),
        compiler_params=pltriton.CompilerParams(),
        interpret=interpret,
    )(x, values, sources, places)


def _gpu_outer(
    x: Array,
    dy: Array,
    indices: Array,
    *,
    shape: tuple[int, int],
    present: int,
    precision: Any,
    interpret: bool,
) -> Array:
    batch, (outputs, per) = x.shape[0], shape
    deep, wide = x.shape[1] // present, dy.shape[1] // outputs
    depth, breadth, rows = _gpu_tile(deep), _gpu_tile(wide), _gpu_rows(batch)

    # One program: product, parts of its inputs and outputs.
    def kernel(x_ref: Any, dy_ref: Any, indices_ref: Any, dw_ref: Any) -> None:
        at, part, column = pl.program_id(0), pl.program_id(1) * depth, pl.program_id(2) * breadth
        there = indices_ref[at] < present
        source = jnp.minimum(indices_ref[at], present - 1) * deep + part
        output = lax.div(at, jnp.int32(per)) * wide + column

        def add(step: Any, total: Array) -> Array:
            row = step * rows
            inside = ((row + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)) < batch) & there
            left = _loaded(x_ref, inside, row, source, sides=(rows, depth))
            right = _loaded(dy_ref, inside, row, output, sides=(rows, breadth))
            return total + _dot(left, right, (0, 0), precision)

        zeros = jnp.zeros((depth, breadth), checks.compute_dtype(x.dtype))
        total = lax.fori_loop(0, pl.cdiv(batch, rows), add, zeros)
        _stored(dw_ref, total, True, at, part, column)

    dw = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((outputs * per, deep, wide), x.dtype),
        grid=(outputs * per, deep // depth, wide // breadth),
        compiler_params=pltriton.CompilerParams(),
        interpret=interpret,
    )(x, dy, indices)
    return dw.reshape(outputs, per, deep, wide)


_KERNELS: dict[str, dict[str, Callable[..., Array]]] = {
    "mosaic": {"product": _tpu_product, "outer": _tpu_outer},
    "triton": {"product": _gpu_product, "outer": _gpu_outer},
}
