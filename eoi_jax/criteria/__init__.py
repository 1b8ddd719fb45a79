r"""Criteria: scores for the importance of each weight before training, to prune by.

A tree of **scores** has the structure of the parameters. For each kernel it has an array of the
kernel's shape, and **weights with larger scores are kept**. Every other leaf (biases, norms,
statistics) has the scalar ``inf`` and stays dense. :func:`eoi_jax.masks.top_k` turns scores into a
mask. :func:`prune` does the same in steps, and scores again as the network gets sparser.

A network is a function and a pytree, from any framework. Only kernels are differentiated; all other
leaves are passed to the function unchanged, so a whole Linen dictionary with batch statistics can
be scored. Scores are float32 or wider. They may be computed inside :func:`jax.jit`, compiled once
for many batches. Outside of :func:`jax.jit`, scores that are not finite raise an error.
"""

from eoi_jax.criteria.iterative import prune
from eoi_jax.criteria.scores import grasp, invert, magnitude, random, snip
from eoi_jax.criteria.synflow import synflow

__all__ = ["grasp", "invert", "magnitude", "prune", "random", "snip", "synflow"]
