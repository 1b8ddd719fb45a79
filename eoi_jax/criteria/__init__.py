r"""Criteria: how much each weight of a parameter tree matters before any training.

A tree of **scores** has the structure of the parameters that it judges. For a kernel it holds an
array of the kernel's shape, and **larger means keep**; every other leaf (biases, norms, statistics)
has the scalar ``inf``: it stays dense. Scores become a mask by :func:`eoi_jax.masks.top_k`, or by
:func:`prune`, which scores again as the network gets sparser.

A network is a function and a pytree, whatever wrote it. Only kernels are differentiated; all other
leaves reach the function as they are, so a Linen dictionary with its batch statistics is scored
whole. Scores are float32 or wider. They may be computed inside :func:`jax.jit`, once compiled for
many batches; where they can be read, scores that are not finite are an error.
"""

from eoi_jax.criteria.iterative import prune
from eoi_jax.criteria.scores import grasp, invert, magnitude, random, snip
from eoi_jax.criteria.synflow import synflow

__all__ = ["grasp", "invert", "magnitude", "prune", "random", "snip", "synflow"]
