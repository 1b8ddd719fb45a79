"""Does one learning rate suit all densities? A coordinate check of SμPar.

A perceptron of fixed width is trained by Adam at several densities, with three parametrizations:

============== ====================================================================================
masked         LeCun's dense weights on a random mask: signals shrink with the density
rescaled       the same, rescaled to the fan-in of the mask
SμPar          rescaled, and each sparse kernel's updates divided by its density
============== ====================================================================================

The upper row of the picture is the coordinate check: how much one step of all layers changes the
preactivations of the last hidden layer, against the density. The lower row is the loss after some
steps against the learning rate, with a curve for each density. If a parametrization transfers, all
curves have their minima at the same rate.

Hardware: two CPU cores. Time: about two minutes.
Expected: with SμPar, changes are similar at all densities and minima are at one rate. With the
others, as the density falls, changes shrink and the minima move to higher rates.

Example:
    python -m experiments coordinate_check --quick
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from rich.console import Console

import eoi_jax as eoi
from eoi_jax._internal import checks
from eoi_jax._internal.files import atomic_savefig
from eoi_jax.typing import Array, Params
from experiments import data
from experiments.benchmarks import timing

__all__ = ["PARAMETRIZATIONS", "Config", "Found", "main", "measure", "plot", "run"]

PARAMETRIZATIONS = ("masked", "rescaled", "SμPar")
_COLORS = ("#000000", "#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7")


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the check."""

    densities: tuple[float, ...] = (1.0, 1 / 4, 1 / 16, 1 / 64)
    """Densities of all layers but the last, which is dense."""
    width: int = 512
    """Units of a hidden layer."""
    depth: int = 4
    """Linear layers, at least 3."""
    learning_rates: tuple[float, ...] = tuple(2.0**-power for power in range(13, 3, -1))
    """Rates of Adam; the coordinate check takes the smallest."""
    steps: int = 100
    """Training steps."""
    data: str = "mnist"
    """Data set, by its name in experiments.data; "made" needs no files."""
    data_dir: str | None = None
    """Folder of prepared data sets; default: that of tensorflow-datasets."""
    seed: int = 0
    """Seed of weights, masks and the order of images."""
    output: str = "coordinate_check.png"
    """Where the picture is saved."""
    quick: bool = False
    """Width 128, three densities, three rates, 10 steps, synthetic data."""


class Found(NamedTuple):
    """The measurements for one parametrization.

    Attributes:
        changes: Root mean square changes of the last hidden layer's preactivations in one step,
            one a density.
        losses: Mean training losses of the last tenth of the steps, ``(densities, rates)``.
    """

    changes: np.ndarray
    losses: np.ndarray


def _forward(params: Params, x: Array) -> tuple[Array, Array]:
    """Return logits and the preactivations of the last hidden layer."""
    h = x
    *hidden, last = (params[name]["kernel"] for name in sorted(params))
    for kernel in hidden:
        preactivations = h @ kernel
        h = jnp.tanh(preactivations)
    return h @ last, preactivations


def _loss(params: Params, x: Array, labels: Array) -> Array:
    logits, _ = _forward(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _start(config: Config, sizes: tuple[int, ...], density: float, name: str) -> eoi.SparseInit:
    key = jax.random.key(config.seed)
    shapes = {
        f"layer{i:02}": {"kernel": jnp.zeros(shape)}
        for i, shape in enumerate(itertools.pairwise(sizes))
    }
    dense = eoi.networks.redraw(key, shapes, jax.nn.initializers.lecun_normal())
    densities = {layer: {"kernel": density} for layer in shapes}
    mask = eoi.masks.random(jax.random.fold_in(key, 1), dense, densities)
    mask[max(mask)]["kernel"] = jnp.array(True)
    return (eoi.masked if name == "masked" else eoi.rescaled)(dense, mask)


@functools.partial(jax.jit, static_argnames=("power",))
def _train(
    start: eoi.SparseInit, rate: Any, images: Array, labels: Array, power: float
) -> tuple[Params, Array]:
    """Train on ``(steps, batch, features)``; return the parameters and the loss of each step."""
    inner = optax.chain(optax.adam(rate), eoi.scale_by_density(start.mask, power))
    tx = eoi.static_sparse(inner, start.mask)

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        loss, grads = jax.value_and_grad(_loss)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    carry, losses = jax.lax.scan(step, (start.params, tx.init(start.params)), (images, labels))
    return carry[0], losses


def measure(config: Config, tick: Callable[[str], None] = lambda text: None) -> dict[str, Found]:
    """Train all networks.

    Returns:
        A :class:`Found` for each of :data:`PARAMETRIZATIONS`.
    """
    dataset = data.load(config.data, config.data_dir)
    if isinstance(dataset, data.Text):
        raise ValueError(
            f"data={config.data!r} is a text, and this check trains on images: choose another set."
        )
    batch, train = 128, dataset.train
    order = np.random.default_rng(config.seed).integers(
        len(train.labels), size=(config.steps, batch)
    )
    images = dataset.normalize(jnp.asarray(train.images[order]))
    images, labels = images.reshape(*order.shape, -1), jnp.asarray(train.labels[order])
    sizes = (images.shape[-1], *[config.width] * (config.depth - 1), dataset.num_classes)
    late, rates, found = max(1, config.steps // 10), sorted(config.learning_rates), {}
    for name in PARAMETRIZATIONS:
        changes, losses = [], []
        for density in config.densities:
            tick(f"{name}, density {density:g}")
            start, power = _start(config, sizes, density, name), float(name == "SμPar")
            once, _ = _train(start, rates[0], images[:1], labels[:1], power)
            change = _forward(once, images[0])[1] - _forward(start.params, images[0])[1]
            changes.append(float(jnp.sqrt((change**2).mean())))
            curves = [_train(start, rate, images, labels, power)[1] for rate in rates]
            losses.append([float(curve[-late:].mean()) for curve in curves])
        found[name] = Found(np.array(changes), np.array(losses))
    return found


def plot(found: dict[str, Found], config: Config) -> Figure:
    """Draw the changes of one step above, the losses over learning rates below."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = figure.subplots(2, len(found), sharex="row", sharey="row")
    for (above, below), (name, values) in zip(panels.T, found.items(), strict=True):
        above.plot(config.densities, values.changes, "o-", color=_COLORS[1])
        above.set(xscale="log", yscale="log", title=name, xlabel="density")
        for density, losses, color in zip(config.densities, values.losses, _COLORS, strict=False):
            rates = sorted(config.learning_rates)
            below.plot(rates, losses, ".-", color=color, label=f"density {density:g}")
            low = int(np.nanargmin(losses))
            below.plot(rates[low], losses[low], "o", color=color, markersize=9, mfc="none")
        below.set(xscale="log", yscale="log", xlabel="learning rate of Adam")
        for axes in (above, below):
            axes.grid(alpha=0.3)
    panels[0, 0].set_ylabel("change of preactivations\nin one step (root mean square)")
    panels[1, 0].set_ylabel(f"training loss after {config.steps} steps")
    panels[1, 0].legend(fontsize=9)
    figure.suptitle(
        f"{config.depth} layers of width {config.width} on {config.data}; circles: minima"
    )
    return figure


def run(config: Config, console: Console | None = None) -> dict[str, Found]:
    """Measure, print the tables and save the picture."""
    console = console or Console()
    if config.quick:
        changes: dict[str, Any] = {"width": 128, "densities": (1.0, 1 / 4, 1 / 16), "steps": 10}
        changes |= {"learning_rates": (1e-3, 4e-3, 1.6e-2), "data": "made"}
        config = dataclasses.replace(config, **changes)
    timing.check_output(config.output)
    checks.integer(config.depth, low=3, name="depth")
    checks.integer(config.steps, low=1, name="steps")
    with console.status("") as status:
        found = measure(config, status.update)
    rates = sorted(config.learning_rates)
    lines = [
        [
            name,
            f"{d:.3g}",
            f"{change:.2e}",
            f"{rates[int(np.nanargmin(losses))]:.2g}",
            f"{np.nanmin(losses):.3f}",
        ]
        for name, values in found.items()
        for d, change, losses in zip(config.densities, values.changes, values.losses, strict=True)
    ]
    heads = ["parametrization", "density", "change in one step", "best rate", "loss at it"]
    console.print(timing.tabulate(f"Coordinate check, {timing.machine()}", heads, lines))
    atomic_savefig(Path(config.output), plot(found, config), dpi=110)
    console.print(f"Saved: {config.output}")
    return found


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    prog = "python -m experiments coordinate_check"
    config = tyro.cli(Config, args=arguments, description=__doc__, prog=prog)
    try:
        run(config)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
