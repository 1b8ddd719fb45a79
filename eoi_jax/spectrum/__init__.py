"""Spectra of Jacobians and of kernels: how far a network, a layer or a matrix is from an isometry.

Use ``singular_values`` for whole spectra, ``extreme_singular_values`` and ``spectral_density``
where a Jacobian is too large to form, ``layerwise`` and ``monitor`` for spectra along depth and
training, and ``kernel_singular_values`` for the kernels, without an input.

A function is dynamically isometric at an input when all singular values of its input–output
Jacobian there are 1. A function ``fn`` maps *one* example (no batch axis) to one array, and ``x``
has a leading batch axis; Jacobians are those of the flattened output with respect to the flattened
example.

Matrix products run at the highest precision, on every platform: the bfloat16 and TF32 defaults of
accelerators have errors of 1e-3, where float32 allows 1e-6.

``fn`` is traced again at each call. To compile it once for many batches, compile the caller:
``jax.jit(lambda x: spectrum.singular_values(fn, x))``.
"""

from eoi_jax.spectrum.jacobian import (
    SpectrumSummary,
    jacobian,
    orthogonality_error,
    singular_values,
    summarize,
)
from eoi_jax.spectrum.kernels import (
    conv_singular_values,
    kernel_orthogonality_errors,
    kernel_singular_values,
)
from eoi_jax.spectrum.krylov import (
    ExtremeSingularValues,
    SpectralDensity,
    extreme_singular_values,
    spectral_density,
)
from eoi_jax.spectrum.layerwise import layerwise, monitor

__all__ = [
    "ExtremeSingularValues",
    "SpectralDensity",
    "SpectrumSummary",
    "conv_singular_values",
    "extreme_singular_values",
    "jacobian",
    "kernel_orthogonality_errors",
    "kernel_singular_values",
    "layerwise",
    "monitor",
    "orthogonality_error",
    "singular_values",
    "spectral_density",
    "summarize",
]
