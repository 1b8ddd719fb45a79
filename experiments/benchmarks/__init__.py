"""Benchmarks: every time is a median; compared programs run in turns within one process."""
