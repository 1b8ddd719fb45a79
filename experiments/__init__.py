"""Experiments with eoi_jax: a quickstart, benchmarks, and what they share."""
