"""Runs that measure without training: spectra at the start, counts of weights, times, kernels."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import eoi_jax as eoi
from eoi_jax.typing import Array
from experiments import data, models
from experiments.benchmarks import timing
from experiments.config import Counts, Kernel, Spectrum, Start, Times
from experiments.runs import Runtime, write_json
from experiments.tools.plan import plan
from experiments.training import network, starts

__all__ = ["counts", "kernel", "singular_values", "spectrum", "spectrum_of", "times"]

SAMPLES = 128  # the first batch of training images, as the paper measures it
_SEQUENCES, _TOKENS = 4, 8  # of random tokens, at which transformers are measured


def spectrum(config: Spectrum, folder: Path, runtime: Runtime) -> None:
    """Measure the singular values of the input-output Jacobian at the start, for each seed."""
    shape = network.image_shape(config)
    dataset = data.load(config.data, runtime.data_dir, image_shape=shape)
    rows = []
    for seed in config.seeds:
        start = starts.make(config, seed, dataset, cache=Path(runtime.runs) / "cache")
        found = spectrum_of(config, dataset, start)
        if None in found.values():
            raise FloatingPointError(
                f"A Jacobian is not finite for seed {seed}. Lower scale={config.scale}."
            )
        rows.append({**starts.record(seed, start), **found})
    write_json(folder / "results.json", rows)


def spectrum_of(
    config: Start, dataset: data.Dataset, start: starts.Start
) -> dict[str, float | None]:
    """Summarize the singular values of a start's Jacobian, on the first training images.

    Of a transformer those of its blocks alone, from all tokens to all tokens, at four sequences of
    eight tokens with normal entries of variance 1.

    Args:
        config: That of the start.
        dataset: Its first 128 training images are taken.
        start: That of one seed.

    Returns:
        ``spectrum_mean``, ``_min``, ``_max`` and ``_std``; None where one is not finite.
    """
    model = network.build(config, dataset.num_classes)
    if models.SPECS[config.model].attention:
        shape = (_SEQUENCES, _TOKENS, model.width)
        tokens = jax.random.normal(jax.random.key(0), shape)
        summary = _summary_of_blocks(model, start.variables, tokens)
    else:
        images = dataset.normalize(dataset.train.images[:SAMPLES])
        summary = _summary(model, start.variables, images)
    values = {name: float(getattr(summary, name)) for name in ("mean", "min", "max", "std")}
    return {
        f"spectrum_{name}": value if math.isfinite(value) else None
        for name, value in values.items()
    }


@functools.partial(jax.jit, static_argnames="model")
def singular_values(model: Any, variables: Any, images: Array) -> Array:
    """Measure the singular values of a network's Jacobian at each image.

    Args:
        model: A Linen module from images to logits.
        variables: Its parameters and other collections.
        images: ``(batch, height, width, channels)``, normalized.

    Returns:
        The values, ``(batch, logits)``.
    """

    def logits(image: Array) -> Array:
        return model.apply(variables, image[None])[0]

    return eoi.spectrum.singular_values(logits, images)


@functools.partial(jax.jit, static_argnames="model")
def _summary(model: Any, variables: Any, images: Array) -> eoi.spectrum.SpectrumSummary:
    return eoi.spectrum.summarize(singular_values(model, variables, images))


@functools.partial(jax.jit, static_argnames="model")
def _summary_of_blocks(model: Any, variables: Any, tokens: Array) -> eoi.spectrum.SpectrumSummary:
    def blocks(flat: Array) -> Array:
        sequence = flat.reshape(tokens.shape[1:])
        return models.transformer.blocks_alone(model, variables, sequence).reshape(-1)

    flat = tokens.reshape(len(tokens), -1)
    return eoi.spectrum.summarize(eoi.spectrum.singular_values(blocks, flat))


def counts(config: Counts, folder: Path, runtime: Runtime) -> None:
    """Count the parameters of a network, those that are pruned, and those that are kept.

    Only shapes are computed.
    """
    del runtime
    model, shape = models.create(config.model, config.num_classes), models.input_shape(config.model)
    pruned = models.where(config.model, attention=config.attention)
    found = plan(model, shape, config.density, config.budget, where=pruned)
    size, kept = (found.total(name, pruned=True) for name in ("size", "nonzeros"))
    images = jax.ShapeDtypeStruct((1, *shape), "float32")
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    row = {"parameters": parameters, "size": size, "kept": kept}
    write_json(folder / "results.json", [{**row, "all_kept": parameters - size + kept}])


def times(config: Times, folder: Path, runtime: Runtime) -> None:
    """Time one matrix of EOI, SAO and QR, and a step of AI, in turns."""
    del runtime
    from experiments.benchmarks.methods import seconds_of  # imports matplotlib: not for training

    found = seconds_of(config.size, config.densities, config.repeats)
    machine = timing.machine()
    rows = [
        {"density": density, "method": method, "seconds": seconds, "machine": machine}
        for density, by_method in found.items()
        for method, seconds in by_method.items()
        if math.isfinite(seconds)  # what a method cannot do has no time
    ]
    write_json(folder / "results.json", rows)


def kernel(config: Kernel, folder: Path, runtime: Runtime) -> None:
    """Draw a convolution's kernel and mask, and count both at each tap."""
    del runtime
    weights, mask = draw_kernel(config)
    rows = []
    for tap in np.ndindex(*weights.shape[:2]):
        nonzeros, unmasked = (int(np.count_nonzero(array[tap])) for array in (weights, mask))
        rows.append({"tap": list(tap), "nonzeros": nonzeros, "unmasked": unmasked})
    write_json(folder / "results.json", rows)


def draw_kernel(config: Kernel) -> tuple[np.ndarray, np.ndarray]:
    """Return the kernel ``(taps, taps, inputs, outputs)`` of a config, and its mask."""
    shape = (config.taps, config.taps, config.channels, config.channels)
    key = jax.random.key(config.seed)
    weights = eoi.conv(config.density)(key, shape, jnp.float32)
    support = eoi.masks.support({"kernel": weights})
    mask = eoi.masks.fill(jax.random.fold_in(key, 1), support, config.density)["kernel"]
    return np.asarray(weights), np.asarray(mask)
