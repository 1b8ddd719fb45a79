"""Do sparse orthogonal weights have the spectra that theory predicts for dense ones?

Mean-field theory and free probability predict the singular values of a deep Jacobian for dense
orthogonal weights, drawn by the Haar measure. Sparse exactly orthogonal weights are orthogonal all
the same, but their units see few inputs: preactivations need not be Gaussian, nor the layers free
of each other. This measures, at initialization, how far the spectra of networks with EOI's weights
are from the prediction, over density, depth, width and activation, with dense Haar weights as the
reference for what finite width alone does.

Each network is a chain h' = W phi(h) + b at its critical point, its input Gaussian of the fixed
point's variance. Measured are the Wasserstein-1 distance between the singular values of the
Jacobian dh_L/dh_0 and the prediction, whose mean square is 1, and the relative error of the second
moment of the squared values.

Hardware: two CPU cores. Time: about 80 seconds.
Expected: Haar weights agree with the prediction up to what width explains; EOI's do not, and less
so the sparser the weights.

Example:
    python -m experiments universality --quick
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import tyro
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import eoi_jax as eoi
from eoi_jax import mean_field
from eoi_jax.typing import Array
from experiments import models, timing

__all__ = ["Config", "Row", "chain", "main", "measure", "plot", "run"]

# The variance of preactivations at which each network is critical.
VARIANCES = {"tanh": 0.1, "hard_tanh": 0.25, "relu": 1.0}
HAAR = 0.0  # stands for dense Haar weights where a density is expected


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    densities: tuple[float, ...] = (0.02, 0.05, 0.1, 0.25, 0.5)
    """Densities of EOI; dense Haar weights are always measured."""
    depths: tuple[int, ...] = (4, 16, 64)
    """Numbers of layers."""
    widths: tuple[int, ...] = (128, 512)
    """Units of each layer."""
    seeds: int = 5
    """Networks of each kind."""
    seed: int = 0
    """Seed of everything random."""
    output: str = "universality"
    """Where the table (.csv) and the pictures (.png, _laws.png) are saved, without a suffix."""
    quick: bool = False
    """Width 128, two densities, depths 4 and 16, two seeds."""


class Row(NamedTuple):
    """One network: its kind, and how far it is from the prediction."""

    activation: str
    width: int
    depth: int
    density: float
    seed: int
    wasserstein: float
    moment_error: float


def chain(
    weights: Array, biases: Array, x: Array, activation: Callable[[Array], Array], depths: Any
) -> list[Array]:
    """Return the singular values of the Jacobian after each of the depths.

    ``weights`` is ``(layers, width, width)``, ``biases`` ``(layers, width)``, ``x`` ``(width,)``.
    """
    slope = jax.vmap(jax.grad(activation))

    def layer(carry: tuple[Array, Array], parameters: tuple[Array, Array]) -> Any:
        h, jacobian = carry
        weight, bias = parameters
        jacobian = weight @ (slope(h)[:, None] * jacobian)
        return (weight @ activation(h) + bias, jacobian), None

    carry, values, done = (x, jnp.eye(x.size, dtype=x.dtype)), [], 0
    with jax.default_matmul_precision("highest"):
        for depth in depths:
            carry, _ = jax.lax.scan(layer, carry, (weights[done:depth], biases[done:depth]))
            values.append(jnp.linalg.svd(carry[1], compute_uv=False))
            done = depth
    return values


@functools.partial(jax.jit, static_argnames=("width", "depth", "density"))
def _weights(key: Array, *, width: int, depth: int, density: float) -> Array:
    """Draw a stack of orthogonal matrices, sparse or Haar."""
    shape = (width, width)

    def draw(key: Array) -> Array:
        if density == HAAR:
            return jax.nn.initializers.orthogonal()(key, shape, jnp.float64)
        return eoi.orthogonal(key, shape, density, dtype=jnp.float64)

    return jax.lax.map(draw, jax.random.split(key, depth))


@functools.partial(jax.jit, static_argnames=("activation", "depths"))
def _measure(
    key: Array, weights: Array, sigmas: Array, *, activation: str, depths: tuple[int, ...]
) -> list[Array]:
    width = weights.shape[-1]
    # Not the keys of the weights: the first of a split are the same, however many it makes.
    for_biases, for_input = jax.random.split(jax.random.fold_in(key, 1))
    biases = sigmas[1] * jax.random.normal(for_biases, weights.shape[:2], weights.dtype)
    x = sigmas[2] * jax.random.normal(for_input, (width,), weights.dtype)
    phi = models.ACTIVATIONS[activation]
    return chain(sigmas[0] * weights, biases, x, phi, depths)


def measure(config: Config, tick: Callable[[str], None] = lambda text: None) -> tuple[Any, Any]:
    """Measure all networks.

    Returns:
        The rows, and the singular values of the widest and deepest networks by activation and
        density, pooled over seeds.
    """
    rows: list[Row] = []
    pooled: dict[tuple[str, float], list[Any]] = {}
    depths = tuple(sorted(config.depths))
    laws = {
        (activation, depth): predicted(activation, depth)
        for activation in VARIANCES
        for depth in depths
    }
    for width in config.widths:
        for density in (HAAR, *config.densities):
            for seed in range(config.seeds):
                tick(f"width {width}, {name_of(density)}, seed {seed}")
                key = jax.random.fold_in(jax.random.key(config.seed), seed)
                weights = _weights(key, width=width, depth=depths[-1], density=density)
                for activation, q in VARIANCES.items():
                    sigmas = jnp.array([*mean_field.critical_line(activation, q), q**0.5])
                    found = _measure(key, weights, sigmas, activation=activation, depths=depths)
                    for depth, values in zip(depths, found, strict=True):
                        law = laws[activation, depth]
                        errors = compare(np.sort(np.asarray(values)), law)
                        rows.append(Row(activation, width, depth, density, seed, *errors))
                    if width == max(config.widths):
                        pooled.setdefault((activation, density), []).append(np.asarray(found[-1]))
    return rows, {cell: np.concatenate(own) for cell, own in pooled.items()}


def predicted(activation: str, depth: int) -> mean_field.PredictedSpectrum:
    """Return the law that theory predicts for a critical network with Haar weights."""
    q = VARIANCES[activation]
    sigma_w, _ = mean_field.critical_line(activation, q)
    return mean_field.predicted_singular_values(activation, depth, sigma_w, q)


def compare(values: Any, law: mean_field.PredictedSpectrum) -> tuple[float, float]:
    """Return the Wasserstein-1 distance and the relative error of the second moment of squares."""
    middles = (np.arange(values.size) + 0.5) / values.size
    distance = np.abs(values - law.quantile(middles)).mean()
    second = law.moments(2)[1]
    return float(distance), float(abs((values**4).mean() - second) / second)


def name_of(density: float) -> str:
    """Name the weights."""
    return "Haar" if density == HAAR else f"EOI {density:g}"


def run(config: Config, console: Console | None = None) -> list[Row]:
    """Measure, print the table, save it and the pictures."""
    console = console or Console(width=None if Console().is_terminal else 120)
    if config.quick:
        config = dataclasses.replace(
            config, widths=(128,), densities=(0.05, 0.25), depths=(4, 16), seeds=2
        )
    timing.check(config.seeds, config.output)
    console.print(f"{config.seeds} networks a cell, mean ± s.d. over them. {timing.machine()}")
    with jax.enable_x64(True), console.status("") as status:
        rows, pooled = measure(config, status.update)
    for statistic, title in (
        ("wasserstein", "Wasserstein-1 distance between measured and predicted singular values"),
        ("moment_error", "Relative error of the second moment of the squared singular values"),
    ):
        console.print(table_of(rows, config, statistic, title))
    path = Path(config.output)
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(rows)
    plot(rows, config, path.with_suffix(".png"))
    plot_laws(pooled, config, path.with_name(f"{path.name}_laws.png"))
    console.print(f"Saved: {path}.csv, {path}.png, {path}_laws.png")
    return rows


def _cell(rows: Sequence[Row], statistic: str, **kind: Any) -> tuple[float, float]:
    own = [
        getattr(row, statistic)
        for row in rows
        if all(getattr(row, name) == value for name, value in kind.items())
    ]
    return statistics.mean(own), statistics.stdev(own) if len(own) > 1 else 0.0


def table_of(rows: Sequence[Row], config: Config, statistic: str, title: str) -> Table:
    """Build the table of one statistic."""
    table = Table(title=title, box=SIMPLE)
    densities = (HAAR, *config.densities)
    for head in ("activation", "width", "depth", *map(name_of, densities)):
        table.add_column(head, justify="right", no_wrap=True)
    for activation in VARIANCES:
        for width in config.widths:
            for depth in sorted(config.depths):
                kind = {"activation": activation, "width": width, "depth": depth}
                cells = [_cell(rows, statistic, **kind, density=d) for d in densities]
                own = [f"{mean:.2g} ± {deviation:.1g}" for mean, deviation in cells]
                table.add_row(activation, str(width), str(depth), *own)
    return table


def plot(rows: Sequence[Row], config: Config, path: Path) -> None:
    """Plot distance against density: a panel for each activation, a color for each depth."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colors = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")
    figure, panels = plt.subplots(
        1, len(VARIANCES), figsize=(12, 4.4), sharey=True, layout="constrained", squeeze=False
    )
    for axes, activation in zip(panels[0], VARIANCES, strict=True):
        for width, marker, style in zip(config.widths, "os^", ("--", "-", ":"), strict=False):
            for depth, color in zip(sorted(config.depths), colors, strict=False):
                kind = {"activation": activation, "width": width, "depth": depth}
                cells = [_cell(rows, "wasserstein", **kind, density=d) for d in config.densities]
                means, deviations = zip(*cells, strict=True)
                label = f"depth {depth}, width {width}"
                axes.errorbar(
                    config.densities,
                    means,
                    deviations,
                    color=color,
                    marker=marker,
                    linestyle=style,
                    capsize=3,
                    label=label,
                )
                mean, deviation = _cell(rows, "wasserstein", **kind, density=HAAR)
                axes.errorbar(
                    [1.3],
                    [mean],
                    [deviation],
                    color=color,
                    marker=marker,
                    capsize=3,
                    markerfacecolor="none",
                )
        ticks = [*config.densities, 1.3]
        axes.set(xscale="log", yscale="log", title=activation, xlabel="density (Haar: dense)")
        axes.set_xticks(ticks, [*(f"{d:g}" for d in config.densities), "Haar"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("Wasserstein-1 distance to the prediction")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_laws(pooled: dict[tuple[str, float], Any], config: Config, path: Path) -> None:
    """Draw the histograms of the widest, deepest networks and the predicted density over them."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    depth, width = max(config.depths), max(config.widths)
    shown = (HAAR, max(config.densities), min(config.densities))
    figure, panels = plt.subplots(
        len(shown), len(VARIANCES), figsize=(12, 7), layout="constrained", sharex="col"
    )
    for column, activation in enumerate(VARIANCES):
        law = predicted(activation, depth)
        top = 1.1 * max(float(law.quantile(0.999)), 1.0)
        bins = np.linspace(0, top, 60)
        for row, density in enumerate(shown):
            axes = panels[row, column]
            values = pooled[activation, density]
            share = np.full(values.size, 1 / values.size)
            axes.hist(values.clip(max=top), bins, weights=share, color="#56B4E9", label="measured")
            # The mass of each bin, atoms included: what a histogram of infinite width would show.
            mass = np.diff(law.cdf(bins), prepend=0.0)
            mass[1] += mass[0]  # an atom at 0 belongs to the first bin
            middles = (bins[1:] + bins[:-1]) / 2
            axes.plot(middles, mass[1:], color="#D55E00", label="predicted for Haar weights")
            axes.set_title(f"{activation}, {name_of(density)}")
            axes.set_yscale("symlog", linthresh=1e-2)
            axes.grid(alpha=0.3)
        panels[-1, column].set_xlabel("singular value (larger ones in the last bin)")
    for axes in panels[:, 0]:
        axes.set_ylabel("share of a bin")
    panels[0, 0].legend()
    figure.suptitle(f"Jacobians of {depth} layers of width {width}, {config.seeds} networks")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    config = tyro.cli(Config, args=arguments, description=__doc__)
    try:
        run(config)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
