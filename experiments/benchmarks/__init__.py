"""Benchmarks: every number is a median, taken in turns within one process."""
