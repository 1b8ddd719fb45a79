"""Time to measure spectra: all singular values of a small net, the extremes of a very deep one."""

from __future__ import annotations

import dataclasses
import functools
import resource
import time
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

import eoi_jax as eoi
from eoi_jax.typing import Array
from experiments import data, models
from experiments.benchmarks.timing import machine, medians, tabulate

__all__ = ["Spectrum", "bench_spectrum"]


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Measure spectra: one jitted call against a loop, and extremes without a Jacobian."""

    repeats: int = 9
    """Runs of each function; the median is reported."""
    layers: int = 1000
    """Convolutions of the deep network."""
    channels: int = 128
    """Channels of its 8 x 8 features."""
    steps: int = 10
    """Golub-Kahan steps for its extreme singular values."""
    data_dir: str | None = None
    """Folder of tensorflow-datasets with MNIST; default: standard Gaussian images of its shape."""


def bench_spectrum(options: Spectrum, console: Console) -> None:
    """Print the tables of ``spectrum``."""
    console.print(f"Median of {options.repeats} runs. {machine()}")
    _bench_all(options, console)
    _bench_extremes(options, console)


def _bench_all(options: Spectrum, console: Console) -> None:
    """Time all singular values of MLP-7 on 128 images of MNIST."""
    model: Any = models.create("mlp7")
    images, source = _example_images(128, options.data_dir)
    variables = jax.jit(model.init)(jax.random.key(1), images[:1])

    def logits(image: Array) -> Array:
        return model.apply(variables, image[None])[0]

    at_once = jax.jit(functools.partial(eoi.spectrum.singular_values, logits))

    @jax.jit
    def one(image: Array) -> Array:
        jacobian = jax.jacrev(logits)(image).reshape(10, -1)
        return jnp.linalg.svd(jacobian, compute_uv=False)

    def loop() -> list[Array]:
        return [one(image) for image in images]

    seconds = medians({"at once": lambda: at_once(images), "loop": loop}, options.repeats)
    difference = jnp.abs(at_once(images) - jnp.stack(loop())).max()
    row = {
        "spectrum.singular_values, one call (ms)": f"{1e3 * seconds['at once']:.1f}",
        "jitted loop (ms)": f"{1e3 * seconds['loop']:.1f}",
        "ratio": f"{seconds['loop'] / seconds['at once']:.1f}",
        "max |difference|": f"{float(difference):.1e}",
    }
    title = f"All 1280 singular values of MLP-7 on 128 images ({source})"
    console.print(tabulate(title, list(row), [row.values()]))


def _example_images(samples: int, data_dir: str | None) -> tuple[Array, str]:
    """Return the first images of MNIST, or Gaussian ones of its shape, and their name."""
    if data_dir is None:
        shape = (samples, *models.input_shape("mlp7"))
        return jax.random.normal(jax.random.key(0), shape), "Gaussian inputs"
    mnist = data.load("mnist", data_dir)
    return mnist.normalize(mnist.train.images[:samples]), "MNIST"


def _bench_extremes(options: Spectrum, console: Console) -> None:
    """Time the extreme singular values of a deep convolutional network, and tell the memory."""
    layers, channels = options.layers, options.channels
    keys = jax.random.split(jax.random.key(2), layers)
    init = eoi.conv(0.125, scale=1.0247)
    draw = jax.jit(lambda keys: jax.lax.map(lambda k: init(k, (3, 3, channels, channels)), keys))
    kernels = jax.block_until_ready(draw(keys))
    x = jax.random.normal(jax.random.key(3), (1, 8, 8, channels)) * 0.16

    def network(x: Array, kernels: Array) -> Array:
        def layer(h: Array, kernel: Array) -> tuple[Array, None]:
            padded = jnp.pad(jnp.tanh(h)[None], ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap")
            dimensions = ("NHWC", "HWIO", "NHWC")
            out = jax.lax.conv_general_dilated(
                padded, kernel, (1, 1), "VALID", dimension_numbers=dimensions
            )
            return out[0], None

        return jax.lax.scan(layer, x, kernels)[0]

    # The kernels are an argument: as a constant they would be compiled in, and copied.
    measure = jax.jit(
        lambda key, x, kernels: eoi.spectrum.extreme_singular_values(
            key, lambda example: network(example, kernels), x, num_steps=options.steps
        )
    )
    start = time.perf_counter()
    compiled = measure.lower(jax.random.key(4), x, kernels).compile()
    compile_seconds = time.perf_counter() - start
    start = time.perf_counter()
    ends = jax.block_until_ready(compiled(jax.random.key(4), x, kernels))
    seconds = time.perf_counter() - start
    analysis: Any = compiled.memory_analysis()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    size = 64 * channels
    rows = {
        "compile (s)": f"{compile_seconds:.1f}",
        f"{options.steps} steps (s)": f"{seconds:.1f}",
        "one step, a product with J and with its transpose (s)": f"{seconds / options.steps:.2f}",
        "kernels (GiB)": f"{kernels.nbytes / 2**30:.2f}",
        "temporary memory (GiB)": f"{analysis.temp_size_in_bytes / 2**30:.2f}",
        "peak memory of the whole process (GiB)": f"{peak:.2f}",
        "the Jacobian alone would take (GiB)": f"{4 * size**2 / 2**30:.2f}",
        "largest singular value, at least": f"{float(ends.largest[0]):.4f}",
        "within": f"{float(ends.largest_residual[0]):.1e}",
        "smallest singular value, at most": f"{float(ends.smallest[0]):.4f}",
    }
    title = f"Extremes of a {size} x {size} Jacobian: {layers} convolutions, {channels} channels"
    table = tabulate(title, ("", ""), rows.items(), names=2)
    table.show_header = False
    console.print(table)
