"""The paper's experiments with eoi_jax, run from a checkout: ``python -m experiments`` lists them."""
