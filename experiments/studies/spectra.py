"""Singular values at initialization through the depth of a network, from four starts.

The picture shows the singular values of the Jacobian of the first k layers of a 1000-layer tanh
MLP, for every twentieth k, together with mean-field theory.

Hardware: two CPU cores. Time: about a minute.
Expected: the dense orthogonal start follows theory at every depth. The largest values of EOI stay
near those of the dense start while its others fall faster. The values of the masked starts vanish.

Example:
    python -m experiments spectra --quick
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.console import Console

import eoi_jax as eoi
from eoi_jax import mean_field
from eoi_jax._internal import checks
from eoi_jax._internal.files import atomic_savefig
from eoi_jax.typing import Array
from experiments.benchmarks import timing

__all__ = ["Config", "against_depth", "main", "plot", "run"]

# The critical point of tanh at which the published 1000-layer networks start.
_SIGMA_W, _SIGMA_B = 1.0247, 0.00448
_LOOKS = {
    "dense orthogonal": ("#000000", ":"),
    "EOI": ("#0072B2", "-"),
    "masked orthogonal": ("#D55E00", "--"),
    "masked Gaussian": ("#CC79A7", "--"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the picture."""

    layers: int = 1000
    """Number of layers of the network, at least 50."""
    width: int = 128
    """Units of each layer."""
    density: float = 0.125
    """Fraction of weights that the sparse starts keep."""
    seed: int = 0
    """Seed of the starts."""
    output: str = "spectra_depth.png"
    """Where the picture is saved."""
    quick: bool = False
    """100 layers."""


def against_depth(config: Config) -> dict[str, Any]:
    """Return the singular values of the Jacobian of the first layers of each start.

    Returns:
        ``(depths, samples, width)`` by the name of the start.
    """
    key = jax.random.key(config.seed)
    shape = (config.layers, config.width, config.width)
    params = {"kernel": jnp.zeros(shape)}
    draw = functools.partial(eoi.networks.redraw, key, params, layout=_stacked)
    orthogonal = draw(jax.nn.initializers.orthogonal(_SIGMA_W))
    gaussian = draw(
        jax.nn.initializers.normal((_SIGMA_W**2 / config.density / config.width) ** 0.5)
    )
    mask = eoi.masks.random(
        jax.random.key(3), params, {"kernel": np.full(config.layers, config.density)}
    )
    starts = {
        "dense orthogonal": orthogonal,
        "EOI": eoi.exact_orthogonal(
            key, params, config.density, scale=_SIGMA_W, layout=_stacked
        ).params,
        "masked orthogonal": eoi.masked(orthogonal, mask).params,
        "masked Gaussian": eoi.masked(gaussian, mask).params,
    }
    x = jax.random.normal(jax.random.key(1), (4, config.width)) * 0.16

    @jax.jit
    def values(kernels: Array, biases: Array) -> Array:
        def step(layer: tuple[Array, Array], h: Array) -> Array:
            kernel, bias = layer
            return kernel.T @ jnp.tanh(h) + bias

        return eoi.spectrum.layerwise(step, (kernels, biases), x, every=config.layers // 50)

    biases = _SIGMA_B * jax.random.normal(jax.random.key(2), shape[:2])
    return {name: np.asarray(values(start["kernel"], biases)) for name, start in starts.items()}


def _stacked(path: Any, leaf: Any) -> eoi.typing.Layout:
    del path, leaf
    return eoi.typing.Layout(batch_axes=1)


def run(config: Config, console: Console | None = None) -> None:
    """Measure, and save the picture."""
    console = console or Console()
    if config.quick:
        config = dataclasses.replace(config, layers=100)
    timing.check_output(config.output)
    checks.integer(config.layers, low=50, name="layers")
    console.print(timing.machine())
    with console.status(f"{config.layers} layers"):
        depth = against_depth(config)
    atomic_savefig(Path(config.output), plot(depth, config), dpi=120)
    console.print(f"Saved: {config.output}")


def plot(found: dict[str, Any], config: Config) -> Figure:
    """Plot median and spread of the singular values against the number of layers, and theory.

    Args:
        found: What :func:`against_depth` returns.
        config: The settings.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    every = config.layers // 50
    fractions = np.array([0.1, 0.5, 0.9])
    for name, values in found.items():
        color, style = _LOOKS[name]
        layers = np.minimum(every * (np.arange(len(values)) + 1), config.layers)
        pooled = values.reshape(len(values), -1).clip(1e-12)  # zeros have no logarithm
        low, middle, high = np.quantile(pooled, fractions, axis=1)
        axes.plot(layers, middle, style, color=color, label=name)
        axes.fill_between(layers, low, high, color=color, alpha=0.15)
    depths = np.unique(np.geomspace(1, config.layers, 25).astype(int))
    for fraction, of in zip(fractions, _quantiles_of_theory(depths, fractions).T, strict=True):
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
    return figure


def _quantiles_of_theory(depths: Any, fractions: Any) -> Any:
    """Return the quantiles ``(depths, fractions)`` of singular values by mean-field theory."""
    q = mean_field.fixed_point("tanh", _SIGMA_W, _SIGMA_B)
    laws = (mean_field.predicted_singular_values("tanh", int(d), _SIGMA_W, q) for d in depths)
    return np.stack([law.quantile(fractions) for law in laws])


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    prog = "python -m experiments spectra"
    config = tyro.cli(Config, args=arguments, description=__doc__, prog=prog)
    try:
        run(config)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
