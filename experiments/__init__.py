"""The experiments of the paper: ``python -m experiments`` lists them, in a checkout."""
