"""Time of a training step and of an optimizer's update under a mask, against the dense ones."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console

import eoi_jax as eoi
from eoi_jax.typing import Array
from experiments import models
from experiments.benchmarks.timing import machine, medians, tabulate

__all__ = ["Optim", "bench_optim"]


@dataclasses.dataclass(frozen=True)
class Optim:
    """Train under a mask: time of a step with static_sparse against the dense step."""

    repeats: int = 31
    """Runs of each function; the median is reported."""


def bench_optim(options: Optim, console: Console) -> None:
    """Print the time of whole training steps and of optimizer updates alone, masked and dense."""
    console.print(f"Median of {options.repeats} runs. {machine()}")
    model = models.Mlp(depth=102, width=256, num_classes=10, kernel_init=eoi.dense(0.1))
    images = jax.random.normal(jax.random.key(0), (128, 16, 16, 1))
    labels = jnp.zeros((128,), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(1), images)
    mask = eoi.masks.support(params)

    def loss_fn(params: Any) -> Array:
        logits = model.apply(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def update(tx: optax.GradientTransformation) -> Callable[..., Any]:
        def call(params: Any, state: Any, grads: Any) -> Any:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return call

    def step(tx: optax.GradientTransformation) -> Callable[..., Any]:
        return lambda params, state, grads: update(tx)(params, state, jax.grad(loss_fn)(params))

    optimizers = {
        "sgd, Nesterov": optax.sgd(1e-3, momentum=0.9, nesterov=True),
        "adamw": optax.adamw(1e-3),
    }
    grads = jax.grad(loss_fn)(params)
    rows = []
    for name, inner in optimizers.items():
        masked = eoi.static_sparse(inner, mask)
        seconds = medians(
            {
                f"{kind} {which}": functools.partial(
                    jax.jit(make(tx)), params, tx.init(params), grads
                )
                for kind, make in (("step", step), ("update", update))
                for which, tx in (("dense", inner), ("masked", masked))
            },
            options.repeats,
        )
        cells = [name]
        for kind in ("step", "update"):
            bare, under_mask = seconds[f"{kind} dense"], seconds[f"{kind} masked"]
            cells += [f"{bare * 1e3:.1f}", f"{under_mask * 1e3:.1f}", f"{under_mask / bare:.2f}"]
        rows.append(cells)
    title = "static_sparse against the bare optimizer: 102 x 256 wide, batch 128, density 0.1"
    times = ("dense step ms", "masked ms", "ratio", "dense update ms", "masked ms", "ratio")
    console.print(tabulate(title, ("optimizer", *times), rows, names=1))
