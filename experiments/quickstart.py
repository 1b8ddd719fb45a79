"""Train a 1000-layer network with 12.5 % of its weights on digits, from several starts.

One plain tanh MLP, without residuals or normalization, is trained in the same way from four starts:

* dense orthogonal: all weights, orthogonal kernels;
* EOI: sparse and exactly orthogonal kernels, ``eoi.dense(density)``;
* masked orthogonal: orthogonal kernels with random weights removed;
* masked Gaussian: as many weights removed, variance ``scale² / kept inputs`` of each unit.

``--blocks 16`` adds a fifth start: layers that store and multiply only blocks of 16 x 16. They are
equally sparse and exactly orthogonal, and train with the plain optimizer, without a mask.

Example:
    python -m experiments quickstart --layers 100
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.axes import Axes
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import eoi_jax as eoi
from eoi_jax._internal import checks
from eoi_jax._internal.files import atomic_savefig
from eoi_jax.typing import Array
from experiments import data, models
from experiments.benchmarks import timing
from experiments.reporting.figures import Curves, Figure
from experiments.studies import measure
from experiments.training import starts, steps

__all__ = [
    "BLOCKS",
    "STARTS",
    "Config",
    "Result",
    "StepFns",
    "check",
    "main",
    "run",
    "start_of",
    "train",
]

_FLOOR = 1e-8  # smallest singular value in the picture


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    data: Literal["digits", "mnist"] = "digits"
    """Data set: digits needs no download, mnist comes through tensorflow-datasets."""
    data_dir: str | None = None
    """Folder of tensorflow-datasets, for mnist."""
    layers: int = 1000
    """Number of linear layers, at least 2."""
    width: int = 128
    """Units of each layer."""
    density: float = 0.125
    """Fraction of weights that the sparse networks keep."""
    scale: float = 1.0247
    """Gain of the kernels; 1.0247 with bias_std 0.00448 is critical for tanh."""
    bias_std: float = 0.00448
    """Standard deviation of the biases at the start."""
    steps: int = 60
    """Training steps."""
    batch_size: int = 128
    """Images per step."""
    learning_rate: float | None = None
    """Learning rate of SGD with Nesterov momentum 0.9, the same for every start; default
    0.5 / layers, since every layer adds to the change of one step."""
    blocks: int = 0
    """If not 0, also train block-sparse layers of this block size, a divisor of the width. At the
    default width and density each block of outputs has one block of inputs with 16, two with 8."""
    seed: int = 0
    """Seed of everything random."""
    output: str = "quickstart.png"
    """Where the picture is saved."""


@dataclasses.dataclass
class Result:
    """The result of one start."""

    start: str
    density: float
    kept: int
    singular_values: np.ndarray
    losses: list[float]
    accuracy: float = math.nan


def check(config: Config) -> None:
    """Refuse settings that would only fail after minutes of training.

    Args:
        config: The settings.

    Raises:
        ValueError: Naming the setting, its value, the allowed range and the remedy.
    """
    for name, low in {"layers": 2, "width": 2, "steps": 1, "batch_size": 1}.items():
        checks.integer(getattr(config, name), low=low, name=name)
    checks.integer(config.seed, low=0, high=2**31 - 1, name="seed")
    checks.number(config.scale, "scale", interval="(0, inf)")
    checks.number(config.bias_std, "bias_std", interval="[0, inf)")
    if config.learning_rate is not None:
        checks.number(config.learning_rate, "learning_rate", interval="(0, inf)")
    remedy = f"Orthogonal matrices of width={config.width} have no fewer weights: use more."
    checks.density(config.density, minimum=1 / config.width, why=remedy)
    if config.blocks:
        sizes = [size for size in range(1, config.width + 1) if config.width % size == 0]
        fit = [size for size in sizes if config.density * config.width >= size]
        if config.blocks not in fit:
            raise checks.value_error(
                "blocks",
                config.blocks,
                f"is outside the divisors of width={config.width} up to density * width, "
                f"{{{', '.join(map(str, fit))}}}",
                "Choose one of them, or 0 for none.",
            )
    timing.check_output(config.output)


def _model(
    config: Config, dataset: data.Dataset, kernel_init: Any, blocks: models.Blocks | None = None
) -> models.Mlp:
    """Build the network with one initializer for all its dense kernels."""
    inits = {"kernel_init": kernel_init, "bias_init": jax.nn.initializers.normal(config.bias_std)}
    return models.Mlp(config.layers, config.width, dataset.num_classes, **inits, blocks=blocks)


def _blocks(config: Config) -> models.Blocks:
    return models.Blocks(config.density, config.blocks, config.scale)


def _drawn(config: Config, key: Array, dataset: data.Dataset, kernel_init: Any) -> eoi.SparseInit:
    """Draw the network; what its initializer leaves zero is masked."""
    params = _init(_model(config, dataset, kernel_init), key, dataset)["params"]
    return eoi.SparseInit(params, eoi.masks.support(params))


def _init(model: models.Mlp, key: Array, dataset: data.Dataset) -> dict[str, Any]:
    return dict(model.init(key, dataset.normalize(dataset.train.images[:1])))


def _dense_orthogonal(config: Config, key: Array, dataset: data.Dataset) -> eoi.SparseInit:
    return _drawn(config, key, dataset, jax.nn.initializers.orthogonal(config.scale))


def _exact_orthogonal(config: Config, key: Array, dataset: data.Dataset) -> eoi.SparseInit:
    return _drawn(config, key, dataset, eoi.dense(config.density, scale=config.scale))


def _masked_orthogonal(config: Config, key: Array, dataset: data.Dataset) -> eoi.SparseInit:
    for_mask, for_params = jax.random.split(key)
    params = _dense_orthogonal(config, for_params, dataset).params
    # One density a layer: the scanned layers are slices of one leaf.
    densities = jax.tree.map(lambda leaf: np.full(leaf.shape[:-2], config.density), params)
    return eoi.masked(params, eoi.masks.random(for_mask, params, densities))


def _masked_gaussian(config: Config, key: Array, dataset: data.Dataset) -> eoi.SparseInit:
    for_mask, for_noise = jax.random.split(key)
    params, mask = _masked_orthogonal(config, for_mask, dataset)

    def draw(key: Array, leaf_mask: Array, leaf: Array) -> Array:
        if leaf_mask.ndim == 0:
            return leaf
        kept = jnp.maximum(leaf_mask.sum(axis=-2, keepdims=True), 1)
        return config.scale * jax.random.normal(key, leaf.shape) / jnp.sqrt(kept)

    structure: Any = jax.tree.structure(mask)
    keys = jax.tree.unflatten(structure, jax.random.split(for_noise, structure.num_leaves))
    return eoi.masked(jax.tree.map(draw, keys, mask, params), mask)


STARTS: dict[str, Callable[[Config, Array, data.Dataset], eoi.SparseInit]] = {
    "dense orthogonal": _dense_orthogonal,
    "EOI": _exact_orthogonal,
    "masked orthogonal": _masked_orthogonal,
    "masked Gaussian": _masked_gaussian,
}
"""Starts under a mask by name: ``(config, key, dataset) -> (params, mask)``."""

BLOCKS = "EOI in blocks"
"""Name of the start whose layers store only blocks; it has no mask."""


def start_of(config: Config, name: str, key: Array, dataset: data.Dataset) -> starts.Start:
    """Make a start by its name: one of :data:`STARTS`, or :data:`BLOCKS`."""
    if name != BLOCKS:
        params, mask = STARTS[name](config, key, dataset)
        return starts.Start({"params": params}, mask)
    # The first layer and the last, 0.1 % of all weights, are dense.
    ends = jax.nn.initializers.orthogonal(config.scale)
    variables = _init(_model(config, dataset, ends, _blocks(config)), key, dataset)
    return starts.Start(variables, jax.tree.map(lambda _: jnp.array(True), variables["params"]))


class StepFns:
    """The network, and the compiled functions that train it from any start.

    Args:
        config: The settings.
        dataset: What is learned.
        blocks: Whether its layers store only blocks. Then the optimizer is optax's as it is;
            otherwise it holds a mask.
    """

    def __init__(self, config: Config, dataset: data.Dataset, *, blocks: bool = False) -> None:
        zeros = jax.nn.initializers.zeros
        self.model = _model(config, dataset, zeros, _blocks(config) if blocks else None)
        optimizer_of = steps.sparse_optimizer(config.steps, weight_decay=0.0)
        if blocks:
            optimizer_of = _plain_sgd
        self.begin = functools.partial(steps.init_state, optimizer_of)
        self.step = jax.jit(steps.train_step(self.model, dataset, optimizer_of))
        self.evaluate = jax.jit(steps.evaluation(self.model, dataset, len(dataset.test.labels)))


def _plain_sgd(key: Any, mask: Any, learning_rate: Any) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer that the masked starts have too, without a mask."""
    del key, mask
    sgd = optax.sgd(learning_rate, momentum=0.9, nesterov=True)
    return optax.with_extra_args_support(sgd)


def _batches(config: Config, size: int) -> Iterator[np.ndarray]:
    """Yield indices of batches, epoch after epoch, each in a new order."""
    generator = np.random.default_rng(config.seed)
    batch = min(config.batch_size, size)
    while True:
        order = generator.permutation(size)
        for first in range(0, size - batch + 1, batch):
            yield order[first : first + batch]


def train(
    config: Config,
    dataset: data.Dataset,
    step_fns: StepFns,
    name: str,
    results: list[Result],
    tick: Callable[[float], None],
) -> None:
    """Train from one start.

    Args:
        config: The settings.
        dataset: What is learned.
        step_fns: The compiled functions.
        name: One of :data:`STARTS`, or :data:`BLOCKS`.
        results: Where the result is appended, before the first step; each step adds to it.
        tick: Called with the loss of each step.
    """
    key, (images, labels) = jax.random.key(config.seed), dataset.train
    start = jax.jit(lambda key: start_of(config, name, key, dataset))(key)
    kept, size = starts.count(start)
    examples = dataset.normalize(images[: measure.SAMPLES])
    values = np.asarray(measure.singular_values(step_fns.model, start.variables, examples))
    result = Result(name, kept / size, kept, values, [])
    results.append(result)
    rate = 0.5 / config.layers if config.learning_rate is None else config.learning_rate
    state = step_fns.begin(key, *start)
    batches = _batches(config, len(labels))
    for number, index in zip(range(config.steps), batches, strict=False):
        state, sums = step_fns.step(state, number, rate, images[index], labels[index])
        result.losses.append(float(sums.loss))
        tick(result.losses[-1])
    result.accuracy = float(step_fns.evaluate(state, *map(jnp.asarray, dataset.test))[1])


def run(config: Config, console: Console | None = None) -> list[Result]:
    """Train from every start, print the table and save the picture.

    Ctrl-C ends the training; the table and the picture then show what there is.

    Args:
        config: The settings.
        console: Where to print; default: standard output.

    Returns:
        One result a start.

    Raises:
        ValueError: As :func:`check` raises it, or for data that cannot be read.
    """
    check(config)
    console = console or Console()
    dataset = data.load(config.data, config.data_dir, validation=0)
    started, results = time.perf_counter(), list[Result]()
    names = [*STARTS, *([BLOCKS] if config.blocks else [])]
    batch, total = min(config.batch_size, len(dataset.train.labels)), config.steps * len(names)
    console.print(
        f"{config.layers} layers of width {config.width}, tanh, no residuals, on {config.data}: "
        f"{config.steps} steps of {batch} images from each of {len(names)} starts"
    )
    progress = Progress(
        TextColumn("{task.description:<18}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
    stopped = False
    with progress:
        bar = progress.add_task("", total=total, loss=math.nan)

        def tick(loss: float) -> None:
            progress.update(bar, advance=1, loss=loss)

        try:
            step_fns = StepFns(config, dataset)
            for name in names:
                progress.update(bar, description=name)
                if name == BLOCKS:
                    step_fns = StepFns(config, dataset, blocks=True)
                train(config, dataset, step_fns, name, results, tick)
        except KeyboardInterrupt:
            stopped = True
    if stopped:
        done = sum(len(result.losses) for result in results)
        console.print(
            f"[yellow]Stopped by Ctrl-C after {done} of {total} steps; "
            "these are the results so far."
        )
    console.print(_table(config, results))
    if results:
        path = Path(config.output)
        canvas = _figure(config, results).draw()
        atomic_savefig(path, canvas, dpi=120)
        console.print(f"Picture: {path}")
    console.print(f"{time.perf_counter() - started:.0f} s")
    if stopped:
        sys.exit(130)
    return results


def _table(config: Config, results: list[Result]) -> Table:
    """Tabulate what each start gave, in 80 columns."""
    out = Table(
        title=f"{config.layers}-layer tanh MLP on {config.data}", box=SIMPLE, padding=(0, 1, 0, 0)
    )
    out.add_column("start", no_wrap=True)
    for column in ("density", "weights", "mean", "min", "max", "loss", "test"):
        out.add_column(column, justify="right", no_wrap=True)
    for result in results:
        summary = eoi.spectrum.summarize(jnp.asarray(result.singular_values))
        out.add_row(
            result.start,
            f"{result.density:.4f}",
            f"{result.kept:,}",
            *(f"{float(x):.2g}" for x in (summary.mean, summary.min, summary.max)),
            f"{result.losses[-1]:.3f}" if result.losses else "–",
            "–" if math.isnan(result.accuracy) else f"{result.accuracy:.1%}",
        )
    out.caption = (
        "mean, min, max: singular values of the input-output Jacobian at the start, "
        f"{measure.SAMPLES} images; loss: last step; test: accuracy"
    )
    return out


def _figure(config: Config, results: list[Result]) -> Figure:
    """Draw loss curves beside the singular values at the start."""
    rows, names = list[dict[str, Any]](), dict[str, str]()
    for result in results:
        start = result.start
        names[start] = f"{start}, density {result.density:.3g}"
        if not math.isnan(result.accuracy):
            names[start] += f", test accuracy {result.accuracy:.0%}"
        rows += [{"start": start, "step": x, "loss": y} for x, y in enumerate(result.losses, 1)]
        values = np.maximum(np.sort(result.singular_values.ravel())[::-1], _FLOOR)
        points = zip(np.linspace(0, 1, len(values)), values, strict=True)
        rows += [{"start": start, "fraction": x, "value": y} for x, y in points]
    curves = functools.partial(
        Curves, rows, by="start", names=names, order=(*STARTS, BLOCKS), spread="none", markers=False
    )
    losses = curves(
        "step", "loss", xlabel="training step", ylabel="cross-entropy (nats)", title="Training loss"
    )
    spectra = curves(
        *("fraction", "value"),
        xlabel="fraction of the singular values",
        ylabel="singular value",
        title="Singular values of the Jacobian at the start",
        yscale="log",
    )

    def draw_spectra(axes: Axes) -> None:
        spectra(axes)
        axes.set(ylim=(_FLOOR / 2, 10))
        text = f"at or below {_FLOOR:g}"
        axes.annotate(text, (0.98, _FLOOR * 1.6), ha="right", fontsize=9, color="0.3")

    title = (
        f"{config.layers}-layer tanh MLP of width {config.width} on {config.data}, "
        "no residuals, no normalization"
    )
    return Figure("quickstart", title, "", (losses, draw_spectra), across=2, size=(5.5, 4.5))


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    prog = "python -m experiments quickstart"
    config = tyro.cli(Config, args=arguments, description=__doc__, prog=prog)
    try:
        run(config)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
