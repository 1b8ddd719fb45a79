"""Loops over the steps of an epoch on a mesh of devices, which may be those of several processes.

Images stay in the memory of the machines: of each batch, a process reads the examples for its own
devices. Steps are dispatched one by one. The compiler divides the work by the shardings of the
state and of the batch (:mod:`experiments.training.meshes`), so a step computes the same as on one
device, and only the order of its sums differs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eoi_jax.typing import Array
from experiments.training import meshes
from experiments.training.loops import CPU_OPTIONS, Advance, Epoch, sums_of
from experiments.training.steps import State, Sums

__all__ = ["advance", "evaluate"]


def advance(
    step: Callable[[State, Sums, Any, Any, Array, Array], tuple[State, Sums]], mesh: Mesh
) -> Advance:
    """Dispatch step by step, with batches that each process reads its share of.

    Args:
        step: As :func:`experiments.training.loops.step_of_examples` returns it; of a state of
            several seeds, over the seeds at once.
        mesh: The devices.

    Returns:
        ``(state, first, stop, epoch) -> (state, sums)``, for an epoch whose order, images and
        labels are arrays of NumPy.
    """

    def divided(state: State, sums: Sums, *rest: Any) -> tuple[State, Sums]:
        state, sums = step(state, sums, *rest)
        constrain = jax.lax.with_sharding_constraint
        return constrain(state, meshes.shardings(mesh, state)), constrain(sums, _whole(mesh))

    compiled = jax.jit(divided, donate_argnums=0, compiler_options=_options())

    def run(state: State, first: Any, stop: Any, epoch: Epoch) -> tuple[State, Sums]:
        sums = sums_of(epoch)
        for number in range(first, stop):
            rows = epoch.order[..., number % epoch.order.shape[-2], :]
            batch = (_spread(epoch.images, rows, mesh), _spread(epoch.labels, rows, mesh))
            state, sums = compiled(state, sums, np.int32(number), epoch.learning_rate, *batch)
            _wait(sums)
        return state, sums

    return run


def evaluate(
    totals: Callable[[State, Array, Array, Array], tuple[Array, Array]], mesh: Mesh, batch_size: int
) -> Callable[[State, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return the function that evaluates a state on all images of a split.

    Args:
        totals: As :func:`experiments.training.steps.evaluated_batch` returns it; of a state of
            several seeds, over the seeds at once.
        mesh: The devices.
        batch_size: Images of a batch, a multiple of the axis of examples.

    Returns:
        ``(state, images, labels) -> (loss, accuracy)``, means over all images.
    """
    compiled = jax.jit(totals, out_shardings=_whole(mesh), compiler_options=_options())

    def run(state: State, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        loss: Any = np.float32(0)
        correct: Any = np.float32(0)
        size = len(labels)
        for first in range(0, size, batch_size):
            # The last batch is filled up with images that do not count.
            index = np.arange(first, first + batch_size)
            rows, counts = np.minimum(index, size - 1), index < size
            batch = (_spread(whole, rows, mesh) for whole in (images, labels))
            new = compiled(state, *batch, _spread(counts, np.arange(batch_size), mesh))
            loss, correct = loss + np.asarray(new[0]), correct + np.asarray(new[1])
        return loss / np.float32(size), correct / np.float32(size)

    return run


def _spread(whole: Any, rows: Any, mesh: Mesh) -> Array:
    """Divide the given rows of an array along the axis of examples, the last of ``rows``.

    Only those of the devices of this process are read.
    """
    spec = PartitionSpec(*[None] * (rows.ndim - 1), "data")
    shape = (*rows.shape, *whole.shape[1:])

    def read(index: Any) -> Any:
        return whole[rows[index[: rows.ndim]]]

    return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), read)


def _whole(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _options() -> Any:
    return CPU_OPTIONS if jax.default_backend() == "cpu" else None


def _wait(sums: Sums) -> None:
    """Let a step end before the next is dispatched, on CPUs.

    There the threads of several steps would wait for each other in their collectives.
    """
    if jax.default_backend() == "cpu":
        jax.block_until_ready(sums)
