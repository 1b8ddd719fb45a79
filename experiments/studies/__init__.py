"""Measurements without training: spectra, counts, times, kernels, theory."""
