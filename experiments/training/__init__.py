"""Training: starts and masks of a seed, the jitted step, its loops, metrics and checkpoints."""
