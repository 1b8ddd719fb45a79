"""What is measured without training: spectra, counts, times, kernels, theory."""
