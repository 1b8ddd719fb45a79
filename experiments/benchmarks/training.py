"""Images a second of a residual network's training step, with and without the options for CPUs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console

from eoi_jax import masks
from experiments import data, models
from experiments.benchmarks.timing import machine, medians, tabulate
from experiments.data import augment
from experiments.training import loops, steps

__all__ = ["Training", "bench_training", "step_of"]

_BATCH_SIZE = 128


@dataclasses.dataclass(frozen=True)
class Training:
    """Train ResNet-20: images a second as the experiments do on CPUs, against XLA's defaults."""

    repeats: int = 7
    """Runs of each function; the median is reported."""

    depth: int = 20
    """Layers of the network, 6 n + 2."""


def bench_training(options: Training, console: Console) -> None:
    """Print how long one training step takes, compiled with and without the options for CPUs."""
    console.print(f"Median of {options.repeats} runs. {machine()}")
    step, arguments = step_of(options)
    compilers: dict[str, Any] = {"XLA's defaults": None}
    if jax.default_backend() == "cpu":
        compilers["inputs of convolutions kept in memory"] = loops.CPU_OPTIONS
    seconds = medians(
        {
            name: functools.partial(jax.jit(step, compiler_options=compiler), *arguments)
            for name, compiler in compilers.items()
        },
        options.repeats,
    )
    slowest = seconds["XLA's defaults"]
    rows = [
        [name, f"{each * 1e3:.0f}", f"{_BATCH_SIZE / each:.0f}", f"{slowest / each:.2f}"]
        for name, each in seconds.items()
    ]
    title = f"ResNet-{options.depth}, images of 32 x 32, batch {_BATCH_SIZE}"
    heads = ("program", "step ms", "images/s", "ratio")
    console.print(tabulate(title, heads, rows, names=1))


def step_of(options: Training) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return a training step with augmentation and optimizer, and its arguments.

    Returns:
        The function, and ``(state, number, learning_rate, images, labels)``.
    """
    model = models.create("resnet32", depth=options.depth)
    made = data.load("made", image_shape=models.input_shape("resnet32"))
    dataset = dataclasses.replace(made, change=augment.cifar)
    images = dataset.train.images[:_BATCH_SIZE]
    labels = dataset.train.labels[:_BATCH_SIZE]
    variables = jax.jit(model.init)(jax.random.key(0), dataset.normalize(images[:1]))
    mask = masks.support(variables["params"])
    optimizer_of = steps.sparse_optimizer(1000)
    state = steps.init_state(optimizer_of, jax.random.key(1), variables, mask)
    return steps.train_step(model, dataset, optimizer_of), (state, 0, 0.1, images, labels)
