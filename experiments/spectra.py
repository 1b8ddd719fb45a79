"""Singular values at initialization: through the depth of a net, and against its density.

The first picture follows the Jacobian of the first k layers of a 1000-layer tanh MLP, for every
tenth k, from four starts. The second shows all singular values of the input-output Jacobian of
MLP-7 against the density, for masked dense weights (Base), approximated isometry (AI) and EOI, on
ERK masks, with tanh and without an activation.

Hardware: two CPU cores. Time: about two minutes.
Expected: EOI's values stay near those of the dense start at every depth; without an activation
they are all 1 at every density, where Base's vanish and AI's fall below a density of 0.2.

Example:
    python -m experiments spectra --quick
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from eoi_jax.typing import Array, Params
from experiments import data, models, timing

__all__ = ["Config", "against_density", "against_depth", "example_images", "main", "run"]

# The critical point of tanh at which the published 1000-layer networks start.
SIGMA_W, SIGMA_B = 1.0247, 0.00448
LOOKS = {
    "dense orthogonal": ("#000000", ":"),
    "EOI": ("#0072B2", "-"),
    "AI": ("#009E73", "-."),
    "masked orthogonal": ("#D55E00", "--"),
    "masked Gaussian": ("#CC79A7", "--"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the pictures."""

    data_dir: str | None = None
    """Folder of tensorflow-datasets with MNIST; default: standard Gaussian inputs."""
    layers: int = 1000
    """Layers of the deep network, at least 50."""
    width: int = 128
    """Its width."""
    density: float = 0.125
    """Its density."""
    densities: tuple[float, ...] = (0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 0.9)
    """Densities of MLP-7."""
    samples: int = 128
    """Images for the spectrum of MLP-7."""
    seed: int = 0
    """Seed of everything random."""
    output: str = "spectra"
    """Where the pictures (_depth.png, _density.png) are saved, without a suffix."""
    quick: bool = False
    """100 layers, three densities, 16 images."""


def against_depth(config: Config) -> dict[str, Any]:
    """Return the singular values ``(depths, samples, width)`` of the first layers of each start."""
    key = jax.random.key(config.seed)
    shape = (config.layers, config.width, config.width)
    params = {"kernel": jnp.zeros(shape)}
    draw = functools.partial(eoi.networks.redraw, key, params, layout=_stacked)
    orthogonal = draw(jax.nn.initializers.orthogonal(SIGMA_W))
    gaussian = draw(jax.nn.initializers.normal((SIGMA_W**2 / config.density / config.width) ** 0.5))
    mask = eoi.masks.random(
        jax.random.key(3), params, {"kernel": np.full(config.layers, config.density)}
    )
    starts = {
        "dense orthogonal": orthogonal,
        "EOI": eoi.exact_orthogonal(
            key, params, config.density, scale=SIGMA_W, layout=_stacked
        ).params,
        "masked orthogonal": eoi.masked(orthogonal, mask).params,
        "masked Gaussian": eoi.masked(gaussian, mask).params,
    }
    x = jax.random.normal(jax.random.key(1), (4, config.width)) * 0.16

    @jax.jit
    def values(kernels: Array, biases: Array) -> Array:
        def step(own: tuple[Array, Array], h: Array) -> Array:
            return own[0].T @ jnp.tanh(h) + own[1]

        return eoi.spectrum.layerwise(step, (kernels, biases), x, every=config.layers // 50)

    biases = SIGMA_B * jax.random.normal(jax.random.key(2), shape[:2])
    return {name: np.asarray(values(own["kernel"], biases)) for name, own in starts.items()}


def _stacked(path: Any, leaf: Any) -> eoi.typing.Layout:
    del path, leaf
    return eoi.typing.Layout(batch_axes=1)


def against_density(
    config: Config, images: Array, tick: Callable[[str], None] = lambda text: None
) -> dict[tuple[str, str, float], Any]:
    """Return the singular values of MLP-7 by activation, method and density."""
    key = jax.random.key(config.seed)
    found: dict[tuple[str, str, float], Any] = {}
    shapes = jax.eval_shape(models.create("mlp7").init, key, images[:1])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    dense = eoi.networks.redraw(key, zeros, jax.nn.initializers.orthogonal(), layout=models.layout)

    @functools.partial(jax.jit, static_argnames="activation")
    def values(params: Params, activation: str) -> Array:
        model: Any = models.create("mlp7", activation=activation)
        return eoi.spectrum.singular_values(lambda x: model.apply(params, x[None])[0], images)

    for density in config.densities:
        tick(f"MLP-7 at density {density:g}")
        densities = eoi.budgets.erdos_renyi_kernel(zeros, density, layout=models.layout)
        mask = eoi.masks.random(jax.random.fold_in(key, 1), zeros, densities)
        starts = {
            "EOI": eoi.exact_orthogonal(
                key, zeros, densities, infeasible="redistribute", layout=models.layout
            ),
            "AI": eoi.approximate_isometry(
                dense, mask, num_steps=100 if config.quick else 10_000, layout=models.layout
            ),
            "masked orthogonal": eoi.masked(dense, mask),
        }
        for activation in ("identity", "tanh"):
            for name, start in starts.items():
                own = values(start.params, activation=activation)
                found[activation, name, density] = np.asarray(own)
    return found


def run(config: Config, console: Console | None = None) -> None:
    """Measure, print the table of MLP-7 and save the pictures."""
    console = console or Console(width=None if Console().is_terminal else 150)
    if config.quick:
        config = dataclasses.replace(config, layers=100, densities=(0.05, 0.2, 0.5), samples=16)
    timing.check(1, config.output)
    if config.layers < 50:
        raise ValueError(f"layers={config.layers} is outside [50, ...). Give a larger number.")
    images, source = example_images(config.samples, config.data_dir, config.seed)
    console.print(timing.machine())
    with console.status("") as status:
        status.update(f"{config.layers} layers")
        depth = against_depth(config)
        density = against_density(config, images, status.update)
    console.print(table_of(density, config, source))
    stem = Path(config.output)
    plot_depth(depth, config, stem.with_name(f"{stem.name}_depth.png"))
    plot_density(density, config, source, stem.with_name(f"{stem.name}_density.png"))
    console.print(f"Saved: {stem}_depth.png, {stem}_density.png")


def example_images(samples: int, data_dir: str | None, seed: int = 0) -> tuple[Array, str]:
    """Return the first images of MNIST, or Gaussian ones of its shape, and what they are."""
    if data_dir is None:
        shape = (samples, *models.input_shape("mlp7"))
        return jax.random.normal(jax.random.key(seed), shape), "Gaussian inputs"
    mnist = data.load("mnist", data_dir)
    return mnist.normalize(mnist.train.images[:samples]), "MNIST"


def table_of(found: dict[tuple[str, str, float], Any], config: Config, source: str) -> Table:
    """Build the table of mean, least and largest singular values of MLP-7."""
    table = Table(
        title=f"Singular values of MLP-7 on {config.samples} images ({source}): mean [min, max]",
        box=SIMPLE,
    )
    methods = ("masked orthogonal", "AI", "EOI")
    for head in ("activation", "density", *methods):
        table.add_column(head, justify="right", no_wrap=True)
    for activation in ("identity", "tanh"):
        for density in config.densities:
            cells = []
            for method in methods:
                own = found[activation, method, density]
                cells.append(f"{own.mean():.3g} [{own.min():.2g}, {own.max():.3g}]")
            table.add_row(activation, f"{density:g}", *cells)
    return table


def plot_depth(found: dict[str, Any], config: Config, path: Path) -> None:
    """Plot median and spread of the singular values against the number of layers, and theory."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    every = config.layers // 50
    fractions = np.array([0.1, 0.5, 0.9])
    for name, values in found.items():
        color, style = LOOKS[name]
        layers = np.minimum(every * (np.arange(len(values)) + 1), config.layers)
        pooled = values.reshape(len(values), -1).clip(1e-12)  # zeros have no logarithm
        low, middle, high = np.quantile(pooled, fractions, axis=1)
        axes.plot(layers, middle, style, color=color, label=name)
        axes.fill_between(layers, low, high, color=color, alpha=0.15)
    depths = np.unique(np.geomspace(1, config.layers, 25).astype(int))
    for fraction, of in zip(fractions, quantiles_of_theory(depths, fractions).T, strict=True):
        label = "theory, dense orthogonal" if fraction == 0.5 else None
        axes.plot(depths, of, color="#E69F00", linestyle=(0, (1, 1)), label=label)
    axes.set(
        yscale="log",
        ylim=(1e-6, 1e3),
        xlabel="layers",
        ylabel="singular value: median, and 10 % to 90 % (shaded)",
        title=f"Jacobian of the first layers, tanh, width {config.width}, "
        f"density {config.density:g} (dense: 1)",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def quantiles_of_theory(depths: Any, fractions: Any) -> Any:
    """Return the quantiles ``(depths, fractions)`` of singular values by mean-field theory."""
    q = mean_field.fixed_point("tanh", SIGMA_W, SIGMA_B)
    laws = (mean_field.predicted_singular_values("tanh", int(d), SIGMA_W, q) for d in depths)
    return np.stack([law.quantile(fractions) for law in laws])


def plot_density(
    found: dict[tuple[str, str, float], Any], config: Config, source: str, path: Path
) -> None:
    """Plot mean and range of the singular values against the density, for each start."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
    for axes, activation in zip(panels, ("identity", "tanh"), strict=True):
        for method in ("EOI", "AI", "masked orthogonal"):
            color, style = LOOKS[method]
            own = [found[activation, method, d].ravel().clip(1e-12) for d in config.densities]
            means = [values.mean() for values in own]
            axes.plot(config.densities, means, style, color=color, marker="o", label=method)
            low, high = [values.min() for values in own], [values.max() for values in own]
            axes.fill_between(config.densities, low, high, color=color, alpha=0.15)
        name = "no activation" if activation == "identity" else activation
        axes.set(yscale="log", ylim=(1e-6, 10), xlabel="density", title=f"MLP-7, {name}, {source}")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("singular value: mean, and range (shaded)")
    panels[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    config = tyro.cli(Config, args=arguments, description=__doc__)
    try:
        run(config)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
