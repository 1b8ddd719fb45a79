"""Do sparse orthogonal weights have the spectra that theory predicts for dense ones?

Mean-field theory and free probability predict the singular values of a deep Jacobian for dense
orthogonal weights, drawn by the Haar measure. They assume that a layer's preactivations are
Gaussian, all of one variance, and that its weights are free of them. Sparse weights can be exactly
orthogonal too, but their units have few inputs. This command measures, at initialization, how far
the spectra of several kinds of weights are from the prediction, over density, depth, width and
activation:

* Haar: dense, to see the effect of the finite width alone;
* EOI: products of rotations in independent planes, whose rows differ in their non-zeros;
* matching: the same with planes by perfect matchings, whose rows have nearly equal counts;
* blocks: Haar blocks under random permutations, whose rows have equal counts;
* center and spread: circular convolutions of 3 x 3 taps over 4 x 4 pixels by EOI, with all entries
  at the center tap, or with the rows spread over all taps. A row has at most as many non-zeros as
  there are channels.

Each network is a chain h' = W phi(h) + b at its critical point, with a Gaussian input of the fixed
point's variance. The command measures the Wasserstein-1 distance between the singular values of the
Jacobian dh_L/dh_0 and the prediction, whose mean square is 1, and two relative errors of the mean
fourth power of the singular values. The first error compares this mean with the prediction. The
second compares it with the value that the slopes phi'(h) of this network would give if the weights
were free of them: it is small where only the law of the preactivations differs, and large where
freeness fails too.

Hardware: one CPU core. Time: about twenty minutes.
Expected: Haar weights agree with the prediction up to the effect of the width. EOI's do not, and
the fewer non-zeros a row has, the larger is the distance. At equal mean counts, rows of equal or
nearly equal counts are closer to the prediction: matchings have two thirds of EOI's distance. Taps
make little difference.

Example:
    python -m experiments universality --quick
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import eoi_jax as eoi
from eoi_jax import mean_field
from eoi_jax._internal import checks
from eoi_jax._internal.files import atomic_savefig, atomic_write_text
from eoi_jax.typing import Array
from experiments import models
from experiments.benchmarks import timing

__all__ = [
    "CASES",
    "Case",
    "Config",
    "Row",
    "chain",
    "compare",
    "main",
    "measure",
    "predicted",
    "run",
]


class Case(NamedTuple):
    """An activation, and the variance of preactivations at which its network is critical."""

    activation: str
    q: float

    def __str__(self) -> str:
        return self.activation if self.activation == "identity" else f"{self[0]}, q = {self.q:g}"


# tanh at 0.0259 is the published 1000-layer network.
CASES = (
    Case("identity", 1.0),
    Case("tanh", 0.0259),
    Case("tanh", 0.1),
    Case("hard_tanh", 0.25),
    Case("relu", 1.0),
)
_CURVED = CASES[1:]  # without the identity, whose distances are 0
_MATRICES, _CONVOLUTIONS = ("EOI", "matching", "blocks"), ("center", "spread")
_KINDS = ("Haar", *_MATRICES, *_CONVOLUTIONS)
_PIXELS, _TAPS = (4, 4), (3, 3)


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    densities: tuple[float, ...] = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
    """Densities of the sparse kinds; dense Haar weights are always measured."""
    depths: tuple[int, ...] = (4, 16, 64)
    """Numbers of layers."""
    widths: tuple[int, ...] = (128, 256, 512)
    """Units of each layer; density times width must divide it, the size of a block."""
    seeds: int = 5
    """Networks of each kind."""
    seed: int = 0
    """Seed of everything random."""
    output: str = "universality"
    """Where the table (.csv) and the pictures (.png) are saved, without a suffix."""
    quick: bool = False
    """Width 128, two densities, depths 4 and 16, two seeds."""


class Row(NamedTuple):
    """One network: its kind, and how far it is from the prediction."""

    activation: str
    q: float
    width: int
    depth: int
    weights: str
    density: float
    seed: int
    wasserstein: float
    moment_error: float
    freeness_error: float


def chain(
    weights: Array, biases: Array, x: Array, activation: Callable[[Array], Array], depths: Any
) -> list[tuple[Array, Array]]:
    """Return singular values of the Jacobian after each of the depths, and moments of slopes.

    Args:
        weights: ``(layers, width, width)``.
        biases: ``(layers, width)``.
        x: ``(width,)``.
        activation: Elementwise.
        depths: Increasing numbers of layers.

    Returns:
        For each depth the singular values, ``(width,)``, and for each of its layers the means of
        the squared slopes and of their squares, ``(depth, 2)``.
    """
    slope = jax.vmap(jax.grad(activation))

    def layer(carry: tuple[Array, Array], parameters: tuple[Array, Array]) -> Any:
        h, jacobian = carry
        weight, bias = parameters
        slopes = slope(h)
        jacobian = weight @ (slopes[:, None] * jacobian)
        moments = jnp.stack([(slopes**2).mean(), (slopes**4).mean()])
        return (weight @ activation(h) + bias, jacobian), moments

    carry, found, done = (x, jnp.eye(x.size, dtype=x.dtype)), [], 0
    moments = jnp.zeros((0, 2), x.dtype)
    with jax.default_matmul_precision("highest"):
        for depth in depths:
            carry, new = jax.lax.scan(layer, carry, (weights[done:depth], biases[done:depth]))
            moments = jnp.concatenate([moments, new])
            found.append((jnp.linalg.svd(carry[1], compute_uv=False), moments))
            done = depth
    return found


@functools.partial(jax.jit, static_argnames=("width", "depth", "kind", "density"))
def _weights(key: Array, *, width: int, depth: int, kind: str, density: float) -> Array:
    """Draw a stack of orthogonal matrices."""

    def draw(key: Array) -> Array:
        if kind == "Haar":
            return jax.nn.initializers.orthogonal()(key, (width, width), jnp.float64)
        if kind == "blocks":
            return eoi.sao.orthogonal(key, width, round(density * width), dtype=jnp.float64)
        if kind in _CONVOLUTIONS:
            return _convolution(key, width, density, kind)
        planes = eoi.planes.matching if kind == "matching" else eoi.planes.independent
        return eoi.orthogonal(key, (width, width), density, planes=planes, dtype=jnp.float64)

    return jax.lax.map(draw, jax.random.split(key, depth))


def _convolution(key: Array, width: int, density: float, taps: Any) -> Array:
    """Draw a circular convolution as a matrix over all pixels and channels."""
    channels = width // math.prod(_PIXELS)
    init = eoi.conv(
        density * width / channels / math.prod(_TAPS),
        center_density=density * width / channels,
        taps=taps,
        dtype=jnp.float64,
    )
    kernel = init(key, (*_TAPS, channels, channels), jnp.float64)
    units = jnp.eye(width, dtype=jnp.float64).reshape(width, *_PIXELS, channels)
    border = [(0, 0), *((size // 2, size // 2) for size in _TAPS), (0, 0)]
    axes = ("NHWC", "HWIO", "NHWC")
    columns = jax.lax.conv_general_dilated(
        jnp.pad(units, border, mode="wrap"), kernel, (1, 1), "VALID", dimension_numbers=axes
    )
    return columns.reshape(width, width).T


def _exists(kind: str, width: int, density: float) -> bool:
    """Tell whether a kind has networks of this width, with rows of so many non-zeros."""
    channels, rest = divmod(width, math.prod(_PIXELS))
    return kind not in _CONVOLUTIONS or (not rest and 1 <= density * width <= channels)


@functools.partial(jax.jit, static_argnames=("activation", "depths"))
def _measure(
    key: Array, weights: Array, sigmas: Array, *, activation: str, depths: tuple[int, ...]
) -> list[tuple[Array, Array]]:
    width = weights.shape[-1]
    for_biases, for_input = jax.random.split(key)
    biases = sigmas[1] * jax.random.normal(for_biases, weights.shape[:2], weights.dtype)
    x = sigmas[2] * jax.random.normal(for_input, (width,), weights.dtype)
    phi = models.ACTIVATIONS[activation]
    return chain(sigmas[0] * weights, biases, x, phi, depths)


def measure(config: Config, tick: Callable[[str], None] = lambda text: None) -> tuple[Any, Any]:
    """Measure all networks.

    Returns:
        The rows, and the singular values of the widest and deepest networks by case, kind of
        weights and density, pooled over seeds.
    """
    rows: list[Row] = []
    pooled: dict[tuple[Case, str, float], list[Any]] = {}
    depths = tuple(sorted(config.depths))
    laws = {(case, depth): predicted(case, depth) for case in CASES for depth in depths}
    sparse = [(kind, density) for density in config.densities for kind in _KINDS[1:]]
    for width in config.widths:
        there = [(kind, density) for kind, density in sparse if _exists(kind, width, density)]
        for kind, density in [("Haar", 1.0), *there]:
            for seed in range(config.seeds):
                tick(f"width {width}, {_name_of(kind, density)}, seed {seed}")
                key = jax.random.fold_in(jax.random.key(config.seed), seed)
                for_weights, for_rest = jax.random.split(key)
                weights = _weights(
                    for_weights, width=width, depth=depths[-1], kind=kind, density=density
                )
                for case in CASES:
                    sigmas = jnp.array([*mean_field.critical_line(*case), case.q**0.5])
                    found = _measure(
                        for_rest, weights, sigmas, activation=case.activation, depths=depths
                    )
                    for depth, (values, moments) in zip(depths, found, strict=True):
                        measured = np.asarray(values), np.asarray(moments)
                        errors = compare(*measured, float(sigmas[0]), laws[case, depth])
                        rows.append(Row(*case, width, depth, kind, density, seed, *errors))
                    if width == max(config.widths):
                        deepest = np.asarray(found[-1][0])
                        pooled.setdefault((case, kind, density), []).append(deepest)
    return rows, {cell: np.concatenate(values) for cell, values in pooled.items()}


def predicted(case: Case, depth: int) -> mean_field.PredictedSpectrum:
    """Return the law that theory predicts for a critical network with Haar weights."""
    sigma_w, _ = mean_field.critical_line(*case)
    return mean_field.predicted_singular_values(case.activation, depth, sigma_w, case.q)


def compare(
    values: Any, moments: Any, gain: float, law: mean_field.PredictedSpectrum
) -> tuple[float, float, float]:
    """Return the distance, and the relative errors of the mean fourth power.

    The first error is against the law. The second is against the two moments of the layers' slopes,
    for weights free of them: S-transforms multiply, so the variances of the squared slopes relative
    to their squared means add up.

    Args:
        values: Singular values, ``(width,)``.
        moments: Means of squared slopes and of their squares, ``(depth, 2)``.
        gain: ``σ_w`` of the weights.
        law: What theory predicts.

    Returns:
        The Wasserstein-1 distance and both errors.
    """
    middles = (np.arange(values.size) + 0.5) / values.size
    distance = np.abs(np.sort(values) - law.quantile(middles)).mean()
    first, second = moments.T
    fourth, free = (values**4).mean(), 0.0
    if first.all():  # else a layer is dead, and no singular value is left
        free = np.prod(gain**2 * first) ** 2 * (1 + (second / first**2 - 1).sum())
    error, freeness_error = (abs(fourth - m) / m if m else 0.0 for m in (law.moments(2)[1], free))
    return float(distance), float(error), float(freeness_error)


def _name_of(kind: str, density: float) -> str:
    """Name the weights."""
    return kind if kind == "Haar" else f"{kind} {density:.3g}"


def run(config: Config, console: Console | None = None) -> list[Row]:
    """Measure, print the tables, save them and the pictures."""
    console = console or Console(width=None if Console().is_terminal else 150)
    if config.quick:
        config = dataclasses.replace(
            config, widths=(128,), densities=(1 / 16, 1 / 4), depths=(4, 16), seeds=2
        )
    checks.integer(config.seeds, low=1, name="seeds")
    timing.check_output(config.output)
    for width in config.widths:
        for density in config.densities:
            eoi.sao.degree(width, density)  # refuses what has no blocks
    console.print(f"{config.seeds} networks a cell, mean ± s.d. over them. {timing.machine()}")
    with jax.enable_x64(True), console.status("") as status:
        rows, pooled = measure(config, status.update)
    most = max(row.wasserstein for row in rows if row.activation == "identity")
    console.print(f"Without an activation every distance is below {most:.0e}; left out below.")
    for statistic, title in (
        ("wasserstein", "Wasserstein-1 distance between measured and predicted singular values"),
        ("moment_error", "Relative error of the mean fourth power, against the prediction"),
        ("freeness_error", "The same against weights free of the slopes that were measured"),
    ):
        for kind in _kinds(rows):
            console.print(_table(rows, config, kind, statistic, f"{title}: {kind}"))
    path = Path(config.output)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(Row._fields)
    writer.writerows(
        [f"{value:.6g}" if isinstance(value, float) else value for value in row] for row in rows
    )
    atomic_write_text(path.with_suffix(".csv"), text.getvalue())
    names = ["", "_convolutions", "_laws"]
    figures = (
        _plot(rows, config, _MATRICES),
        _plot(rows, config, _CONVOLUTIONS),
        _plot_laws(pooled, config),
    )
    for name, figure in zip(names, figures, strict=True):
        atomic_savefig(path.with_name(f"{path.name}{name}.png"), figure, dpi=110)
    console.print(f"Saved: {path}.csv, {', '.join(f'{path}{name}.png' for name in names)}")
    return rows


def _cell(rows: Sequence[Row], statistic: str, **kind: Any) -> tuple[float, float]:
    """Return the mean of one statistic over the networks of a kind, and its deviation."""
    values = [
        getattr(row, statistic)
        for row in rows
        if all(getattr(row, name) == value for name, value in kind.items())
    ]
    if not values:
        return math.nan, math.nan
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _kinds(rows: Sequence[Row]) -> list[str]:
    """Return the kinds of sparse weights that were measured."""
    found = {row.weights for row in rows}
    return [kind for kind in _KINDS[1:] if kind in found]


def _table(rows: Sequence[Row], config: Config, kind: str, statistic: str, title: str) -> Table:
    """Tabulate one statistic: Haar weights beside one kind of sparse ones."""
    weights = [("Haar", 1.0), *((kind, density) for density in config.densities)]
    lines = []
    for case, width, depth in itertools.product(_CURVED, config.widths, sorted(config.depths)):
        network = {**case._asdict(), "width": width, "depth": depth}
        cells = [_cell(rows, statistic, **network, weights=k, density=d) for k, d in weights]
        texts = ("" if math.isnan(mean) else f"{mean:.2g} ± {dev:.1g}" for mean, dev in cells)
        lines.append([str(case), str(width), str(depth), *texts])
    heads = ["network", "width", "depth", *(_name_of(*kind) for kind in weights)]
    return timing.tabulate(title, heads, lines)


def _plot(rows: Sequence[Row], config: Config, kinds: Sequence[str]) -> Figure:
    """Plot distance against the non-zeros of a row: a column for each case, a row for each depth.

    Full symbols are sparse, hollow ones dense Haar weights, whose rows have ``width`` of them.
    """
    depths, colors = sorted(config.depths), ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
    figure = Figure(figsize=(13, 2.6 * len(depths) + 1), layout="constrained")
    panels = figure.subplots(len(depths), len(_CURVED), sharex=True, sharey="row", squeeze=False)
    for line, depth in zip(panels, depths, strict=True):
        for axes, case in zip(line, _CURVED, strict=True):
            for width, color in zip(config.widths, colors, strict=False):
                of = {**case._asdict(), "width": width, "depth": depth, "statistic": "wasserstein"}
                for kind, look in zip(kinds, ("o-", "^--", "x:"), strict=False):
                    densities = [d for d in config.densities if _exists(kind, width, d)]
                    if not densities:
                        continue
                    cells = [_cell(rows, **of, weights=kind, density=d) for d in densities]
                    x = [d * width for d in densities]
                    label = f"{kind}, width {width}"
                    axes.errorbar(x, *zip(*cells, strict=True), fmt=look, color=color, label=label)
                mean, deviation = _cell(rows, **of, weights="Haar", density=1.0)
                label = f"Haar, width {width}"
                axes.errorbar([width], mean, deviation, fmt="s", mfc="w", color=color, label=label)
            axes.set(xscale="log", yscale="log")
            axes.set_xticks(powers := 2 ** np.arange(1, 10, 2), map(str, powers))
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.set_title(f"{case}, depth {depth}", fontsize=10)
        line[0].set_ylabel("Wasserstein-1 distance")
    for axes in panels[-1]:
        axes.set_xlabel("mean non-zeros of a row")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _plot_laws(pooled: dict[tuple[Case, str, float], Any], config: Config) -> Figure:
    """Draw the histograms of the widest, deepest networks and the predicted density over them."""
    depth, width = max(config.depths), max(config.widths)
    shown = [("Haar", 1.0), ("EOI", max(config.densities)), ("EOI", min(config.densities))]
    figure = Figure(figsize=(13, 7), layout="constrained")
    panels = figure.subplots(len(shown), len(_CURVED), sharex="col")
    for column, case in enumerate(_CURVED):
        law = predicted(case, depth)
        top = 1.1 * max(float(law.quantile(0.999)), 1.0)
        bins = np.linspace(0, top, 60)
        for row, (kind, density) in enumerate(shown):
            axes = panels[row, column]
            values = pooled[case, kind, density]
            share = np.full(values.size, 1 / values.size)
            axes.hist(values.clip(max=top), bins, weights=share, color="#56B4E9", label="measured")
            # The mass of each bin, atoms included: what a histogram of infinite width would show.
            mass = np.diff(law.cdf(bins), prepend=0.0)
            mass[1] += mass[0]  # an atom at 0 belongs to the first bin
            middles = (bins[1:] + bins[:-1]) / 2
            axes.plot(middles, mass[1:], color="#D55E00", label="predicted for Haar weights")
            axes.set_title(f"{case}: {_name_of(kind, density)}", fontsize=10)
            axes.set_yscale("symlog", linthresh=1e-2)
            axes.grid(alpha=0.3)
        panels[-1, column].set_xlabel("singular value (larger: last bin)")
    for axes in panels[:, 0]:
        axes.set_ylabel("share of a bin")
    panels[0, 0].legend(fontsize=9)
    figure.suptitle(f"Jacobians of {depth} layers of width {width}, {config.seeds} networks")
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    prog = "python -m experiments universality"
    config = tyro.cli(Config, args=arguments, description=__doc__, prog=prog)
    try:
        run(config)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
