"""A 1000-layer network with 12.5 % of its weights learns digits, and where it started decides.

One plain tanh MLP, no residuals, no normalization, is trained in the same way from four starts:

* dense orthogonal: all weights, orthogonal kernels;
* EOI: sparse and exactly orthogonal kernels, ``eoi.dense(density)``;
* masked orthogonal: orthogonal kernels with random weights removed;
* masked Gaussian: as many removed, variance ``scale² / kept inputs`` of each unit.

Example:
    python -m experiments quickstart --layers 100
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import eoi_jax as eoi
from eoi_jax.typing import Array, Mask, Params
from experiments import data, models

SPECTRUM_SAMPLES = 128  # one batch, as the paper measures it


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
    0.5 / layers, since every layer adds to what one step changes."""
    seed: int = 0
    """Seed of everything random."""
    output: str = "quickstart.png"
    """Where the picture is saved."""


@dataclasses.dataclass
class Result:
    """What one start gave."""

    start: str
    density: float
    kept: int
    singular_values: np.ndarray
    losses: list[float]
    accuracy: float = math.nan


def check(config: Config) -> None:
    """Refuse settings that would only fail after minutes of training.

    Raises:
        ValueError: naming the setting, its value, the allowed range and the remedy.
    """
    smallest = {"layers": 2, "width": 2, "steps": 1, "batch_size": 1}
    for name, low in smallest.items():
        if getattr(config, name) < low:
            raise ValueError(
                f"{name}={getattr(config, name)} is outside [{low}, ...). Give a larger number."
            )
    positive = ("scale",) if config.learning_rate is None else ("scale", "learning_rate")
    for name in positive:
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(
                f"{name}={getattr(config, name)} is outside (0, inf). Give a positive number."
            )
    if not 0 <= config.bias_std < math.inf:
        raise ValueError(f"bias_std={config.bias_std} is outside [0, inf). Give 0 for no biases.")
    if not 0 <= config.seed < 2**31:
        raise ValueError(f"seed={config.seed} is outside [0, 2**31). Give another seed.")
    if not 1 / config.width <= config.density <= 1:
        raise ValueError(
            f"density={config.density} is outside [{1 / config.width:.4g}, 1], what an orthogonal "
            f"matrix of width {config.width} can have. Give a density in it or a larger width."
        )
    folder = Path(config.output).resolve().parent
    if not folder.is_dir():
        raise ValueError(
            f"output={config.output!r} is in a folder that does not exist. Create {folder}, or "
            "name another place."
        )


def model_of(config: Config, num_classes: int, kernel_init: Any) -> models.Mlp:
    """Build the network with one initializer for all its kernels."""
    return models.Mlp(
        depth=config.layers,
        width=config.width,
        num_classes=num_classes,
        kernel_init=kernel_init,
        bias_init=jax.nn.initializers.normal(config.bias_std),
    )


def _example(dataset: data.Dataset) -> Array:
    return dataset.normalize(dataset.train.images[:1])


def dense_orthogonal(config: Config, key: Array, dataset: data.Dataset) -> tuple[Params, Mask]:
    """All weights, orthogonal kernels."""
    init = jax.nn.initializers.orthogonal(config.scale)
    params = model_of(config, dataset.num_classes, init).init(key, _example(dataset))
    return params, eoi.masks.support(params)


def exact_orthogonal(config: Config, key: Array, dataset: data.Dataset) -> tuple[Params, Mask]:
    """Sparse and exactly orthogonal kernels."""
    init = eoi.dense(config.density, scale=config.scale)
    params = model_of(config, dataset.num_classes, init).init(key, _example(dataset))
    return params, eoi.masks.support(params)


def masked_orthogonal(config: Config, key: Array, dataset: data.Dataset) -> tuple[Params, Mask]:
    """Orthogonal kernels with random weights removed."""
    for_mask, for_params = jax.random.split(key)
    params, mask = dense_orthogonal(config, for_params, dataset)
    empty = jax.tree.map(lambda leaf: jnp.zeros_like(leaf) if leaf.ndim else leaf, mask)
    # One density per layer: the scanned layers are slices of one leaf.
    densities = jax.tree.map(
        lambda leaf: np.full(leaf.shape[:-2], config.density) if leaf.ndim else 1.0, mask
    )
    mask = eoi.masks.fill(for_mask, empty, densities)
    return eoi.masks.apply(mask, params), mask


def masked_gaussian(config: Config, key: Array, dataset: data.Dataset) -> tuple[Params, Mask]:
    """Gaussian kernels with random weights removed and the variance each unit's inputs ask for."""
    for_mask, for_noise = jax.random.split(key)
    params, mask = masked_orthogonal(config, for_mask, dataset)

    def fill(key: Array, leaf_mask: Array, leaf: Array) -> Array:
        if leaf_mask.ndim == 0:
            return leaf
        kept = jnp.maximum(leaf_mask.sum(axis=-2, keepdims=True), 1)
        noise = jax.random.normal(key, leaf.shape)
        return jnp.where(leaf_mask, config.scale * noise / jnp.sqrt(kept), 0.0)

    structure: Any = jax.tree.structure(mask)
    keys = jax.tree.unflatten(structure, jax.random.split(for_noise, structure.num_leaves))
    return jax.tree.map(fill, keys, mask, params), mask


Start = Callable[[Config, Array, data.Dataset], tuple[Params, Mask]]
STARTS: dict[str, Start] = {
    "dense orthogonal": dense_orthogonal,
    "EOI": exact_orthogonal,
    "masked orthogonal": masked_orthogonal,
    "masked Gaussian": masked_gaussian,
}


class Trainer:
    """The compiled functions that all starts share: one network, one optimizer."""

    def __init__(self, config: Config, dataset: data.Dataset):
        model = model_of(config, dataset.num_classes, jax.nn.initializers.zeros)
        rate = 0.5 / config.layers if config.learning_rate is None else config.learning_rate
        sgd = optax.sgd(rate, momentum=0.9, nesterov=True)

        def loss_fn(params: Params, images: Array, labels: Array) -> Array:
            logits = model.apply(params, dataset.normalize(images))
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        self.init = lambda params, mask: eoi.static_sparse(sgd, mask).init(params)

        @jax.jit
        def step(params: Params, state: Any, images: Array, labels: Array) -> Any:
            loss, grads = jax.value_and_grad(loss_fn)(params, images, labels)
            # The mask that counts is the one in the state.
            tx = eoi.static_sparse(sgd, optax.tree.get(state, "mask"))
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        self.step = step

        def predict(params: Params, images: Array) -> Array:
            logits: Any = model.apply(params, dataset.normalize(images))
            return jnp.argmax(logits, axis=-1)

        self.predict = jax.jit(predict)

        @jax.jit
        def singular_values(params: Params, images: Array) -> Array:
            normalized = dataset.normalize(images)
            return eoi.spectrum.singular_values(
                lambda x: model.apply(params, x[None])[0], normalized
            )

        self.singular_values = singular_values


def batches(config: Config, size: int) -> Any:
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
    trainer: Trainer,
    name: str,
    results: list[Result],
    tick: Callable[[float], None],
) -> None:
    """Train from one start; the result stands in ``results`` from the first step on."""
    key = jax.random.key(config.seed)
    params, mask = jax.jit(lambda key: STARTS[name](config, key, dataset))(key)
    kept = sum(int(leaf.sum()) for leaf in jax.tree.leaves(mask) if leaf.ndim)
    values = trainer.singular_values(params, dataset.train.images[:SPECTRUM_SAMPLES])
    result = Result(name, float(eoi.masks.density(mask)), kept, np.asarray(values), [])
    results.append(result)
    state = trainer.init(params, mask)
    for _, index in zip(
        range(config.steps), batches(config, len(dataset.train.images)), strict=False
    ):
        params, state, loss = trainer.step(
            params, state, dataset.train.images[index], dataset.train.labels[index]
        )
        result.losses.append(float(loss))
        tick(result.losses[-1])
    predicted = trainer.predict(params, dataset.test.images)
    result.accuracy = float((predicted == dataset.test.labels).mean())


def run(config: Config, console: Console | None = None) -> list[Result]:
    """Train from every start, print the table and save the picture.

    Ctrl-C ends the training; the table and the picture then show what there is.
    """
    check(config)
    console = console or Console()
    dataset = data.load(config.data, config.data_dir, validation=0)
    started, results = time.perf_counter(), list[Result]()
    batch = min(config.batch_size, len(dataset.train.images))
    console.print(
        f"{config.layers} layers of width {config.width}, tanh, no residuals, on {config.data}: "
        f"{config.steps} steps of {batch} images from each of {len(STARTS)} starts"
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
        bar = progress.add_task("", total=config.steps * len(STARTS), loss=math.nan)
        try:
            trainer = Trainer(config, dataset)
            for name in STARTS:
                progress.update(bar, description=name)
                train(
                    config,
                    dataset,
                    trainer,
                    name,
                    results,
                    lambda loss: progress.update(bar, advance=1, loss=loss),
                )
        except KeyboardInterrupt:
            stopped = True
    if stopped:
        done = sum(len(result.losses) for result in results)
        console.print(
            f"[yellow]Stopped by Ctrl-C after {done} of {config.steps * len(STARTS)} steps; "
            "these are the results so far."
        )
    console.print(table(config, results))
    if results:
        path = draw(config, results)
        console.print(f"Picture: {path}")
    console.print(f"{time.perf_counter() - started:.0f} s")
    if stopped:
        sys.exit(130)
    return results


def table(config: Config, results: list[Result]) -> Table:
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
        f"{SPECTRUM_SAMPLES} images; loss: last step; test: accuracy"
    )
    return out


def draw(config: Config, results: list[Result]) -> Path:
    """Save the picture: loss curves beside the singular values at the start."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colors = dict(zip(STARTS, ("#000000", "#0072B2", "#D55E00", "#CC79A7"), strict=True))
    styles = dict(zip(STARTS, ("--", "-", ":", "-."), strict=True))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    floor = 1e-8
    for result in results:
        look = {"color": colors[result.start], "linestyle": styles[result.start], "linewidth": 2}
        label = f"{result.start}, density {result.density:.3g}"
        if not math.isnan(result.accuracy):
            label += f": {result.accuracy:.0%}"
        left.plot(range(1, len(result.losses) + 1), result.losses, label=label, **look)
        values = np.sort(result.singular_values.ravel())[::-1]
        right.plot(np.linspace(0, 1, len(values)), np.maximum(values, floor), **look)
    left.set(xlabel="training step", ylabel="cross-entropy (nats)", title="Training loss")
    figure.legend(title="start: test accuracy", loc="outside lower center", ncols=2)
    right.set(
        yscale="log",
        ylim=(floor / 2, 10),
        xlabel="fraction of the singular values",
        ylabel="singular value",
        title="Singular values of the input-output Jacobian at the start",
    )
    right.annotate(
        f"at or below {floor:g}", (0.98, floor * 1.6), ha="right", fontsize=9, color="#555555"
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(
        f"{config.layers}-layer tanh MLP of width {config.width} on {config.data}, "
        "no residuals, no normalization"
    )
    path = Path(config.output)
    figure.savefig(path, dpi=120, format=path.suffix[1:] or "png")
    plt.close(figure)
    return path


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
