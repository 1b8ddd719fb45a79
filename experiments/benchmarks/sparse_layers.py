"""Sparse layers against dense ones: where they save time and memory, and where they do not.

Layers have ``n`` inputs and ``n`` outputs. They are dense; dense under a mask; BCOO of
``jax.experimental.sparse`` and the condensed form, which store any pattern; and blocks. The
programs are a forward pass; forward and backward, with gradients by inputs and by weights; and a
whole AdamW step of three such layers with ReLUs between them. A ratio is the time of the dense
layer over that of the sparse layer. All layers are timed in one process, in turns of two runs, of
which only the second counts.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import sparse
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.console import Console
from rich.table import Table

import eoi_jax as eoi
from eoi_jax._internal import checks
from eoi_jax._internal.files import atomic_savefig, atomic_write_text
from eoi_jax.typing import Array
from experiments.benchmarks.timing import machine, medians, tabulate

__all__ = ["Cell", "SparseLayers", "bench_sparse_layers", "break_even", "plot"]

# Okabe and Ito's colors, as in reports.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D")
_SQUARE = 2048  # of the product that measures the machine
# Entries of an array that is read and written, and how many times: 128 MiB, and 1 MiB.
_COPIES = {"memory": (2**25, 8), "cache": (2**18, 1024)}
_UNITS = ("GFLOP", "MiB", "FLOP/B")
_DEPTH = 3  # layers of the network that trains
_FORWARD, _BACKWARD, _STEP = PROGRAMS = ("forward", "forward + backward", "AdamW step")
_INPUT, _WEIGHT = "input gradient", "weight gradient"


@dataclasses.dataclass(frozen=True)
class SparseLayers:
    """Sparse layers against dense ones: forward, forward and backward, a whole AdamW step."""

    batches: tuple[int, ...] = (256,)
    """Examples in a batch."""
    sizes: tuple[int, ...] = (2048, 4096)
    """Inputs, and outputs, of a layer."""
    blocks: tuple[int, ...] = (128, 256)
    """Rows, and columns, of a block. Combinations that do not exist are left out."""
    densities: tuple[float, ...] = (1 / 16, 1 / 8)
    """Fractions of the weights that are not zero."""
    quick: bool = False
    """One small size, as a test: a minute."""
    full: bool = False
    """Batches 32 to 2048, n = 1024 to 8192, blocks 32 to 256, densities 1/32 to 1/4: hours."""
    repeats: int = 9
    """Runs of each function; the median is reported."""
    seconds: float = 6.0
    """A function that has taken this long in all is not run again, except once for the result."""
    memory: float = 6.0
    """Programs that need more GiB than this are not run."""
    output: str = "benchmark_sparse_layers.png"
    """Where the picture is saved; the table is saved beside it, as CSV."""

    def check(self) -> None:
        """Refuse what cannot be measured."""
        for name in ("batches", "sizes", "blocks", "densities"):
            if not getattr(self, name):
                raise checks.value_error(name, (), "is empty", "Give one number or more.")
        for name in ("batches", "sizes", "blocks"):
            for value in getattr(self, name):
                checks.integer(value, low=1, name=name)
        for density in self.densities:
            checks.density(density, name="densities")
        for name in ("seconds", "memory"):
            checks.number(getattr(self, name), name, interval="(0, inf)")
        if self.quick and self.full:
            raise checks.value_error("quick", True, "contradicts full", "Give one of the two.")
        for n, density in itertools.product(self.grid().sizes, self.grid().densities):
            if not _divides(n, density):
                problem = f"is outside the divisors of n={n}, divided by it"
                remedy = "Give densities 1 / m for a divisor m of all sizes."
                raise checks.value_error("densities", density, problem, remedy)

    def grid(self) -> SparseLayers:
        """Return the options with the sizes that ``quick`` and ``full`` stand for."""
        if self.quick:
            return dataclasses.replace(self, batches=(64,), sizes=(512,), blocks=(32, 64))
        if self.full:
            return dataclasses.replace(
                self,
                batches=(32, 256, 2048),
                sizes=(1024, 2048, 4096, 8192),
                blocks=(32, 64, 128, 256),
                densities=(1 / 32, 1 / 16, 1 / 8, 1 / 4),
            )
        return self


def _divides(n: int, density: float) -> bool:
    """Whether every output can have one weight in each 1 / density inputs."""
    period = round(1 / density)
    return math.isclose(period * density, 1) and n % period == 0


class Case(NamedTuple):
    """The settings shared by all layers of a comparison."""

    batch: int
    n: int
    density: float
    program: str


class Cell(NamedTuple):
    """The measurements and sizes of one layer in one program: a row of the CSV file.

    Attributes:
        batch: Examples.
        n: Inputs, and outputs.
        density: Fraction of the weights that the sparse layers of a group store.
        layer: ``"dense"``, ``"masked"``, ``"BCOO"``, ``"condensed"`` or ``"block b"``.
        program: One of :data:`PROGRAMS`.
        ms: Median milliseconds; NaN where it was not run.
        ratio: The dense layer's time over this one's.
        limit: The dense layer's multiplications over this one's: 1 / density where zeros are
            skipped.
        bound: What the ratio would be if each product, and the optimizer's update, took the larger
            of its FLOPs over the machine's rate and its bytes over its bandwidth to memory.
        bound_in_cache: The same by the bandwidth to a cache that holds all arrays.
        parameter_bytes: Weights, and whatever says where they are.
        optimizer_bytes: The optimizer's state; 0 where there is none.
        peak_bytes: Arguments, results and temporary arrays, by XLA's memory analysis.
        flops: Multiplications and additions of all products, and of the update.
        bytes: What these move, if every array passes through memory once in each use.
        xla_flops: The same by XLA's cost analysis, which counts the body of a loop once.
        xla_bytes: The same of bytes.
    """

    batch: int
    n: int
    density: float
    layer: str
    program: str
    ms: float
    ratio: float
    limit: float
    bound: float
    bound_in_cache: float
    parameter_bytes: int
    optimizer_bytes: int
    peak_bytes: int
    flops: float
    bytes: float
    xla_flops: float
    xla_bytes: float


class Work(NamedTuple):
    """The cost of a product: FLOPs, and bytes that pass through memory."""

    flops: float
    bytes: float

    def seconds(self, rates: Work) -> float:
        """Return the least time at a machine's FLOPs and bytes a second: the roofline."""
        return max(self.flops / rates.flops, self.bytes / rates.bytes)


class Layer(NamedTuple):
    """A layer: weights of one floating array, the pattern of them, and the product."""

    weights: Array
    pattern: Any
    multiply: Callable[[Array, Array, Any], Array]
    work: Callable[[int], Mapping[str, Work]]


class Product(NamedTuple):
    """One of the three products of a layer of blocks, and the dense layer's.

    Attributes:
        layer: ``"block b"``.
        name: Forward, or which gradient.
        batch: Examples.
        n: Inputs, and outputs.
        dense: What the dense layer's product costs.
        block: What this one costs.
        ratio: The dense product's time over this one's, without gathers and sums.
    """

    layer: str
    name: str
    batch: int
    n: int
    dense: Work
    block: Work
    ratio: float


def bench_sparse_layers(options: SparseLayers, console: Console) -> None:
    """Print the tables of ``sparse_layers``, and save its picture and its CSV file."""
    grid = options.grid()
    rates = _rates(grid.repeats)
    slow, fast = rates
    console.print(
        f"Median of {grid.repeats} runs, each after one that does not count, fewer where they take "
        f"more than {grid.seconds:g} s in all; float32. {machine()}\n"
        f"Matmul of {_SQUARE}: {slow.flops / 1e9:.0f} GFLOP/s. Read and "
        f"write: {slow.bytes / 1e9:.1f} GB/s in memory, {fast.bytes / 1e9:.1f} GB/s in cache. "
        "Bounds (rooflines) are for all arrays in memory and for all in cache. FLOPs and bytes are "
        "counted from shapes; XLA counts the body of a loop, which condensed has, once. "
        f"A dash: more than {grid.memory:g} GiB would be needed."
    )
    cells: list[Cell] = []
    products: list[Product] = []
    for n, density in itertools.product(grid.sizes, grid.densities):
        networks = _networks(n, density, grid.blocks)
        for batch, program in itertools.product(grid.batches, PROGRAMS):
            case = Case(batch, n, density, program)
            with console.status(f"{program}: batch {batch}, n = {n}, density {density:g}"):
                cells += _measure(grid, case, networks, rates)
        for batch in grid.batches:
            products += _measure_products(networks, batch, grid.repeats)
    for batch, program in itertools.product(grid.batches, PROGRAMS):
        of_program = [cell for cell in cells if (cell.batch, cell.program) == (batch, program)]
        console.print(_table_of_times(of_program, _title(program, batch)))
        console.print(_table_of_costs(of_program, _title(program, batch)))
    console.print(_table_of_products(products, rates))
    console.print(_table_of_break_even(cells))
    path = Path(options.output)
    _save(path.with_suffix(".csv"), cells)
    atomic_savefig(path, plot(cells), dpi=120)
    console.print(f"Saved: {path}, {path.with_suffix('.csv')}")


def _rates(repeats: int) -> tuple[Work, Work]:
    """Measure FLOPs and bytes a second: of a large product, and of arrays in memory and in cache.

    The bytes are those of adding one to an array again and again, which is read and written.
    """
    square = jnp.ones((_SQUARE, _SQUARE))
    functions: dict[str, Callable[[], Any]] = {
        "matmul": functools.partial(jax.jit(jnp.matmul), square, square)
    }
    for name, (size, times) in _COPIES.items():

        def count(x: Array, times: int = times) -> Array:
            return jax.lax.fori_loop(0, times, lambda _, x: x + 1, x)

        functions[name] = functools.partial(jax.jit(count), jnp.ones(size))
    seconds = medians(functions, repeats)
    flops = 2 * _SQUARE**3 / seconds["matmul"]
    in_memory, in_cache = (
        Work(flops, 2 * 4 * size * times / seconds[name]) for name, (size, times) in _COPIES.items()
    )
    return in_memory, in_cache


Network: TypeAlias = tuple[Layer, ...]


def _networks(n: int, density: float, blocks: Iterable[int]) -> dict[str, Network]:
    """Draw the layers of a network of each kind, by name; blocks as far as they exist."""
    makers: dict[str, Callable[[Array], Layer]] = {
        "dense": functools.partial(_dense, n=n),
        "masked": functools.partial(_masked, n=n, density=density),
        "BCOO": functools.partial(_bcoo, n=n, density=density),
        "condensed": functools.partial(_condensed, n=n, density=density),
    }
    for size in blocks:
        # A whole number of blocks in each row, which divides the number of rows.
        if n % size == 0 and density * n >= size and _divides(n // size, density):
            makers[f"block {size}"] = functools.partial(_block, n=n, density=density, size=size)
    keys = jax.random.split(jax.random.key(0), _DEPTH)
    return {name: tuple(make(key) for key in keys) for name, make in makers.items()}


def _dense(key: Array, n: int) -> Layer:
    weights = jax.random.normal(key, (n, n)) / math.sqrt(n)
    return Layer(weights, None, lambda x, w, _: x @ w, _work_of("dense", n, n * n, 0))


def _masked(key: Array, n: int, density: float) -> Layer:
    values, rows = _entries(key, n, density)
    weights = jnp.zeros((n, n)).at[rows, jnp.arange(n)[:, None]].set(values)
    return Layer(
        weights, weights != 0, lambda x, w, m: x @ (w * m), _work_of("masked", n, n * n, 0)
    )


def _bcoo(key: Array, n: int, density: float) -> Layer:
    values, rows = map(np.asarray, _entries(key, n, density))
    columns = np.repeat(np.arange(n), rows.shape[1])
    order = np.lexsort((columns, rows.ravel()))
    indices = jnp.asarray(np.stack([rows.ravel(), columns], 1)[order], jnp.int32)

    def multiply(x: Array, data: Array, indices: Array) -> Array:
        flags = {"indices_sorted": True, "unique_indices": True}
        return x @ sparse.BCOO((data, indices), shape=(n, n), **flags)

    data = jnp.asarray(values.ravel()[order])
    return Layer(data, indices, multiply, _work_of("BCOO", n, data.size, data.size))


def _condensed(key: Array, n: int, density: float) -> Layer:
    values, rows = _entries(key, n, density)
    return Layer(
        values,
        rows,
        lambda x, values, rows: x @ eoi.condensed.Condensed(values, rows, n),
        _work_of("condensed", n, values.size, values.size),
    )


def _block(key: Array, n: int, density: float, size: int) -> Layer:
    drawn = eoi.blocks.orthogonal(key, (n, n), density, block_size=size)
    return Layer(
        drawn.values,
        (drawn.rows, drawn.slots),
        lambda x, values, pattern: x @ eoi.blocks.BlockSparse(values, *pattern),
        # Each block of outputs gathers the inputs that it sees.
        _work_of("block", n, drawn.values.size, drawn.values.size // drawn.values.shape[-1]),
    )


def _entries(key: Array, n: int, density: float) -> tuple[Array, Array]:
    """Draw values and inputs ``(n, k)`` of each output: one in each ``1 / density`` inputs."""
    for_values, for_rows = jax.random.split(key)
    period = round(1 / density)
    shape = (n, n // period)
    rows = jax.random.randint(for_rows, shape, 0, period) + period * jnp.arange(shape[1])
    return jax.random.normal(for_values, shape) / math.sqrt(shape[1]), rows.astype(jnp.int32)


# How often arrays pass through memory in a product: activations (batch x n), weights (those that
# are stored), and gathered inputs (for blocks, what each block of outputs sees; else one for each
# weight and example). A mask is a quarter of a weight, and so is read in a quarter of a pass.
_PASSES: dict[str, dict[str, tuple[float, float, float]]] = {
    "dense": {_FORWARD: (2, 1, 0), _INPUT: (2, 1, 0), _WEIGHT: (2, 1, 0)},
    # Weights times mask, and the gradient times mask: read, read the mask, write.
    "masked": {_FORWARD: (2, 3.25, 0), _INPUT: (2, 1, 0), _WEIGHT: (2, 3.25, 0)},
    # Gather, write; scale, add to the sums, which are read and written.
    "BCOO": {_FORWARD: (1, 3, 5), _INPUT: (1, 3, 5), _WEIGHT: (0, 3, 6)},
    # Gather, add to the sums, which are read and written; features first, and back.
    "condensed": {_FORWARD: (4, 2, 3), _INPUT: (4, 2, 3), _WEIGHT: (0, 2, 2)},
    # Blocks first; gather and write, multiply; back again. Gradients of the inputs are written for
    # each block of outputs and summed; those of the weights use what was gathered before.
    "block": {_FORWARD: (5, 1, 3), _INPUT: (6, 1, 2), _WEIGHT: (1, 1, 1)},
}
# What AdamW reads and writes: weights, gradients, two moments; weights and moments.
_UPDATE = Work(flops=15, bytes=7 * 4)


def _work_of(kind: str, n: int, stored: int, gathered: int) -> Callable[[int], Mapping[str, Work]]:
    """Return the work of a layer's three products, for a batch.

    Args:
        kind: Of :data:`_PASSES`.
        n: Inputs, and outputs.
        stored: Number of weights that are multiplied.
        gathered: Number of inputs that are gathered for one example.
    """

    def work(batch: int) -> Mapping[str, Work]:
        return {
            product: Work(
                2 * batch * stored,
                4 * (passes[0] * batch * n + passes[1] * stored + passes[2] * batch * gathered),
            )
            for product, passes in _PASSES[kind].items()
        }

    return work


def _works(network: Network, case: Case) -> list[Work]:
    """List the work of all products of a program, and of the optimizer's updates."""
    layer = network[0]
    work = layer.work(case.batch)
    if case.program == _FORWARD:
        return [work[_FORWARD]]
    if case.program == _BACKWARD:
        return list(work.values())
    update = Work(_UPDATE.flops * layer.weights.size, _UPDATE.bytes * layer.weights.size)
    # The first layer's inputs need no gradient.
    return [*[work[_FORWARD], work[_WEIGHT], update] * _DEPTH, *[work[_INPUT]] * (_DEPTH - 1)]


def _measure(
    grid: SparseLayers, case: Case, networks: Mapping[str, Network], rates: tuple[Work, Work]
) -> list[Cell]:
    """Compile a program for every kind of layer, and run those in turns that memory allows."""
    calls, cells = {}, {}
    dense_works = _works(networks["dense"], case)
    for name, network in networks.items():
        function, arguments, donated = _program(network, case)
        compiled = jax.jit(function, donate_argnums=donated).lower(*arguments).compile()
        peak, costs = _peak(compiled), compiled.cost_analysis() or {}
        works = _works(network, case)
        used = network if case.program == _STEP else network[:1]
        cells[name] = Cell(
            **case._asdict(),
            layer=name,
            ms=math.nan,
            ratio=math.nan,
            limit=dense_works[0].flops / works[0].flops,
            bound=_bound(dense_works, works, rates[0]),
            bound_in_cache=_bound(dense_works, works, rates[1]),
            parameter_bytes=_nbytes([(layer.weights, layer.pattern) for layer in used]),
            optimizer_bytes=_nbytes(arguments[1]) if case.program == _STEP else 0,
            peak_bytes=peak,
            flops=sum(work.flops for work in works),
            bytes=sum(work.bytes for work in works),
            xla_flops=costs.get("flops", math.nan),
            xla_bytes=costs.get("bytes accessed", math.nan),
        )
        if peak <= grid.memory * 2**30:
            calls[name] = _repeatable(compiled, arguments, len(donated))
    seconds = medians(calls, grid.repeats, most_seconds=grid.seconds, twice=True)
    dense = seconds.get("dense", math.nan)
    return [
        cell._replace(ms=1e3 * seconds[name], ratio=dense / seconds[name])
        if name in seconds
        else cell
        for name, cell in cells.items()
    ]


def _measure_products(networks: Mapping[str, Network], batch: int, repeats: int) -> list[Product]:
    """Time the products of the layers of blocks, and the dense ones, by themselves."""
    layers = {
        name: network[0]
        for name, network in networks.items()
        if name == "dense" or name.startswith("block")
    }
    calls = {
        f"{name}, {product}": call
        for name, layer in layers.items()
        for product, call in _products_alone(layer.weights, batch).items()
    }
    seconds = medians(calls, repeats)
    dense = layers.pop("dense")
    return [
        Product(
            layer=name,
            name=product,
            batch=batch,
            n=dense.weights.shape[0],
            dense=dense.work(batch)[product],
            block=work,
            ratio=seconds[f"dense, {product}"] / seconds[f"{name}, {product}"],
        )
        for name, layer in layers.items()
        for product, work in layer.work(batch).items()
    ]


def _products_alone(weights: Array, batch: int) -> dict[str, Callable[[], Array]]:
    """Return the batched matrix products of a layer, of inputs that are gathered already."""
    count = weights.shape[0] if weights.ndim == 4 else 1
    w = weights.reshape(count, -1, weights.shape[-1])
    x, dy = (jnp.ones((count, batch, side)) for side in w.shape[1:])
    multiply = jax.jit(jnp.einsum, static_argnums=0)
    return {
        _FORWARD: functools.partial(multiply, "rbi,rio->rbo", x, w),
        _INPUT: functools.partial(multiply, "rbo,rio->rbi", dy, w),
        _WEIGHT: functools.partial(multiply, "rbi,rbo->rio", x, dy),
    }


def _bound(dense: Iterable[Work], works: Iterable[Work], rates: Work) -> float:
    """Return the ratio of times that a machine's rates allow at best."""
    return sum(work.seconds(rates) for work in dense) / sum(work.seconds(rates) for work in works)


def _nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _peak(compiled: Any) -> int:
    """Return the bytes of arguments, results and temporary arrays, overwritten ones once."""
    memory = compiled.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return int(kept + memory.temp_size_in_bytes)


def _repeatable(compiled: Any, arguments: Sequence[Any], state: int) -> Callable[[], Any]:
    """Return a call without arguments; the first ``state`` results are its next arguments."""
    given = list(arguments)

    def call() -> Any:
        results = compiled(*given)
        given[:state] = results[:state]
        return results

    return call


def _program(
    network: Network, case: Case
) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]:
    """Return a program, its arguments, and which of these are a state that it overwrites."""
    x, dy = jax.random.normal(jax.random.key(1), (2, case.batch, case.n))
    multiply, (weights, pattern) = network[0].multiply, network[0][:2]
    if case.program == _FORWARD:
        return multiply, (x, weights, pattern), ()
    if case.program == _BACKWARD:

        def backward(x: Array, weights: Array, pattern: Any, dy: Array) -> tuple[Array, ...]:
            y, pull = jax.vjp(lambda x, w: multiply(x, w, pattern), x, weights)
            return y, *pull(dy)

        return backward, (x, weights, pattern, dy), ()

    tx = optax.adamw(1e-3)

    def loss_fn(weights: Any, patterns: Any, x: Array, target: Array) -> Array:
        first, *others = zip(weights, patterns, strict=True)
        y = multiply(x, *first)
        for layer in others:
            y = multiply(jax.nn.relu(y), *layer)
        return ((y - target) ** 2).mean()

    def step(weights: Any, state: Any, patterns: Any, x: Array, target: Array) -> tuple[Any, ...]:
        grads = jax.grad(loss_fn)(weights, patterns, x, target)
        updates, state = tx.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    trained = [jnp.array(layer.weights, copy=True) for layer in network]
    patterns = [layer.pattern for layer in network]
    return step, (trained, tx.init(trained), patterns, x, dy), (0, 1)


def _fraction(density: float) -> str:
    return str(Fraction(density).limit_denominator(10_000))


def _number(value: float, digits: int = 1) -> str:
    return "–" if math.isnan(value) else f"{value:,.{digits if value < 100 else 0}f}"


def _title(program: str, batch: int) -> str:
    name = f"AdamW step of {_DEPTH} layers" if program == _STEP else program.capitalize()
    return f"{name}, batch {batch}"


def _of(cell: Cell) -> list[str]:
    return [cell.layer, str(cell.n), _fraction(cell.density)]


def _table_of_times(cells: Iterable[Cell], title: str) -> Table:
    """Build the table of the time and memory of a program."""
    rows = []
    for cell in cells:
        memory = (cell.parameter_bytes, cell.optimizer_bytes, cell.peak_bytes)
        rows.append(
            [
                *_of(cell),
                _number(cell.ms),
                _number(cell.ratio, 2),
                f"{cell.bound:.1f}–{cell.bound_in_cache:.1f}",
                _number(cell.limit),
                *(_number(value / 2**20) for value in memory),
            ]
        )
    heads = ("layer", "n", "density", "ms", "ratio", "bounds", "limit")
    sizes = ("weights MiB", "state MiB", "peak MiB")
    return tabulate(title, (*heads, *sizes), rows, names=1)


def _table_of_costs(cells: Iterable[Cell], title: str) -> Table:
    """Build the table of FLOPs and bytes of a program, counted from shapes and by XLA."""
    rows = [
        [
            *_of(cell),
            *(_number(value / 1e9, 2) for value in (cell.flops, cell.xla_flops)),
            *(_number(value / 2**20, 1) for value in (cell.bytes, cell.xla_bytes)),
            _number(cell.flops / cell.bytes),
            _number(cell.flops / cell.ms / 1e6),
        ]
        for cell in cells
    ]
    costs = ("GFLOP", "GFLOP by XLA", "MiB moved", "MiB by XLA", "FLOP/B", "GFLOP/s")
    return tabulate(f"{title}: FLOPs and bytes", ("layer", "n", "density", *costs), rows, names=1)


def _table_of_products(products: Iterable[Product], rates: tuple[Work, Work]) -> Table:
    """Build the table that says, product by product, why blocks fall short of their limit."""
    rows = []
    for product in products:
        costs = [
            (work.flops / 1e9, work.bytes / 2**20, work.flops / work.bytes)
            for work in (product.dense, product.block)
        ]
        bounds = [_bound([product.dense], [product.block], rate) for rate in rates]
        rows.append(
            [
                product.layer.removeprefix("block "),
                product.name,
                str(product.batch),
                str(product.n),
                *(_number(value) for cost in costs for value in cost),
                f"{bounds[0]:.1f}–{bounds[1]:.1f}",
                _number(product.ratio),
                _number(product.dense.flops / product.block.flops),
            ]
        )
    balance = " and ".join(f"{rate.flops / rate.bytes:.0f}" for rate in rates)
    title = (
        "Why blocks fall short of their limit: FLOPs and bytes of each product\n"
        f"Below {balance} FLOP/B this machine waits for memory, and for its cache. Alone: the "
        "measured\nratio without gathers and sums; small products reach fewer GFLOP/s than a large "
        "one."
    )
    costs_of = [f"{kind}\n{unit}" for kind in ("dense", "block") for unit in _UNITS]
    heads = ("block", "product", "batch", "n", *costs_of, "bounds", "alone", "limit")
    return tabulate(title, heads, rows, names=2)


def break_even(cells: Iterable[Cell]) -> dict[tuple[str, int], tuple[Cell, Cell] | None]:
    """Find where blocks begin to win: at the smallest n, and at the largest density.

    Args:
        cells: Of any layers.

    Returns:
        For each program and batch the cell of the smallest ``n`` in which blocks are faster than
        dense, and that of the largest density; where several have it, the one of the largest
        ratio. None where no cell wins.
    """
    found: dict[tuple[str, int], tuple[Cell, Cell] | None] = {}
    of_blocks = [cell for cell in cells if cell.layer.startswith("block")]
    for program, batch in dict.fromkeys((cell.program, cell.batch) for cell in of_blocks):
        wins = [
            cell
            for cell in of_blocks
            if (cell.program, cell.batch) == (program, batch) and cell.ratio > 1
        ]
        found[program, batch] = None
        if wins:
            found[program, batch] = (
                min(wins, key=lambda cell: (cell.n, -cell.ratio)),
                max(wins, key=lambda cell: (cell.density, cell.ratio)),
            )
    return found


def _table_of_break_even(cells: Iterable[Cell]) -> Table:
    rows = []
    for (program, batch), pair in break_even(cells).items():
        row = [program, str(batch)]
        for cell in pair or ():
            place = f"{cell.layer}, n = {cell.n}, density {_fraction(cell.density)}"
            row.append(f"{place}: {cell.ratio:.2f}")
        rows.append([*row, "–", "–"][:4])
    title = "Where blocks begin to win, among the cells above: layer, place and ratio"
    return tabulate(title, ("program", "batch", "smallest n", "largest density"), rows, names=1)


def _save(path: Path, cells: Iterable[Cell]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Cell._fields)
    for cell in cells:
        writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in cell])
    atomic_write_text(path, text.getvalue())


def plot(cells: Sequence[Cell]) -> Figure:
    """Plot ratios against density, a panel for each program and batch.

    Args:
        cells: Those of the dense layers are not drawn, but for the line at 1.
    """
    batches = sorted({cell.batch for cell in cells})
    sizes = sorted({cell.n for cell in cells})
    densities = sorted({cell.density for cell in cells})
    layers = [name for name in dict.fromkeys(cell.layer for cell in cells) if name != "dense"]
    colors = {name: _COLORS[index % len(_COLORS)] for index, name in enumerate(layers)}
    markers = {n: _MARKERS[index % len(_MARKERS)] for index, n in enumerate(sizes)}
    figure = Figure(figsize=(12, 0.8 + 3.6 * len(batches)), layout="constrained")
    panels = figure.subplots(len(batches), len(PROGRAMS), sharex=True, sharey=True, squeeze=False)
    for (row, batch), (column, program) in itertools.product(
        enumerate(batches), enumerate(PROGRAMS)
    ):
        axes = panels[row, column]
        axes.plot(densities, [1 / d for d in densities], color="black", linestyle="--")
        axes.axhline(1, color="gray", linewidth=1)
        for layer, n in itertools.product(layers, sizes):
            points = [
                (cell.density, cell.ratio)
                for cell in sorted(cells, key=lambda cell: cell.density)
                if (cell.batch, cell.program, cell.layer, cell.n) == (batch, program, layer, n)
            ]
            if points:
                label = f"{layer}, n = {n}"
                axes.plot(
                    *zip(*points, strict=True), label=label, color=colors[layer], marker=markers[n]
                )
        axes.set(xscale="log", yscale="log", title=f"{program}, batch {batch}")
        axes.set_xticks(densities, [_fraction(density) for density in densities])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel("density (fraction of weights stored)")
    for axes in panels[:, 0]:
        axes.set_ylabel("times as fast as dense")
        low, high = axes.get_ylim()
        powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
        axes.set_yticks(
            [2.0**power for power in powers], [_fraction(2.0**power) for power in powers]
        )
    handles = [
        Line2D([], [], color="black", linestyle="--", label="limit, 1 / density"),
        Line2D([], [], color="gray", linewidth=1, label="dense"),
        *(Line2D([], [], color=color, label=name) for name, color in colors.items()),
        *(
            Line2D([], [], color="gray", linestyle="", marker=marker, label=f"n = {n}")
            for n, marker in markers.items()
        ),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(8, len(handles)))
    figure.suptitle(machine(), fontsize=9)
    return figure
